"""Every way to lay a job out that can run at all, and the least time that each can take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Literal

from hfpp.errors import PipelineConfigError
from hfpp.plan.estimates.workload import DTYPE_BYTES
from hfpp.plan.pipeline_plan import RECOMPUTE, ParallelSizes, Recompute
from hfpp.plan.placement import stage_ids_by_rank
from hfpp.plan.schedules import (
    SCHEDULES,
    ScheduleSpec,
    check_microbatches,
    find_schedule,
    least_activation_limit,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hfpp.plan.costs import ModelCosts
    from hfpp.plan.search.replicas import Sharding

__all__ = ["Candidate", "PlanRequest", "candidates", "ranks_of"]

MOST_STAGES_PER_RANK = 8
"""More virtual stages save ever less of the bubble and send ever more."""
MOST_ACTIONS = 1 << 22
"""Of a table that is simulated: its memory and time stay small."""
LIMITS = 4
"""Steps from the lowest limit on activations that VLimited can keep to the highest that matters."""
MOST_SEARCHED = 1 << 17
"""Of VLimited: units of all ranks, for each: the search for one table takes some 50 ms at most."""
_WHOLE_BACKWARDS = frozenset({"GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What a job must do, and what is already decided about it.

    Attributes:
        global_batch_size: sequences of one step, over all replicas.
        seq_len: tokens of a sequence.
        tp: ranks that share every matrix.
        cp: ranks that share every sequence.
        ep: ranks that share the experts.
        schedules: names to choose from; empty for all.
        pp_sizes: ranks of a pipeline to choose from; empty for all that fit.
        stages_per_rank: to choose from; empty for all that fit.
        microbatch_sizes: sequences of a microbatch to choose from; empty for all that fit.
        recompute: what may be computed again; empty for all.
        sharding: whether replicas divide the optimizer's states among them.
        dtype: of weights and activations; None for the config's, else bfloat16.
        attention: kernels of attention, as `Workload` names them.
        top: how many plans to return.
    """

    global_batch_size: int
    seq_len: int
    tp: int = 1
    cp: int = 1
    ep: int = 1
    schedules: tuple[str, ...] = ()
    pp_sizes: tuple[int, ...] = ()
    stages_per_rank: tuple[int, ...] = ()
    microbatch_sizes: tuple[int, ...] = ()
    recompute: tuple[Recompute, ...] = ()
    sharding: Sharding = "optimizer"
    dtype: str | None = None
    attention: Literal["flash", "sdpa", "eager"] = "flash"
    top: int = 10

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "seq_len", "tp", "cp", "ep", "top"):
            self._check(name, getattr(self, name))
        for name in ("pp_sizes", "stages_per_rank", "microbatch_sizes"):
            for value in getattr(self, name):
                self._check(name, value)
        for name in self.recompute:
            if name not in RECOMPUTE:
                raise PipelineConfigError(
                    f"recompute ({name!r}) must be one of {', '.join(RECOMPUTE)}: use "
                    "recompute='none'"
                )
        for name in self.schedules:
            find_schedule(name, argument="schedule")
        if self.dtype is not None and self.dtype not in DTYPE_BYTES:
            raise PipelineConfigError(
                f"dtype ({self.dtype!r}) must be one of {', '.join(DTYPE_BYTES)}: use "
                "dtype=bfloat16"
            )

    def _check(self, name: str, value: int) -> None:
        if type(value) is not int or not 1 <= value <= 1 << 28:
            raise PipelineConfigError(
                f"{name} ({value!r}) must be an integer from 1 to {1 << 28}: use {name}=8"
            )

    @property
    def specs(self) -> Sequence[ScheduleSpec]:
        """The schedules to choose from."""
        names = self.schedules or tuple(SCHEDULES)
        return list(dict.fromkeys(find_schedule(name, argument="schedule") for name in names))


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to lay a job out; its partition is still open.

    Attributes:
        spec: the schedule.
        pp_size: ranks of a pipeline.
        stages_per_rank: stages of each.
        n_microbatches: of one step of one pipeline.
        microbatch_size: sequences of one of them.
        recompute: what is computed again.
        parallel: the other sizes.
    """

    spec: ScheduleSpec
    pp_size: int
    stages_per_rank: int
    n_microbatches: int
    microbatch_size: int
    recompute: Recompute
    parallel: ParallelSizes

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.pp_size * self.stages_per_rank

    def least_seconds(self, costs: ModelCosts) -> float:
        """What a step takes at least, whatever the partition.

        Some rank has the mean or more, and some the longest layer. Where a backward is one action,
        rank r moreover idles while the first microbatch passes the ranks before it and its last
        gradient goes back through them. For one stage per rank the shortest step is then that of
        stages whose times fall geometrically, p x mean / (1 - (1 - 1/n)^p), which is more than n x
        mean with half the bubble of equal stages. Several stages per rank divide that bubble.
        """
        mean, longest = costs.total_seconds / self.pp_size, costs.longest_layer
        bubble = 0.0
        if self.spec.name in _WHOLE_BACKWARDS:
            bubble = (self.pp_size - 1) * mean / 2 / self.stages_per_rank
        return max(self.n_microbatches * longest, self.n_microbatches * mean + bubble)


def ranks_of(candidate: Candidate) -> list[tuple[int, ...]]:
    """The stages of every rank."""
    style = candidate.spec.placement.value
    table = stage_ids_by_rank(candidate.pp_size, candidate.num_stages, style)
    return [table.row(rank) for rank in range(candidate.pp_size)]


def candidates(request: PlanRequest, *, gpus: int, num_layers: int) -> list[Candidate]:
    """All of them, in the order of sizes.

    Raises:
        PipelineConfigError: there is none; the message has the rule that stands in the way.
    """
    found = list(_candidates(request, gpus, num_layers))
    if not found:
        raise PipelineConfigError(_reason(request, gpus, num_layers))
    return found


def _candidates(request: PlanRequest, gpus: int, num_layers: int) -> Iterator[Candidate]:
    for pp_size, parallel in _worlds(request, gpus, num_layers):
        local_batch = request.global_batch_size // parallel.dp
        for size in _chosen(_divisors(local_batch), request.microbatch_sizes):
            count = local_batch // size
            for spec, per_rank in _layouts(request, pp_size, num_layers):
                if pp_size * per_rank * count > MOST_ACTIONS:
                    continue
                try:
                    check_microbatches(
                        spec,
                        pp_size=pp_size,
                        num_stages=pp_size * per_rank,
                        n_microbatches=count,
                    )
                except PipelineConfigError:
                    continue
                for limited, recompute in product(
                    _under_limits(spec, request, pp_size, count), request.recompute or RECOMPUTE
                ):
                    yield Candidate(
                        spec=limited,
                        pp_size=pp_size,
                        stages_per_rank=per_rank,
                        n_microbatches=count,
                        microbatch_size=size,
                        recompute=recompute,
                        parallel=parallel,
                    )


def _worlds(
    request: PlanRequest, gpus: int, num_layers: int
) -> Iterator[tuple[int, ParallelSizes]]:
    inner = request.tp * request.cp
    if gpus % inner:
        return
    for pp_size in _chosen(_divisors(gpus // inner), request.pp_sizes):
        dp = gpus // inner // pp_size
        if (
            pp_size <= num_layers
            and request.global_batch_size % dp == 0
            and dp * request.cp % request.ep == 0
        ):
            yield pp_size, ParallelSizes(dp=dp, tp=request.tp, cp=request.cp, ep=request.ep)


def _layouts(
    request: PlanRequest, pp_size: int, num_layers: int
) -> Iterator[tuple[ScheduleSpec, int]]:
    most = min(MOST_STAGES_PER_RANK, num_layers // pp_size)
    whole = [spec for spec in request.specs if spec.single_stage]
    # A rank without neighbours has nobody to wait for: virtual stages change nothing there.
    for spec in whole if pp_size == 1 and whole else request.specs:
        per_ranks = range(2, most + 1) if spec.stages_per_rank is None else (spec.stages_per_rank,)
        for per_rank in _chosen(per_ranks, request.stages_per_rank):
            if pp_size * per_rank <= num_layers:
                yield spec, per_rank


def _under_limits(
    spec: ScheduleSpec, request: PlanRequest, pp_size: int, count: int
) -> Iterator[ScheduleSpec]:
    """A schedule under the limits on activations to choose from, where it takes one."""
    if spec.name != "VLimited":
        yield spec
    elif pp_size**2 * (6 * count + 4 * pp_size) <= MOST_SEARCHED:
        least = least_activation_limit(pp_size=pp_size, n_microbatches=count)
        most = 2 * min(pp_size, count)
        limits = {least + (most - least) * i // LIMITS for i in range(LIMITS + 1)}
        if count >= 2 * pp_size - 1 and SCHEDULES["ZBVZeroBubble"] in request.specs:
            limits.discard(most)  # as good
        yield from map(spec.limited, sorted(limits))


def _chosen(possible: Sequence[int], wanted: Sequence[int]) -> list[int]:
    return [size for size in possible if not wanted or size in wanted]


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _reason(request: PlanRequest, gpus: int, num_layers: int) -> str:
    """Why there is no candidate: the first rule that leaves none, and what would."""
    inner = request.tp * request.cp
    if gpus % inner:
        rest = gpus // inner * inner
        remedy = f"gpus={rest}" if rest else f"tp={1} and cp={1}"
        return (
            f"gpus ({gpus}) must be a multiple of tp ({request.tp}) x cp ({request.cp}): "
            f"use {remedy}"
        )
    outer = gpus // inner
    sizes = _chosen(_divisors(outer), request.pp_sizes)
    if not sizes:
        return (
            f"pp ({_listed(request.pp_sizes)}) must divide gpus ({gpus}) / tp ({request.tp}) / cp "
            f"({request.cp}) = {outer}: use pp={_nearest(_divisors(outer), request.pp_sizes[0])}"
        )
    fitting = [size for size in sizes if size <= num_layers]
    if not fitting:
        return (
            f"pp ({_listed(sizes)}) is more than the model has layers ({num_layers}), and every "
            f"rank needs one: use pp={max(s for s in _divisors(outer) if s <= num_layers)}"
        )
    if all(request.global_batch_size % (outer // size) for size in fitting):
        least = min(outer // size for size in fitting)
        near = max(1, round(request.global_batch_size / least)) * least
        return (
            f"global_batch_size ({request.global_batch_size}) must be a multiple of the number of "
            f"replicas, gpus ({gpus}) / tp ({request.tp}) / cp ({request.cp}) / pp, and no pp that "
            f"fits makes it one: use global_batch_size={near}"
        )
    worlds = list(_worlds(request, gpus, num_layers))
    if not worlds:
        return (
            f"ep ({request.ep}) must divide dp x cp, over whose ranks the experts lie, and that is "
            f"{_listed([gpus // request.tp // size for size in fitting])} for pp "
            f"{_listed(fitting)}: use ep=1"
        )
    batches = sorted({request.global_batch_size // parallel.dp for _, parallel in worlds})
    divisors = sorted({size for batch in batches for size in _divisors(batch)})
    if not _chosen(divisors, request.microbatch_sizes):
        return (
            f"microbatch_size ({_listed(request.microbatch_sizes)}) must divide the batch of a "
            f"pipeline, global_batch_size ({request.global_batch_size}) / dp = {_listed(batches)}: "
            f"use microbatch_size={_nearest(divisors, request.microbatch_sizes[0])}"
        )
    if not any(list(_layouts(request, pp_size, num_layers)) for pp_size, _ in worlds):
        return _reason_of_stages(request, gpus, num_layers)
    return (
        "no schedule can run: of "
        f"{_listed([spec.name for spec in request.specs])} each asks for stages or microbatches "
        f"that pp {_listed(fitting)}, {num_layers} layers and global_batch_size "
        f"({request.global_batch_size}) do not give"
        + (
            f" with microbatch_size {_listed(request.microbatch_sizes)}"
            if request.microbatch_sizes
            else ""
        )
        + ": leave schedule, stages_per_rank and microbatch_size open, or use a larger batch"
    )


def _reason_of_stages(request: PlanRequest, gpus: int, num_layers: int) -> str:
    """Why no schedule finds layers for its stages."""
    names = _listed([spec.name for spec in request.specs])
    pp_sizes = [pp for pp, _ in _worlds(request, gpus, num_layers)]
    anywhere = replace(request, stages_per_rank=())
    possible = sorted({n for pp in pp_sizes for _, n in _layouts(anywhere, pp, num_layers)})
    if possible:
        return (
            f"stages_per_rank ({_listed(request.stages_per_rank)}) must be "
            f"{_listed(possible)} for {names} with pp {_listed(pp_sizes)} and {num_layers} "
            f"layers, of which every stage needs one: use stages_per_rank="
            f"{_nearest(possible, request.stages_per_rank[0])}"
        )
    least, wanted = min(pp_sizes), min(spec.stages_per_rank or 2 for spec in request.specs)
    other = [pp for pp, _ in _worlds(replace(request, pp_sizes=()), gpus, num_layers)]
    fitting = [pp for pp in other if list(_layouts(request, pp, num_layers))]
    remedy = f"pp={max(fitting)}" if fitting else "schedule=1F1B"
    return (
        f"schedule ({names}) needs {wanted} stages on each rank, which is {least * wanted} with pp "
        f"{least}, and every stage needs one of the {num_layers} layers: use {remedy}"
    )


def _listed(values: Sequence[object], most: int = 8) -> str:
    shown = [str(value) for value in values[:most]]
    return ", ".join(shown) + (", ..." if len(values) > most else "")


def _nearest(sizes: Sequence[int], wanted: int) -> int:
    return min(sizes, key=lambda size: abs(size - wanted))
