"""Values of a JSON file, each with its path in it, so that errors say where they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from hfpp.errors import PipelineConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from os import PathLike

__all__ = ["JsonValue", "read_json_file"]

_LARGEST_INTEGER = 1 << 53
_SHOWN = 60  # characters of a wrong value
_Parsed = TypeVar("_Parsed")


class JsonValue:
    """One value of a document.

    Attributes:
        value: as `json` gives it.
        path: where it stands, such as ``$.schedule.name``.
        name: of the document, for messages.
    """

    __slots__ = ("name", "path", "value")

    def __init__(self, value: Any, name: str, path: str = "$") -> None:
        self.value = value
        self.path = path
        self.name = name

    def fail(self, rule: str) -> NoReturn:
        """Raise the error of this value: what it is, and the rule that it breaks."""
        raise PipelineConfigError(f"{self.name}: {self.path} ({_shown(self.value)}) {rule}")

    def fields(self, names: Sequence[str], *, optional: Sequence[str] = ()) -> _Fields:
        """The members of an object that has these and no others.

        Raises:
            PipelineConfigError: no object, or another member is there or one is absent.
        """
        if not isinstance(self.value, dict):
            self.fail("must be an object, {...}")
        known = (*names, *optional)
        for name in self.value:
            if name not in known:
                raise PipelineConfigError(
                    f"{self.name}: {self.path} has a member {_shown(name)} that is not known: use "
                    f"only {', '.join(known)}"
                )
        for name in names:
            if name not in self.value:
                raise PipelineConfigError(
                    f"{self.name}: {self.path} has no member {name!r}: it needs {', '.join(names)}"
                )
        return _Fields(self)

    def items(self, *, most: int) -> list[JsonValue]:
        """The elements of an array.

        Raises:
            PipelineConfigError: no array, or longer than ``most``.
        """
        if not isinstance(self.value, list):
            self.fail("must be an array, [...]")
        if len(self.value) > most:
            self.fail(f"has {len(self.value)} elements: at most {most} are read")
        return [
            JsonValue(value, self.name, f"{self.path}[{index}]")
            for index, value in enumerate(self.value)
        ]

    def integer(self, *, minimum: int = 0, maximum: int = _LARGEST_INTEGER) -> int:
        """An integer within limits; 1.0 and true are none.

        Raises:
            PipelineConfigError: something else.
        """
        if type(self.value) is not int or not minimum <= self.value <= maximum:
            self.fail(f"must be an integer from {minimum} to {maximum}")
        return self.value

    def number(self) -> float:
        """A finite number that is not negative.

        Raises:
            PipelineConfigError: something else.
        """
        value = self.value
        if type(value) not in (int, float) or not 0 <= value <= 1e300:
            self.fail("must be a finite number that is not negative")
        return float(value)

    def text(self, *, most: int = 200) -> str:
        """A string of one line.

        Raises:
            PipelineConfigError: something else.
        """
        if not isinstance(self.value, str) or len(self.value) > most or "\n" in self.value:
            self.fail(f"must be a string of one line and at most {most} characters")
        return self.value

    def flag(self) -> bool:
        """True or false.

        Raises:
            PipelineConfigError: something else.
        """
        if not isinstance(self.value, bool):
            self.fail("must be true or false")
        return self.value

    def one_of(self, choices: Sequence[str]) -> str:
        """One of some strings.

        Raises:
            PipelineConfigError: something else.
        """
        if not isinstance(self.value, str) or self.value not in choices:
            self.fail(f"must be one of {', '.join(choices)}")
        return self.value

    def optional(self, parse: Callable[[JsonValue], _Parsed]) -> _Parsed | None:
        """None for null, else what ``parse`` makes of it."""
        return None if self.value is None else parse(self)


class _Fields:
    """Members of an object by name."""

    def __init__(self, owner: JsonValue) -> None:
        self._owner = owner

    def __getitem__(self, name: str) -> JsonValue:
        owner = self._owner
        return JsonValue(owner.value.get(name), owner.name, f"{owner.path}.{name}")


def read_json_file(path: str | PathLike[str], *, what: str, largest: int) -> JsonValue:
    """A JSON document: UTF-8, no member twice, no NaN and no infinity.

    Args:
        path: of the file.
        what: what it should be, for messages.
        largest: bytes; nothing beyond is read.

    Raises:
        FileNotFoundError: no such file.
        PipelineConfigError: no JSON; the message has file, line and column.
    """
    file, name = Path(path), str(path)
    if not file.exists():
        raise FileNotFoundError(f"{name}: no such file; give the path of {what}")
    try:
        if not file.is_file():  # a pipe or a device may never end
            raise PipelineConfigError(f"{name} is no regular file: give the path of {what}")
        with file.open("rb") as stream:
            data = stream.read(largest + 1)
    except OSError as error:
        raise PipelineConfigError(f"{name} cannot be read: {error.strerror}") from None
    if len(data) > largest:
        raise PipelineConfigError(
            f"{name} is larger than {largest >> 20} MiB, which no {what.removeprefix('a ')} is: "
            f"give the path of {what}"
        )
    return _parsed(data, name, what)


def _parsed(data: bytes, name: str, what: str) -> JsonValue:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = _place(data[: error.start].decode("utf-8", "replace"))
        raise PipelineConfigError(f"{name}, {place}: not UTF-8: give the path of {what}") from None
    try:
        value = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise PipelineConfigError(f"{name}, {place}: not JSON: {error.msg}") from None
    except RecursionError:
        raise PipelineConfigError(f"{name}: nested too deep to be {what}") from None
    except ValueError as error:  # a number of thousands of digits, or one of the hooks
        raise PipelineConfigError(f"{name}: {str(error)[:200]}") from None
    return JsonValue(value, name)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the member {_shown(name)} stands twice in one object: keep one")
            seen.add(name)
    return members


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number: write a finite one")


def _place(before: str) -> str:
    """Line and column of what follows a text."""
    return f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, str):
        value = value[: _SHOWN + 1]
    if type(value) is int and abs(value) > 10**30:
        return "an integer of more than 30 digits"
    shown = json.dumps(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
