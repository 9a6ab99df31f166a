"""A schedule as a picture: one row per rank, time to the right, to scale."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from hfpp.errors import PipelineConfigError
from hfpp.plan.actions import ActionKind, ScheduleTable
from hfpp.plan.simulate import Bar, Simulation, simulate, uniform_costs

__all__ = ["schedule_svg"]

_KINDS = {
    ActionKind.FORWARD: ("forward", (45, 105, 214)),
    ActionKind.FULL_BACKWARD: ("backward", (22, 146, 100)),
    ActionKind.BACKWARD_INPUT: ("backward: inputs", (12, 143, 158)),
    ActionKind.BACKWARD_WEIGHT: ("backward: weights", (235, 150, 30)),
}
_PAPER, _FRAME, _TRACK = "#ffffff", "#d5dbe3", "#e6eaf0"
_INK, _SOFT = "#1c2533", "#667085"
_FONT = "-apple-system,BlinkMacSystemFont,'Segoe UI',Helvetica,Arial,sans-serif"
_DIGIT = 0.6  # width of a digit, in font sizes
_MANY = 6000  # above so many actions the picture goes without tooltips


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things are, in pixels."""

    table: ScheduleTable
    step: Simulation
    rows: tuple[tuple[Bar, ...], ...]
    width: float

    left = 74.0
    right = 24.0
    top = 84.0

    @property
    def row(self) -> float:
        """Height of a row with the gap to the next."""
        return max(9.0, min(30.0, 470.0 / self.table.pp_size))

    @property
    def bar(self) -> float:
        """Height of a bar."""
        return self.row - max(1.5, 0.14 * self.row)

    @property
    def end(self) -> float:
        """Of the step, in time."""
        return self.step.step_time

    @property
    def scale(self) -> float:
        """Pixels per unit of time."""
        return (self.width - self.left - self.right) / self.end

    @property
    def bottom(self) -> float:
        """Below the last row."""
        return self.top + self.row * self.table.pp_size

    @property
    def height(self) -> float:
        """Of the whole picture."""
        return self.bottom + 44.0

    def x(self, time: float) -> float:
        """Where a time is."""
        return self.left + time * self.scale

    def y(self, rank: int) -> float:
        """The upper edge of a rank's bars."""
        return self.top + rank * self.row


def schedule_svg(
    table: ScheduleTable,
    *,
    title: str | None = None,
    forward: float = 1.0,
    backward: float = 2.0,
    weight: float | None = None,
    width: float | None = None,
) -> str:
    """Draws a schedule.

    Every computation is one bar with its microbatch number, where there is room: forwards blue,
    backwards green, or split into inputs (teal) and weights (orange). Lighter shades are a rank's
    later stages; a frame around two bars is an overlapped pair; grey is idle time.

    Args:
        table: the actions of all ranks; communication is not drawn and takes no time.
        title: the heading; None: the table's name.
        forward: time of one stage's forward on one microbatch.
        backward: time of one stage's backward.
        weight: the part of it that makes the weights' gradients; None: half.
        width: of the picture in pixels; None: what the schedule asks for, from 720 to 1600.

    Returns:
        An SVG document: light paper of its own, readable on any page.

    Raises:
        PipelineConfigError: the table does not run to its end.

    Example:
        >>> from hfpp.plan.schedule import compute_table, find_schedule
        >>> svg = schedule_svg(compute_table(find_schedule("1F1B"), pp_size=4, n_microbatches=8))
        >>> svg[:4]
        '<svg'
    """
    weight = backward / 2 if weight is None else weight
    if not (forward > 0 and backward > 0 and 0 < weight < backward):
        raise PipelineConfigError(
            f"forward ({forward}), backward ({backward}) and weight ({weight}) must be positive, "
            "and weight, as a part of it, smaller than backward"
        )
    costs = uniform_costs(table.num_stages, forward=forward, backward=backward, weight=weight)
    step = simulate(table, costs)
    if width is None:
        columns = step.step_time / min(forward, backward)
        width = min(1600.0, max(720.0, 100.0 + 22.0 * columns))
    rows = tuple(map(step.bars, range(table.pp_size)))
    layout = _Layout(table, step, rows, width)
    return "\n".join(_document(layout, title or table.name)) + "\n"


