"""Timelines as lines of text: cells that are coloured, or letters where there are no colours."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from hfpp.plan.render.axis import axis, size_words
from hfpp.plan.render.colours import COMMUNICATION, DIM, LIVE, Colour, ink_on, shade
from hfpp.plan.render.density import blend, cell_shares

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfpp.plan.render.timeline import Level, Timeline

__all__ = ["LEAST_WIDTH", "TALL", "Look", "Piece", "terminal_lines"]

LEAST_WIDTH = 40
TALL = 8
"""Up to so many ranks have a line each that shows their live activations."""
_HEIGHTS = " ▁▂▃▄▅▆▇█"


class Piece(NamedTuple):
    """A part of a line.

    Attributes:
        words: its text.
        ink: colour of the text; None: the terminal's own.
        paper: colour behind it; None: the terminal's own.
    """

    words: str
    ink: Colour | None = None
    paper: Colour | None = None


Line = tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What the terminal can show.

    Attributes:
        width: columns.
        colours: whether cells can have colours; without them letters say what a cell is.
        plain: whether only ASCII can be shown.
    """

    width: int
    colours: bool
    plain: bool = False

    @property
    def idle(self) -> str:
        """An idle cell without colours."""
        return "." if self.plain else "·"

    @property
    def waiting(self) -> str:
        """An idle cell while a message to the rank is on its way."""
        return ">" if self.plain else "→"

    @property
    def filling(self) -> str:
        """The rest of a bar after its letters."""
        return "-" if self.plain else "─"


def terminal_lines(timeline: Timeline, look: Look, *, end: float | None = None) -> Iterator[Line]:
    """Draws a timeline for a terminal.

    A line per rank, with its idle share and the most that it holds; up to 8 ranks have a second
    one with what they hold when. Where bars are wider than a cell they have their microbatch's
    number; where they are narrower, cells have the mean colour of what is there, or the letter of
    what takes most of it.

    Args:
        timeline: simulated or recorded.
        look: what the terminal can show; its width should be at least `LEAST_WIDTH`.
        end: the time at the right end; None: the timeline's own.

    Yields:
        The lines from top to bottom: the heads of the columns, the ranks, the axis.
    """
    end = timeline.end if end is None else end
    names = [f"rank {rank} " for rank in timeline.ranks]
    in_bytes = timeline.kept is not None and any(kept.activations for kept in timeline.kept)
    held = [timeline.live_bytes(r) if in_bytes else timeline.live(r) for r in range(len(names))]
    peaks = [max(level.held for level in levels) for levels in held]
    notes = [
        (f"{100 * timeline.idle_of(row):.1f} %", size_words(peak) if in_bytes else f"{peak:,}")
        for row, peak in enumerate(peaks)
    ]
    times = axis(end, timeline.unit)
    under = f"time, {times.unit} " if times.unit else "time "
    left = max(len(under), *map(len, names))
    idle_width = max(len("idle"), *(len(idle) for idle, _ in notes)) + 2
    peak_width = max(len("peak live"), *(len(peak) for _, peak in notes)) + 2
    cells = max(8, look.width - left - idle_width - peak_width)
    yield (Piece(" " * (left + cells) + "idle".rjust(idle_width) + "peak live".rjust(peak_width)),)
    for row, name in enumerate(names):
        note = notes[row][0].rjust(idle_width) + notes[row][1].rjust(peak_width)
        used = max(1, round(cells * timeline.end / end))
        body = tuple(_row(timeline, row, used, look))
        yield (Piece(name.rjust(left)), *body, Piece(" " * (cells - used) + note))
        if len(names) <= TALL:
            heights = _area(timeline, [*held[row]], used, max(1, *peaks), look)
            yield (Piece(" " * left), Piece(heights, ink=LIVE if look.colours else None))
    yield (Piece(_axis_line(under.rjust(left), times.ticks(end, cells / 12), cells / end)),)


