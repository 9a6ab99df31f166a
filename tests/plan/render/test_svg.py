"""The SVG picture: every bar in its place, texts that fit, one scale."""

from __future__ import annotations

import base64
import math
import zlib
from collections import Counter
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings

from hfpp.errors import PipelineConfigError
from hfpp.plan.costs import UnitCost
from hfpp.plan.render import schedule_html, schedule_svg
from hfpp.plan.render.layout import text_width
from hfpp.plan.render.planned import planned
from hfpp.plan.render.svg import comparison_svg, timeline_svg
from hfpp.plan.schedules import SCHEDULES, compute_table
from hfpp.plan.schedules.actions import ScheduleTable, parse_action
from hfpp.plan.schedules.lowering import lower
from hfpp.plan.schedules.simulator import Link, uniform_costs
from tests.plan.schedules.test_named import sizes, table_of

SVG = "{http://www.w3.org/2000/svg}"
Box = tuple[float, float, float, float]


def drawn(svg: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    return [element for element in root.iter(f"{SVG}rect") if "data-action" in element.attrib]


def box(element: ElementTree.Element) -> Box:
    x, y, width, height = (float(element.attrib[k]) for k in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def texts(svg: str) -> list[str]:
    return [t.text or "" for t in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def text_boxes(svg: str) -> list[tuple[str, Box]]:
    """Every text with about the room that it takes."""
    found = []
    for element in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        x, y, size = (float(element.attrib[name]) for name in ("x", "y", "font-size"))
        width = text_width(element.text or "", size)
        x -= {"start": 0, "middle": width / 2, "end": width}[
            element.attrib.get("text-anchor", "start")
        ]
        found.append((element.text or "", (x, y - 0.75 * size, x + width, y)))
    return found


def groups(svg: str, name: str) -> list[ElementTree.Element]:
    return [g for g in ElementTree.fromstring(svg).iter(f"{SVG}g") if g.get("class") == name]


@settings(max_examples=40)
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


@settings(max_examples=40)
@given(sizes(max_pp=4, max_microbatches=8))
def test_bars_of_a_rank_follow_each_other_and_ranks_lie_below_each_other(
    size: dict[str, Any],
) -> None:
    table = table_of(**size)
    rank_of = {
        str(a): r for r in range(table.pp_size) for s in table.steps(r) for a in s.action.leaves
    }
    rows: dict[int, list[Box]] = {}
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


def test_costs_of_stages_are_drawn_to_scale_in_their_unit() -> None:
    table = compute_table(SCHEDULES["1F1B"], pp_size=2, n_microbatches=2)
    slow, fast = (
        UnitCost(forward=f, backward_input=f, backward_weight=f, activation_bytes=3 << 20)
        for f in (0.003, 0.001)
    )
    svg = schedule_svg(table, costs=[slow, fast])
    bars = {b.attrib["data-action"]: box(b) for b in drawn(svg)}
    wide = {action: right - left + 1 for action, (left, _, right, _) in bars.items()}
    assert wide["0F0"] / wide["1F0"] == pytest.approx(3, rel=0.02)
    assert {"time (ms)", "live bytes", "6.0 MiB", "3.0 MiB"} <= set(texts(svg))


def test_overlapped_pairs_are_framed() -> None:
    table = compute_table(SCHEDULES["DualPipeV"], pp_size=2, n_microbatches=6)
    pairs = sum(1 for r in range(2) for s in table.steps(r) if s.action.parts)
    (frames,) = groups(schedule_svg(table), "pairs")
    assert pairs > 0
    assert len(frames) == pairs


def test_texts_are_escaped_and_say_what_is_seen() -> None:
    table = compute_table(SCHEDULES["1F1B"], pp_size=4, n_microbatches=8)
    words = texts(schedule_svg(table, title="<a & b>"))
    assert "<a & b>" in words
    assert "4 ranks · 4 stages · 8 microbatches · 27.3 % idle" in words
    assert {"forward", "backward", "idle", "live activations", "rank 0", "rank 3"} <= set(words)
    assert "backward: weights" not in words
    assert "communication" not in words
    assert words.count("27.3 %") == 4
    assert [words[words.index(f"rank {rank}") + 2] for rank in range(4)] == ["4", "3", "2", "1"]


@pytest.mark.parametrize(
    ("name", "pp_size", "n_microbatches"),
    [
        ("1F1B", 4, 8),
        ("DualPipeV", 4, 8),
        ("ZBVZeroBubble", 8, 100),
        ("InterleavedZeroBubble", 16, 32),
        ("GPipe", 32, 8),
        ("1F1B", 64, 64),
        ("Interleaved1F1B", 64, 128),
        ("GPipe", 1, 1),
    ],
)
def test_no_text_lies_on_another_or_leaves_the_picture(
    name: str, pp_size: int, n_microbatches: int
) -> None:
    table = compute_table(SCHEDULES[name], pp_size=pp_size, n_microbatches=n_microbatches)
    svg = schedule_svg(table)
    width = float(ElementTree.fromstring(svg).attrib["width"])
    by_line: dict[int, list[tuple[str, Box]]] = {}
    for words, (left, top, right, bottom) in text_boxes(svg):
        assert left >= 0, words
        assert right <= width, words
        for line in range(math.floor(top), math.ceil(bottom)):
            by_line.setdefault(line, []).append((words, (left, top, right, bottom)))
    for found in by_line.values():
        for one, other in pairwise(sorted(found, key=lambda entry: entry[1][0])):
            apart = one[1][2] <= other[1][0] or one[1][3] <= other[1][1] or other[1][3] <= one[1][1]
            assert apart, (one, other)


@pytest.mark.parametrize(("name", "pp_size"), [("1F1B", 16), ("ZBVZeroBubble", 8)])
def test_numbers_lie_within_their_bars(name: str, pp_size: int) -> None:
    table = compute_table(SCHEDULES[name], pp_size=pp_size, n_microbatches=2 * pp_size)
    svg = schedule_svg(table)
    (numbers,) = groups(svg, "numbers")
    lefts = sorted((box(bar)[1], box(bar)[0], box(bar)[2]) for bar in drawn(svg))
    assert len(numbers) > 100
    for number in numbers:
        x, y, size = (float(number.attrib[key]) for key in ("x", "y", "font-size"))
        half = text_width(number.text or "", size) / 2
        rows = [(left, right) for top, left, right in lefts if top < y < top + 30]
        assert any(left <= x - half and x + half <= right for left, right in rows), number.text


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


def test_bars_without_number_are_pictures_of_their_mean_colours() -> None:
    table = compute_table(SCHEDULES["GPipe"], pp_size=4, n_microbatches=2000)
    svg = schedule_svg(table)
    assert drawn(svg) == []
    assert len(svg) < 90_000  # a bar takes about 100
    images = list(ElementTree.fromstring(svg).iter(f"{SVG}image"))
    assert len(images) == 4
    forward, backward, idle = (45, 105, 214), (22, 146, 100), (230, 234, 240)
    seen = [pixels(image.attrib["href"]) for image in images]
    for row in seen:
        assert all(
            min(c[i] for c in (forward, backward, idle)) - 1 <= p[i] for p in row for i in range(3)
        )
    assert seen[0][3] == forward
    assert seen[0][-3] == backward
    blue = sum(pixel == forward for pixel in seen[0]) / len(seen[0])
    assert blue == pytest.approx(1 / 3, abs=0.01)


def pixels(uri: str) -> list[tuple[int, int, int]]:
    """The first line of a PNG picture as hfpp writes it."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width = int.from_bytes(data[16:20], "big")
    start = data.index(b"IDAT")
    raw = zlib.decompress(data[start + 4 :])
    line = raw[1 : 1 + 3 * width]
    return [tuple(line[i : i + 3]) for i in range(0, len(line), 3)]  # type: ignore[misc]


def timed(name: str, pp_size: int, n_microbatches: int) -> Any:
    table = compute_table(SCHEDULES[name], pp_size=pp_size, n_microbatches=n_microbatches)
    costs = uniform_costs(table.num_stages)
    return planned(table, costs, link=Link(latency=0.25), unit="")


def test_messages_that_take_time_are_strips_and_arrows() -> None:
    line = timed("1F1B", 4, 8)
    svg = timeline_svg(line)
    assert "communication" in texts(svg)
    (strips,) = groups(svg, "transfers")
    (arrows,) = groups(svg, "arrows")
    assert len(line.transfers) == 2 * 3 * 8
    assert len(list(arrows.iter(f"{SVG}path"))) >= len(line.transfers)
    bars = {b.attrib["data-action"]: box(b) for b in drawn(svg)}
    scale = (bars["0F0"][2] - bars["0F0"][0] + 1) / 1.0
    first = min(box(strip) for strip in strips if box(strip)[1] > bars["1F0"][1])
    assert first[0] == pytest.approx(bars["0F0"][2] + 1, abs=0.05)  # from the end of 0F0
    assert first[2] - first[0] == pytest.approx(0.25 * scale, abs=0.05)


def test_many_messages_are_strips_alone() -> None:
    svg = timeline_svg(timed("1F1B", 16, 32))
    assert groups(svg, "transfers")
    assert not groups(svg, "arrows")


def test_two_timelines_have_one_scale() -> None:
    table = compute_table(SCHEDULES["1F1B"], pp_size=2, n_microbatches=4)
    short = planned(table, uniform_costs(2), unit="s")
    long = planned(table, uniform_costs(2, forward=2.0, backward=4.0), unit="s")
    svg = comparison_svg(short, long)
    words = texts(svg)
    assert "one step: 15 s planned, 30 s recorded (+100.0 %)" in words
    assert any(word.startswith("planned: 2 ranks") for word in words)
    bars = drawn(svg)
    assert len(bars) == 2 * 2 * 2 * 4
    above, below = bars[: len(bars) // 2], bars[len(bars) // 2 :]
    assert max(box(bar)[3] for bar in above) < min(box(bar)[1] for bar in below)
    widths = [
        max(box(bar)[2] - box(bar)[0] for bar in half if bar.attrib["data-action"] == "0F0")
        for half in (above, below)
    ]
    assert widths[1] / widths[0] == pytest.approx(2, rel=0.03)


def test_a_figure_for_a_page_brings_all_that_it_needs() -> None:
    table = compute_table(SCHEDULES["1F1B"], pp_size=2, n_microbatches=4)
    html = schedule_html(table, title="mine", caption="<all>")
    figure = ElementTree.fromstring(html)
    assert figure.tag == "figure"
    assert "".join(figure.find("figcaption").itertext()) == "<all>"  # type: ignore[union-attr]
    elements = list(figure.iter())
    assert not any("id" in element.attrib for element in elements)
    assert not any(
        value.startswith("http")
        for e in elements
        for key, value in e.attrib.items()
        if "href" in key
    )
    assert {e.tag.rpartition("}")[2] for e in elements} <= {
        "figure", "figcaption", "svg", "g", "rect", "path", "text", "title", "image",
    }  # fmt: skip


def test_spelled_out_messages_change_nothing_in_the_picture() -> None:
    table = compute_table(SCHEDULES["ZBVZeroBubble"], pp_size=3, n_microbatches=6)
    assert schedule_svg(lower(table)) == schedule_svg(table)


def test_a_deadlock_is_an_error_and_no_picture() -> None:
    rows = ("0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0")
    table = ScheduleTable.from_rows(
        "x", tuple(tuple(map(parse_action, row.split())) for row in rows)
    )
    with pytest.raises(PipelineConfigError, match="deadlocks"):
        schedule_svg(table)


@pytest.mark.parametrize(
    ("costs", "named"),
    [
        ({"forward": -1}, "forward"),
        ({"backward": -1}, r"^backward \(-1\)"),
        ({"backward": float("nan")}, r"^backward \(nan\)"),
        ({"weight": 3.0}, "weight"),
        ({"forward": 0, "backward": 0}, "costs are 0"),
    ],
)
def test_costs_are_checked(costs: dict[str, float], named: str) -> None:
    table = compute_table(SCHEDULES["1F1B"], pp_size=2, n_microbatches=2)
    with pytest.raises(PipelineConfigError, match=named):
        schedule_svg(table, **costs)
