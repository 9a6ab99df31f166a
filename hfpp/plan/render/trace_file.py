"""Reads back the traces that hfpp writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from hfpp.errors import PipelineConfigError
from hfpp.plan.render.axis import one_line
from hfpp.plan.render.chrome_trace import FORMAT, Take
from hfpp.plan.render.timeline import LEAST_TIME, Bar, Timeline, Transfer
from hfpp.plan.schedules.actions import Action, ActionKind, parse_action
from hfpp.plan.strict_json import JsonValue, read_json_file

if TYPE_CHECKING:
    from os import PathLike

    from hfpp.plan.json_places import Step

__all__ = ["is_trace", "read_trace", "trace_takes"]

_LARGEST = 128 << 20
_SENDS = (ActionKind.SEND_FORWARD, ActionKind.SEND_BACKWARD)
_UNITS = {"s": ("s", 1e-6), "none": ("", 1e-3)}  # and what a microsecond is in it


def read_trace(path: str | PathLike[str]) -> list[Take]:
    """The timelines of a trace that `chrome_trace` made, such as a run's.

    Args:
        path: of the file.

    Returns:
        One entry per label and step, in the order of the file; every step starts with its first
        computation.

    Raises:
        FileNotFoundError: no such file.
        PipelineConfigError: no JSON, or no trace of hfpp's; the message says where.
    """
    return trace_takes(read_json_file(path, what="a trace of hfpp", largest=_LARGEST))


def is_trace(document: JsonValue) -> bool:
    """Whether a document is a trace, of hfpp or of somebody else."""
    return isinstance(document.value, dict) and "traceEvents" in document.value


def trace_takes(document: JsonValue) -> list[Take]:
    """The same, of a document that has been read.

    Raises:
        PipelineConfigError: no trace of hfpp's.
    """
    reader = _Reader(document)
    for index, event in enumerate(reader.events):
        reader.take_event(index, event)
    return reader.takes()


class _Reader:
    """The events of a file by label and step."""

    def __init__(self, document: JsonValue) -> None:
        self._document = document
        value = document.value
        about = value.get("otherData") if isinstance(value, dict) else None
        if not isinstance(about, dict) or about.get("hfpp") != FORMAT:
            problem = f"is not {FORMAT}, and so it is no trace that hfpp wrote"
            self._refuse(problem, "otherData", "hfpp")
        if about.get("unit") not in _UNITS:
            self._refuse('must be "s" or "none"', "otherData", "unit")
        self._schedule = one_line(str(about.get("schedule", "")))
        self._unit, self._scale = _UNITS[about["unit"]]
        events = value.get("traceEvents")
        if not isinstance(events, list):
            self._refuse("must be an array, [...]", "traceEvents")
        self.events: list[Any] = events
        self._bars: dict[tuple[str, int | None], dict[int, list[Bar]]] = {}
        self._transfers: dict[tuple[str, int | None], list[Transfer]] = {}

    def take_event(self, index: int, event: Any) -> None:
        """One event; those that only viewers read are left out."""
        about = event.get("args") if isinstance(event, dict) else None
        if not isinstance(about, dict) or event.get("ph") != "X" or "action" not in about:
            return
        where: tuple[Step, ...] = ("traceEvents", index)
        action = self._action(about["action"], where)
        rank = self._whole(about, "rank", where)
        step = self._whole(about, "step", where) if "step" in about else None
        start, length = (self._number(event, name, where) for name in ("ts", "dur"))
        end = start + length
        key = (one_line(str(about.get("label", ""))), step)
        if action.kind in _SENDS:
            source = self._whole(about, "from", where)
            size = self._whole(about, "bytes", where)
            transfer = Transfer(source, rank, action, start, end, size)
            self._transfers.setdefault(key, []).append(transfer)
        elif action.kind.is_compute and not action.parts:
            self._bars.setdefault(key, {}).setdefault(rank, []).append(Bar(action, start, end))
        else:
            problem = f"({action}) is neither a computation nor a send"
            self._refuse(problem, *where, "args", "action")

    def takes(self) -> list[Take]:
        """What was taken."""
        if not self._bars:
            self._refuse("has no computation")
        return [self._take(label, step, rows) for (label, step), rows in self._bars.items()]

    def _take(self, label: str, step: int | None, rows: dict[int, list[Bar]]) -> Take:
        if sorted(rows) != list(range(len(rows))):
            self._refuse(
                f"has computations in step {step} of {len(rows)} ranks, but not of ranks 0 "
                f"to {len(rows) - 1}"
            )
        start = min(bar.start for bars in rows.values() for bar in bars)
        end = max(bar.end for bars in rows.values() for bar in bars)
        if (end - start) * self._scale < LEAST_TIME:
            self._refuse(f"has a step {step} that takes no time")
        ordered = [sorted(rows[rank], key=lambda bar: bar.start) for rank in range(len(rows))]
        transfers = self._transfers.get((label, step), [])
        if any(not (t.source < len(rows) and t.target < len(rows)) for t in transfers):
            self._refuse(f"has a message in step {step} from or to a rank that computes nothing")
        timeline = Timeline.of_bars(
            self._schedule,
            [[self._from(bar, start) for bar in bars] for bars in ordered],
            transfers=[self._from(transfer, start) for transfer in transfers],
            unit=self._unit,
        )
        return Take(timeline, label, step, start * self._scale)

    def _from(self, timed: Any, start: float) -> Any:
        return timed._replace(
            start=(timed.start - start) * self._scale, end=(timed.end - start) * self._scale
        )

    def _action(self, text: Any, where: tuple[Step, ...]) -> Action:
        try:
            action = parse_action(text) if isinstance(text, str) and len(text) < 200 else None
        except PipelineConfigError as error:
            self._refuse(f"is no action: {error}", *where, "args", "action")
        if action is None:
            self._refuse("must be an action, such as 3F0", *where, "args", "action")
        return action

    def _whole(self, values: dict[str, Any], name: str, where: tuple[Step, ...]) -> int:
        value = values.get(name)
        if type(value) is not int or not 0 <= value < 1 << 53:
            self._refuse("must be an integer that is not negative", *where, "args", name)
        return value

    def _number(self, values: dict[str, Any], name: str, where: tuple[Step, ...]) -> float:
        value: Any = values.get(name)
        if type(value) not in (int, float) or not 0 <= value < 1e18:  # nor is NaN
            self._refuse("must be a finite number that is not negative", *where, name)
        return float(value)

    def _refuse(self, problem: str, *where: Step) -> NoReturn:
        raise PipelineConfigError(
            f"{self._document.at(*where)} {problem}: give a file of hfpp train --trace or hfpp "
            "show --trace"
        )
