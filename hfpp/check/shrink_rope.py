"""Rotary parameters of a smaller head dimension."""

from __future__ import annotations

from typing import Any

from hfpp.check.shrink_defaults import MROPE_SECTIONS
from hfpp.check.shrink_layers import is_ints


def name_sections(model_type: str, rope: Any) -> None:
    """Put into rotary parameters the sections that a model of this type would assume."""
    sections = MROPE_SECTIONS.get(model_type)
    if sections is None or not isinstance(rope, dict):
        return
    for parameters in [rope] if "rope_type" in rope else rope.values():
        if isinstance(parameters, dict):
            parameters.setdefault("mrope_section", list(sections))


def shrink_rope(rope: dict[str, Any], head_dim: tuple[int, int], factor: float) -> None:
    """Shorten what rotary parameters list per dimension; their kind, base and factors stay.

    Args:
        rope: A config's rotary parameters, perhaps a dict of them per kind of layer; changed in
            place.
        head_dim: The head dimension before and after.
        factor: The part of it that is rotated, where the parameters do not say.
    """
    old, new = head_dim
    for name, value in rope.items():
        if isinstance(value, dict):
            shrink_rope(value, head_dim, factor)
        elif name == "mrope_section" and is_ints(value):
            rotary = int(new * (rope.get("partial_rotary_factor") or factor))
            rope[name] = _sections(value, max(len(value), rotary // 2))
        elif name in ("short_factor", "long_factor") and isinstance(value, list):
            rope[name] = value[: max(1, len(value) * new // old)]


def _sections(sections: list[int], total: int) -> list[int]:
    """Sections in about the same proportions that add up to `total`, none empty."""
    small = [max(1, section * total // sum(sections)) for section in sections]
    while sum(small) != total:
        step = 1 if sum(small) < total else -1
        # The section furthest from its share gives or takes, of equals the last.
        gaps = [
            step * (old * total / sum(sections) - new)
            for old, new in zip(sections, small, strict=True)
        ]
        place = max(range(len(small)), key=lambda i: (gaps[i] if small[i] + step > 0 else -1e9, i))
        small[place] += step
    return small
