"""Relations between a config's sizes that their names alone do not tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from hfpp.check.shrink_layers import KeptLayers
from hfpp.check.shrink_sizes import StackSizes

Old = Mapping[str, Any]
New = MutableMapping[str, Any]
Rule = Callable[[Old, New, StackSizes, "KeptLayers | None"], None]


def _int(old: Old, *names: str) -> bool:
    return all(isinstance(old.get(name), int) for name in names)


def _query_key_dim(old: Old, new: New, sizes: StackSizes, stack: KeptLayers | None) -> None:
    """Queries and keys of compressed attention: a rotary and another part."""
    if _int(old, "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"):
        new["qk_head_dim"] = new["qk_nope_head_dim"] + new["qk_rope_head_dim"]


def _period_offset(old: Old, new: New, sizes: StackSizes, stack: KeptLayers | None) -> None:
    """An offset into a period."""
    for name in old:
        period = name.replace("_offset", "_period")
        if name.endswith("_offset") and period != name and _int(old, name, period):
            new[name] = old[name] % new[period]


_GENERAL: tuple[Rule, ...] = (_query_key_dim, _period_offset)
_BY_MODEL_TYPE: dict[str, Rule] = {}


def apply_rules(part: Any, old: Old, new: New, sizes: StackSizes, stack: KeptLayers | None) -> None:
    """Put right, in `new`, what shrinking each attribute on its own has broken.

    Args:
        part: The config (or plain dict) the attributes belong to.
        old: Its attributes before.
        new: Its attributes now; changed in place.
        sizes: The stack's measures.
        stack: The layers kept, if it has any.
    """
    for rule in _GENERAL:
        rule(old, new, sizes, stack)
    special = _BY_MODEL_TYPE.get(getattr(part, "model_type", ""))
    if special is not None:
        special(old, new, sizes, stack)
