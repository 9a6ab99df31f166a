"""Recorded steps as timelines, and the plans that they are compared with."""

from __future__ import annotations

import random

import pytest

from hfpp.errors import PipelineConfigError
from hfpp.plan.costs import UnitCost
from hfpp.plan.render.chrome_trace import Take
from hfpp.plan.render.planned import planned
from hfpp.plan.render.recorded import (
    Computed,
    RankRecord,
    Sent,
    compared,
    measured_costs,
    middle_take,
    recorded_takes,
    recorded_timeline,
    table_of,
)
from hfpp.plan.render.timeline import Timeline
from hfpp.plan.schedules import SCHEDULES, compute_table
from hfpp.plan.schedules.actions import parse_action


def record(
    *computed: tuple[str, float, float], sent: list[tuple[str, int, float]] | None = None
) -> RankRecord:
    if sent is None:
        sent = []
    return RankRecord(
        tuple(Computed(parse_action(text), start, end) for text, start, end in computed),
        tuple(Sent(parse_action(text), target, time, 64) for text, target, time in sent),
    )


STEP = [
    record(("0F0", 100.0, 101.0), ("0B0", 106.0, 108.0), sent=[("0SEND_F0", 1, 101.1)]),
    record(("1F0", 102.0, 103.0), ("1B0", 103.0, 105.0), sent=[("1SEND_B0", 0, 105.2)]),
]


def test_a_step_starts_with_its_first_computation_and_messages_end_where_they_are_taken() -> None:
    line = recorded_timeline("1F1B", STEP)
    assert [(str(b.action), b.start, b.end) for b in line.bars[1]] == [
        ("1F0", 2.0, 3.0),
        ("1B0", 3.0, 5.0),
    ]
    assert line.end == 8.0
    assert line.unit == "s"
    assert [(t.source, t.target, str(t.action), t.size) for t in line.transfers] == [
        (0, 1, "0SEND_F0", 64),
        (1, 0, "1SEND_B0", 64),
    ]
    times = [time for t in line.transfers for time in (t.start, t.end)]
    assert times == pytest.approx([1.1, 2.0, 5.2, 6.0])


def test_a_message_that_nobody_takes_ends_when_it_is_sent() -> None:
    frozen = [record(("0F0", 0, 1), sent=[("0SEND_F0", 1, 1.5)]), record(("1F1", 2, 3))]
    (transfer,) = recorded_timeline("x", frozen).transfers
    assert transfer.start == transfer.end == 1.5


def test_steps_of_one_run_follow_each_other() -> None:
    later = [
        RankRecord(tuple(c._replace(start=c.start + 20, end=c.end + 20) for c in rank.computed), ())
        for rank in STEP
    ]
    takes = recorded_takes("1F1B", [(7, STEP), (8, later)])
    assert [(take.step, take.start) for take in takes] == [(7, 0.0), (8, 20.0)]


def noisy(line: Timeline, seed: int) -> Timeline:
    """The same step with computations that take up to a tenth longer."""
    draw = random.Random(seed)
    rows = [
        [b._replace(end=b.start + (b.end - b.start) * draw.uniform(0.9, 1.1)) for b in row]
        for row in line.bars
    ]
    return Timeline.of_bars(line.name, rows, unit="s")


@pytest.mark.parametrize("name", ["Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"])
def test_a_plan_with_recorded_times_is_the_step_that_was_recorded(name: str) -> None:
    """A step that ran exactly as planned, with different stages, is planned again as it ran."""
    table = compute_table(SCHEDULES[name], pp_size=2, n_microbatches=8)
    costs = [
        UnitCost(forward=1.0 + s, backward_input=1.5 + s, backward_weight=0.5 + s)
        for s in range(table.num_stages)
    ]
    line = planned(table, costs)
    found = measured_costs([line])
    for one, other in zip(found, costs, strict=True):
        assert one.backward == pytest.approx(other.backward)
        assert one.forward == pytest.approx(other.forward)
    comparison = compared([Take(line)], table)
    assert comparison.planned.end == pytest.approx(line.end)
    for row, expected in zip(comparison.planned.bars, line.bars, strict=True):
        assert [b.action for b in row] == [b.action for b in expected]
        assert [b.start for b in row] == pytest.approx([b.start for b in expected])
    medians = measured_costs([noisy(line, seed) for seed in range(20)])
    assert [c.forward for c in medians] == pytest.approx([c.forward for c in costs], rel=0.05)


def test_what_ran_is_a_table() -> None:
    table = compute_table(SCHEDULES["1F1B"], pp_size=3, n_microbatches=4)
    costs = [UnitCost(forward=1.0, backward_input=1.0, backward_weight=1.0)] * 3
    again = table_of(planned(table, costs))
    assert [[str(step.action) for step in again.steps(rank)] for rank in range(3)] == [
        [str(step.action) for step in table.steps(rank)] for rank in range(3)
    ]


def test_the_step_in_the_middle_is_chosen_or_the_one_asked_for() -> None:
    takes = [
        Take(recorded_timeline("x", [record(("0F0", 0, length))]), "", step)
        for step, length in ((1, 9.0), (2, 3.0), (3, 5.0))
    ]
    plan = Take(recorded_timeline("x", [record(("0F0", 0, 4.0))]), "planned")
    assert middle_take([plan, *takes]).step == 3
    assert middle_take([plan, *takes], step=2).timeline.end == 3.0
    assert middle_take([plan]) is plan
    with pytest.raises(PipelineConfigError, match="steps 1, 2, 3"):
        middle_take(takes, step=4)


@pytest.mark.parametrize("actions", [["0B0"], ["1F0"], ["0F0", "2F0"]])
def test_stages_without_a_forward_are_no_costs(actions: list[str]) -> None:
    line = recorded_timeline("x", [record(*((text, k, k + 1) for k, text in enumerate(actions)))])
    with pytest.raises(PipelineConfigError, match="every stage from 0 on"):
        measured_costs([line])
