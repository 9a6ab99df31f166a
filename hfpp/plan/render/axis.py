"""Times and sizes in words: round ticks, units that fit."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["Axis", "axis", "count", "one_line", "size_words"]


_LONGEST = 200  # letters of a name


class Axis(NamedTuple):
    """How times are written.

    Attributes:
        unit: such as "ms"; empty where times have none.
        per_unit: what a time is divided by to be in that unit.
    """

    unit: str
    per_unit: float

    def number(self, time: float) -> str:
        """A time, without its unit."""
        return f"{time / self.per_unit:.4g}"

    def words(self, time: float) -> str:
        """A time with its unit."""
        return f"{self.number(time)} {self.unit}".rstrip()

    def ticks(self, end: float, most: float) -> list[tuple[float, str]]:
        """Round times from 0 to `end`, at most about `most` of them, and how they are written."""
        step = _round_up(end / self.per_unit / max(1.0, most))
        numbers = [k * step for k in range(int(end / self.per_unit / step + 1e-9) + 1)]
        return [(number * self.per_unit, f"{number:g}") for number in numbers]


def axis(end: float, unit: str) -> Axis:
    """The unit in which times up to `end` read well.

    Args:
        end: the last time.
        unit: "s", or empty for times without a unit.
    """
    if unit != "s":
        return Axis(unit, 1.0)
    for name, seconds in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if end >= seconds:
            return Axis(name, seconds)
    return Axis("ns", 1e-9)


def _round_up(least: float) -> float:
    """A round number of at least `least`: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * m for m in (1, 2, 5, 10, 20) if power * m >= least)


def size_words(size: float) -> str:
    """A number of bytes, such as 3.2 GiB."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 999.5:
            break
        size, unit = size / 1024, larger
    return f"{size:.{0 if size >= 99.5 or unit == 'B' else 1}f} {unit}"


def count(number: int, one: str, many: str | None = None) -> str:
    """Such as 1 rank, 2 ranks."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def one_line(text: str) -> str:
    """Text from a file, without what would move a terminal's cursor or break a document."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_LONGEST])
