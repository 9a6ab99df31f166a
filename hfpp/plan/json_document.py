"""The one reader of JSON files: bounded, strict, and with line and column in every error."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hfpp.errors import PipelineConfigError
from hfpp.plan.json_places import deep_position, find_fault, line_and_column, position_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from hfpp.plan.json_places import Step

__all__ = ["JsonDocument", "read_document"]

_CONSTANTS = ("NaN", "Infinity", "-Infinity")


@dataclass(frozen=True, slots=True)
class JsonDocument:
    """What a file holds.

    Attributes:
        name: of the file, for messages.
        text: of the file, to find places in.
        value: as `json` gives it.
    """

    name: str
    text: str
    value: Any

    def place(self, steps: Sequence[Step]) -> str:
        """Line and column of a member or an element; empty where the file has no such thing."""
        position = position_of(self.text, steps)
        return "" if position is None else line_and_column(self.text, position)


def read_document(
    path: str | PathLike[str], *, what: str, largest: int, allow_infinity: bool = False
) -> JsonDocument:
    """A JSON document: UTF-8, no member twice, no NaN and no infinity.

    Args:
        path: of the file.
        what: what it should be, for messages.
        largest: bytes; nothing beyond is read.
        allow_infinity: whether ``Infinity`` may stand where a number may.

    Raises:
        FileNotFoundError: no such file.
        PipelineConfigError: no such document; the message has file, line and column.
    """
    file, name = Path(path), str(path)
    if not file.exists():
        raise FileNotFoundError(f"{name}: no such file: give the path of {what}")
    try:
        if not file.is_file():  # a pipe or a device may never end
            raise PipelineConfigError(f"{name} is no regular file: give the path of {what}")
        with file.open("rb") as stream:
            data = stream.read(largest + 1)
    except OSError as error:
        raise PipelineConfigError(f"{name} cannot be read: {error.strerror}") from None
    if len(data) > largest:
        raise PipelineConfigError(
            f"{name} is larger than {largest >> 20} MiB: give the path of {what}"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig", "replace")
        _fail(name, before, len(before), f"not UTF-8: give the path of {what}")
    del data
    return JsonDocument(name, text, _parsed(text, name, what, allow_infinity=allow_infinity))


def _parsed(text: str, name: str, what: str, *, allow_infinity: bool) -> Any:
    refused = tuple(c for c in _CONSTANTS if not (allow_infinity and c == "Infinity"))

    def constant(word: str) -> float:
        if word in refused:
            raise ValueError(f"{word} is no JSON number")
        return float(word)

    try:
        return json.loads(text, object_pairs_hook=_without_doubles, parse_constant=constant)
    except json.JSONDecodeError as error:
        _fail(name, text, error.pos, f"not JSON: {error.msg}")
    except RecursionError:
        _fail(name, text, deep_position(text), f"nested too deep to be {what}")
    except ValueError as error:  # one of the hooks, or a number of thousands of digits
        fault = find_fault(text, refused)
        if fault is None:
            raise PipelineConfigError(f"{name}: {str(error)[:200]}") from None
        _fail(name, text, fault.position, fault.message)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member stands twice in one object")
    return members


def _fail(name: str, text: str, position: int, message: str) -> NoReturn:
    raise PipelineConfigError(f"{name}, {line_and_column(text, position)}: {message}") from None
