"""What a table of computations costs when every part takes a given whole time: slow, obvious."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hfpp.plan.schedules.actions import ActionKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hfpp.plan.schedules.actions import ScheduleTable

F, B = ActionKind.FORWARD, ActionKind.FULL_BACKWARD
I, W = ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT  # noqa: E741 (the field's letters)


class Run(NamedTuple):
    """A run of a table with free communication.

    Attributes:
        time: from the first action of any rank to the last.
        idle: by rank: of that time, what it does not compute.
        own_idle: by rank: the same between its own first and last action.
        peak: by rank: the most stages' activations that live at a time, from a forward's start to
            the end of the weights' part.
    """

    time: int
    idle: list[int]
    own_idle: list[int]
    peak: list[int]


def run(table: ScheduleTable, times: Mapping[ActionKind, int] = {F: 1, I: 1, W: 1, B: 2}) -> Run:
    """Runs all ranks as early as their inputs allow; no overlapped groups."""
    rows = [[step.action for step in table.steps(rank)] for rank in range(table.pp_size)]
    ends: dict[tuple[int, ActionKind, int | None], int] = {}
    clock = [0] * len(rows)
    begins: list[int | None] = [None] * len(rows)
    position = [0] * len(rows)
    while any(position[rank] < len(row) for rank, row in enumerate(rows)):
        before = list(position)
        for rank, row in enumerate(rows):
            if position[rank] == len(row):
                continue
            stage, kind, m, _ = row[position[rank]]
            need = None
            if kind is F and stage > 0:
                need = (stage - 1, F, m)
            elif kind in (B, I) and stage < table.num_stages - 1:
                need = (stage + 1, B, m)
            if need is not None and need not in ends:
                continue
            start = max(clock[rank], ends[need] if need else 0)
            clock[rank] = ends[stage, B if kind is I else kind, m] = start + times[kind]
            if begins[rank] is None:
                begins[rank] = start
            position[rank] += 1
        assert position != before, "deadlock"
    busy = [sum(times[action.kind] for action in row) for row in rows]
    return Run(
        max(clock),
        [max(clock) - taken for taken in busy],
        [end - (begin or 0) - taken for end, begin, taken in zip(clock, begins, busy, strict=True)],
        [peak_live(row) for row in rows],
    )


def peak_live(row: list) -> int:
    """The most activations that live at a time while a row runs."""
    live = peak = 0
    for action in row:
        live += action.kind is F
        peak = max(peak, live)
        live -= action.kind in (B, W)
    return peak
