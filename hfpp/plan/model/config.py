"""A config.json read with care: sizes by any of their names, and errors that say where."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from hfpp.errors import PipelineConfigError
from hfpp.plan.json_document import JsonDocument, read_document

__all__ = ["ModelConfig", "read_config", "read_config_file"]

LARGEST_FILE = 8 << 20  # bytes; what Python makes of a malicious one is some 30 times as much
LARGEST_SIZE = 1 << 40  # of a width, in elements
MOST_LAYERS = 4_096


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The values of a config and where they come from.

    Attributes:
        values: by name.
        model_type: its model_type; empty where it has none.
        document: the file, to find lines in; None for a mapping.
        path: names of the sub-configs that lead here.
        besides: names of the sub-configs whose entries are among the values.
    """

    values: Mapping[str, Any]
    model_type: str
    document: JsonDocument | None = field(default=None, repr=False)
    path: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What errors call it: the file, or "config"."""
        return "config" if self.document is None else self.document.name

    def inner(self, key: str) -> ModelConfig | None:
        """A sub-config; None where there is none of this name.

        Raises:
            PipelineConfigError: it is no object.
        """
        values = self.object(key)
        if values is None:
            return None
        kind = _kind(values) or self.model_type
        return ModelConfig(values, kind, self.document, (*self.path, key))

    def merged(self, keys: Sequence[str]) -> ModelConfig:
        """The same config with the entries of these sub-configs among its own.

        Raises:
            PipelineConfigError: one of them is no object.
        """
        values = dict(self.values)
        for key in keys:
            values = {**(self.object(key) or {}), **values}
        return replace(self, values=values, besides=tuple(keys))

    def object(self, key: str) -> Mapping[str, Any] | None:
        """An object; None where there is none of this name.

        Raises:
            PipelineConfigError: it is something else.
        """
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.fail(key, f"is {_shown(value)}: it must be an object, {{...}}")
        return value

    def with_values(self, changes: Mapping[str, Any]) -> ModelConfig:
        """The same config with other values."""
        return replace(self, values={**self.values, **changes})

    def has(self, *names: str) -> bool:
        """Whether any of these is set to something else than null."""
        return any(self.values.get(name) is not None for name in names)

    def integer(self, *names: str, minimum: int = 1, maximum: int = LARGEST_SIZE) -> int:
        """The first of these sizes that is set.

        Raises:
            PipelineConfigError: none is set, or it is no integer within the limits.
        """
        found = self.optional(*names, minimum=minimum, maximum=maximum)
        if found is None:
            self.fail_missing(names)
        return found

    def optional(self, *names: str, minimum: int = 1, maximum: int = LARGEST_SIZE) -> int | None:
        """The first of these sizes that is set; None where none is.

        Raises:
            PipelineConfigError: it is no integer within the limits.
        """
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                self.fail(name, f"is {_shown(value)}: it must be an integer")
            if not minimum <= value <= maximum:
                self.fail(name, f"is {_shown(value)}: it must be from {minimum} to {maximum}")
            return value
        return None

    def number(self, name: str, default: float) -> float:
        """A positive number.

        Raises:
            PipelineConfigError: it is none.
        """
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(name, f"is {_shown(value)}: it must be a number")
        if not (0 < value <= LARGEST_SIZE):
            self.fail(name, f"is {_shown(value)}: it must be a positive number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Whether something is switched on.

        Raises:
            PipelineConfigError: it is neither true nor false.
        """
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(name, f"is {_shown(value)}: it must be true or false")
        return value

    def text(self, *names: str) -> str | None:
        """The first of these names that is set; None where none is.

        Raises:
            PipelineConfigError: it is no string.
        """
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if not isinstance(value, str):
                self.fail(name, f"is {_shown(value)}: it must be a string")
            return value
        return None

    def listed(self, name: str) -> list[Any] | None:
        """A list, as long as a list of layers may be; None where it is not set.

        Raises:
            PipelineConfigError: it is no list, or too long.
        """
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            self.fail(name, f"is {_shown(value)}: it must be a list")
        if len(value) > MOST_LAYERS:
            self.fail(name, f"has {len(value)} entries: at most {MOST_LAYERS} are read")
        return list(value)

    def indices(self, name: str) -> frozenset[int] | None:
        """A list of numbers of layers; None where it is not set.

        Raises:
            PipelineConfigError: it is no list of integers.
        """
        value = self.listed(name)
        if value is None:
            return None
        if any(isinstance(item, bool) or not isinstance(item, int) for item in value):
            self.fail(name, f"is {_shown(value)}: it must list integers")
        return frozenset(value)

    def check_multiple(
        self, names: Sequence[str], value: int, divisors: Sequence[str], divisor: int
    ) -> None:
        """Check that one size is a multiple of another; both by any of their names.

        Raises:
            PipelineConfigError: it is none.
        """
        if value % divisor:
            keys = [next(filter(self.has, given), given[0]) for given in (names, divisors)]
            self.fail(keys[0], f"is {value}: it must be a multiple of {keys[1]} ({divisor})")

    def fail(self, key: str, what: str) -> NoReturn:
        """Raise the error of one value, with its line where it comes from a file."""
        inners = ((), *((inner,) for inner in self.besides))
        ways = [(*self.path, *inner, key) for inner in inners]
        places = [self.document.place(way) if self.document is not None else "" for way in ways]
        way, place = next(filter(itemgetter(1), zip(ways, places, strict=True)), (ways[0], ""))
        raise PipelineConfigError(f"{self.name}{place and ', '}{place}: {'.'.join(way)} {what}.")

    def fail_missing(self, names: Sequence[str]) -> NoReturn:
        """Raise the error of a size that none of its names gives."""
        kind = f"model_type {self.model_type!r}" if self.model_type else "no model_type"
        keys = ", ".join(self._full(name) for name in names)
        raise PipelineConfigError(
            f"{self.name} ({kind}) has none of the keys {keys}: give one of them, or let "
            f"hfpp profile measure what the live model costs."
        )

    def _full(self, key: str) -> str:
        return ".".join((*self.path, key))


