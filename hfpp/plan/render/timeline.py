"""What is drawn: the computations and transfers of a pipeline in time, simulated or recorded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, NamedTuple

from hfpp.plan.schedules.actions import ActionKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from hfpp.plan.schedules.actions import Action

__all__ = ["LEAST_TIME", "Bar", "Kept", "Level", "Timeline", "Transfer"]

LEAST_TIME = 1e-100
"""Of a picture; within less, numbers are so close to 0 that they cannot be divided by."""

_F, _B = ActionKind.FORWARD, ActionKind.FULL_BACKWARD
_I, _W = ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT


class Bar(NamedTuple):
    """One computation in time.

    Attributes:
        action: a forward, a backward or a part of one.
        start: when it starts.
        end: when it ends.
        group: the overlapped group that it is a part of.
    """

    action: Action
    start: float
    end: float
    group: Action | None = None


class Transfer(NamedTuple):
    """One message from rank to rank.

    Attributes:
        source: the rank that sends.
        target: the rank that receives.
        action: the send, such as ``1SEND_F3``.
        start: when it is sent.
        end: when it is there; of a recorded run, when it was taken, which may be later.
        size: in bytes; 0: unknown.
    """

    source: int
    target: int
    action: Action
    start: float
    end: float
    size: int = 0


class Kept(NamedTuple):
    """Bytes that a stage keeps of one microbatch.

    Attributes:
        activations: from its forward to its backward, or to the inputs' part of it.
        weight: from the inputs' part to the weights' part.
    """

    activations: int
    weight: int


class Level(NamedTuple):
    """What is held from a moment on."""

    time: float
    held: int


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A pipeline's step in time.

    Attributes:
        name: of the schedule, or what else it is to be called.
        bars: the computations of each rank shown, in order.
        end: when the last rank ends, more than 0; the step starts at 0.
        transfers: messages between ranks shown; empty where communication is free.
        unit: of all times: "s", or nothing where a forward's time is the unit.
        ranks: the rank of each row of `bars`, ascending; not all where the pipeline is too tall.
        pp_size: ranks of the whole pipeline.
        num_stages: of the whole pipeline.
        n_microbatches: of the step.
        idle_share: of all ranks' time, the share without a computation: the bubble.
        kept: by stage; None where sizes are unknown.
    """

    name: str
    bars: tuple[tuple[Bar, ...], ...]
    end: float
    ranks: tuple[int, ...]
    pp_size: int
    num_stages: int
    n_microbatches: int
    idle_share: float
    transfers: tuple[Transfer, ...] = ()
    unit: str = ""
    kept: tuple[Kept, ...] | None = None

    @classmethod
    def of_bars(
        cls,
        name: str,
        bars: Iterable[Iterable[Bar]],
        *,
        transfers: Iterable[Transfer] = (),
        unit: str = "",
        kept: tuple[Kept, ...] | None = None,
    ) -> Timeline:
        """The timeline of all ranks' computations.

        Args:
            name: see the class, as for the others.
            bars: of every rank, in order; at least one in all takes time.
            transfers: between them.
            unit: of the times.
            kept: by stage.
        """
        rows = tuple(map(tuple, bars))
        end = max(bar.end for row in rows for bar in row)
        busy = sum(bar.end - bar.start for row in rows for bar in row)
        return cls(
            name=name,
            bars=rows,
            end=end,
            ranks=tuple(range(len(rows))),
            pp_size=len(rows),
            num_stages=1 + max(bar.action.stage for row in rows for bar in row),
            n_microbatches=1 + max(bar.action.microbatch or 0 for row in rows for bar in row),
            idle_share=1 - busy / (end * len(rows)),
            transfers=tuple(transfers),
            unit=unit,
            kept=kept,
        )

    @cached_property
    def row_of(self) -> dict[int, int]:
        """The row of each rank shown."""
        return {rank: row for row, rank in enumerate(self.ranks)}

    @cached_property
    def chunks(self) -> dict[int, tuple[int, int]]:
        """By stage, which of its rank's stages it is, and how many its rank has."""
        found: dict[int, tuple[int, int]] = {}
        for row in self.bars:
            stages = sorted({bar.action.stage for bar in row})
            found.update({stage: (k, len(stages)) for k, stage in enumerate(stages)})
        return found

    @cached_property
    def kinds(self) -> tuple[ActionKind, ...]:
        """The kinds of computations that occur, in the order in which a microbatch sees them."""
        found = {bar.action.kind for row in self.bars for bar in row}
        return tuple(kind for kind in (_F, _B, _I, _W) if kind in found)

    @cached_property
    def shortest(self) -> float:
        """The shortest computation; infinity without any."""
        lengths = (bar.end - bar.start for row in self.bars for bar in row)
        return min((length for length in lengths if length > 0), default=float("inf"))

    def idle(self, row: int) -> float:
        """Time between 0 and the end in which a row's rank does not compute."""
        return max(0.0, self.end - sum(bar.end - bar.start for bar in self.bars[row]))

    def idle_of(self, row: int) -> float:
        """The same as a share of the step."""
        return self.idle(row) / self.end

    def live(self, row: int) -> tuple[Level, ...]:
        """How many activations a row's rank holds when.

        An activation is that of one stage and microbatch: it is held from its forward's start to
        the end of the last part of its backward.
        """
        return self._levels(row, lambda _stage: Kept(1, 1))

    def live_bytes(self, row: int) -> tuple[Level, ...]:
        """How many bytes these are; all zero where `kept` is None."""
        kept = self.kept
        return self._levels(row, lambda stage: Kept(0, 0) if kept is None else kept[stage])

    def _levels(self, row: int, kept: Callable[[int], Kept]) -> tuple[Level, ...]:
        bars = self.bars[row]
        last = {(bar.action.stage, bar.action.microbatch): k for k, bar in enumerate(bars)}
        changes: dict[float, int] = {0.0: 0}
        for k, (action, (start, end)) in enumerate(_held_for(bars)):
            held = kept(action.stage)
            if action.kind is _F:
                changes[start] = changes.get(start, 0) + held.activations
            elif last[action.stage, action.microbatch] == k:
                now = held.weight if action.kind is _W else held.activations
                changes[end] = changes.get(end, 0) - now
            elif action.kind is _I:
                changes[end] = changes.get(end, 0) - held.activations + held.weight
        times = sorted(changes)
        return tuple(map(Level, times, accumulate(changes[time] for time in times)))


def _held_for(bars: Iterable[Bar]) -> Iterator[tuple[Action, tuple[float, float]]]:
    """Computations with their times; the parts of a group run at once, for as long as all of it."""
    for group, same in groupby(bars, key=lambda bar: bar.group):
        parts = list(same)
        for bar in parts:
            whole = (parts[0].start, parts[-1].end)
            yield bar.action, (bar.start, bar.end) if group is None else whole
