"""The schedules that hfpp knows: names, placement, what each asks for, and their tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from hfpp.errors import PipelineConfigError
from hfpp.plan.actions import Action, ActionKind, ScheduleTable, parse_action
from hfpp.plan.placement import Placement
from hfpp.plan.schedule_csv import read_csv, write_csv
from hfpp.plan.schedule_orders import rank_actions
from hfpp.plan.verify import verify

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "SCHEDULES",
    "Action",
    "ActionKind",
    "ScheduleSpec",
    "ScheduleTable",
    "check_microbatches",
    "compute_table",
    "find_schedule",
    "parse_action",
    "read_csv",
    "verify",
    "write_csv",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpec:
    """What a schedule is called and how it wants its stages laid out.

    Attributes:
        name: torch's name, such as ``Interleaved1F1B``.
        placement: how stages lie on ranks.
        single_stage: whether a rank has exactly one stage.
        stages_per_rank: 1 or 2 where the schedule fixes it; None for any number from 2 up.
        aliases: other spellings that are understood.
    """

    name: str
    placement: Placement
    single_stage: bool
    stages_per_rank: int | None
    aliases: tuple[str, ...]


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
    ):
        yield ScheduleSpec(
            name=name,
            placement=placement,
            single_stage=per_rank == 1,
            stages_per_rank=per_rank,
            aliases=aliases,
        )


SCHEDULES: Mapping[str, ScheduleSpec] = MappingProxyType({spec.name: spec for spec in _specs()})
"""Every schedule, by torch's name."""


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


def find_schedule(name: str) -> ScheduleSpec:
    """The schedule of a name, whatever its case, and of the usual aliases.

    Args:
        name: torch's name, one of the aliases, or torch's class name; underscores, dashes and
            spaces do not matter.

    Raises:
        PipelineConfigError: unknown (the known ones are listed), abstract, or not a string.

    Example:
        >>> find_schedule("interleaved_1f1b").name
        'Interleaved1F1B'
    """
    known = ", ".join(SCHEDULES)
    if not isinstance(name, str):
        raise PipelineConfigError(
            f"pipeline_parallel_schedule must be the name of a schedule, not {name!r}: "
            f"use one of {known}"
        )
    plain = _plain(name)
    if plain in _ABSTRACT:
        raise PipelineConfigError(
            f"pipeline_parallel_schedule {name!r} is an abstract class of torch, which cannot "
            f"run: use one of {known}"
        )
    if plain not in _BY_PLAIN_NAME:
        raise PipelineConfigError(
            f"pipeline_parallel_schedule {name!r} is unknown: use one of {known}"
        )
    return _BY_PLAIN_NAME[plain]


def check_microbatches(
    spec: ScheduleSpec, *, pp_size: int, num_stages: int, n_microbatches: int
) -> None:
    """Checks that a schedule can run that many microbatches.

    Args:
        spec: the schedule.
        pp_size: number of ranks.
        num_stages: number of stages of the whole pipeline.
        n_microbatches: microbatches per step.

    Raises:
        PipelineConfigError: it cannot; the message has the counts that work.
    """
    n, name = n_microbatches, spec.name
    if n < 1:
        raise PipelineConfigError(
            f"n_microbatches ({n}) must be at least 1: give local_batch_size at least one "
            "microbatch_size"
        )
    if name == "1F1B" and n < num_stages:
        raise PipelineConfigError(
            f"{name} needs at least as many microbatches as stages, but n_microbatches is {n} and "
            f"the pipeline has {num_stages} stages: use n_microbatches >= {num_stages} (a larger "
            "local_batch_size or a smaller microbatch_size), or GPipe, which takes any count"
        )
    if name == "DualPipeV" and n < 2 * pp_size:
        raise PipelineConfigError(
            f"{name} needs at least two microbatches per rank, but n_microbatches is {n} and the "
            f"pipeline has {pp_size} ranks: use n_microbatches >= {2 * pp_size} (a larger "
            "local_batch_size or a smaller microbatch_size)"
        )
    if name in ("Interleaved1F1B", "InterleavedZeroBubble"):
        _check_rounds(name, pp_size, n)


def _check_rounds(name: str, pp_size: int, n: int) -> None:
    def works(count: int) -> bool:
        return count % max(1, count // pp_size) == 0

    if works(n):
        return
    lower = next(count for count in range(n - 1, 0, -1) if works(count))
    higher = next(count for count in range(n + 1, n + pp_size + 1) if works(count))
    raise PipelineConfigError(
        f"{name} runs its microbatches in {n // pp_size} rounds (n_microbatches // pp_size), but "
        f"n_microbatches ({n}) is no multiple of {n // pp_size} with pp_size ({pp_size}): use "
        f"n_microbatches {lower} or {higher}; every multiple of {pp_size} works"
    )


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

    Example:
        >>> table = compute_table(find_schedule("1F1B"), pp_size=2, n_microbatches=2)
        >>> [str(action) for action in table.rows[0]]
        ['0F0', '0F1', '0B0', '0B1']
    """
    per_rank = stages_per_rank if stages_per_rank is not None else spec.stages_per_rank or 2
    if pp_size < 1:
        raise PipelineConfigError(f"pp_size ({pp_size}) must be at least 1")
    if per_rank < 1 or (spec.stages_per_rank or per_rank) != per_rank:
        rule = "at least 1" if spec.stages_per_rank is None else str(spec.stages_per_rank)
        raise PipelineConfigError(f"stages_per_rank ({per_rank}) must be {rule} for {spec.name}")
    check_microbatches(
        spec, pp_size=pp_size, num_stages=pp_size * per_rank, n_microbatches=n_microbatches
    )
    rows = (
        rank_actions(
            spec.name,
            rank=rank,
            pp_size=pp_size,
            stages_per_rank=per_rank,
            n_microbatches=n_microbatches,
        )
        for rank in range(pp_size)
    )
    return ScheduleTable(spec.name, tuple(map(tuple, rows)))
