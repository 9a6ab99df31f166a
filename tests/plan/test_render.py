"""The picture of a schedule, and the times that it shows."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given

from hfpp.errors import PipelineConfigError
from hfpp.plan.actions import ScheduleTable, parse_action
from hfpp.plan.lowering import lower
from hfpp.plan.render import schedule_svg
from hfpp.plan.schedule import SCHEDULES, compute_table
from tests.plan.test_schedule import sizes, table_of

SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    return [element for element in root.iter(f"{SVG}rect") if "data-action" in element.attrib]


def box(element: ElementTree.Element) -> tuple[float, float, float, float]:
    x, y, width, height = (float(element.attrib[k]) for k in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


@given(sizes(max_pp=4, max_microbatches=8))
def test_every_action_is_drawn_once_inside_the_picture(size: dict[str, Any]) -> None:
    table = table_of(**size)
    svg = schedule_svg(table)
    bars = drawn(svg)
    expected = Counter(
        str(leaf)
        for rank in range(table.pp_size)
        for step in table.steps(rank)
        for leaf in step.action.leaves
    )
    assert Counter(bar.attrib["data-action"] for bar in bars) == expected
    root = ElementTree.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for bar in bars:
        left, top, right, bottom = box(bar)
        assert left >= 0
        assert top >= 0
        assert right <= width
        assert bottom <= height


@given(sizes(max_pp=4, max_microbatches=8))
def test_bars_of_a_rank_follow_each_other_and_ranks_lie_below_each_other(
    size: dict[str, Any],
) -> None:
    table = table_of(**size)
    rank_of = {
        str(a): r for r in range(table.pp_size) for s in table.steps(r) for a in s.action.leaves
    }
    rows: dict[int, list[tuple[float, float, float, float]]] = {}
    for bar in drawn(schedule_svg(table)):
        rows.setdefault(rank_of[bar.attrib["data-action"]], []).append(box(bar))
    for boxes in rows.values():
        assert len({top for _, top, _, _ in boxes}) == 1
        for before, after in pairwise(sorted(boxes)):
            assert before[2] <= after[0] + 0.02  # rounded to hundredths
    tops = [rows[rank][0][1] for rank in range(table.pp_size)]
    bottoms = [rows[rank][0][3] for rank in range(table.pp_size)]
    assert all(bottom <= top for bottom, top in zip(bottoms, tops[1:], strict=False))


def test_widths_are_to_scale() -> None:
    table = compute_table(SCHEDULES["InterleavedZeroBubble"], pp_size=2, n_microbatches=4)
    bars = {b.attrib["data-action"]: box(b) for b in drawn(schedule_svg(table, weight=0.5))}
    wide = {action: right - left + 1 for action, (left, _, right, _) in bars.items()}  # and the gap
    assert wide["0I0"] / wide["0F0"] == pytest.approx(1.5, rel=0.02)
    assert wide["0W0"] / wide["0F0"] == pytest.approx(0.5, rel=0.02)


def test_overlapped_pairs_are_framed() -> None:
    table = compute_table(SCHEDULES["DualPipeV"], pp_size=2, n_microbatches=6)
    pairs = sum(1 for r in range(2) for s in table.steps(r) if s.action.parts)
    root = ElementTree.fromstring(schedule_svg(table))
    groups = {group.attrib.get("class"): group for group in root.iter(f"{SVG}g")}
    assert pairs > 0
    assert len(groups["pairs"]) == pairs


def test_texts_are_escaped_and_say_what_is_seen() -> None:
    table = compute_table(SCHEDULES["1F1B"], pp_size=4, n_microbatches=8)
    svg = schedule_svg(table, title="<a & b>")
    texts = [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert "<a & b>" in texts
    assert "4 ranks · 4 stages · 8 microbatches · 27.3 % idle" in texts
    assert {"forward", "backward", "idle", "rank 0", "rank 3"} <= set(texts)
    assert "backward: weights" not in texts


@pytest.mark.parametrize("pp_size", [4, 16, 64])
def test_rows_of_many_ranks_stay_apart(pp_size: int) -> None:
    table = compute_table(SCHEDULES["1F1B"], pp_size=pp_size, n_microbatches=pp_size)
    svg = schedule_svg(table)
    heights = [bottom - top for _, top, _, bottom in map(box, drawn(svg))]
    assert min(heights) >= 7
    labels = [
        float(element.attrib["y"])
        for element in ElementTree.fromstring(svg).iter(f"{SVG}text")
        if (element.text or "").startswith("rank ")
    ]
    assert min(after - before for before, after in pairwise(labels)) >= 9.5


def test_communication_changes_nothing_in_the_picture() -> None:
    table = compute_table(SCHEDULES["ZBVZeroBubble"], pp_size=3, n_microbatches=6)
    assert schedule_svg(lower(table, unshard=False, reduce_grad=False)) == schedule_svg(table)


def test_a_deadlock_is_an_error_and_no_picture() -> None:
    rows = ("0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0")
    table = ScheduleTable.from_rows(
        "x", tuple(tuple(map(parse_action, row.split())) for row in rows)
    )
    with pytest.raises(PipelineConfigError, match="deadlocks"):
        schedule_svg(table)


@pytest.mark.parametrize(
    "costs", [{"forward": 0}, {"backward": -1}, {"weight": 2.0}, {"weight": 0.0}]
)
def test_costs_are_checked(costs: dict[str, float]) -> None:
    table = compute_table(SCHEDULES["1F1B"], pp_size=2, n_microbatches=2)
    with pytest.raises(PipelineConfigError, match=next(iter(costs))):
        schedule_svg(table, **costs)
