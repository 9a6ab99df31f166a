"""Where things stand in the text of a JSON file, looked for only once there is an error to tell."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Fault", "Step", "deep_position", "find_fault", "line_and_column", "position_of"]

Step: TypeAlias = "str | int"
"""From an object or an array to a member by name, or to an element by index."""

_DEEP = 256  # levels; Python's own limit depends on who called, and is further down
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
_BRACKETS = re.compile(rf"{_STRING}|([\[{{])|([\]}}])")


class Fault(NamedTuple):
    """Something in a file that JSON's grammar lets pass, but a reader does not.

    Attributes:
        position: in the text.
        message: what it is and what to do.
    """

    position: int
    message: str


def line_and_column(text: str, position: int) -> str:
    """A position in words, both numbers from 1."""
    line = text.count("\n", 0, position) + 1
    return f"line {line}, column {position - text.rfind(chr(10), 0, position)}"


def position_of(text: str, steps: Sequence[Step]) -> int | None:
    """Where a member's name, or an element, begins.

    Args:
        text: of a JSON document.
        steps: the way to it; none is the document itself.

    Returns:
        None where the document has no such thing.

    Example:
        >>> text = '{"a": {"b": [7, 8]}}'
        >>> text[position_of(text, ("a", "b", 1)):]
        '8]}}'
    """
    value = found = _after_space(text, 0)
    for step in steps:
        member = _member(text, value, step)
        if member is None:
            return None
        found, value = member
    return found


def _member(text: str, start: int, step: Step) -> tuple[int, int] | None:
    """Where the member begins, and where its value does."""
    is_object = isinstance(step, str)
    if text[start] != ("{" if is_object else "["):
        return None
    at, index = _after_space(text, start + 1), 0
    while text[at] not in "}]":
        begin, key = at, index
        if is_object:
            key, at = _DECODER.raw_decode(text, at)
            at = _after_space(text, _after_space(text, at) + 1)  # the colon
        if key == step:
            return begin, at
        at = _after_space(text, _DECODER.raw_decode(text, at)[1])
        if text[at] == ",":
            at = _after_space(text, at + 1)
        index += 1
    return None


def _after_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return position if found is None else found.end()


def find_fault(text: str, constants: Sequence[str]) -> Fault | None:
    """The first member that stands twice in its object, or number that is none.

    Args:
        text: JSON, as far as the first fault.
        constants: of NaN, Infinity and -Infinity those that are faults.
    """
    digits = sys.get_int_max_str_digits() or len(text)  # beyond, Python makes no integer of them
    parts = (
        rf"(?P<name>{_STRING}(?=[ \t\n\r]*:))|{_STRING}",
        r"(?P<open>\{)|(?P<close>\})",
        rf"(?P<constant>NaN|-?Infinity)|(?P<digits>\d{{{digits + 1},}})|\d+",
    )
    members: list[set[str]] = []
    for found in re.finditer("|".join(parts), text):
        kind = found.lastgroup
        if kind == "name" and members:
            name = found[0][1:-1]
            name = json.loads(found[0]) if "\\" in name else name
            if name in members[-1]:
                shown = _shortened(json.dumps(name))
                message = f"the member {shown} stands twice in one object: keep one"
                return Fault(found.start(), message)
            members[-1].add(name)
        elif kind == "open":
            members.append(set())
        elif kind == "close" and members:
            members.pop()
        elif kind == "constant" and found[0] in constants:
            message = f"{found[0]} is no JSON number: write a finite one"
            return Fault(found.start(), message)
        elif kind == "digits":
            message = f"a number of {len(found[0])} digits: at most {digits} are read"
            return Fault(found.start(), message)
    return None


def deep_position(text: str) -> int:
    """Where the nesting gets deeper than any sensible file's; else the end."""
    depth = 0
    for found in _BRACKETS.finditer(text):
        depth += bool(found[1]) - bool(found[2])
        if depth > _DEEP:
            return found.start()
    return len(text)


def _shortened(shown: str) -> str:
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