def _row(timeline: Timeline, row: int, cells: int, look: Look) -> Iterator[Piece]:
    """The cells of one rank."""
    bars = timeline.bars[row]
    per_cell = timeline.end / cells
    arriving = _arriving(timeline, row, cells, per_cell)
    if sum(bar.end - bar.start for bar in bars) < 1.2 * per_cell * len(bars):
        yield from _dense_row(timeline, row, cells, look, arriving)
        return
    place, before = 0, None
    for owner, run in groupby(_owners(timeline, row, cells, per_cell)):
        length = len(list(run))
        if owner is None:
            before = None
            for waits, part in groupby(arriving[place : place + length]):
                yield _idle(len(list(part)), look, waits=waits)
        else:
            action = bars[owner].action
            colour = shade(action.kind, *timeline.chunks[action.stage])
            if look.colours:
                word = str(action.microbatch)
                room = length - (colour == before)  # so that two numbers do not read as one
                word = word if len(word) <= max(room, 1) else ""
                yield Piece(word.center(length), ink=ink_on(colour), paper=colour)
                before = colour
            else:
                words = (f"{action.kind.value}{action.microbatch}", action.kind.value)
                word = next(word for word in words if len(word) <= max(length, 1))
                yield Piece(word.ljust(length, look.filling))
        place += length


def _owners(timeline: Timeline, row: int, cells: int, per_cell: float) -> list[int | None]:
    """By cell, the bar that takes most of it; None for an idle one."""
    found: list[int | None] = [None] * cells
    most = [0.0] * cells
    busy = [0.0] * cells
    for index, bar in enumerate(timeline.bars[row]):
        start, stop = bar.start / per_cell, bar.end / per_cell
        for cell in range(int(start), min(int(stop) + 1, cells)):
            share = min(stop, cell + 1) - max(start, cell)
            busy[cell] += max(0.0, share)
            if share > most[cell]:
                found[cell], most[cell] = index, share
    return [owner if busy[cell] >= 0.5 else None for cell, owner in enumerate(found)]


def _dense_row(
    timeline: Timeline, row: int, cells: int, look: Look, arriving: list[bool]
) -> Iterator[Piece]:
    """Mean colours; or letters that occur as often as their computations take time."""
    owed: dict[str, float] = {}
    for cell, shares in enumerate(cell_shares(timeline, row, cells, timeline.end)):
        idle = 1.0 - sum(shares.values())
        if look.colours:
            paper = blend(shares, idle_colour=DIM)
            yield _idle(1, look, waits=arriving[cell]) if idle > 0.95 else Piece(" ", paper=paper)
            continue
        parts = {"": idle}
        for (kind, _, _), share in shares.items():
            parts[kind.value] = parts.get(kind.value, 0.0) + share
        owed = {letter: owed.get(letter, 0.0) + share for letter, share in parts.items()}
        letter = max((name for name in owed if parts[name] > 0.05), key=lambda name: owed[name])
        owed[letter] -= 1.0
        yield Piece(letter) if letter else _idle(1, look, waits=arriving[cell])


def _idle(length: int, look: Look, *, waits: bool) -> Piece:
    words = (look.waiting if waits else look.idle) * length
    if not look.colours:
        return Piece(words)
    return Piece(words, ink=COMMUNICATION if waits else DIM)


def _arriving(timeline: Timeline, row: int, cells: int, per_cell: float) -> list[bool]:
    """By cell, whether a message to the rank is on its way for most of it."""
    found = [0.0] * cells
    rank = timeline.ranks[row]
    for transfer in timeline.transfers:
        if transfer.target == rank and transfer.end > transfer.start:
            start, stop = transfer.start / per_cell, transfer.end / per_cell
            for cell in range(int(start), min(int(stop) + 1, cells)):
                found[cell] += min(stop, cell + 1) - max(start, cell)
    return [share >= 0.5 for share in found]


def _area(timeline: Timeline, levels: list[Level], cells: int, most: int, look: Look) -> str:
    """What a rank holds, by cell the most of it, as heights; as digits up to 9 in plain ASCII."""
    per_cell = timeline.end / cells
    found = [0] * cells
    ends = [level.time for level in levels[1:]] + [timeline.end]
    for level, stop in zip(levels, ends, strict=True):
        for cell in range(int(level.time / per_cell), cells):
            if cell * per_cell >= stop:
                break
            found[cell] = max(found[cell], level.held)
    if look.plain:
        return "".join(str(-(-held * 9 // most)) if held else " " for held in found)
    return "".join(_HEIGHTS[-(-held * 8 // most)] for held in found)


def _axis_line(name: str, ticks: list[tuple[float, str]], per_time: float) -> str:
    line = name
    for time, word in ticks:
        place = len(name) + round(time * per_time)
        if place >= len(line):
            line = line.ljust(place) + word
    return line
