"""The schedules that hfpp knows: names, placement, what each asks for, and their tables."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING

from hfpp import _core
from hfpp.errors import PipelineConfigError
from hfpp.plan.placement import Placement
from hfpp.plan.schedules.actions import ScheduleTable, unpacked

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from hfpp.plan.schedules.actions import Action

__all__ = [
    "SCHEDULES",
    "ScheduleSpec",
    "check_microbatches",
    "compute_table",
    "find_schedule",
    "forward_table",
    "least_activation_limit",
    "rank_actions",
]


_LIMITED = "VLimited"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpec:
    """What a schedule is called and how it wants its stages laid out.

    Attributes:
        name: torch's name, such as ``Interleaved1F1B``; where torch has no such schedule, the
            paper's.
        placement: how stages lie on ranks.
        single_stage: whether a rank has exactly one stage.
        stages_per_rank: 1 or 2 where the schedule fixes it; None for any number from 2 up.
        aliases: other spellings that are understood.
        activation_limit: of VLimited: the most activations that a rank may hold at once, each of
            one stage and one microbatch, as `verify` counts them; None: as many as
            ZBVZeroBubble.
    """

    name: str
    placement: Placement
    single_stage: bool
    stages_per_rank: int | None
    aliases: tuple[str, ...]
    activation_limit: int | None = None

    def limited(self, activation_limit: int) -> ScheduleSpec:
        """VLimited under a limit, which its name then has: ``VLimited-12``."""
        name = f"{_LIMITED}-{activation_limit}"
        return replace(self, name=name, activation_limit=activation_limit)


def _specs() -> Iterator[ScheduleSpec]:
    loop, v = Placement.LOOP, Placement.V
    for name, placement, per_rank, aliases in (
        ("GPipe", loop, 1, ("g_pipe",)),
        ("1F1B", loop, 1, ("one_f_one_b",)),
        ("Interleaved1F1B", loop, None, ("interleaved", "interleaved_1f1b", "dfs", "depth_first")),
        ("LoopedBFS", loop, None, ("looped_bfs", "bfs", "breadth_first")),
        (
            "InterleavedZeroBubble",
            loop,
            None,
            ("interleaved_zero_bubble", "zero_bubble", "zb1p", "zb_1p"),
        ),
        ("ZBVZeroBubble", v, 2, ("zbv_zero_bubble", "zbv", "zb_v", "v_schedule", "v")),
        ("DualPipeV", v, 2, ("dual_pipe_v", "dual_pipe")),
        ("ZBH2", loop, 1, ("zb_h2",)),
        ("VHalf", v, 2, ("v_half",)),
        ("VMin", v, 2, ("v_min",)),
        (_LIMITED, v, 2, ("v_limited",)),
    ):
        yield ScheduleSpec(
            name=name,
            placement=placement,
            single_stage=per_rank == 1,
            stages_per_rank=per_rank,
            aliases=aliases,
        )


SCHEDULES: Mapping[str, ScheduleSpec] = MappingProxyType({spec.name: spec for spec in _specs()})
"""Every schedule by name: torch's seven, and four that torch lacks and runs as tables.

With F, I and W for the times of a forward and of the two parts of a backward:

- ``ZBH2`` (ZB-H2, arXiv 2401.10241): no idle time between a rank's first action and its last where
  F = I = W, from ``2 * pp_size - 1`` microbatches on; that many activations live on every rank,
  where 1F1B has ``pp_size`` at most.
- ``VHalf`` and ``VMin`` (arXiv 2405.15362): two stages per rank in a v, each half as long as one of
  1F1B's, and activations of ``pp_size // 2 + 1`` and of ``ceil((pp_size + 2) / 3)`` whole
  microbatches at most, where 1F1B has ``pp_size``. Where F = I = W no rank idles in the steady
  state; at both ends together ``7 * pp_size // 2 - 4`` and ``4 * pp_size - 5`` (one more where 3
  divides ``pp_size``) times F of one of its stages, where 1F1B idles ``6 * (pp_size - 1)``.
