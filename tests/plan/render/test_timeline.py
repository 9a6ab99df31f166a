"""What a timeline says of itself: idle time, and what ranks hold when."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings

from hfpp.plan.costs import UnitCost
from hfpp.plan.render.planned import planned
from hfpp.plan.render.timeline import Bar, Kept, Timeline
from hfpp.plan.schedules import SCHEDULES, compute_table
from hfpp.plan.schedules.actions import ScheduleTable, parse_action
from hfpp.plan.schedules.simulator import simulate, uniform_costs
from hfpp.plan.schedules.verifier import peak_activations
from tests.plan.schedules.tables import parse_rows
from tests.plan.schedules.test_named import sizes, table_of


def timeline_of(name: str, pp_size: int, n_microbatches: int, **changes: Any) -> Timeline:
    table = compute_table(SCHEDULES[name], pp_size=pp_size, n_microbatches=n_microbatches)
    return planned(table, uniform_costs(table.num_stages), unit="", **changes)


def held_by_hand(bars: tuple[Bar, ...], time: float, kept: Kept) -> int:
    """Bytes at one moment, stage by stage and microbatch by microbatch."""
    total = 0
    for forward in bars:
        if forward.action.kind.value != "F" or forward.start > time:
            continue
        parts = {
            bar.action.kind.value: bar.end
            for bar in bars
            if bar.action.stage == forward.action.stage
            and bar.action.microbatch == forward.action.microbatch
        }
        if parts.get("B", parts.get("I", time + 1)) > time:
            total += kept.activations
        elif parts.get("W", time) > time:
            total += kept.weight
    return total


@settings(max_examples=40)
@given(sizes(max_pp=4, max_microbatches=8))
def test_what_is_held_is_what_counting_by_hand_gives(size: dict[str, Any]) -> None:
    table = table_of(**size)
    costs = [
        UnitCost(
            forward=1.0,
            backward_input=1.5,
            backward_weight=1.25,
            activation_bytes=10,
            weight_bytes=3,
        )
    ] * table.num_stages
    line = planned(table, costs)
    for row, bars in enumerate(line.bars):
        for levels, kept in (
            (line.live(row), Kept(1, 1)),
            (line.live_bytes(row), Kept(10, 3)),
        ):
            assert levels[0].time == 0
            assert levels[-1].held == 0
            for level, following in pairwise(levels):
                middle = (level.time + following.time) / 2
                assert level.held == held_by_hand(bars, middle, kept)


@settings(max_examples=40)
@given(sizes(max_pp=5, max_microbatches=12))
def test_peaks_are_those_of_the_verifier(size: dict[str, Any]) -> None:
    table = table_of(**size)
    line = planned(table, uniform_costs(table.num_stages))
    peaks = tuple(max(level.held for level in line.live(r)) for r in range(table.pp_size))
    assert peaks == tuple(peak_activations(table))


def test_the_parts_of_a_group_are_held_together() -> None:
    """Whichever is drawn first: what a group's backward frees is there until the group ends."""
    table = ScheduleTable.from_rows(
        "groups", parse_rows("0F0 1F0 (1B0;0F1)OVERLAP_F_B 0B0 1F1 1B1 0B1")
    )
    line = planned(table, uniform_costs(2, activation_bytes=10))
    assert max(level.held for level in line.live(0)) == peak_activations(table)[0] == 3
    step = simulate(table, uniform_costs(2, activation_bytes=10))
    assert max(level.held for level in line.live_bytes(0)) == step.rank(0).peak_activation_bytes
    assert step.rank(0).peak_activation_bytes == 30


@pytest.mark.parametrize("pp_size", [2, 4, 8])
def test_peaks_of_gpipe_and_1f1b(pp_size: int) -> None:
    """All microbatches, and one more than the ranks that follow (arXiv 2104.04473)."""
    for name, peaks in (("GPipe", [16] * pp_size), ("1F1B", list(range(pp_size, 0, -1)))):
        line = timeline_of(name, pp_size, 16)
        assert [max(level.held for level in line.live(r)) for r in range(pp_size)] == peaks


def test_idle_shares_add_up() -> None:
    line = timeline_of("1F1B", 4, 8)
    assert line.idle_share == pytest.approx(9 / 33)
    assert [line.idle_of(row) for row in range(4)] == pytest.approx([9 / 33] * 4)


def test_later_stages_of_a_rank_are_told_apart() -> None:
    line = timeline_of("ZBVZeroBubble", 3, 6)
    assert line.chunks == {0: (0, 2), 1: (0, 2), 2: (0, 2), 3: (1, 2), 4: (1, 2), 5: (1, 2)}
    assert [kind.value for kind in line.kinds] == ["F", "I", "W"]


def test_a_timeline_of_bars_alone_knows_its_sizes() -> None:
    bars = [[("0F0", 0, 2), ("0B0", 5, 6)], [("1F0", 2, 3), ("1B0", 3, 5)]]
    rows = [[Bar(parse_action(text), start, end) for text, start, end in row] for row in bars]
    line = Timeline.of_bars("mine", rows, unit="s")
    assert (line.end, line.pp_size, line.num_stages, line.n_microbatches) == (6, 2, 2, 1)
    assert line.idle_share == pytest.approx(0.5)
    assert line.shortest == 1


def test_a_tall_pipeline_is_shown_by_some_of_its_ranks() -> None:
    line = timeline_of("GPipe", 1000, 4)
    whole = 3 * 4 / (3 * (4 + 999))
    assert line.pp_size == 1000
    assert len(line.bars) == len(line.ranks) == 128
    assert (line.ranks[0], line.ranks[-1]) == (0, 999)
    assert line.idle_share == pytest.approx(1 - whole)  # of all ranks, not of those shown
    assert all(len(row) == 8 for row in line.bars)
    assert {bar.action.stage for bar in line.bars[-1]} == {999}
