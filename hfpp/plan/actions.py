"""Actions of a schedule, and the table of all ranks' actions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from hfpp.errors import PipelineConfigError
from hfpp.plan.placement import Placement

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Action", "ActionKind", "ScheduleTable", "Step", "parse_action"]


class ActionKind(StrEnum):
    """What an action does; the values are torch's spelling in schedule files."""

    FORWARD = "F"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    FULL_BACKWARD = "B"
    OVERLAP = "OVERLAP_F_B"
    SEND_FORWARD = "SEND_F"
    RECEIVE_FORWARD = "RECV_F"
    SEND_BACKWARD = "SEND_B"
    RECEIVE_BACKWARD = "RECV_B"
    WAIT_SEND_FORWARD = "WAIT_SEND_F"
    WAIT_SEND_BACKWARD = "WAIT_SEND_B"
    UNSHARD = "UNSHARD"
    RESHARD = "RESHARD"
    REDUCE_GRAD = "REDUCE_GRAD"
    WAIT_REDUCE_GRAD = "WAIT_REDUCE_GRAD"

    __hash__ = str.__hash__  # Enum's own is Python code: tables hash hundreds of thousands

    @property
    def is_compute(self) -> bool:
        """Whether a stage computes: a forward, a backward or a part of one."""
        return self in _COMPUTE

    @property
    def has_microbatch(self) -> bool:
        """Whether the action is about one microbatch (the others are about a whole stage)."""
        return self not in _WHOLE_STAGE


_COMPUTE = frozenset(
    {
        ActionKind.FORWARD,
        ActionKind.BACKWARD_INPUT,
        ActionKind.BACKWARD_WEIGHT,
        ActionKind.FULL_BACKWARD,
        ActionKind.OVERLAP,
    }
)
_WHOLE_STAGE = frozenset(
    {
        ActionKind.OVERLAP,
        ActionKind.UNSHARD,
        ActionKind.RESHARD,
        ActionKind.REDUCE_GRAD,
        ActionKind.WAIT_REDUCE_GRAD,
    }
)


class Action(NamedTuple):
    """One thing that a rank does; prints as torch writes it in schedule files, such as ``3F0``.

    Attributes:
        stage: the stage's index in the pipeline; -1 for an overlapped group.
        kind: what is done.
        microbatch: the microbatch's index; None where the action is about the whole stage.
        parts: the actions that an overlapped group runs as one; empty for all other kinds.
    """

    stage: int
    kind: ActionKind
    microbatch: int | None = None
    parts: tuple[Action, ...] = ()

    @property
    def leaves(self) -> tuple[Action, ...]:
        """The parts of an overlapped group; of every other action the action itself."""
        return self.parts or (self,)

    def __str__(self) -> str:
        if self.parts:
            return f"({';'.join(map(str, self.parts))}){self.kind.value}"
        microbatch = "" if self.microbatch is None else self.microbatch
        return f"{self.stage}{self.kind.value}{microbatch}"


_SINGLE = re.compile(
    rf"(\d+)({'|'.join(sorted((kind.value for kind in ActionKind), key=len, reverse=True))})(\d*)"
)
_GROUP = re.compile(r"\(([^()]*)\)OVERLAP_F_B")


def parse_action(text: str) -> Action | None:
    """Reads one action in torch's spelling: the inverse of ``str(action)``.

    Args:
        text: such as ``3F0``, ``1UNSHARD``, ``(2F4;5B1)OVERLAP_F_B``; blank means idle.

    Returns:
        The action; None for an idle column.

    Raises:
        PipelineConfigError: the text is not an action; the message says what is expected.

    Example:
        >>> str(parse_action("(2F4;5B1)OVERLAP_F_B"))
        '(2F4;5B1)OVERLAP_F_B'
    """
    text = text.strip()
    if not text or text == "None":
        return None
    if group := _GROUP.fullmatch(text):
        parts = tuple(part for item in group[1].split(";") if (part := parse_action(item)))
        if parts and all(part.kind.is_compute for part in parts):
            return Action(-1, ActionKind.OVERLAP, None, parts)
    elif single := _SINGLE.fullmatch(text):
        stage, kind, microbatch = int(single[1]), ActionKind(single[2]), single[3]
        if kind is not ActionKind.OVERLAP and bool(microbatch) is kind.has_microbatch:
            return Action(stage, kind, int(microbatch) if microbatch else None)
    raise PipelineConfigError(
        f"{text!r} is not a schedule action: expected stage, kind and microbatch such as 3F0 "
        f"(kinds: {', '.join(kind.value for kind in ActionKind)}; UNSHARD, RESHARD and "
        "REDUCE_GRAD without a microbatch), a group such as (2F4;5B1)OVERLAP_F_B, or nothing"
    )