def _document(layout: _Layout, title: str) -> Iterator[str]:
    width, height = _number(layout.width), _number(layout.height)
    table = layout.table
    facts = (
        f"{_count(table.pp_size, 'rank')} · {_count(table.num_stages, 'stage')} · "
        f"{_count(table.n_microbatches, 'microbatch', 'microbatches')} · "
        f"{100 * layout.step.idle_share:.1f} % idle"
    )
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="{_FONT}" role="img">'
    )
    yield f"<title>{escape(title)}: {facts}</title>"
    yield (
        f'<rect x="0.5" y="0.5" width="{_number(layout.width - 1)}" '
        f'height="{_number(layout.height - 1)}" rx="8" fill="{_PAPER}" stroke="{_FRAME}"/>'
    )
    yield _text(20, 32, title, size=17, weight=600)
    yield _text(20, 54, facts, size=12.5, colour=_SOFT)
    yield from _legend(layout)
    yield from _ranks(layout)
    yield from _bars(layout)
    yield from _axis(layout)
    yield "</svg>"


def _legend(layout: _Layout) -> Iterator[str]:
    """What the colours mean, at the right of the heading."""
    used = {bar.action.kind for row in layout.rows for bar in row}
    entries = [(name, _colour(kind, 0, 1)) for kind, (name, _) in _KINDS.items() if kind in used]
    entries.append(("idle", _TRACK))
    x = layout.width - layout.right
    for name, colour in reversed(entries):
        x -= _text_width(name, 12)
        yield _text(x, 54, name, size=12, colour=_SOFT)
        x -= 18
        yield f'<rect x="{_number(x)}" y="44" width="12" height="12" rx="3" fill="{colour}"/>'
        x -= 14
    if layout.table.stages_per_rank > 1:
        note = "lighter: the rank's later stages"
        yield _text(layout.width - layout.right, 32, note, size=12, colour=_SOFT, anchor="end")


def _ranks(layout: _Layout) -> Iterator[str]:
    """A track per rank, whose bare parts are idle time, and its name."""
    size = min(12.0, layout.row * 0.75)
    every = 1 if layout.row >= 12 else 4
    for rank in range(layout.table.pp_size):
        y = layout.y(rank)
        box = _box(layout.left, y, layout.end * layout.scale, layout.bar)
        yield f'<rect class="rank" {box} rx="{_number(min(3.0, layout.bar / 4))}" fill="{_TRACK}"/>'
        if rank % every == 0:
            middle = y + layout.bar / 2 + size * 0.35
            shown = max(size, 9.5)
            yield _text(
                layout.left - 10, middle, f"rank {rank}", size=shown, colour=_SOFT, anchor="end"
            )


def _bars(layout: _Layout) -> Iterator[str]:
    """The bars by colour, then their numbers, then frames around overlapped pairs."""
    table = layout.table
    tooltips = sum(map(len, layout.rows)) <= _MANY
    local = {s: k for stages in table.stages_by_rank for k, s in enumerate(stages)}
    font = _number_size(layout)
    by_colour: dict[str, list[str]] = {}
    numbers: list[str] = []
    frames: list[str] = []
    for rank, bars in enumerate(layout.rows):
        y, height = layout.y(rank), layout.bar
        for bar in bars:
            colour = _colour(bar.action.kind, local[bar.action.stage], table.stages_per_rank)
            x, width = layout.x(bar.start), (bar.end - bar.start) * layout.scale
            gap = min(1.0, 0.12 * width) if width > 3 else 0.0
            rounding = min(2.5, width / 6) if width > 6 else 0.0
            head = (
                f'<rect data-action="{bar.action}" {_box(x, y, width - gap, height)}'
                f"{_attribute('rx', rounding)}"
            )
            tip = f"><title>{_tooltip(rank, bar)}</title></rect>" if tooltips else "/>"
            by_colour.setdefault(colour, []).append(head + tip)
            if font:
                number = str(bar.action.microbatch)
                middle = (x + (width - gap) / 2, y + height / 2 + font * 0.36)
                ink = _ink_on(colour)
                numbers.append(_text(*middle, number, size=font, colour=ink, anchor="middle"))
            if bar.group is not None and bar.action == bar.group.parts[-1] and width > 3:
                start = layout.x(next(b.start for b in bars if b.group is bar.group))
                frames.append(f"<rect {_box(start, y, x + width - gap - start, height)}/>")
    for colour, shapes in by_colour.items():
        yield f'<g class="bars" fill="{colour}">'
        yield from shapes
        yield "</g>"
    yield '<g class="numbers" font-variant-numeric="tabular-nums">'
    yield from numbers
    yield "</g>"
    yield f'<g class="pairs" fill="none" stroke="{_INK}" stroke-width="1.2">'
    yield from frames
    yield "</g>"


