"""A config.json read with care: sizes by any of their names, and errors that say where."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from hfpp.errors import PipelineConfigError

__all__ = ["ModelConfig", "read_config"]

LARGEST_FILE = 64 << 20  # bytes; vocabularies of multimodal models make the largest ones
LARGEST_SIZE = 1 << 40  # of a width, in elements
MOST_LAYERS = 4_096


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The values of a config and where they come from.

    Attributes:
        values: by name.
        name: what errors call it: the file, or "config".
        model_type: its model_type; empty where it has none.
        text: of the file, to find lines in; empty for a mapping.
        path: names of the sub-configs that lead here, joined by dots.
    """

    values: Mapping[str, Any]
    name: str
    model_type: str
    text: str = field(default="", repr=False)
    path: str = ""

    def inner(self, key: str) -> ModelConfig | None:
        """A sub-config; None where there is none of this name."""
        values = self.values.get(key)
        if not isinstance(values, Mapping):
            return None
        own = values.get("model_type")
        path = f"{self.path}.{key}".removeprefix(".")
        kind = own if isinstance(own, str) else self.model_type
        return ModelConfig(values, self.name, kind, self.text, path)

    def merged(self, keys: Sequence[str]) -> ModelConfig:
        """The same config with the entries of these sub-configs among its own."""
        values = dict(self.values)
        for key in keys:
            inner = values.get(key)
            if isinstance(inner, Mapping):
                values = {**inner, **values}
        return ModelConfig(values, self.name, self.model_type, self.text, self.path)

    def with_values(self, changes: Mapping[str, Any]) -> ModelConfig:
        """The same config with other values."""
        values = {**self.values, **changes}
        return ModelConfig(values, self.name, self.model_type, self.text, self.path)

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

    def fail(self, key: str, what: str) -> NoReturn:
        """Raise the error of one value, with its line where it comes from a file."""
        raise PipelineConfigError(f"{self.name}{self._place(key)}: {self._full(key)} {what}.")

    def fail_missing(self, names: Sequence[str]) -> NoReturn:
        """Raise the error of a size that none of its names gives."""
        kind = f"model_type {self.model_type!r}" if self.model_type else "no model_type"
        keys = ", ".join(self._full(name) for name in names)
        raise PipelineConfigError(
            f"{self.name} ({kind}) has none of the keys {keys}: give one of them, or let "
            f"hfpp profile measure what the live model costs."
        )

    def _full(self, key: str) -> str:
        return f"{self.path}.{key}".removeprefix(".")

    def _place(self, key: str) -> str:
        found = re.search(rf'"{re.escape(key)}"\s*:', self.text)
        return "" if found is None else f", {_place(self.text, found.start())}"


def read_config(source: Mapping[str, Any] | str | PathLike[str]) -> ModelConfig:
    """A model's config.

    Args:
        source: the values by name, the path of a JSON file, or a folder with a config.json.

    Raises:
        PipelineConfigError: there is no such file, or it holds no JSON object; with line and
            column.
    """
    if isinstance(source, Mapping):
        return _config(source, "config", "")
    if not isinstance(source, str | PathLike):
        raise PipelineConfigError(
            f"source is a {type(source).__name__}: give a config's values as a dict, the path of a "
            f"config.json or of a folder with one"
        )
    path = Path(source)
    name = repr(str(path / "config.json" if path.is_dir() else path))
    text = _read(path / "config.json" if path.is_dir() else path, name)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise PipelineConfigError(f"{name}, {place}: no JSON: {error.msg}.") from None
    except (RecursionError, ValueError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)[:120]
        raise PipelineConfigError(f"{name}: no usable JSON: {reason}.") from None
    if not isinstance(values, dict):
        raise PipelineConfigError(
            f"{name}, line 1, column 1: the file must hold one JSON object ({{...}}), but holds a "
            f"{type(values).__name__}."
        )
    return _config(values, name, text)


def _config(values: Mapping[str, Any], name: str, text: str) -> ModelConfig:
    kind = values.get("model_type")
    return ModelConfig(values, name, kind if isinstance(kind, str) else "", text)


def _read(path: Path, name: str) -> str:
    try:
        is_file = path.is_file()
    except ValueError:  # a null byte
        is_file = False
    if not is_file:
        raise PipelineConfigError(
            f"{name} is no file: give the path of a config.json or of a folder with one."
        )
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise PipelineConfigError(f"{name} cannot be read: {error.strerror}.") from None
    if len(data) > LARGEST_FILE:
        raise PipelineConfigError(
            f"{name} is larger than {LARGEST_FILE >> 20} MiB: give a model's config.json."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", errors="replace")
        place = _place(before, len(before))
        raise PipelineConfigError(f"{name}, {place}: no UTF-8 text.") from None


def _place(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    return f"line {line}, column {position - (text.rfind(chr(10), 0, position) + 1) + 1}"


def _shown(value: Any) -> str:
    """A value for an error: short, however large it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return f"a number of {int(math.log10(abs(value))) + 1} digits"
    shown = json.dumps(value, default=lambda item: type(item).__name__)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
