"""Timelines as an SVG picture: one row per rank, time to the right, to scale."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from hfpp.plan.render import shapes
from hfpp.plan.render.axis import count, one_line
from hfpp.plan.render.colours import COMMUNICATION, IDLE, LIVE, NAMES, hex_of, shade
from hfpp.plan.render.layout import Panel, panels, text_width
from hfpp.plan.render.shapes import FRAME, SOFT, number, text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfpp.plan.render.timeline import Timeline

__all__ = ["comparison_svg", "facts", "timeline_svg"]

_PAPER = "#ffffff"
_FONT = "-apple-system,BlinkMacSystemFont,'Segoe UI',Helvetica,Arial,sans-serif"
_TOP = 112.0
_LEGEND = 80.0


def timeline_svg(
    timeline: Timeline, *, title: str | None = None, width: float | None = None
) -> str:
    """Draws one step of a pipeline.

    Every computation is one bar with its microbatch number, where there is room: forwards blue,
    backwards green, or split into inputs (teal) and weights (orange). Lighter shades are a rank's
    later stages; a frame around two bars is an overlapped pair; grey is idle time. Messages that
    take time are a strip under the bars of the rank that waits for them, and arrows where there is
    room. Under each rank lies what it holds: activations, or bytes where they are known. Bars too
    many to be drawn are a picture of their mean colours.

    Args:
        timeline: simulated or recorded.
        title: the heading; None: the timeline's name.
        width: of the picture in pixels; None: what the bars ask for.

    Returns:
        An SVG document: light paper of its own, readable on any page, nothing loaded from outside.
    """
    (panel,) = panels([(None, timeline)], width=width, top=_TOP)
    heading = title or timeline.name
    return "\n".join(_document([panel], heading, facts(timeline))) + "\n"


def comparison_svg(
    planned: Timeline, recorded: Timeline, *, title: str | None = None, width: float | None = None
) -> str:
    """Draws two timelines below each other on one scale: what was planned, and what was.

    Args:
        planned: simulated, its times in the unit of the other's.
        recorded: of a real run.
        title: the heading; None: the name of what was planned.
        width: as for `timeline_svg`.

    Returns:
        An SVG document.
    """
    pair = [("planned", planned), ("recorded", recorded)]
    placed = panels(
        [(f"{word}: {facts(line)}", line) for word, line in pair], width=width, top=_TOP
    )
    lengths = [panel.axis.words(panel.timeline.end) for panel in placed]
    more = f"{100 * (recorded.end / planned.end - 1):+.1f} %"
    compared = f"one step: {lengths[0]} planned, {lengths[1]} recorded ({more})"
    return "\n".join(_document(placed, title or planned.name, compared)) + "\n"


def facts(timeline: Timeline) -> str:
    """What a timeline is, in a line."""
    return " · ".join(
        (
            count(timeline.pp_size, "rank"),
            count(timeline.num_stages, "stage"),
            count(timeline.n_microbatches, "microbatch", "microbatches"),
            f"{100 * timeline.idle_share:.1f} % idle",
        )
    )


def _document(placed: list[Panel], title: str, line: str) -> Iterator[str]:
    width, height = placed[0].width, placed[-1].bottom + 44.0
    size = f'width="{number(width)}" height="{number(height)}"'
    view = f'viewBox="0 0 {number(width)} {number(height)}"'
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view} font-family="{_FONT}" role="img">'
    )
    yield f"<title>{escape(one_line(title))}: {escape(line)}</title>"
    yield (
        f'<rect x="0.5" y="0.5" width="{number(width - 1)}" height="{number(height - 1)}" rx="8" '
        f'fill="{_PAPER}" stroke="{FRAME}"/>'
    )
    yield text(20, 32, one_line(title), size=17, weight=600)
    yield text(20, 54, line, size=12.5, colour=SOFT)
    yield from _legend(placed)
    for panel in placed:
        yield from _panel(panel)
    yield "</svg>"


def _legend(placed: list[Panel]) -> Iterator[str]:
    """What the colours mean."""
    used = {kind for panel in placed for kind in panel.timeline.kinds}
    entries = [(NAMES[kind], shade(kind, 0, 1)) for kind in NAMES if kind in used]
    entries.append(("idle", IDLE))
    if any(panel.timed for panel in placed):
        entries.append(("communication", COMMUNICATION))
    entries.append(("live bytes" if placed[0].in_bytes else "live activations", LIVE))
    x = 20.0
    for name, colour in entries:
        box = f'x="{number(x)}" y="{number(_LEGEND - 10)}" width="12" height="12" rx="3"'
        yield f'<rect {box} fill="{hex_of(colour)}"/>'
        yield text(x + 18, _LEGEND, name, size=12, colour=SOFT)
        x += 18 + text_width(name, 12) + 16
    notes = []
    if any(chunks > 1 for panel in placed for _, chunks in panel.timeline.chunks.values()):
        notes.append("lighter: the rank's later stages")
    shown, size = placed[0].timeline.ranks, placed[0].timeline.pp_size
    if len(shown) < size:
        notes.append(f"{len(shown)} of {size:,} ranks shown")
    if notes:
        yield text(placed[0].width - 20, 54, " · ".join(notes), size=12, colour=SOFT, anchor="end")


def _panel(panel: Panel) -> Iterator[str]:
    if panel.heading is not None:
        yield text(20, panel.top - 18, panel.heading, size=12.5, weight=600)
    edge = panel.x(panel.end)
    for x, word in ((edge + 52, "idle"), (edge + 104, "peak live")):
        yield text(x, panel.top - 5, word, size=9.5, colour=SOFT, anchor="end")
    yield from shapes.tracks(panel)
    yield from shapes.live_areas(panel)
    yield from shapes.strips(panel)
    yield from shapes.dense_bars(panel) if panel.dense else shapes.bars(panel)
    if panel.arrows:
        yield from shapes.arrows(panel)
    yield from shapes.time_axis(panel)
