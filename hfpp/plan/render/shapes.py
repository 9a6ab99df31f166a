"""The parts of a panel as SVG elements."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from hfpp.plan.render.colours import (
    COMMUNICATION,
    IDLE,
    LIVE,
    NAMES,
    Colour,
    hex_of,
    ink_on,
    shade,
)
from hfpp.plan.render.density import blend, cell_shares, png_row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfpp.plan.render.layout import Panel
    from hfpp.plan.render.timeline import Bar

__all__ = [
    "FRAME",
    "SOFT",
    "arrows",
    "bars",
    "dense_bars",
    "live_areas",
    "number",
    "strips",
    "text",
    "time_axis",
    "tracks",
]

FRAME, INK, SOFT = "#d5dbe3", "#1c2533", "#667085"
_DIGIT = 0.6  # width of a digit, in font sizes
_MANY = 6000  # above so many actions the picture goes without tooltips
_LEGIBLE = 5.5  # the smallest font for numbers


def tracks(panel: Panel) -> Iterator[str]:
    """A track per rank, whose bare parts are idle time; its name; its idle share and peak."""
    timeline = panel.timeline
    size = min(12.0, max(9.0, 0.66 * panel.bar))
    for row, rank in enumerate(timeline.ranks):
        y = panel.y(row)
        box = _box(panel.left, y, timeline.end * panel.scale, panel.bar)
        yield f'<rect class="rank" {box} fill="{hex_of(IDLE)}"/>'
        middle = y + panel.bar / 2 + size * 0.35
        yield text(panel.left - 10, middle, f"rank {rank}", size=size, colour=SOFT, anchor="end")
        edge = panel.x(panel.end)
        idle = f"{100 * timeline.idle_of(row):.1f} %"
        yield text(edge + 52, middle, idle, size=min(size, 11), colour=INK, anchor="end")
        peak = panel.peak_words(row)
        yield text(edge + 104, middle, peak, size=min(size, 11), colour=INK, anchor="end")


def bars(panel: Panel) -> Iterator[str]:
    """The bars by colour, then their numbers, then frames around overlapped pairs."""
    timeline = panel.timeline
    tooltips = sum(map(len, timeline.bars)) <= _MANY
    font = _number_size(panel)
    by_colour: dict[Colour, list[str]] = {}
    numbers: list[str] = []
    frames: list[str] = []
    for row, row_bars in enumerate(timeline.bars):
        y, height = panel.y(row), panel.bar
        for bar in row_bars:
            colour = shade(bar.action.kind, *timeline.chunks[bar.action.stage])
            x, width = panel.x(bar.start), (bar.end - bar.start) * panel.scale
            gap = min(1.0, 0.12 * width) if width > 3 else 0.0
            rounding = min(2.5, width / 6) if width > 6 else 0.0
            head = (
                f'<rect data-action="{bar.action}" {_box(x, y, width - gap, height)}'
                f"{_attribute('rx', rounding)}"
            )
            tip = f"><title>{_tooltip(panel, row, bar)}</title></rect>" if tooltips else "/>"
            by_colour.setdefault(colour, []).append(head + tip)
            word = str(bar.action.microbatch)
            if font and width >= len(word) * _DIGIT * font + 2.5:
                middle = (x + (width - gap) / 2, y + height / 2 + font * 0.36)
                ink = hex_of(ink_on(colour))
                numbers.append(text(*middle, word, size=font, colour=ink, anchor="middle"))
            if bar.group is not None and bar.action == bar.group.parts[-1]:
                start = panel.x(next(b.start for b in row_bars if b.group is bar.group))
                if x + width - start > 9:
                    frames.append(f"<rect {_box(start, y, x + width - gap - start, height)}/>")
    for colour, found in by_colour.items():
        yield f'<g class="bars" fill="{hex_of(colour)}">'
        yield from found
        yield "</g>"
    yield '<g class="numbers" font-variant-numeric="tabular-nums">'
    yield from numbers
    yield "</g>"
    stroke = "1.2" if panel.row > 24 else "0.5"
    yield f'<g class="pairs" fill="none" stroke="{INK}" stroke-width="{stroke}">'
    yield from frames
    yield "</g>"


def dense_bars(panel: Panel) -> Iterator[str]:
    """A picture of each rank's bars, one pixel of which has the mean colour of what is there."""
    width = panel.timeline.end * panel.scale
    cells = max(1, round(width))
    yield '<g class="dense">'
    for row in range(len(panel.timeline.bars)):
        colours = map(blend, cell_shares(panel.timeline, row, cells, panel.timeline.end))
        box = _box(panel.left, panel.y(row), width, panel.bar)
        uri = png_row(list(colours))
        yield f'<image {box} preserveAspectRatio="none" image-rendering="pixelated" href="{uri}"/>'
    yield "</g>"


def strips(panel: Panel) -> Iterator[str]:
    """Under the bars of each rank, when messages to it are on their way."""
    if not panel.timed:
        return
    yield f'<g class="transfers" fill="{hex_of(COMMUNICATION)}">'
    for row, rank in enumerate(panel.timeline.ranks):
        spans = [(t.start, t.end) for t in panel.timeline.transfers if t.target == rank]
        y = panel.y(row) + panel.bar + 0.5
        for start, end in _united(spans, least=0.5 / panel.scale):
            box = _box(panel.x(start), y, max(0.6, (end - start) * panel.scale), panel.strip)
            yield f"<rect {box}/>"
    yield "</g>"


