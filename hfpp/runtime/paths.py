"""Where a tensor sits inside nested tuples, lists and mappings, such as a call's arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch


class Key(NamedTuple):
    """A path's step into a mapping; steps into tuples and lists are plain integers."""

    name: Any


Path = tuple[int | Key, ...]
"""Where a value sits in ``(args, kwargs)`` of a call: ``(0, 0)`` is the first positional argument,
``(1, Key("mask"))`` the keyword argument ``mask``."""


_SCALARS = frozenset((int, float, bool, str, torch.dtype, torch.device))


def walk_tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, torch.Tensor]]:
    """Yield every tensor inside nested tuples, lists and mappings, with its path."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key in list(value):
            yield from walk_tensors(value[key], (*path, Key(key)))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from walk_tensors(item, (*path, index))


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor that ``walk_tensors`` yields, in its order."""
    found: list[torch.Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[torch.Tensor]) -> None:
    if value is None or type(value) in _SCALARS:
        return  # most of an operator's arguments: asking for a Mapping takes long
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(item, found)
    elif isinstance(value, Mapping):
        for key in list(value):
            _collect(value[key], found)


def get_at(value: Any, path: Path) -> Any:
    """The item of nested containers at ``path``."""
    for step in path:
        value = value[step.name] if isinstance(step, Key) else value[step]
    return value


def set_at(value: Any, path: Path, new: Any) -> Any:
    """``value`` with ``new`` at ``path``.

    Tuples are rebuilt, lists and mappings written in place, so that a container that the model
    shares between layers stays shared.
    """
    if not path:
        return new
    step, rest = path[0], path[1:]
    if isinstance(step, Key):
        value = {} if value is None else value
        old = value.get(step.name, None)
        value[step.name] = set_at(old, rest, new)
        return value
    items = list(value) if value is not None else []
    items.extend([None] * (step + 1 - len(items)))
    items[step] = set_at(items[step], rest, new)
    if isinstance(value, list):
        value[:] = items
        return value
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Rebuild nested tuples, lists and dicts with ``function`` applied to each tensor."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        items = [map_tensors(function, item) for item in value]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value
