"""What options are made of: numbers and lists, and what to say of text that is none."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["as_options", "columns", "integer", "integers", "names", "number"]

_Number = TypeVar("_Number", int, float)
_FEWEST_COLUMNS = 40
_MOST_COLUMNS = 2000  # more are a typing error, and take minutes to fill


def integer(text: str) -> int:
    """An integer.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    return _parsed(int, text, "an integer, such as 4")


def number(text: str) -> float:
    """A number; inf and nan are some too, for those who take the value to judge.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    return _parsed(float, text, "a number, such as 1.5")


def integers(text: str) -> tuple[int, ...]:
    """Integers between commas, each once.

    Raises:
        argparse.ArgumentTypeError: one of them is none.
    """
    rule = "integers between commas, such as 2,4"
    found = (_parsed(int, part, rule, text) for part in text.split(","))
    return tuple(dict.fromkeys(found))


def names(text: str) -> tuple[str, ...]:
    """Names between commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def as_options(message: str, options: Mapping[str, str]) -> str:
    """A message that names arguments of functions, with the options that they are here.

    Args:
        message: of an error.
        options: by argument, without dashes.
    """
    named = re.compile(rf"\b({'|'.join(options)})(?==| \(| '| is )")
    return named.sub(lambda found: f"--{options[found[1]]}", message)


def columns(text: str) -> int:
    """The width of a table or a drawing.

    Raises:
        argparse.ArgumentTypeError: it is none, or one that no terminal has.
    """
    rule = f"columns from {_FEWEST_COLUMNS} to {_MOST_COLUMNS}, such as 120"
    width = _parsed(int, text, rule)
    if not _FEWEST_COLUMNS <= width <= _MOST_COLUMNS:
        raise _refusal(text, rule)
    return width


def _parsed(
    parse: Callable[[str], _Number], text: str, rule: str, whole: str | None = None
) -> _Number:
    try:
        return parse(text)
    except ValueError:  # also of integers of thousands of digits
        raise _refusal(text if whole is None else whole, rule) from None


def _refusal(text: str, rule: str) -> argparse.ArgumentTypeError:
    shown = repr(text if len(text) <= 40 else f"{text[:40]}...")
    return argparse.ArgumentTypeError(f"{shown} must be {rule}")
