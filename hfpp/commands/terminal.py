"""Timelines in the terminal: in colours where it has any, and as letters where it has none."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from hfpp.plan.render.axis import axis, one_line
from hfpp.plan.render.colours import COMMUNICATION, DIM, LIVE, NAMES, hex_of, shade
from hfpp.plan.render.svg import facts
from hfpp.plan.render.terminal import LEAST_WIDTH, TALL, Look, Piece, terminal_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

    from hfpp.plan.render.chrome_trace import Take
    from hfpp.plan.render.timeline import Timeline

__all__ = ["print_timelines"]

_MOST_WIDTH = 2000  # columns; more are a typing error, and take minutes


def print_timelines(
    title: str,
    takes: Sequence[Take],
    *,
    width: int | None = None,
    console: Console | None = None,
) -> None:
    """Draws timelines below each other, on one scale.

    Args:
        title: the heading.
        takes: one or two.
        width: columns; None: those of the terminal.
        console: where to; None: stdout, with colours if it is a terminal and NO_COLOR is not set.
    """
    from rich.console import Console

    if console is None:
        console = Console(file=sys.stdout, highlight=False)
    look = Look(
        width=min(max(LEAST_WIDTH, console.width if width is None else width), _MOST_WIDTH),
        colours=console.color_system is not None and not console.no_color,
        plain=not console.encoding.lower().startswith("utf"),
    )
    end = max(take.timeline.end for take in takes)
    _print(console, [Piece(one_line(title))], look, bold=True)
    for take in takes:
        heading = f"{take.label}: " if take.label else ""
        step = f" · step {take.step}" if take.step is not None else ""
        _print(console, [Piece(f"{heading}{_line(take.timeline, step)}")], look)
        for line in terminal_lines(take.timeline, look, end=end):
            _print(console, line, look)
    _print(console, _legend([take.timeline for take in takes], look), look)


def _line(timeline: Timeline, step: str) -> str:
    long = f" · {axis(timeline.end, timeline.unit).words(timeline.end)}"
    return f"{facts(timeline)}{long if timeline.unit else ''}{step}"


def _legend(timelines: Sequence[Timeline], look: Look) -> list[Piece]:
    """What colours or letters mean."""
    kinds = [kind for kind in NAMES if any(kind in line.kinds for line in timelines)]
    timed = any(t.end > t.start for line in timelines for t in line.transfers)
    pieces: list[Piece] = []
    if look.colours:
        entries = [(NAMES[kind], Piece("  ", paper=shade(kind, 0, 1))) for kind in kinds]
        entries.append(("idle", Piece(look.idle * 2, ink=DIM)))
        entries += [("message on its way", Piece(look.waiting * 2, COMMUNICATION))] * timed
        if any(len(line.ranks) <= TALL for line in timelines):
            entries.append(("live", Piece("99" if look.plain else "▄▄", ink=LIVE)))
    else:
        entries = [(NAMES[kind], Piece(kind.value)) for kind in kinds]
        entries.append(("idle", Piece(look.idle)))
        entries += [("idle, message on its way", Piece(look.waiting))] * timed
    for name, sample in entries:
        pieces += [sample, Piece(f" {name}   ")]
    return pieces


def _print(console: Console, pieces: Iterable[Piece], look: Look, *, bold: bool = False) -> None:
    from rich.style import Style
    from rich.text import Text

    text = Text(no_wrap=True, end="")
    for words, ink, paper in pieces:
        style = Style(
            color=None if ink is None else hex_of(ink),
            bgcolor=None if paper is None else hex_of(paper),
            bold=bold or None,
        )
        text.append(_ascii(words) if look.plain else words, style)
    text.rstrip()
    console.print(text, soft_wrap=True)


def _ascii(words: str) -> str:
    known = words.replace(" · ", ", ").replace("µ", "u")
    return known.encode("ascii", "replace").decode("ascii")
