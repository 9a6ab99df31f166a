"""Schedules and runs as pictures: SVG, lines of text, traces, parts of pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfpp.plan.render.html import timeline_html
from hfpp.plan.render.planned import planned
from hfpp.plan.render.svg import timeline_svg
from hfpp.plan.schedules.simulator import Link, uniform_costs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfpp.plan.costs import UnitCost
    from hfpp.plan.render.timeline import Timeline
    from hfpp.plan.schedules.actions import ScheduleTable
    from hfpp.plan.schedules.simulator import Links

__all__ = ["schedule_html", "schedule_svg"]


def schedule_svg(
    table: ScheduleTable,
    *,
    title: str | None = None,
    forward: float = 1.0,
    backward: float = 2.0,
    weight: float | None = None,
    width: float | None = None,
    costs: Sequence[UnitCost] | None = None,
    link: Links | None = None,
    boundary_bytes: int | Sequence[int] = 0,
) -> str:
    """Draws a schedule: one row per rank, time to the right, to scale.

    Every computation is one bar with its microbatch number, where there is room: forwards blue,
    backwards green, or split into inputs (teal) and weights (orange). Lighter shades are a rank's
    later stages; a frame around two bars is an overlapped pair; grey is idle time. Under each rank
    lies what it holds; at the right stand its idle share and the most that it holds.

    Args:
        table: the actions of all ranks.
        title: the heading; None: the table's name.
        forward: time of one stage's forward on one microbatch, in any unit.
        backward: time of one stage's backward.
        weight: the part of it that makes the weights' gradients; None: half.
        width: of the picture in pixels; None: what the schedule asks for, from 820 to 1600.
        costs: by stage, in seconds, instead of the three above.
        link: between ranks, see `simulate`; None: messages take no time.
        boundary_bytes: of what crosses from stage to stage, see there.

    Returns:
        An SVG document: light paper of its own, readable on any page.

    Raises:
        PipelineConfigError: the table does not run to its end, or the costs do not fit it.

    Example:
        >>> from hfpp.plan.schedules import compute_table, find_schedule
        >>> svg = schedule_svg(compute_table(find_schedule("1F1B"), pp_size=4, n_microbatches=8))
        >>> svg[:4]
        '<svg'
    """
    line = _timeline(table, (forward, backward, weight), costs, link, boundary_bytes)
    return timeline_svg(line, title=title, width=width)


def schedule_html(
    table: ScheduleTable,
    *,
    title: str | None = None,
    caption: str | None = None,
    costs: Sequence[UnitCost] | None = None,
    link: Links | None = None,
    boundary_bytes: int | Sequence[int] = 0,
) -> str:
    """The same as a part of an HTML page, which loads nothing from outside.

    Args:
        table: as for `schedule_svg`, and so are the others.
        title: see there.
        caption: plain text under the picture; None: what the schedule is, in a line.
        costs: see there; None: a forward takes 1, a backward 2.
        link: see there.
        boundary_bytes: see there.

    Returns:
        A ``<figure>``.

    Raises:
        PipelineConfigError: as for `schedule_svg`.
    """
    line = _timeline(table, (1.0, 2.0, None), costs, link, boundary_bytes)
    return timeline_html(line, title=title, caption=caption)


def _timeline(
    table: ScheduleTable,
    times: tuple[float, float, float | None],
    costs: Sequence[UnitCost] | None,
    link: Links | None,
    boundary_bytes: int | Sequence[int],
) -> Timeline:
    unit = "s"
    if costs is None:
        forward, backward, weight = times
        costs = uniform_costs(table.num_stages, forward=forward, backward=backward, weight=weight)
        unit = ""
    link = Link() if link is None else link
    return planned(table, costs, link=link, boundary_bytes=boundary_bytes, unit=unit)
