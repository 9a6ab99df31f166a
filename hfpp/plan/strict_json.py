"""Values of a JSON file, each with its path in it, so that errors say where they stand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from hfpp.errors import PipelineConfigError
from hfpp.plan.json_document import read_document

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from os import PathLike

    from hfpp.plan.json_document import JsonDocument
    from hfpp.plan.json_places import Step

__all__ = ["JsonValue", "read_json_file"]

_LARGEST_INTEGER = 1 << 53
_SHOWN = 60  # characters of a wrong value
_ROOT: Any = object()
_Parsed = TypeVar("_Parsed")


class JsonValue:
    """One value of a document.

    Attributes:
        value: as `json` gives it.
    """

    __slots__ = ("_document", "_steps", "value")

    def __init__(
        self, document: JsonDocument, value: Any = _ROOT, steps: Sequence[Step] = ()
    ) -> None:
        self.value = document.value if value is _ROOT else value
        self._document = document
        self._steps = steps

    def at(self, *steps: Step) -> str:
        """The file, line and column of something in this value, and its path from the root."""
        way = (*self._steps, *steps)
        names = (f".{step}" if isinstance(step, str) else f"[{step}]" for step in way)
        place = self._document.place(way)
        return f"{self._document.name}{place and ', '}{place}: ${''.join(names)}"

    def fail(self, rule: str) -> NoReturn:
        """Raise the error of this value: what it is, and the rule that it breaks."""
        raise PipelineConfigError(f"{self.at()} ({_shown(self.value)}) {rule}")

    def member(self, name: str) -> JsonValue:
        """A member of an object; null where it has none of this name."""
        return JsonValue(self._document, self.value.get(name), (*self._steps, name))

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
                place = self.at(name).removesuffix(f".{name}")
                raise PipelineConfigError(
                    f"{place} has a member {_shown(name)} that is not known: use only "
                    f"{', '.join(known)}"
                )
        for name in names:
            if name not in self.value:
                raise PipelineConfigError(
                    f"{self.at()} has no member {name!r}: it needs {', '.join(names)}"
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
            JsonValue(self._document, value, (*self._steps, index))
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
        return self._owner.member(name)


def read_json_file(path: str | PathLike[str], *, what: str, largest: int) -> JsonValue:
    """A JSON document, as `read_document` reads it, without any infinity.

    Raises:
        FileNotFoundError: no such file.
        PipelineConfigError: no JSON; the message has file, line and column.
    """
    return JsonValue(read_document(path, what=what, largest=largest))


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