- ``VLimited`` (the same paper's question, by a search): of the v schedules that hold no more than a
  limit, the one with least idle time that is known where F = I = W. The limit is part of the name:
  ``VLimited-12`` holds 12 activations of a stage at most. Limits from VMin's
  (``2 * ceil((pp_size + 2) / 3)``) to ZBVZeroBubble's (``2 * pp_size``, the default) make a
  difference; a larger one never idles more. The search is for up to about 64 ranks;
  beyond, this is what of ZBVZeroBubble, VHalf and VMin keeps the limit.
"""


def _plain(name: str) -> str:
    """The name without case, separators and the ``Schedule`` of torch's class names."""
    return re.sub(r"[\s_-]", "", name).lower().removeprefix("schedule")


_BY_PLAIN_NAME = {
    _plain(spelling): spec for spec in SCHEDULES.values() for spelling in (spec.name, *spec.aliases)
}
_ABSTRACT = {
    _plain(name)
    for name in ("PipelineScheduleSingle", "PipelineScheduleMulti", "_PipelineScheduleRuntime")
}


def find_schedule(name: str, *, argument: str = "pipeline_parallel_schedule") -> ScheduleSpec:
    """The schedule of a name, whatever its case, and of the usual aliases.

    Args:
        name: torch's name, one of the aliases, or torch's class name; underscores, dashes and
            spaces do not matter. ``VLimited-12`` is VLimited with a limit of 12 activations.
        argument: what the caller calls the name, for messages.

    Raises:
        PipelineConfigError: unknown (the known ones are listed), abstract, or not a string.

    Example:
        >>> find_schedule("interleaved_1f1b").name
        'Interleaved1F1B'
    """
    known = f"known are {', '.join(SCHEDULES)}"
    if not isinstance(name, str):
        raise PipelineConfigError(
            f"{argument} must be the name of a schedule, not {name!r}; {known}: "
            f"use {argument}='1F1B'"
        )
    plain = _plain(name)
    if plain in _ABSTRACT:
        raise PipelineConfigError(
            f"{argument} {name!r} is an abstract class of torch, which cannot run; {known}: "
            f"use {argument}='{'1F1B' if 'single' in plain else 'Interleaved1F1B'}'"
        )
    if limit := re.fullmatch(rf"{_plain(_LIMITED)}(\d{{1,18}})", plain):
        return SCHEDULES[_LIMITED].limited(int(limit[1]))
    if plain not in _BY_PLAIN_NAME:
        close = get_close_matches(plain, _BY_PLAIN_NAME, n=1)
        remedy = _BY_PLAIN_NAME[close[0]].name if close else "1F1B"
        raise PipelineConfigError(
            f"{argument} {name!r} is unknown; {known}: use {argument}='{remedy}'"
        )
    return _BY_PLAIN_NAME[plain]


def check_microbatches(
    spec: ScheduleSpec,
    *,
    pp_size: int,
    num_stages: int,
    n_microbatches: int,
    microbatch_size: int | None = None,
) -> None:
    """Checks that a schedule can run that many microbatches.

    Args:
        spec: the schedule.
        pp_size: number of ranks.
        num_stages: number of stages of the whole pipeline.
        n_microbatches: microbatches per step.
        microbatch_size: where the caller was given it with a local_batch_size: the remedy is then
            a local_batch_size.

    Raises:
        PipelineConfigError: it cannot; the message has the counts that work. Or the schedule's
            limit on activations is too low for any order; the message has the lowest that works.
    """
    n = n_microbatches
    counts: tuple[int, ...]
    if n < 1:
        rule, counts = "needs at least 1 microbatch", (_least(spec, pp_size, num_stages),)
    elif spec.name in ("1F1B", "DualPipeV") and n < _least(spec, pp_size, num_stages):
        counts = (_least(spec, pp_size, num_stages),)
        if spec.name == "1F1B":
            rule = f"needs at least as many microbatches as the pipeline has stages ({num_stages})"
        else:
            rule = f"needs at least two microbatches for each of the {pp_size} ranks"
    elif spec.name in ("Interleaved1F1B", "InterleavedZeroBubble") and not _in_rounds(n, pp_size):
        rounds = n // pp_size
        rule = (
            f"runs in {rounds} rounds (n_microbatches // pp_size ({pp_size})), of which "
            "n_microbatches must be a multiple"
        )
        counts = (
            n - n % rounds,
            min(n + rounds - n % rounds, (rounds + 1) * pp_size),  # or a round more
        )
    else:
        _check_activation_limit(spec, pp_size, n)
        return
    if microbatch_size is None:
        has, remedies = f"{n}", [f"n_microbatches={count}" for count in counts]
    else:
        size = microbatch_size
        has = f"local_batch_size ({n * size}) // microbatch_size ({size}) = {n}"
        remedies = [f"local_batch_size={count * size}" for count in counts]
    raise PipelineConfigError(
        f"{spec.name} {rule}, but n_microbatches is {has}: use {' or '.join(remedies)}"
    )


def least_activation_limit(*, pp_size: int, n_microbatches: int) -> int:
    """The lowest limit on activations that VLimited can keep: what VMin holds."""
    return 2 * min(n_microbatches, -(-(pp_size + 2) // 3))


def _check_activation_limit(spec: ScheduleSpec, pp_size: int, n_microbatches: int) -> None:
    least = least_activation_limit(pp_size=pp_size, n_microbatches=n_microbatches)
    if spec.activation_limit is not None and spec.activation_limit < least:
        raise PipelineConfigError(
            f"{spec.name} may hold {spec.activation_limit} activations on a rank, but with pp_size "
            f"({pp_size}) and n_microbatches ({n_microbatches}) no order is known that holds less "
            f"than {least}: use '{_LIMITED}-{least}'"
        )


def _least(spec: ScheduleSpec, pp_size: int, num_stages: int) -> int:
    return {"1F1B": num_stages, "DualPipeV": 2 * pp_size}.get(spec.name, 1)


def _in_rounds(n_microbatches: int, pp_size: int) -> bool:
    return n_microbatches % max(1, n_microbatches // pp_size) == 0


def compute_table(
    spec: ScheduleSpec, *, pp_size: int, n_microbatches: int, stages_per_rank: int | None = None
) -> ScheduleTable:
    """The compute actions of all ranks, in the order in which torch runs them.

    Args:
        spec: the schedule.
        pp_size: number of ranks.
        n_microbatches: microbatches per step.
        stages_per_rank: stages per rank; None means what the schedule fixes, else 2. Schedules
            with several stages per rank also take 1 here.

    Returns:
        The table, without communication and without idle columns.

    Raises:
        PipelineConfigError: sizes that the schedule cannot have.
        OverflowError: sizes that no table holds.

    Example:
        >>> table = compute_table(find_schedule("1F1B"), pp_size=2, n_microbatches=2)
        >>> [str(action) for action in table.rows[0]]
        ['0F0', '0F1', '0B0', '0B1']
    """
    per_rank = _checked_stages_per_rank(spec, pp_size, n_microbatches, stages_per_rank)
    return ScheduleTable(
        _core.Schedule.of_order(
            name=_order_name(spec),
            pp_size=pp_size,
            stages_per_rank=per_rank,
            n_microbatches=n_microbatches,
            activation_limit=spec.activation_limit,
        )
    )


def rank_actions(
    spec: ScheduleSpec,
    rank: int,
    *,
    pp_size: int,
    n_microbatches: int,
    stages_per_rank: int | None = None,
) -> tuple[Action, ...]:
    """One rank's row of `compute_table`, in time proportional to its own actions.

    Only a search for VLimited's order takes the time of all rows.

    Args:
        spec: as there.
        rank: in the range of `pp_size`.
        pp_size: as there.
        n_microbatches: as there.
        stages_per_rank: as there.

    Raises:
        PipelineConfigError: sizes that the schedule cannot have, or a rank out of range.
        OverflowError: sizes that no table holds.

    Example:
        >>> actions = rank_actions(find_schedule("GPipe"), 9_999, pp_size=10_000, n_microbatches=2)
        >>> [str(action) for action in actions]
        ['9999F0', '9999F1', '9999B0', '9999B1']
    """
    per_rank = _checked_stages_per_rank(spec, pp_size, n_microbatches, stages_per_rank)
    codes = _core.Schedule.codes_of_order(
        name=_order_name(spec),
        rank=rank,
        pp_size=pp_size,
        stages_per_rank=per_rank,
        n_microbatches=n_microbatches,
        activation_limit=spec.activation_limit,
    )
    return tuple(action for action in unpacked(codes.row()) if action is not None)


def _order_name(spec: ScheduleSpec) -> str:
    """What the core calls the order, of whatever limit."""
    return spec.name if spec.activation_limit is None else _LIMITED


def _checked_stages_per_rank(
    spec: ScheduleSpec, pp_size: int, n_microbatches: int, stages_per_rank: int | None
) -> int:
    """The stages per rank that are meant, where the schedule can have all of these sizes."""
    per_rank = stages_per_rank if stages_per_rank is not None else spec.stages_per_rank or 2
    if pp_size < 1:
        raise PipelineConfigError(f"pp_size ({pp_size}) must be at least 1: use pp_size=1")
    if per_rank < 1 or (spec.stages_per_rank or per_rank) != per_rank:
        rule = "at least 1" if spec.stages_per_rank is None else str(spec.stages_per_rank)
        raise PipelineConfigError(
            f"stages_per_rank ({per_rank}) must be {rule} for {spec.name}: "
            f"use stages_per_rank={spec.stages_per_rank or 2}"
        )
    check_microbatches(
        spec, pp_size=pp_size, num_stages=pp_size * per_rank, n_microbatches=n_microbatches
    )
    return per_rank


def forward_table(stage_to_rank: Sequence[int], n_microbatches: int) -> ScheduleTable:
    """Forwards only, of stages in any placement: what an evaluation runs.

    Every rank has its stages in their order, all microbatches of one before the next: an order of
    which all ranks see their part cannot deadlock.

    Args:
        stage_to_rank: the rank of every stage.
        n_microbatches: microbatches per batch.

    Raises:
        PipelineConfigError: no stage, no microbatch, or a rank that is negative or not less than
            the number of stages.
        OverflowError: sizes that no table holds.

    Example:
        >>> [str(action) for action in forward_table([0, 1, 0], 2).row(0)]
        ['0F0', '0F1', '2F0', '2F1']
    """
    return ScheduleTable(_core.Schedule.forward_only(stage_to_rank, n_microbatches))
