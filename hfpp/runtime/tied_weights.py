"""Gradients of tensors that several stages hold: their sum, on every holder, after each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hfpp.errors import PipelineConfigError
from hfpp.runtime.stage_boundary import Place, boundary_of, place_of

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage


@dataclass(frozen=True, slots=True)
class _Tie:
    name: str  # the owner's
    stages: tuple[int, ...]  # all holders, the owner first
    ranks: tuple[int, ...]  # theirs, of the pipeline's group
    places: tuple[Place, ...]  # this rank's, one per stage


class TiedGradients:
    """Sums the gradients of tied parameters over the stages that hold them.

    The holders send their gradients to the owner's rank, which adds them up and sends the sum back:
    all copies get the same bits. One step's gradients are summed before they are added to what
    earlier steps accumulated: a sum over everything would count earlier steps once per holder.

    Args:
        stages: this rank's stages, after any wrapping. Every rank must come here: holders agree on
            which tensors are trained.

    Raises:
        PipelineConfigError: on every holder, if one trains its copy and another does not.
    """

    def __init__(self, stages: Sequence[PipelineStage]) -> None:
        boundaries = [(stage, boundary_of(stage.submod)) for stage in stages]
        local = {b.stage_index: stage for stage, b in boundaries if b is not None}
        tied = next((b.tied for _, b in boundaries if b is not None), ())
        rank_of = stages[0].stage_index_to_group_rank
        self._group = stages[0].group
        self._rank = stages[0].group_rank
        self._device = stages[0].device
        self._checked = False
        self._ties: list[_Tie] = []
        self._frozen: list[_Tie] = []
        for parameter in tied:
            places = tuple(
                place_of(local[stage].submod, names[0])
                for stage, names in parameter.names
                if stage in local
            )
            if places:
                ranks = tuple(dict.fromkeys(rank_of[stage] for stage in parameter.stages))
                name = parameter.names[0][1][0]
                self._ties.append(_Tie(name, parameter.stages, ranks, places))
        self._set_frozen_aside()

    def __bool__(self) -> bool:
        return bool(self._ties or self._frozen)

    def _set_frozen_aside(self) -> None:
        """Leave out what no holder trains; all holders count the same."""
        mine = [
            torch.tensor([sum(p.parameter.requires_grad for p in tie.places)], device=self._device)
            for tie in self._ties
        ]
        ties = list(zip(self._ties, self._sum_over_ranks(mine), strict=True))
        for tie, trained in ties:
            if 0 < int(trained) < len(tie.stages):
                raise PipelineConfigError(
                    f"{tie.name} is one tensor of the model that stages {list(tie.stages)} hold, "
                    f"but only {int(trained)} of them train it (requires_grad), and the copies "
                    f"would drift apart: freeze it on all of them or on none."
                )
        self._ties = [tie for tie, trained in ties if int(trained)]
        self._frozen = [tie for tie, trained in ties if not int(trained)]

    @contextmanager
    def around_step(self) -> Iterator[None]:
        """Around one step of the schedule: afterwards every holder has the summed gradient."""
        for tie, trained in [(t, False) for t in self._frozen] + [(t, True) for t in self._ties]:
            if any(place.parameter.requires_grad != trained for place in tie.places):
                raise PipelineConfigError(
                    f"{tie.name}, which stages {list(tie.stages)} hold, was "
                    f"{'trained' if trained else 'frozen'} when the pipeline was made and is not "
                    f"any more, so its copies would drift apart: set requires_grad before "
                    f"pipeline_model."
                )
        self._check_copies_once()
        earlier = [[place.parameter.grad for place in tie.places] for tie in self._ties]
        for tie in self._ties:
            for place in tie.places:
                place.parameter.grad = None
        try:
            yield
        except BaseException:
            for tie, before in zip(self._ties, earlier, strict=True):
                for place, old in zip(tie.places, before, strict=True):
                    place.parameter.grad = old
            raise
        totals = self._sum_over_ranks([_fresh_gradient(tie) for tie in self._ties])
        for tie, total, before in zip(self._ties, totals, earlier, strict=True):
            for place, old in zip(tie.places, before, strict=True):
                _store(place.parameter, total, old)

    def _check_copies_once(self) -> None:
        """Before the first step, when weights are loaded: all copies hold the same bits."""
        if self._checked:
            return
        self._checked = True
        mine = [_checksum(tie.places[0].parameter) for tie in self._ties]
        sums = [value * len(tie.places) for tie, value in zip(self._ties, mine, strict=True)]
        for tie, value, total in zip(self._ties, mine, self._sum_over_ranks(sums), strict=True):
            alike = {int(_checksum(place.parameter)) for place in tie.places} == {int(value)}
            if not alike or not torch.equal(total, value * len(tie.stages)):
                raise PipelineConfigError(
                    f"{tie.name} is one tensor of the model, but its copies on stages "
                    f"{list(tie.stages)} differ: initialise every rank's model with the same seed, "
                    f"or load the same weights into all of them."
                )

    def _sum_over_ranks(self, values: list[Tensor]) -> list[Tensor]:
        """The sums of ``values``, one per tie, over each tie's ranks."""
        received: list[list[Tensor]] = []
        ops: list[dist.P2POp] = []
        for tie, value in zip(self._ties, values, strict=True):
            others = tie.ranks[1:] if self._rank == tie.ranks[0] else ()
            received.append([torch.empty_like(value) for _ in others])
            ops += [self._op(dist.irecv, t, r) for t, r in zip(received[-1], others, strict=True)]
            if self._rank in tie.ranks[1:]:
                ops.append(self._op(dist.isend, value, tie.ranks[0]))
        _run(ops)
        ops = []
        for tie, value, parts in zip(self._ties, values, received, strict=True):
            for part in parts:
                value += part
            if self._rank == tie.ranks[0]:
                ops += [self._op(dist.isend, value, rank) for rank in tie.ranks[1:]]
            else:
                ops.append(self._op(dist.irecv, value, tie.ranks[0]))
        _run(ops)
        return values

    def _op(self, kind: object, tensor: Tensor, rank: int) -> dist.P2POp:
        group = self._group or dist.group.WORLD
        return dist.P2POp(kind, tensor, dist.get_global_rank(group, rank), group)  # type: ignore[arg-type]


def _run(ops: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(ops) if ops else ():
        work.wait()


def _checksum(parameter: nn.Parameter) -> Tensor:
    """A number of the tensor's bits, int64 [1], that does not depend on the order of adding."""
    values = _local(parameter.detach()).contiguous()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.view(integers[values.element_size()]).sum(dtype=torch.int64).reshape(1)


def _fresh_gradient(tie: _Tie) -> Tensor:
    parameters = [place.parameter for place in tie.places]
    total = torch.zeros_like(_local(parameters[0].detach()), memory_format=torch.contiguous_format)
    for parameter in parameters:
        if parameter.grad is not None:
            total += _local(parameter.grad)
    return total


@torch.no_grad()
def _store(parameter: nn.Parameter, total: Tensor, earlier: Tensor | None) -> None:
    if not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    gradient = _local(parameter.grad)
    gradient.copy_(total)
    if earlier is not None:
        gradient.add_(_local(earlier))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
