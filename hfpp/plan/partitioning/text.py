"""A text that is read from left to right, and what is said about a place in it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hfpp.errors import PipelineConfigError

__all__ = ["PartitionText"]

_DIGITS = re.compile(r"[0-9]*")
_SPACES = re.compile(r"\s*")
_MOST_DIGITS = 9
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class PartitionText:
    """The text of an option.

    Attributes:
        text: as it was written.
        argument: what the caller calls it.
    """

    text: str
    argument: str

    def skip_spaces(self, at: int) -> int:
        """The next place that is no space."""
        found = _SPACES.match(self.text, at)
        return found.end() if found else at

    def number(self, at: int, what: str) -> tuple[int, int]:
        """The number that begins at a place, and the place after it.

        Raises:
            PipelineConfigError: If there is none, or it has too many digits.
        """
        found = _DIGITS.match(self.text, at)
        end = found.end() if found else at
        if end == at:
            raise self.error(
                at, f"{self.shown(at)} is no {what.split(' ', 1)[1]}", "write a whole number"
            )
        if end - at > _MOST_DIGITS:
            raise self.error(
                at,
                f"{what} has {end - at} digits",
                f"write a number of at most {_MOST_DIGITS} digits",
            )
        return int(self.text[at:end]), end

    def shown(self, at: int, length: int = 1) -> str:
        """What stands at a place, for a message."""
        part = self.text[at : at + length]
        if not part:
            return "the end"
        return repr(part if len(part) <= _SHOWN else f"{part[: _SHOWN - 3]}...")

    def error(self, at: int, problem: str, remedy: str) -> PipelineConfigError:
        """What is wrong at a place, and what to write instead; the column counts from 1."""
        text = self.text
        if len(text) > _SHOWN:  # what stands around the place
            begin = max(0, min(at - _SHOWN // 2, len(text) - _SHOWN))
            end = begin + _SHOWN
            text = f"{'...' if begin else ''}{text[begin:end]}{'...' if end < len(text) else ''}"
        return PipelineConfigError(
            f"{self.argument} ({text!r}), column {at + 1}: {problem}: {remedy}."
        )
