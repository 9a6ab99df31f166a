"""Where things are in a picture, in pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from hfpp.plan.render.axis import Axis, axis, size_words

if TYPE_CHECKING:
    from hfpp.plan.render.timeline import Level, Timeline, Transfer

__all__ = ["Panel", "panels", "text_width"]

_HEIGHT = {1: 500.0, 2: 400.0}  # of all rows of a panel, by the number of panels; if they can be so
_LEAST, _MOST = 15.0, 52.0  # of a row
_DENSE = 1.6  # bars narrower than so many pixels on average are drawn as a picture
_MANY = 30_000  # and so are more bars than that
_ARROWS = 300


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One timeline in a picture.

    Attributes:
        timeline: what is drawn.
        heading: above it; None: none.
        top: of its first row.
        row: height of a row with the gap to the next.
        width: of the whole picture.
        end: the time at the right end of the rows; the same for all panels of a picture.
        most_held: what a full-height live area stands for; the same for all panels.
        in_bytes: whether live areas show bytes rather than activations.
    """

    timeline: Timeline
    heading: str | None
    top: float
    row: float
    width: float
    end: float
    most_held: int
    in_bytes: bool

    left = 74.0
    right = 116.0

    @property
    def bar(self) -> float:
        """Height of a bar."""
        return 0.58 * self.row

    @property
    def strip(self) -> float:
        """Height of the strip under the bars that shows messages on their way; 0 without them."""
        return max(1.5, min(4.0, 0.1 * self.row)) if self.timed else 0.0

    @property
    def live(self) -> float:
        """Height of the area that shows live activations."""
        return 0.26 * self.row if self.timed else 0.32 * self.row

    @cached_property
    def timed(self) -> bool:
        """Whether any message takes time."""
        return any(transfer.end > transfer.start for transfer in self.timeline.transfers)

    @cached_property
    def arrows(self) -> tuple[Transfer, ...]:
        """The messages that are drawn as arrows: between neighbours, if there is room for all.

        Arrows over other ranks would hide what these do.
        """
        near = tuple(t for t in self.timeline.transfers if abs(t.source - t.target) == 1)
        return near if self.timed and self.row >= 40 and len(near) <= _ARROWS else ()

    @cached_property
    def dense(self) -> bool:
        """Whether the bars are too many to be drawn one by one."""
        bars = sum(map(len, self.timeline.bars))
        busy = sum(bar.end - bar.start for row in self.timeline.bars for bar in row)
        return bars > _MANY or bars * _DENSE > busy * self.scale

    @property
    def scale(self) -> float:
        """Pixels per unit of time."""
        return (self.width - self.left - self.right) / self.end

    @property
    def bottom(self) -> float:
        """Below the last row."""
        return self.top + self.row * len(self.timeline.bars)

    @property
    def axis(self) -> Axis:
        """How times are written."""
        return axis(self.end, self.timeline.unit)

    def x(self, time: float) -> float:
        """Where a time is."""
        return self.left + time * self.scale

    def y(self, row: int) -> float:
        """The upper edge of a row's bars."""
        return self.top + row * self.row

    def held(self, row: int) -> tuple[Level, ...]:
        """What the live area of a row shows."""
        return self.timeline.live_bytes(row) if self.in_bytes else self.timeline.live(row)

    def peak_words(self, row: int) -> str:
        """The most that a row's rank holds."""
        peak = max(level.held for level in self.held(row))
        return size_words(peak) if self.in_bytes else f"{peak:,}"


def panels(
    timelines: list[tuple[str | None, Timeline]], *, width: float | None, top: float
) -> list[Panel]:
    """Places one or two timelines below each other, on one scale.

    Args:
        timelines: with their headings.
        width: of the picture; None: what the bars ask for, from 820 to 1600.
        top: of the first panel.
    """
    end = max(timeline.end for _, timeline in timelines)
    if width is None:
        shortest = min(timeline.shortest for _, timeline in timelines)
        width = min(1600.0, max(820.0, 192.0 + 22.0 * end / shortest))
    in_bytes = all(_has_bytes(timeline) for _, timeline in timelines)
    held = [
        max(level.held for level in (line.live_bytes(row) if in_bytes else line.live(row)))
        for _, line in timelines
        for row in range(len(line.bars))
    ]
    placed: list[Panel] = []
    for heading, timeline in timelines:
        top += 0.0 if heading is None else 22.0
        placed.append(
            Panel(
                timeline=timeline,
                heading=heading,
                top=top,
                row=min(_MOST, max(_LEAST, _HEIGHT[len(timelines)] / len(timeline.bars))),
                width=width,
                end=end,
                most_held=max(1, *held),
                in_bytes=in_bytes,
            )
        )
        top = placed[-1].bottom + 44.0
    return placed


def _has_bytes(timeline: Timeline) -> bool:
    return timeline.kept is not None and any(kept.activations for kept in timeline.kept)


def text_width(text: str, size: float) -> float:
    """About; fonts differ."""
    widths = {**dict.fromkeys("filjt:.,; ·", 0.33), **dict.fromkeys("mwMW%", 0.9)}
    return size * sum(widths.get(letter, 0.61) for letter in text)
