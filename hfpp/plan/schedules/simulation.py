"""What a simulated step is: times, idle time by cause, and what each rank holds at most."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from hfpp.plan.schedules.actions import Action, ActionKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfpp import _core
    from hfpp.plan.schedules.actions import ScheduleTable

__all__ = ["Bar", "Idle", "RankSimulation", "Simulation", "Transfer"]

_SENDS = (ActionKind.SEND_FORWARD, ActionKind.SEND_BACKWARD)


class Bar(NamedTuple):
    """One computation in time."""

    action: Action
    start: float
    end: float
    group: Action | None  # the overlapped group that it is a part of


class Transfer(NamedTuple):
    """What one computation gives to another rank, in time."""

    source: int  # the ranks
    target: int
    action: Action  # the send that it is, spelled out in the table or not
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Idle:
    """Seconds in which a rank does not compute, by cause.

    Attributes:
        start: before its first computation.
        activations: between two computations, as long as the activation that it needs is not made.
        gradients: the same for a gradient.
        communication: what it needs is made but not here yet; or, without overlap, the rank sends
            or receives.
        end: after its last computation, to the end of the step.
    """

    start: float
    activations: float
    gradients: float
    communication: float
    end: float

    @property
    def between(self) -> float:
        """From a rank's own first computation to its last."""
        return self.activations + self.gradients + self.communication

    @property
    def total(self) -> float:
        """All idle time between the step's start and end."""
        return self.start + self.between + self.end


@dataclass(frozen=True, slots=True)
class RankSimulation:
    """What one rank does in a step, and the most that it holds at any time.

    Attributes:
        busy: seconds of its computations; with the idle time they make up the step.
        idle: the other seconds, by cause.
        first: when its first computation begins.
        last: when its last computation ends.
        peak_live: stages and microbatches whose forward has begun and whose backward (B, or W
            where it is split) has not ended: as the verifier counts them.
        peak_activation_bytes: their ``activation_bytes`` until B or I, and ``weight_bytes`` from I
            to W.
        peak_receive_buffers: messages for which it holds memory: from the receive in the table, or
            from the begin of the transfer where the table has none, to the end of the computation
            that takes them.
        peak_receive_bytes: their bytes.
        sent_bytes: to other ranks in the whole step.
        received_bytes: from other ranks.
    """

    busy: float
    idle: Idle
    first: float
    last: float
    peak_live: int
    peak_activation_bytes: int
    peak_receive_buffers: int
    peak_receive_bytes: int
    sent_bytes: int
    received_bytes: int


class Simulation:
    """A simulated step of one table."""

    def __init__(self, table: ScheduleTable, native: _core.Simulation) -> None:
        self.table = table
        self.native = native
        """The times as the native core holds them."""

    def __repr__(self) -> str:
        return (
            f"Simulation({self.table.name!r}, {self.table.pp_size} ranks, "
            f"step_time={self.step_time:g}, idle_share={self.idle_share:.3f})"
        )

    @property
    def step_time(self) -> float:
        """When the last rank ends; the step begins at 0."""
        return self.native.step_time

    @property
    def idle_share(self) -> float:
        """The share of all ranks' time that is idle: the bubble."""
        return self.native.idle_share

    def rank(self, rank: int) -> RankSimulation:
        """What one rank does."""
        seconds, span, counts = self.native.report(rank)
        busy, *idle = seconds
        return RankSimulation(busy, Idle(*idle), *span, *counts)

    @cached_property
    def ranks(self) -> tuple[RankSimulation, ...]:
        """What every rank does."""
        return tuple(map(self.rank, range(self.table.pp_size)))

    def bars(self, rank: int) -> tuple[Bar, ...]:
        """The computations of one rank, in order; the parts of a group follow one another."""
        return tuple(
            Bar(leaf, start, end, group)
            for leaf, start, end, group in self.times(rank)
            if leaf.kind.is_compute
        )

    def times(self, rank: int) -> Iterator[tuple[Action, float, float, Action | None]]:
        """All actions of one rank with start, end and group; idle columns are left out.

        Sends and receives that the table spells out take time without overlap only.
        """
        spans = iter(self.native.spans(rank))
        for action in self.table.row(rank):
            if action is None:
                next(spans)
                continue
            for leaf in action.leaves:
                yield (leaf, *next(spans), action if action.parts else None)

    def transfers(self, rank: int) -> tuple[Transfer, ...]:
        """What one rank sends to others, in the order of its computations.

        A transfer lasts from when it begins to cross (without overlap: when its sender begins) to
        when the receiver has it all.
        """
        return tuple(
            Transfer(
                source,
                target,
                Action(stage, _SENDS[gradient], microbatch),
                start,
                end,
            )
            for source, target, gradient, stage, microbatch, start, end in self.native.transfers(
                rank
            )
        )
