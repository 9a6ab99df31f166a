"""Traces: what viewers need, nothing lost on the way back, and files that are none."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfpp.errors import PipelineConfigError
from hfpp.plan.costs import UnitCost
from hfpp.plan.render.chrome_trace import Take, chrome_trace
from hfpp.plan.render.planned import planned
from hfpp.plan.render.timeline import Timeline
from hfpp.plan.render.trace_file import read_trace
from hfpp.plan.schedules import SCHEDULES, compute_table
from hfpp.plan.schedules.simulator import Link, uniform_costs
from tests.plan.schedules.test_named import sizes, table_of

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
MEMBERS = st.sampled_from(["ph", "action", "rank", "ts", "dur", "step", "from", "bytes", "label"])
EVENTS = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(MEMBERS, inner, max_size=6),
    max_leaves=20,
)


def timeline_of(size: dict[str, Any], latency: float = 0.3) -> Timeline:
    table = table_of(**size)
    costs = [
        UnitCost(
            forward=1e-3,
            backward_input=1.3e-3,
            backward_weight=0.9e-3,
            activation_bytes=100,
            weight_bytes=10,
        )
    ] * table.num_stages
    link = Link(latency=latency * 1e-3)
    return planned(table, costs, link=link, boundary_bytes=64)


def by_phase(document: dict[str, Any], phase: str) -> list[dict[str, Any]]:
    return [event for event in document["traceEvents"] if event["ph"] == phase]


@settings(max_examples=40)
@given(sizes(max_pp=4, max_microbatches=6), st.sampled_from([0.0, 0.3, 4.0]))
def test_what_viewers_need_is_there(size: dict[str, Any], latency: float) -> None:
    line = timeline_of(size, latency)
    take = Take(line, "planned", step=3, start=0.5)
    document = json.loads(json.dumps(chrome_trace([take, take._replace(label="recorded")])))
    events = document["traceEvents"]
    for event in events:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        if event["ph"] != "M":
            assert event["ts"] >= 500_000  # microseconds
    slices: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in by_phase(document, "X"):
        span = (event["ts"], event["ts"] + event["dur"])
        slices.setdefault((event["pid"], event["tid"]), []).append(span)
    for spans in slices.values():
        for before, after in pairwise(sorted(spans)):
            assert before[1] <= after[0] + 2e-3  # of one thread, rounded to nanoseconds
    named = {(e["pid"], e["tid"]) for e in by_phase(document, "M") if e["name"] == "thread_name"}
    assert set(slices) <= named
    names = {e["args"]["name"] for e in by_phase(document, "M") if e["name"] == "process_name"}
    assert names == {
        f"rank {rank}, {label}" for rank in range(line.pp_size) for label in ("planned", "recorded")
    }
    assert len(by_phase(document, "s")) == len(by_phase(document, "f")) == 2 * len(line.transfers)
    ends = {event["id"]: event for event in by_phase(document, "f")}
    for arrow in (*by_phase(document, "s"), *by_phase(document, "f"), *by_phase(document, "t")):
        spans = slices[arrow["pid"], arrow["tid"]]
        assert any(start <= arrow["ts"] <= end for start, end in spans)
        assert arrow["ts"] <= ends[arrow["id"]]["ts"]
    assert {event["name"] for event in by_phase(document, "C")} == {
        "live activations",
        "live bytes",
    }


def test_counters_are_the_levels_of_the_timeline() -> None:
    line = timeline_of({"name": "1F1B", "pp_size": 3, "stages_per_rank": 1, "n_microbatches": 4})
    counters = [
        (event["ts"], event["args"]["activations"])
        for event in by_phase(chrome_trace([Take(line)]), "C")
        if event["pid"] == 1 and event["name"] == "live activations"
    ]
    assert [held for _, held in counters] == [level.held for level in line.live(0)]
    assert [time for time, _ in counters] == pytest.approx(
        [level.time * 1e6 for level in line.live(0)]
    )


@settings(max_examples=25)
@given(size=sizes(max_pp=4, max_microbatches=6), latency=st.sampled_from([0.0, 0.3]))
def test_what_is_written_is_read_back(
    size: dict[str, Any], latency: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    line = timeline_of(size, latency)
    path = tmp_path_factory.getbasetemp() / "trace.json"
    takes = [Take(line, "", step, start=step * 10.0) for step in (4, 5)]
    path.write_text(json.dumps(chrome_trace(takes)), encoding="utf-8")
    read = read_trace(path)
    assert [(take.label, take.step) for take in read] == [("", 4), ("", 5)]
    for take, before in zip(read, takes, strict=True):
        assert take.start == pytest.approx(before.start)
        again = take.timeline
        assert (again.name, again.unit, again.pp_size) == (line.name, "s", line.pp_size)
        assert (again.num_stages, again.n_microbatches) == (line.num_stages, line.n_microbatches)
        for row, expected in zip(again.bars, line.bars, strict=True):
            assert [bar.action for bar in row] == [bar.action for bar in expected]
            for bar, other in zip(row, expected, strict=True):
                assert (bar.start, bar.end) == pytest.approx((other.start, other.end), abs=2e-9)
        if latency:
            keys = [
                sorted((t.source, t.target, str(t.action), t.size) for t in one.transfers)
                for one in (again, line)
            ]
            assert keys[0] == keys[1]


def test_times_without_a_unit_are_milliseconds() -> None:
    table = compute_table(SCHEDULES["1F1B"], pp_size=2, n_microbatches=2)
    line = planned(table, uniform_costs(2), unit="")
    document = chrome_trace([Take(line)])
    first = by_phase(document, "X")[0]
    assert (first["name"], first["ts"], first["dur"]) == ("0F0", 0.0, 1000.0)
    assert document["otherData"]["unit"] == "none"


def good() -> dict[str, Any]:
    line = timeline_of({"name": "1F1B", "pp_size": 2, "stages_per_rank": 1, "n_microbatches": 2})
    return chrome_trace([Take(line, step=1)])


def changed(**changes: Any) -> dict[str, Any]:
    """A trace whose first slice has other values."""
    document = good()
    first = by_phase(document, "X")[0]
    for name, value in changes.items():
        (first if name in first else first["args"])[name] = value
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "otherData"),
        ({"traceEvents": []}, "otherData"),
        ({**good(), "otherData": {"hfpp": 2}}, "otherData.hfpp"),
        ({**good(), "otherData": {"hfpp": 1, "unit": "h"}}, "otherData.unit"),
        ({**good(), "traceEvents": 7}, "traceEvents must be an array"),
        ({**good(), "traceEvents": []}, "no computation"),
        ({**good(), "traceEvents": [None, 3, {"ph": "X"}, {"args": []}]}, "no computation"),
        (
            {
                **good(),
                "traceEvents": [
                    {"ph": "X", "ts": 7, "dur": 0, "args": {"action": "0F0", "rank": 0}}
                ],
            },
            "takes no time",
        ),
        (changed(action="0Q0"), r"traceEvents\[\d+\].args.action is no action: '0Q0' is not"),
        (changed(action=""), "must be an action"),
        (changed(action="0" * 5000 + "F0"), "must be an action"),
        (changed(action="0UNSHARD"), "neither a computation nor a send"),
        (changed(rank=-1), "args.rank must be an integer"),
        (changed(rank=True), "args.rank must be an integer"),
        (changed(rank=10**15), "not of ranks 0 to"),
        (changed(rank=10**40), "args.rank must be an integer"),
        (changed(step="1"), "args.step must be an integer"),
        (changed(ts=-1), r"\]\.ts must be a finite number"),
        (changed(dur="long"), r"\]\.dur must be a finite number"),
        (changed(ts=1e300), r"\]\.ts must be a finite number"),
        (changed(ts=10**400), "digits|ts must be a finite number"),
    ],
)
def test_what_is_no_trace_is_refused_by_name(document: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(PipelineConfigError, match=message) as refused:
        read_trace(path)
    assert str(refused.value).startswith(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"traceEvents": [', r"line 1, column \d+: not JSON"),
        (b"\x00\xff\xfe\x80", "line 1, column 2: not UTF-8"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b"[" * 100_000, "nested too deep"),
        (b"", "not JSON"),
    ],
)
def test_what_is_no_json_is_refused_with_its_place(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(PipelineConfigError, match=message):
        read_trace(path)


def test_a_message_from_nowhere_is_refused(tmp_path: Path) -> None:
    document = good()
    message = next(e for e in by_phase(document, "X") if e["cat"] == "communication")
    message["args"]["from"] = 9
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(PipelineConfigError, match="rank that computes nothing"):
        read_trace(path)


@settings(max_examples=60)
@given(event=EVENTS)
def test_any_events_are_read_or_refused(
    event: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    slices = {"ph": "X", "ts": 0, "dur": 1, "args": {"action": "0F0", "rank": 0}}
    if isinstance(event, dict):
        slices["args"] = {**slices["args"], **event}  # type: ignore[dict-item]
    about = {"hfpp": 1, "unit": "s", "schedule": event}
    path.write_text(
        json.dumps({"otherData": about, "traceEvents": [event, slices]}), encoding="utf-8"
    )
    try:
        takes = read_trace(path)
    except PipelineConfigError:
        return
    assert all(math.isfinite(take.timeline.end) for take in takes)
