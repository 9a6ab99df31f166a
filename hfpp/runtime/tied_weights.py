"""Gradients of tensors that several stages hold: their sum, on every holder, after each step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hfpp.errors import PipelineConfigError
from hfpp.runtime.stage_boundary import Place, boundary_of, places_of

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage


@dataclass(frozen=True, slots=True)
class _Tie:
    names: tuple[tuple[int, tuple[str, ...]], ...]  # by stage, the owner first
    ranks: tuple[int, ...]  # theirs, of the pipeline's group
    places: tuple[Place, ...]  # this rank's, one per stage
    apart: bool  # whether one of this rank's stages has it as several parameters


class TiedGradients:
    """Sums the gradients of tied parameters over the stages that hold them.

    The holders send their gradients to the owner's rank, which adds them up and sends the sum back:
    all copies get the same bits. One step's gradients are summed before they are added to what
    earlier steps accumulated: a sum over everything would count earlier steps once per holder.

    Before every step the holders compare their copies, as equal gradients keep them equal only in
    optimizers that treat them alike: with the same learning rate, weight decay and state.

    Args:
        stages: this rank's stages, after any wrapping. Every rank must come here: holders agree on
            which tensors are trained.

    Raises:
        PipelineConfigError: on every holder, if one trains its copy and another does not.
    """

    def __init__(self, stages: Sequence[PipelineStage]) -> None:
        boundaries = [(stage, boundary_of(stage.submod)) for stage in stages]
        tied = next((b.tied for _, b in boundaries if b is not None), ())
        local = {
            b.stage_index: places_of(stage.submod)
            for stage, b in boundaries
            if b is not None and tied
        }
        rank_of = stages[0].stage_index_to_group_rank
        self._group = stages[0].group
        self._rank = stages[0].group_rank
        self._device = stages[0].device
        self._ties: list[_Tie] = []
        for parameter in tied:
            held = [
                [_found(local[stage], name, stage) for name in names]
                for stage, names in parameter.names
                if stage in local
            ]
            if held:
                ranks = tuple(dict.fromkeys(rank_of[stage] for stage in parameter.stages))
                places = tuple(same[0] for same in held)
                apart = any(p.parameter is not same[0].parameter for same in held for p in same)
                self._ties.append(_Tie(parameter.names, ranks, places, apart))
        self._check(with_contents=False)

    def __bool__(self) -> bool:
        return bool(self._ties)

    @contextmanager
    def around_step(self) -> Iterator[None]:
        """Around one step of the schedule: afterwards every holder has the summed gradient.

        Raises:
            PipelineConfigError: on every holder, if copies of a tensor differ; before the step.
        """
        self._check(with_contents=True)
        ties = [tie for tie in self._ties if tie.places[0].parameter.requires_grad]
        # copies, as gradients in a bucket of DistributedDataParallel are overwritten in place
        earlier = [[_copied(place.parameter.grad) for place in tie.places] for tie in ties]
        for tie in ties:
            for place in tie.places:
                place.parameter.grad = None
        try:
            yield
            totals = [_sum_of_own(tie, self._device) for tie in ties]
            self._sum_over_ranks([tie.ranks for tie in ties], totals)
        except BaseException:
            for tie, before in zip(ties, earlier, strict=True):
                for place, old in zip(tie.places, before, strict=True):
                    place.parameter.grad = old
            raise
        for tie, total, before in zip(ties, totals, earlier, strict=True):
            for place, old in zip(tie.places, before, strict=True):
                _store(place.parameter, total, old)

    def _check(self, *, with_contents: bool) -> None:
        """Compare all copies of every tensor; all holders find the same."""
        mine = [
            torch.stack(
                [_facts(tie, place, with_contents).to(self._device) for place in tie.places]
            )
            for tie in self._ties
        ]
        totals = self._stacked_sums([facts.sum(0) for facts in mine])
        for tie, facts, total in zip(self._ties, mine, totals, strict=True):
            alike = (facts * len(tie.names) == total).all(0).tolist()
            apart, trained = total[:2].tolist()
            if apart or not all(alike):
                raise _differ(tie, alike, apart=apart, trained=trained)

    def _stacked_sums(self, values: list[Tensor]) -> list[Tensor]:
        """The sums of small tensors, one per tie: one message for all ties of the same ranks."""
        together: dict[tuple[int, ...], list[int]] = {}
        for index, tie in enumerate(self._ties):
            together.setdefault(tie.ranks, []).append(index)
        stacks = [torch.stack([values[i] for i in indices]) for indices in together.values()]
        self._sum_over_ranks(list(together), stacks)
        sums = dict(zip(itertools.chain(*together.values()), itertools.chain(*stacks), strict=True))
        return [sums[index] for index in range(len(values))]

    def _sum_over_ranks(self, ranks: list[tuple[int, ...]], values: list[Tensor]) -> None:
        """Make of every value, in place, its sum over its ranks; the same bits on all of them."""
        received: list[list[Tensor]] = []
        ops: list[dist.P2POp] = []
        for holders, value in zip(ranks, values, strict=True):
            others = holders[1:] if self._rank == holders[0] else ()
            received.append([torch.empty_like(value) for _ in others])
            ops += [self._op(dist.irecv, t, r) for t, r in zip(received[-1], others, strict=True)]
            if self._rank in holders[1:]:
                ops.append(self._op(dist.isend, value, holders[0]))
        _run(ops)
        ops = []
        for holders, value, parts in zip(ranks, values, received, strict=True):
            for part in parts:
                value += part
            if self._rank == holders[0]:
                ops += [self._op(dist.isend, value, rank) for rank in holders[1:]]
            else:
                ops.append(self._op(dist.irecv, value, holders[0]))
        _run(ops)

    def _op(self, kind: object, tensor: Tensor, rank: int) -> dist.P2POp:
        group = self._group or dist.group.WORLD
        return dist.P2POp(kind, tensor, dist.get_global_rank(group, rank), group)  # type: ignore[arg-type]


def _found(places: dict[str, Place], name: str, stage: int) -> Place:
    if name not in places:
        raise PipelineConfigError(
            f"{name}, a tensor that several stages hold, is not on stage {stage} any more: let "
            f"parallelize_fn keep the parameters' names, or untie the tensor before the split."
        )
    return places[name]


def _run(ops: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(ops) if ops else ():
        work.wait()


def _facts(tie: _Tie, place: Place, with_contents: bool) -> Tensor:
    """What copies have in common: int64 [4], or [5] with the contents.

    Whether a stage has it as several parameters; whether it is trained; elements and bytes on this
    rank; a number of the tensor's bits.
    """
    local = _local(place.parameter.detach())
    trained = place.parameter.requires_grad
    layout = torch.tensor([int(tie.apart), int(trained), local.numel(), local.nbytes])
    if not with_contents:
        return layout
    return torch.cat([layout.to(local.device), _number_of(local)])


def _number_of(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits as eight-byte words, int64 [1]; widening smaller ones is slow."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()  # words must be aligned
    words, rest = flat[: flat.numel() // 8 * 8], flat[flat.numel() // 8 * 8 :]
    # the sum wraps around, on every rank alike, and does not depend on the order of adding
    return (words.view(torch.int64).sum() + rest.sum(dtype=torch.int64)).reshape(1)


def _differ(tie: _Tie, alike: list[bool], *, apart: int, trained: int) -> PipelineConfigError:
    """The error for copies whose ``_facts`` are not all ``alike``."""
    copies = ", ".join(f"{' = '.join(names)} of stage {stage}" for stage, names in tie.names)
    if apart:
        problem = (
            "what is one tensor on a stage became several: shard the modules of these names as one "
            "group, fully_shard([module, other]), and after to_empty tie them again"
        )
    elif not alike[1]:
        problem = (
            f"only {trained} of {len(tie.names)} are trained (requires_grad), and they would drift "
            f"apart: freeze all of them or none"
        )
    elif not all(alike[2:4]):
        problem = (
            "they are sharded or cast differently: shard them over the same ranks and give them "
            "the same dtype"
        )
    else:
        problem = (
            "their values differ: initialise every rank's model with the same seed, load the same "
            "weights into all of them, and give them the same optimizer settings (learning rate, "
            "weight decay)"
        )
    return PipelineConfigError(
        f"{tie.names[0][1][0]} is one tensor of the model, with a copy on every stage that uses it "
        f"({copies}), but {problem}."
    )


def _sum_of_own(tie: _Tie, device: torch.device) -> Tensor:
    """What this rank's stages add: their gradients, flat, and at the end how many there are."""
    shape = _local(tie.places[0].parameter.detach())
    total = torch.zeros(shape.numel() + 1, dtype=shape.dtype, device=device)
    for place in tie.places:
        gradient = place.parameter.grad
        if gradient is not None:
            total[:-1].view(shape.shape).add_(_local(gradient).to(device))
            total[-1] += 1
    return total


def _copied(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.clone()


@torch.no_grad()
def _store(parameter: nn.Parameter, total: Tensor, earlier: Tensor | None) -> None:
    """The step's sum and what was there before; None where no holder has a gradient."""
    if parameter.grad is None:
        if not bool(total[-1]):
            parameter.grad = earlier
            return
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.is_sparse:
        parameter.grad = parameter.grad.to_dense()
    gradient = _local(parameter.grad)
    gradient.copy_(total[:-1].view(gradient.shape))
    if earlier is not None:
        gradient.add_(_local(earlier))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
