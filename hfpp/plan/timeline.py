"""When each action of a table runs, given what a forward and a backward cost."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from hfpp.errors import PipelineConfigError
from hfpp.plan.actions import Action, ActionKind, ScheduleTable
from hfpp.plan.dataflow import Result, gives, needs
from hfpp.plan.verify import verify

__all__ = ["Bar", "Costs", "Timeline", "timeline"]

_F, _B = ActionKind.FORWARD, ActionKind.FULL_BACKWARD
_I, _W = ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """The time of one stage's work on one microbatch, in any unit; communication is free.

    Attributes:
        forward: a forward.
        backward: a whole backward.
        weight: the part of a backward that makes the weights' gradients; None: half of it.
    """

    forward: float = 1.0
    backward: float = 2.0
    weight: float | None = None

    def __post_init__(self) -> None:
        weight = self.of(_W)
        if not (self.forward > 0 and self.backward > 0 and 0 < weight < self.backward):
            raise PipelineConfigError(
                f"forward ({self.forward}), backward ({self.backward}) and weight ({weight}) must "
                "be positive, and weight, as a part of it, smaller than backward"
            )

    def of(self, kind: ActionKind) -> float:
        """The time of one action; zero for those that do not compute."""
        weight = self.backward / 2 if self.weight is None else self.weight
        parts = {_F: self.forward, _B: self.backward, _W: weight, _I: self.backward - weight}
        return parts.get(kind, 0.0)


class Bar(NamedTuple):
    """One computation in time."""

    action: Action
    start: float
    end: float
    group: Action | None  # the overlapped group that it is a part of


@dataclass(frozen=True, slots=True)
class Timeline:
    """The computations of all ranks in time.

    Attributes:
        bars: by rank, in order.
        end: when the last rank ends; the first starts at 0.
    """

    bars: tuple[tuple[Bar, ...], ...]
    end: float

    def idle(self, rank: int) -> float:
        """Time between 0 and the end in which a rank does not compute."""
        return self.end - sum(bar.end - bar.start for bar in self.bars[rank])

    @property
    def idle_share(self) -> float:
        """The share of all ranks' time that is idle: the bubble."""
        return sum(map(self.idle, range(len(self.bars)))) / (self.end * len(self.bars))


def timeline(table: ScheduleTable, costs: Costs) -> Timeline:
    """Runs a table in time: every action as soon as its rank and what it takes are ready.

    An overlapped group waits for what all its parts take, and its parts run one after another.

    Raises:
        PipelineConfigError: the table cannot run to its end.
    """
    rows = [[s.action for s in table.steps(rank)] for rank in range(table.pp_size)]
    position = [0] * table.pp_size
    clock = [0.0] * table.pp_size
    bars: list[list[Bar]] = [[] for _ in rows]
    ends: dict[Result, float] = {}
    waiting: dict[Result, list[int]] = {}
    ready = deque(range(table.pp_size))

    while ready:
        rank = ready.popleft()
        while position[rank] < len(rows[rank]):
            action = rows[rank][position[rank]]
            leaves = [leaf for leaf in action.leaves if leaf.kind.is_compute]
            taken = [key for leaf in leaves if (key := needs(table, leaf)) is not None]
            absent = next((key for key in taken if key not in ends), None)
            if absent is not None:
                waiting.setdefault(absent, []).append(rank)
                break
            time = max([clock[rank], *(ends[key] for key in taken)])
            for leaf in leaves:
                end = time + costs.of(leaf.kind)
                bars[rank].append(Bar(leaf, time, end, action if action.parts else None))
                time = end
                if (result := gives(leaf)) is not None:
                    ends[result] = end
                    ready.extend(waiting.pop(result, ()))
            clock[rank] = time
            position[rank] += 1
    if any(position[rank] < len(row) for rank, row in enumerate(rows)):
        verify(table)  # says what is wrong
        raise PipelineConfigError(f"{table.name}: the schedule does not run to its end")
    return Timeline(tuple(map(tuple, bars)), max(clock))
