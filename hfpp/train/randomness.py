"""Turns off what draws random numbers in a model's forward, in its configuration.

A pipeline's ranks would draw other numbers than one process does.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["without_randomness"]

_RANDOM = re.compile(
    r"(^|_)(dropout(_(prob|p|rate|ratio|value|positions))?|pdrop|layer_?drop"
    r"|drop_?path(_(rate|prob))?|drop_?(connect_)?(rate|prob)|(attn|proj|resid|embd?|mlp)_drop"
    r"|jitter(_(noise|eps))?)$"
)

_Path = tuple[str | int, ...]


def without_randomness(config: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The configuration with every rate of dropout and jitter at 0, and which ones were not.

    Only floats are changed, under names that transformers' configurations use for such rates.

    Args:
        config: as JSON has it; not changed.

    Returns:
        A copy, and the changed entries as dotted paths.

    Example:
        >>> without_randomness({"resid_pdrop": 0.1, "text_config": {"layers": 2}})
        ({'resid_pdrop': 0.0, 'text_config': {'layers': 2}}, ('resid_pdrop',))
    """
    found = tuple(_random_entries(config, ()))
    copy = _zeroed(config, (), found)
    assert isinstance(copy, dict)
    return copy, tuple(".".join(map(str, path)) for path in found)


def _random_entries(value: Any, path: _Path) -> Iterator[_Path]:
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            yield from _random_entries(entry, (*path, key))
    elif isinstance(value, float) and value:
        # Entries of a list go by the list's name.
        name = next((key for key in reversed(path) if isinstance(key, str)), "")
        if _RANDOM.search(name.lower()):
            yield path


def _zeroed(value: Any, path: _Path, found: tuple[_Path, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _zeroed(entry, (*path, key), found) for key, entry in value.items()}
    if isinstance(value, list):
        return [_zeroed(entry, (*path, index), found) for index, entry in enumerate(value)]
    return 0.0 if path in found else value
