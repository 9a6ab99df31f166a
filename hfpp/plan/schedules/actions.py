"""Actions of a schedule, and the table of all ranks' actions."""

from __future__ import annotations

from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from hfpp import _core
from hfpp.errors import PipelineConfigError
from hfpp.plan.placement import Placement

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Action", "ActionKind", "ScheduleTable", "Step", "parse_action", "unpacked"]


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


def parse_action(text: str) -> Action | None:
    """Reads one action in torch's spelling: the inverse of ``str(action)``.

    Args:
        text: such as ``3F0``, ``1UNSHARD``, ``(2F4;5B1)OVERLAP_F_B``; blank means idle.

    Returns:
        The action; None for an idle column.

    Raises:
        PipelineConfigError: the text is not an action, or its numbers are larger than a table
            holds; the message says what is expected.

    Example:
        >>> str(parse_action("(2F4;5B1)OVERLAP_F_B"))
        '(2F4;5B1)OVERLAP_F_B'
    """
    return next(unpacked(memoryview(_core.action_codes(text))))


class Step(NamedTuple):
    """An action with its place in the table."""

    rank: int
    column: int
    action: Action

    def __str__(self) -> str:
        return f"rank {self.rank}, column {self.column}, action {self.action}"


_BY_CODE = (
    None,
    ActionKind.FORWARD,
    ActionKind.FULL_BACKWARD,
    ActionKind.BACKWARD_INPUT,
    ActionKind.BACKWARD_WEIGHT,
    ActionKind.SEND_FORWARD,
    ActionKind.RECEIVE_FORWARD,
    ActionKind.SEND_BACKWARD,
    ActionKind.RECEIVE_BACKWARD,
    ActionKind.WAIT_SEND_FORWARD,
    ActionKind.WAIT_SEND_BACKWARD,
    ActionKind.UNSHARD,
    ActionKind.RESHARD,
    ActionKind.REDUCE_GRAD,
    ActionKind.WAIT_REDUCE_GRAD,
)
"""The kinds by their numbers in packed actions; number 0 is an idle column."""
_NUMBERS = {kind: number for number, kind in enumerate(_BY_CODE)}
_BITS = 28
_MOST = (1 << _BITS) - 1
_JOINED = 1 << (2 * _BITS + 6)


def unpacked(codes: Iterable[int]) -> Iterator[Action | None]:
    """The actions of one row, overlapped groups put together; None is an idle column."""
    group: list[Action] = []
    for code in codes:
        kind = _BY_CODE[code >> 2 * _BITS & 63]
        if group and not code & _JOINED:
            yield _grouped(group)
            group = []
        if kind is None:
            yield None
            continue
        microbatch = code & _MOST if kind.has_microbatch else None
        group.append(Action(code >> _BITS & _MOST, kind, microbatch))
    if group:
        yield _grouped(group)


def _grouped(parts: list[Action]) -> Action:
    return parts[0] if len(parts) == 1 else Action(-1, ActionKind.OVERLAP, None, tuple(parts))


def _packed(name: str, row: Iterable[Action | None]) -> Iterator[int]:
    for action in row:
        if action is None:
            yield 0
            continue
        for position, leaf in enumerate(action.leaves):
            if leaf.kind is ActionKind.OVERLAP:
                raise PipelineConfigError(
                    f"{name}: action {leaf}: a group has parts, of which none is a group"
                )
            if leaf.kind.has_microbatch == (leaf.microbatch is None):
                raise PipelineConfigError(
                    f"{name}: action {leaf}: {leaf.kind.value} is about "
                    + ("one microbatch" if leaf.kind.has_microbatch else "a whole stage")
                    + f": use microbatch={'0' if leaf.kind.has_microbatch else 'None'}"
                )
            microbatch = leaf.microbatch or 0
            if not (0 <= leaf.stage <= _MOST and 0 <= microbatch <= _MOST):
                raise PipelineConfigError(
                    f"{name}: action {leaf}: stages and microbatches are numbered from 0 to {_MOST}"
                )
            code = _NUMBERS[leaf.kind] << 2 * _BITS | leaf.stage << _BITS | microbatch
            yield code | _JOINED if position else code


class ScheduleTable:
    """The actions of all ranks of one pipeline, in the order in which each rank runs them.

    Idle columns of a file are kept; they mean nothing to those who run it.
    """

    def __init__(self, native: _core.Schedule) -> None:
        self.native = native
        """The actions as the native core holds them."""

    @classmethod
    def from_rows(cls, name: str, rows: Iterable[Iterable[Action | None]]) -> ScheduleTable:
        """A table of given actions.

        Args:
            name: how messages and pictures call the schedule.
            rows: one row per rank; None is an idle column.

        Raises:
            PipelineConfigError: a stage or a microbatch has a number that no table holds; an action
                lacks its microbatch, or has one although it is about a whole stage; a group has no
                parts.
        """
        codes = [list(_packed(name, row)) for row in rows]
        return cls(_core.Schedule.of_codes(name, codes))

    def __reduce__(self) -> tuple[Any, ...]:
        return ScheduleTable.from_rows, (self.name, self.rows)

    def __repr__(self) -> str:
        return (
            f"ScheduleTable({self.name!r}, {self.pp_size} ranks, {self.native.num_actions} actions)"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScheduleTable):
            return NotImplemented
        return self.name == other.name and self.rows == other.rows

    __hash__ = None  # type: ignore[assignment]

    @property
    def name(self) -> str:
        """How messages and pictures call the schedule."""
        return self.native.name

    @property
    def pp_size(self) -> int:
        """The number of ranks."""
        return self.native.pp_size

    @cached_property
    def rows(self) -> tuple[tuple[Action | None, ...], ...]:
        """One row per rank; None is an idle column."""
        return tuple(self.row(rank) for rank in range(self.pp_size))

    def row(self, rank: int) -> tuple[Action | None, ...]:
        """The actions of one rank; None is an idle column."""
        return tuple(unpacked(memoryview(self.native.codes(rank))))

    def steps(self, rank: int) -> Iterator[Step]:
        """The actions of one rank with their places, idle columns left out."""
        for column, action in enumerate(self.row(rank)):
            if action is not None:
                yield Step(rank, column, action)

    @cached_property
    def stage_to_rank(self) -> tuple[int, ...]:
        """The rank of each stage, by stage index.

        Raises:
            PipelineConfigError: a stage that computes on two ranks, or on none.
        """
        return self.native.stage_to_rank().row()

    @property
    def num_stages(self) -> int:
        """The number of stages of the whole pipeline."""
        return len(self.stage_to_rank)

    @cached_property
    def stages_by_rank(self) -> tuple[tuple[int, ...], ...]:
        """The stages of each rank, ascending."""
        stages: list[list[int]] = [[] for _ in range(self.pp_size)]
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
            PipelineConfigError: neither loop nor v, or not as many stages on each rank; the message
                names the first stage that differs.
        """
        return Placement(self.native.placement())

    @property
    def n_microbatches(self) -> int:
        """The number of microbatches: the highest index plus one."""
        return self.native.n_microbatches

    @property
    def has_communication(self) -> bool:
        """Whether sends, receives or other runtime actions are spelled out."""
        return self.native.has_communication

    def has(self, *kinds: ActionKind) -> bool:
        """Whether any rank has an action of these kinds, alone or in an overlapped group."""
        return any(self.native.kinds >> _NUMBERS[kind] & 1 for kind in kinds)