def read_config(source: Mapping[str, Any] | str | PathLike[str]) -> ModelConfig:
    """A model's config.

    Args:
        source: the values by name, the path of a JSON file, or a folder with a config.json.

    Raises:
        FileNotFoundError: no such file.
        PipelineConfigError: it holds no JSON object; with line and column.
    """
    if isinstance(source, Mapping):
        return _config(source, None)
    if not isinstance(source, str | PathLike):
        raise PipelineConfigError(
            f"source is a {type(source).__name__}: give a config's values as a dict, the path of a "
            f"config.json or of a folder with one"
        )
    document = read_config_file(source)
    if not isinstance(document.value, dict):
        raise PipelineConfigError(
            f"{document.name}, {document.place(())}: the file must hold one JSON object ({{...}}), "
            f"but holds a {type(document.value).__name__}."
        )
    return _config(document.value, document)


def read_config_file(path: str | PathLike[str]) -> JsonDocument:
    """A config.json, in itself or in a folder.

    Infinity may stand in it: several classes of transformers (Mamba 2, Bamba, Zamba 2, Falcon H1,
    Granite hybrid, Nemotron H) have a ``time_step_limit`` of 0 to infinity, which Python's json
    writes so. None has NaN or a negative infinity.

    Raises:
        FileNotFoundError: no such file.
        PipelineConfigError: no JSON; the message has file, line and column.
    """
    file = Path(path)
    return read_document(
        file / "config.json" if file.is_dir() else file,
        what="a config.json or of a folder with one",
        largest=LARGEST_FILE,
        allow_infinity=True,
    )


def _config(values: Mapping[str, Any], document: JsonDocument | None) -> ModelConfig:
    config = ModelConfig(values, _kind(values), document)
    kind = values.get("model_type")
    if kind is not None and not isinstance(kind, str):
        config.fail("model_type", f'is {_shown(kind)}: it must be a name, such as "llama"')
    return config


def _kind(values: Mapping[str, Any]) -> str:
    kind = values.get("model_type")
    return kind if isinstance(kind, str) else ""


def _shown(value: Any) -> str:
    """A value for an error: short, however large it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return f"a number of {int(math.log10(abs(value))) + 1} digits"
    shown = json.dumps(value, default=lambda item: type(item).__name__)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
