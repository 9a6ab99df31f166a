"""Timelines as a trace that Perfetto and chrome://tracing open."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any, NamedTuple

from hfpp.plan.render.colours import NAMES
from hfpp.plan.schedules.actions import Action, ActionKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hfpp.plan.render.timeline import Bar, Timeline, Transfer

__all__ = ["FORMAT", "Take", "chrome_trace"]

FORMAT = 1
"""Of what is in the trace beside what viewers know."""

_COMPUTE, _MESSAGES = 1, 2  # threads; further ones where messages overlap
_MICROSECONDS = {"s": 1e6, "": 1e3}  # what has no unit is drawn as a millisecond
_COLOURS = {  # names that chrome://tracing knows
    ActionKind.FORWARD: "rail_response",
    ActionKind.FULL_BACKWARD: "rail_load",
    ActionKind.BACKWARD_INPUT: "thread_state_running",
    ActionKind.BACKWARD_WEIGHT: "rail_idle",
}
_INSIDE = 1e-3  # of a slice: where arrows begin and end, so that they belong to it


class Take(NamedTuple):
    """One timeline of a trace.

    Attributes:
        timeline: one step.
        label: tells timelines of several kinds apart, such as "planned"; empty where there is one.
        step: its number, from 1; None: it is not one of a training run.
        start: when it starts in the trace, in the timeline's unit.
    """

    timeline: Timeline
    label: str = ""
    step: int | None = None
    start: float = 0.0


def chrome_trace(takes: Sequence[Take]) -> dict[str, Any]:
    """Writes timelines in the Trace Event Format.

    A process per rank (and label), with threads for computations and for messages to the rank,
    counters of what it holds, and arrows from what sends a message to what takes it. Times are
    microseconds; a time without a unit counts as a millisecond. `read_trace` reads it back.

    Args:
        takes: what is in the trace, at least one, all of one unit; of several steps one after the
            other, of several labels side by side.

    Returns:
        What `json.dump` takes.
    """
    labels = list(dict.fromkeys(take.label for take in takes))
    first = takes[0].timeline
    events: list[dict[str, Any]] = []
    for index, label in enumerate(labels):
        mine = [take for take in takes if take.label == label]
        ranks = sorted({rank for take in mine for rank in take.timeline.ranks})
        pids = {rank: 1 + rank * len(labels) + index for rank in ranks}
        lanes = _Lanes()
        for rank, pid in pids.items():
            name = f"rank {rank}, {label}" if label else f"rank {rank}"
            events.append(_meta("process_name", pid, name=name))
            events.append(_meta("process_sort_index", pid, sort_index=pid))
            events.append(_meta("thread_name", pid, _COMPUTE, name="compute"))
        for take in mine:
            events += _slices(take, pids)
            events += _messages(take, pids, lanes)
            events += _counters(take, pids)
        for pid, count in sorted(lanes.counts.items()):
            for lane in range(count):
                name = f"communication {lane + 1}" if count > 1 else "communication"
                events.append(_meta("thread_name", pid, _MESSAGES + lane, name=name))
    return {
        "displayTimeUnit": "ms",
        "otherData": {"hfpp": FORMAT, "schedule": first.name, "unit": first.unit or "none"},
        "traceEvents": events,
    }


class _Lanes:
    """Threads for messages: slices of one thread may not overlap."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self._free: dict[int, list[tuple[float, int]]] = {}

    def lane(self, pid: int, start: float, end: float) -> int:
        """A thread that is free from `start` on, and taken until `end`."""
        free = self._free.setdefault(pid, [])
        if free and free[0][0] <= start:
            _, lane = heapq.heappop(free)
        else:
            lane = self.counts.get(pid, 0)
            self.counts[pid] = lane + 1
        heapq.heappush(free, (end, lane))
        return lane