def _box(x: float, y: float, width: float, height: float) -> str:
    return f'x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" height="{_number(height)}"'


def _attribute(name: str, value: float) -> str:
    return f' {name}="{_number(value)}"' if value else ""


def _number_size(layout: _Layout) -> float:
    """The font size of microbatch numbers; 0 where they do not fit into the narrowest bar."""
    narrowest = min(bar.end - bar.start for row in layout.rows for bar in row) * layout.scale
    digits = len(str(max(layout.table.n_microbatches - 1, 0)))
    size = min(12.0, layout.bar * 0.72, (narrowest - 3.5) / (digits * _DIGIT))
    return size if size >= 5.5 else 0.0


def _tooltip(rank: int, bar: Bar) -> str:
    name = _KINDS[bar.action.kind][0]
    return (
        f"rank {rank}, stage {bar.action.stage}, {name} of microbatch {bar.action.microbatch}, "
        f"{bar.start:g} to {bar.end:g}"
    )


def _axis(layout: _Layout) -> Iterator[str]:
    y = layout.bottom + 4
    yield (
        f'<path d="M{_number(layout.left)} {_number(y)}H{_number(layout.x(layout.end))}" '
        f'stroke="{_FRAME}" fill="none"/>'
    )
    step = _tick(layout.end / max(2.0, (layout.width - layout.left) / 90))
    for k in range(int(layout.end / step + 1e-9) + 1):
        x = layout.x(k * step)
        yield f'<path d="M{_number(x)} {_number(y)}v4" stroke="{_FRAME}"/>'
        yield _text(x, y + 17, f"{k * step:g}", size=11, colour=_SOFT, anchor="middle")
    yield _text(layout.left - 10, y + 17, "time", size=11, colour=_SOFT, anchor="end")


def _tick(least: float) -> float:
    """A round step of at least `least`: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= least)


def _colour(kind: ActionKind, chunk: int, chunks: int) -> str:
    """The kind's colour, lighter for a rank's later stages."""
    share = 0.0 if chunks == 1 else 0.55 * chunk / (chunks - 1)
    red, green, blue = (round(c + (255 - c) * share) for c in _KINDS[kind][1])
    return f"#{red:02x}{green:02x}{blue:02x}"


def _ink_on(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return _INK if 0.3 * red + 0.59 * green + 0.11 * blue > 140 else "#ffffff"


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: float,
    colour: str = _INK,
    weight: int = 400,
    anchor: str = "start",
) -> str:
    return (
        f'<text x="{_number(x)}" y="{_number(y)}" font-size="{_number(size)}" fill="{colour}"'
        + (f' font-weight="{weight}"' if weight != 400 else "")
        + (f' text-anchor="{anchor}"' if anchor != "start" else "")
        + f">{escape(text)}</text>"
    )


def _text_width(text: str, size: float) -> float:
    """About; fonts differ."""
    return size * sum(0.3 if letter in "filt: ," else 0.61 for letter in text)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