class Step(NamedTuple):
    """An action with its place in the table."""

    rank: int
    column: int
    action: Action

    def __str__(self) -> str:
        return f"rank {self.rank}, column {self.column}, action {self.action}"


@dataclass(frozen=True)
class ScheduleTable:
    """The actions of all ranks of one pipeline, in the order in which each rank runs them.

    Attributes:
        name: how messages and pictures call the schedule.
        rows: one row per rank; None is an idle column, which means nothing to those who run it.
    """

    name: str
    rows: tuple[tuple[Action | None, ...], ...] = field(repr=False)

    @property
    def pp_size(self) -> int:
        """The number of ranks."""
        return len(self.rows)

    def steps(self, rank: int) -> Iterator[Step]:
        """The actions of one rank with their places, idle columns left out."""
        for column, action in enumerate(self.rows[rank]):
            if action is not None:
                yield Step(rank, column, action)

    @cached_property
    def stage_to_rank(self) -> tuple[int, ...]:
        """The rank of each stage, by stage index.

        Raises:
            PipelineConfigError: a stage that computes on two ranks, or on none.
        """
        found: dict[int, Step] = {}
        for rank in range(self.pp_size):
            for step in self.steps(rank):
                for leaf in step.action.leaves:
                    if not leaf.kind.is_compute:
                        continue
                    first = found.setdefault(leaf.stage, step)
                    if first.rank != rank:
                        raise PipelineConfigError(
                            f"{self.name}: {step}: stage {leaf.stage} also runs on rank "
                            f"{first.rank} (column {first.column}); a stage lives on one rank"
                        )
        num_stages = max(found, default=-1) + 1
        if missing := [stage for stage in range(num_stages) if stage not in found]:
            raise PipelineConfigError(
                f"{self.name}: no rank runs stage {missing[0]}, although the highest stage is "
                f"{num_stages - 1}: stages are numbered from 0 without gaps"
            )
        return tuple(found[stage].rank for stage in range(num_stages))

    @property
    def num_stages(self) -> int:
        """The number of stages of the whole pipeline."""
        return len(self.stage_to_rank)

    @cached_property
    def stages_by_rank(self) -> tuple[tuple[int, ...], ...]:
        """The stages of each rank, ascending."""
        stages: list[list[int]] = [[] for _ in self.rows]
        for stage, rank in enumerate(self.stage_to_rank):
            stages[rank].append(stage)
        return tuple(map(tuple, stages))

    @property
    def stages_per_rank(self) -> int:
        """The number of stages on each rank.

        Raises:
            PipelineConfigError: not the same on every rank.
        """
        counts = {len(stages) for stages in self.stages_by_rank}
        if len(counts) != 1:
            raise PipelineConfigError(
                f"{self.name}: {self.num_stages} stages lie on {self.pp_size} ranks as "
                f"{[len(stages) for stages in self.stages_by_rank]}: every rank needs as many"
            )
        return counts.pop()

    @cached_property
    def placement(self) -> Placement:
        """How the stages lie on the ranks; a single rank or one stage per rank counts as loop.

        Raises:
            PipelineConfigError: neither loop nor v; the message names the first stage that differs.
        """
        size, last = self.pp_size, self.num_stages - 1
        loop = tuple(stage % size for stage in range(last + 1))
        v = tuple(min(stage, last - stage) for stage in range(last + 1))
        if self.stage_to_rank == loop and self.stages_per_rank:
            return Placement.LOOP
        if last + 1 == 2 * size and self.stage_to_rank == v:
            return Placement.V
        differing = (s for s, rank in enumerate(self.stage_to_rank) if rank != loop[s])
        stage = next(differing, None)
        if stage is None:
            raise PipelineConfigError(
                f"{self.name}: no row has a forward or a backward, so that no stage has a rank: "
                "write the compute actions, with or without the communication"
            )
        raise PipelineConfigError(
            f"{self.name}: stage {stage} runs on rank {self.stage_to_rank[stage]}, where a loop "
            f"(stage s on rank s % {size}) has rank {loop[stage]}, and the table is no v (two "
            "stages per rank, s and the one as far from the end) either: lay the stages as one"
        )

    @cached_property
    def n_microbatches(self) -> int:
        """The number of microbatches: the highest index plus one."""
        return 1 + max(
            (
                leaf.microbatch
                for rank in range(self.pp_size)
                for step in self.steps(rank)
                for leaf in step.action.leaves
                if leaf.microbatch is not None
            ),
            default=-1,
        )

    @cached_property
    def has_communication(self) -> bool:
        """Whether sends, receives or other runtime actions are spelled out."""
        return any(
            not step.action.kind.is_compute
            for rank in range(self.pp_size)
            for step in self.steps(rank)
        )
