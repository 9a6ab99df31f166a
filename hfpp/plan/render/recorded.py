"""What a real run did, as timelines, and what was to be expected of it."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from hfpp.errors import PipelineConfigError
from hfpp.plan.costs import UnitCost
from hfpp.plan.render.chrome_trace import Take
from hfpp.plan.render.planned import planned
from hfpp.plan.render.timeline import Bar, Timeline, Transfer
from hfpp.plan.schedules.actions import Action, ActionKind, ScheduleTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "Comparison",
    "Computed",
    "RankRecord",
    "Sent",
    "compared",
    "measured_costs",
    "middle_take",
    "recorded_takes",
    "recorded_timeline",
    "table_of",
]

_F, _B = ActionKind.FORWARD, ActionKind.FULL_BACKWARD
_I, _W = ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT


class Computed(NamedTuple):
    """One computation of a rank, in seconds."""

    action: Action
    start: float
    end: float


class Sent(NamedTuple):
    """One message that a rank sent: when, in seconds, and how large, in bytes."""

    action: Action
    target: int
    time: float
    size: int


class RankRecord(NamedTuple):
    """What a rank did in one step, in order."""

    computed: tuple[Computed, ...]
    sent: tuple[Sent, ...]


class Comparison(NamedTuple):
    """A recorded step, and what was planned for it."""

    planned: Timeline
    recorded: Take


def recorded_timeline(name: str, ranks: Sequence[RankRecord]) -> Timeline:
    """The timeline of a recorded step; it starts with the first computation.

    When a message arrives is not seen. Its transfer ends when what takes it starts, which may be
    later, as that may have had other reasons to wait.

    Args:
        name: of the schedule.
        ranks: all, on one clock; at least one computation.
    """
    begin = _begin(ranks)
    bars = [[Bar(c.action, c.start - begin, c.end - begin) for c in r.computed] for r in ranks]
    starts = {bar.action: bar.start for row in bars for bar in row}
    transfers: list[Transfer] = []
    for rank, record in enumerate(ranks):
        for sent in record.sent:
            start = sent.time - begin
            taken = [starts[taker] for taker in _takers(sent.action) if taker in starts]
            end = max(start, min(taken, default=start))
            transfers.append(Transfer(rank, sent.target, sent.action, start, end, sent.size))
    return Timeline.of_bars(name, bars, transfers=transfers, unit="s")


def _begin(ranks: Sequence[RankRecord]) -> float:
    return min(computed.start for record in ranks for computed in record.computed)


def _takers(sent: Action) -> Iterable[Action]:
    """What may take a message; the other kind of a backward takes none that the first does."""
    if sent.kind is ActionKind.SEND_FORWARD:
        return (Action(sent.stage + 1, _F, sent.microbatch),)
    return tuple(Action(sent.stage - 1, kind, sent.microbatch) for kind in (_B, _I))


def recorded_takes(name: str, steps: Sequence[tuple[int, Sequence[RankRecord]]]) -> list[Take]:
    """The timelines of several steps, for one trace that starts with the first of them.

    Args:
        name: of the schedule.
        steps: their numbers and records, in order.
    """
    begin = _begin(steps[0][1])
    return [
        Take(recorded_timeline(name, ranks), "", step, _begin(ranks) - begin)
        for step, ranks in steps
    ]


def measured_costs(timelines: Sequence[Timeline]) -> tuple[UnitCost, ...]:
    """What each stage's computations took: the medians over steps and microbatches.

    Args:
        timelines: recorded, of one pipeline.

    Raises:
        PipelineConfigError: a stage has no forward.
    """
    times: dict[tuple[int, ActionKind], list[float]] = {}
    for timeline in timelines:
        for bar in (bar for row in timeline.bars for bar in row):
            times.setdefault((bar.action.stage, bar.action.kind), []).append(bar.end - bar.start)
    stages = {stage for stage, _ in times}
    if stages != set(range(len(stages))) or any((stage, _F) not in times for stage in stages):
        raise PipelineConfigError(
            f"the recorded step has computations of stages {sorted(stages)[:20]}: to plan with "
            "their times, every stage from 0 on must have run a forward"
        )
    middle = {key: median(found) for key, found in times.items()}
    costs = []
    for stage in range(len(stages)):
        whole = middle.get((stage, _B), 0.0)
        inputs = middle.get((stage, _I), whole / 2)
        weights = middle.get((stage, _W), whole - inputs if (stage, _I) not in middle else 0.0)
        costs.append(
            UnitCost(
                forward=middle[stage, _F], backward_input=inputs, backward_weight=max(0.0, weights)
            )
        )
    return tuple(costs)


def table_of(timeline: Timeline) -> ScheduleTable:
    """The actions of a timeline as a table: what each rank did, in the order in which it did it."""
    rows = [[bar.action for bar in row] for row in timeline.bars]
    return ScheduleTable.from_rows(timeline.name, rows)


def compared(
    takes: Sequence[Take],
    table: ScheduleTable | None = None,
    *,
    step: int | None = None,
    costs: Sequence[UnitCost] | None = None,
    **messages: Any,
) -> Comparison:
    """A recorded step, and what was planned for it.

    Without costs the plan takes for each computation the median time of all that are recorded of
    its stage and kind, and lets messages arrive at once: what the recorded step takes longer went
    into messages, into waiting for cores, or into computations that took longer than usual.

    Args:
        takes: recorded steps.
        table: what was planned; None: what was recorded, in its order.
        step: the number of the step; None: the one whose time is the median.
        costs: by stage, in seconds; None: as recorded.
        **messages: what `planned` is told of messages.

    Raises:
        PipelineConfigError: no such step; or the table does not fit the costs.
    """
    take = middle_take(takes, step=step)
    if costs is None:
        costs = measured_costs([take.timeline for take in _of_run(takes)])
    return Comparison(planned(table or table_of(take.timeline), costs, unit="s", **messages), take)


def _of_run(takes: Sequence[Take]) -> list[Take]:
    """Without the plans that stand in the same file."""
    return [take for take in takes if take.label != "planned"] or list(takes)


def middle_take(takes: Sequence[Take], *, step: int | None = None) -> Take:
    """The recorded take of a step; without one, of the step whose time is the median.

    Args:
        takes: of one file.
        step: its number.

    Raises:
        PipelineConfigError: no such step.
    """
    recorded = _of_run(takes)
    if step is None:
        return sorted(recorded, key=lambda take: take.timeline.end)[(len(recorded) - 1) // 2]
    found = next((take for take in recorded if take.step == step), None)
    if found is None:
        steps = ", ".join(str(take.step) for take in recorded if take.step is not None)
        raise PipelineConfigError(
            f"step ({step}) is not in the trace, which has the steps {steps or '(none numbered)'}: "
            "give one of these, or leave it out for the one in the middle"
        )
    return found
