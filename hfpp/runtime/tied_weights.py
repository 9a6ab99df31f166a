"""Gradients of tensors that several stages hold: their sum, on every holder, after each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from hfpp.errors import PipelineConfigError
from hfpp.runtime.stage_module import StageBoundary, boundary_of


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter is registered: wrappers such as FSDP2 put another object there."""

    owner: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        parameter = self.owner._parameters[self.name]
        assert parameter is not None
        return parameter


@dataclass(frozen=True, slots=True)
class _Tie:
    places: tuple[_Place, ...]  # this rank's, one per stage
    group: dist.ProcessGroup | None  # None: all holders are on this rank


class TiedGradients:
    """Sums the gradients of tied parameters over the stages that hold them.

    One step's gradients are summed before they are added to what earlier steps accumulated: a sum
    over everything would count the earlier steps once per holder.

    Args:
        stages: this rank's stages, after any wrapping. Every rank must come here: the ranks that
            share a tensor make a process group.
    """

    def __init__(self, stages: Sequence[PipelineStage]) -> None:
        self._ties: list[_Tie] = []
        boundaries = [(stage, boundary_of(stage.submod)) for stage in stages]
        local = {b.stage_index: (stage, b) for stage, b in boundaries if b is not None}
        if not local:
            return
        boundary = next(iter(local.values()))[1]
        ranks = stages[0].stage_index_to_group_rank
        groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        for tied in boundary.tied:
            places = tuple(
                _place_of(local[stage][0].submod, names[0])
                for stage, names in tied.names
                if stage in local
            )
            if not places:
                continue
            holders = tuple(sorted({ranks[stage] for stage in tied.stages}))
            if holders not in groups:
                groups[holders] = _group_of(holders, boundary)
            if _any_trains(places, groups[holders]):
                self._ties.append(_Tie(places, groups[holders]))

    def __bool__(self) -> bool:
        return bool(self._ties)

    @contextmanager
    def around_step(self) -> Iterator[None]:
        """Around one step of the schedule: afterwards every holder has the summed gradient."""
        earlier = [[place.parameter.grad for place in tie.places] for tie in self._ties]
        for tie in self._ties:
            for place in tie.places:
                place.parameter.grad = None
        yield
        for tie, before in zip(self._ties, earlier, strict=True):
            _sum(tie, before)


def _sum(tie: _Tie, earlier: list[Tensor | None]) -> None:
    parameters = [place.parameter for place in tie.places]
    total = torch.zeros_like(_local(parameters[0].detach()))
    for parameter in parameters:
        if parameter.grad is not None:
            total += _local(parameter.grad)
    if tie.group is not None:
        dist.all_reduce(total, group=tie.group)
    for parameter, before in zip(parameters, earlier, strict=True):
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        with torch.no_grad():
            _local(parameter.grad).copy_(total)
            if before is not None:
                _local(parameter.grad).add_(_local(before))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _place_of(module: nn.Module, name: str) -> _Place:
    """The module that registers ``name`` below ``module``, looking through wrappers."""
    owner = module
    *path, own_name = name.split(".")
    for step in path:
        owner = _unwrapped(owner)._modules[step]  # type: ignore[assignment]
    return _Place(_unwrapped(owner), own_name)


def _unwrapped(module: nn.Module) -> nn.Module:
    for wrapper in ("_checkpoint_wrapped_module", "_orig_mod"):
        while wrapper in module._modules:
            module = module._modules[wrapper]  # type: ignore[assignment]
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return _unwrapped(module.module)
    return module


def _group_of(holders: tuple[int, ...], boundary: StageBoundary) -> dist.ProcessGroup | None:
    if len(holders) == 1:
        return None
    if boundary.pp_group is None:
        raise PipelineConfigError(
            "the stages share a tensor (tied weights) but were split without a process group: "
            "split them with split_model_into_stages or pipeline_model."
        )
    members = [dist.get_global_rank(boundary.pp_group, rank) for rank in holders]
    group: dist.ProcessGroup = dist.new_group(members, use_local_synchronization=True)
    return group


def _any_trains(places: tuple[_Place, ...], group: dist.ProcessGroup | None) -> bool:
    """Whether any holder trains the tensor: frozen ones are left out, by agreement."""
    trains = any(place.parameter.requires_grad for place in places)
    if group is None:
        return trains
    device = places[0].parameter.device
    flag = torch.tensor(int(trains), device="cpu" if device.type == "meta" else device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return bool(flag.item())