def _meta(what: str, pid: int, tid: int = 0, **arguments: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": arguments}


def _micro(take: Take, time: float) -> float:
    return round((take.start + time) * _MICROSECONDS[take.timeline.unit], 3)


def _about(take: Take, rank: int, action: Action) -> dict[str, Any]:
    """The arguments of a slice: what viewers show, and `read_trace` reads."""
    about: dict[str, Any] = {"action": str(action), "rank": rank}
    if take.label:
        about["label"] = take.label
    if take.step is not None:
        about["step"] = take.step
    return about


def _slices(take: Take, pids: dict[int, int]) -> Iterator[dict[str, Any]]:
    for row, bars in enumerate(take.timeline.bars):
        rank = take.timeline.ranks[row]
        for bar in bars:
            start, end = _micro(take, bar.start), _micro(take, bar.end)
            yield {
                "ph": "X",
                "name": str(bar.action),
                "cat": NAMES[bar.action.kind],
                "cname": _COLOURS[bar.action.kind],
                "pid": pids[rank],
                "tid": _COMPUTE,
                "ts": start,
                "dur": round(end - start, 3),
                "args": _about(take, rank, bar.action),
            }


def _messages(take: Take, pids: dict[int, int], lanes: _Lanes) -> Iterator[dict[str, Any]]:
    timeline = take.timeline
    by_action = {bar.action: bar for bars in timeline.bars for bar in bars}
    for number, transfer in enumerate(sorted(timeline.transfers, key=lambda t: t.start)):
        pid = pids[transfer.target]
        start, end = _micro(take, transfer.start), _micro(take, transfer.end)
        lane = lanes.lane(pid, start, end) if end > start else None
        if lane is not None:
            about = _about(take, transfer.target, transfer.action)
            about |= {"from": transfer.source, "bytes": transfer.size}
            yield {
                "ph": "X",
                "name": f"{transfer.action} from rank {transfer.source}",
                "cat": "communication",
                "cname": "bad",
                "pid": pid,
                "tid": _MESSAGES + lane,
                "ts": start,
                "dur": round(end - start, 3),
                "args": about,
            }
        maker, taker = (_find(by_action, choices) for choices in _ends(transfer))
        if maker is not None and taker is not None:
            arrow = {
                "name": "message",
                "cat": "message",
                "id": f"{take.label}{take.step or 0}.{number}",
            }
            at = _micro(take, maker.end - _INSIDE * (maker.end - maker.start))
            source = pids[transfer.source]
            yield {**arrow, "ph": "s", "pid": source, "tid": _COMPUTE, "ts": at}
            if lane is not None:
                middle = round((start + end) / 2, 3)
                yield {**arrow, "ph": "t", "pid": pid, "tid": _MESSAGES + lane, "ts": middle}
            at = _micro(take, taker.start + _INSIDE * (taker.end - taker.start))
            yield {**arrow, "ph": "f", "bp": "e", "pid": pid, "tid": _COMPUTE, "ts": at}


def _ends(transfer: Transfer) -> tuple[tuple[Action, ...], tuple[Action, ...]]:
    """What may have made a message, and what may take it."""
    stage, kind, microbatch, _ = transfer.action
    kinds: tuple[ActionKind, ...] = (ActionKind.FULL_BACKWARD, ActionKind.BACKWARD_INPUT)
    step = -1
    if kind is ActionKind.SEND_FORWARD:
        kinds, step = (ActionKind.FORWARD,), 1
    return (
        tuple(Action(stage, kind, microbatch) for kind in kinds),
        tuple(Action(stage + step, kind, microbatch) for kind in kinds),
    )


def _find(by_action: dict[Action, Bar], choices: tuple[Action, ...]) -> Bar | None:
    return next((by_action[action] for action in choices if action in by_action), None)


def _counters(take: Take, pids: dict[int, int]) -> Iterator[dict[str, Any]]:
    timeline = take.timeline
    for row, rank in enumerate(timeline.ranks):
        counts = [("live activations", "activations", timeline.live(row))]
        if timeline.kept is not None and any(kept.activations for kept in timeline.kept):
            counts.append(("live bytes", "bytes", timeline.live_bytes(row)))
        for name, unit, levels in counts:
            for time, held in levels:
                yield {
                    "ph": "C",
                    "name": name,
                    "pid": pids[rank],
                    "ts": _micro(take, time),
                    "args": {unit: held},
                }