def _united(spans: list[tuple[float, float]], *, least: float) -> list[tuple[float, float]]:
    """The spans without their overlaps, and without gaps shorter than `least`."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1] + least:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def arrows(panel: Panel) -> Iterator[str]:
    """From the bar that a message comes from to the one that takes it."""
    colour = hex_of(COMMUNICATION)
    yield f'<g class="arrows" stroke="{colour}" stroke-width="0.9" stroke-opacity="0.75">'
    for transfer in panel.arrows:
        down = transfer.target > transfer.source
        source, target = (panel.timeline.row_of[r] for r in (transfer.source, transfer.target))
        x, y = panel.x(transfer.start), panel.y(source) + (panel.bar if down else 0.0)
        to_x, to_y = panel.x(transfer.end), panel.y(target) + (0.0 if down else panel.bar)
        tip = to_y - 4 if down else to_y + 4
        yield (
            f'<path fill="{colour}" d="M{number(x)} {number(y)}L{number(to_x)} {number(to_y)}'
            f'l-1.6 {number(tip - to_y)}h3.2z"/>'
            if abs(to_x - x) < 3
            else f'<path fill="none" d="M{number(x)} {number(y)}L{number(to_x)} {number(to_y)}"/>'
            f'<path fill="{colour}" d="M{number(to_x)} {number(to_y)}'
            f'l-4 {number((tip - to_y) * 0.75)}l1.6 {number((to_y - tip) * 0.6)}z"/>'
        )
    yield "</g>"


def live_areas(panel: Panel) -> Iterator[str]:
    """Under each rank, what it holds when; all to one scale."""
    yield f'<g class="live" fill="{hex_of(LIVE)}" fill-opacity="0.55">'
    end = panel.x(panel.timeline.end)
    for row in range(len(panel.timeline.bars)):
        base = panel.y(row) + panel.bar + (panel.strip + 1 if panel.timed else 1.0) + panel.live
        path = [f"M{number(panel.left)} {number(base)}"]
        for x, held in _by_pixel(panel, row):
            y = base - panel.live * held / panel.most_held
            path.append(f"H{number(x)}V{number(y)}")
        path.append(f"H{number(end)}V{number(base)}z")
        yield f'<path d="{"".join(path)}"/>'
    yield "</g>"


def _by_pixel(panel: Panel, row: int) -> Iterator[tuple[float, int]]:
    """The levels of a row with their places; of those within a pixel the highest."""
    place, most, last = 0.0, 0, 0
    for time, held in panel.held(row):
        x = panel.x(time)
        if x - place >= 1.0:
            if most != last:
                yield place, most
            place, most, last = x, held, most
        else:
            most = max(most, held)
    yield place, most


def _number_size(panel: Panel) -> float:
    """The font size of microbatch numbers that fit into most bars, or some; 0: no legible one."""
    widths = sorted(bar.end - bar.start for row in panel.timeline.bars for bar in row)
    digits = len(str(max(panel.timeline.n_microbatches - 1, 0)))
    for tenths in (1, 4, 7):
        width = widths[len(widths) * tenths // 10] * panel.scale
        size = min(12.0, panel.bar * 0.72, (width - 3.5) / (digits * _DIGIT))
        if size >= _LEGIBLE:
            return size
    return 0.0


def _tooltip(panel: Panel, row: int, bar: Bar) -> str:
    times = panel.axis
    return escape(
        f"rank {panel.timeline.ranks[row]}, stage {bar.action.stage}, {NAMES[bar.action.kind]} of "
        f"microbatch {bar.action.microbatch}, {times.number(bar.start)} to {times.words(bar.end)}"
    )


def time_axis(panel: Panel) -> Iterator[str]:
    """Below the last row."""
    y = panel.bottom + 4
    path = f"M{number(panel.left)} {number(y)}H{number(panel.x(panel.end))}"
    yield f'<path d="{path}" stroke="{FRAME}" fill="none"/>'
    for time, word in panel.axis.ticks(panel.end, (panel.width - panel.left) / 90):
        x = panel.x(time)
        yield f'<path d="M{number(x)} {number(y)}v4" stroke="{FRAME}"/>'
        yield text(x, y + 17, word, size=11, colour=SOFT, anchor="middle")
    unit = panel.axis.unit
    name = f"time ({unit})" if unit else "time"
    yield text(panel.left - 10, y + 17, name, size=11, colour=SOFT, anchor="end")


def text(
    x: float,
    y: float,
    words: str,
    *,
    size: float,
    colour: str = INK,
    weight: int = 400,
    anchor: str = "start",
) -> str:
    """A line of text."""
    return (
        f'<text x="{number(x)}" y="{number(y)}" font-size="{number(size)}" fill="{colour}"'
        + (f' font-weight="{weight}"' if weight != 400 else "")
        + (f' text-anchor="{anchor}"' if anchor != "start" else "")
        + f">{escape(words)}</text>"
    )


def number(value: float) -> str:
    """A coordinate, to the hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _box(x: float, y: float, width: float, height: float) -> str:
    return f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'


def _attribute(name: str, value: float) -> str:
    return f' {name}="{number(value)}"' if value else ""
