"""Bars of a page about plans: parts of a whole, and the layers of every stage, as SVG."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["PALETTE", "Bar", "legend", "partition_picture", "stacked_bars"]

PALETTE = ("#4878b0", "#7fb069", "#c2b04a", "#d9803c", "#9a6fb0", "#c05a5a", "#8a8f98")
"""By part, in the order of parts; told apart by lightness too."""

_ROW, _GAP, _LABEL, _FIGURE = 18, 5, 210, 90


class Bar(NamedTuple):
    """One bar.

    Attributes:
        label: at its left.
        parts: by name; every bar of a picture has the same names.
    """

    label: str
    parts: Mapping[str, float]


def stacked_bars(
    bars: Sequence[Bar],
    as_text: Callable[[float], str],
    *,
    limit: float | None = None,
    width: int = 1000,
) -> str:
    """Bars on one scale, their wholes at the right.

    Args:
        bars: from top to bottom.
        as_text: how figures are written.
        limit: drawn as a line, such as the memory that there is.
        width: of the picture in pixels.
    """
    room = width - _LABEL - _FIGURE
    wholes = [sum(bar.parts.values()) for bar in bars]
    scale = room / (max([*wholes, limit or 0.0]) or 1.0)
    height = len(bars) * (_ROW + _GAP) + 16
    out = [_svg(width, height)]
    for index, (bar, whole) in enumerate(zip(bars, wholes, strict=True)):
        y = index * (_ROW + _GAP) + 14
        out.append(_text(_LABEL - 8, y + 13, bar.label, anchor="end"))
        x = float(_LABEL)
        for colour, (name, size) in zip(PALETTE, bar.parts.items(), strict=False):
            if size * scale >= 0.05:
                words = f"{bar.label}: {name} {as_text(size)}"
                out.append(_box(x, y, size * scale, _ROW, colour, words))
            x += size * scale
        out.append(_text(width - _FIGURE + 8, y + 13, as_text(whole)))
    if limit is not None:
        x = _LABEL + limit * scale
        out.append(
            f'<path d="M{x:.1f} 2V{height}" stroke="#b00020" stroke-width="1.5" '
            'stroke-dasharray="4 3"/>'
        )
        out.append(_text(x - 5, 10, f"{as_text(limit)} there is", anchor="end", colour="#b00020"))
    return "".join([*out, "</svg>"])


def legend(names: Sequence[str]) -> str:
    """What the colours of bars mean."""
    return "".join(
        f'<span class="key"><i style="background:{colour}"></i>{escape(name)}</span>'
        for colour, name in zip(PALETTE, names, strict=False)
    )


def partition_picture(
    ranks: Sequence[Sequence[tuple[int, range, float]]],
    *,
    ends: tuple[str, str],
    num_layers: int,
    width: int = 1000,
) -> str:
    """A row per rank with its stages, each as long as it computes.

    Args:
        ranks: by rank, its stages: index, layers and seconds of a microbatch.
        ends: what the first and the last stage have besides layers.
        num_layers: of the model.
        width: of the picture in pixels.
    """
    label = 70
    most = max(sum(seconds for *_, seconds in own) for own in ranks) or 1.0
    scale = (width - label - 10) / most
    height = len(ranks) * (_ROW + _GAP)
    stages = sum(len(own) for own in ranks)
    out = [_svg(width, height)]
    for index, own in enumerate(ranks):
        y = index * (_ROW + _GAP)
        out.append(_text(label - 8, y + 13, f"rank {index}", anchor="end"))
        x = float(label)
        for position, (stage, layers, seconds) in enumerate(own):
            long = seconds * scale
            what = f"{len(layers)} layers" if len(layers) != 1 else "1 layer"
            before, after = ends[:1] * (stage == 0), ends[1:] * (stage == stages - 1)
            besides = (*before, *after)
            name = " + ".join((*before, what, *after))
            words = (
                f"stage {stage}: layers {layers.start} to {layers.stop - 1} of {num_layers}"
                + (f" and {' and '.join(besides)}" if besides else "")
                + f", {seconds * 1e3:.3g} ms per microbatch"
            )
            colour = "#a9c4e4" if position % 2 == 0 else "#cfe0c3"
            out.append(_box(x, y, max(0.5, long - 1), _ROW, colour, words))
            shown = next((t for t in (name, str(len(layers))) if long > 7 * len(t) + 4), "")
            out.append(_text(x + long / 2, y + 13, shown, anchor="middle"))
            x += long
    return "".join([*out, "</svg>"])


def _svg(width: float, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="12">'
    )


def _box(x: float, y: float, width: float, height: float, colour: str, words: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height}" fill="{colour}">'
        f"<title>{escape(words)}</title></rect>"
    )


def _text(x: float, y: float, words: str, *, anchor: str = "start", colour: str = "#222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">'
        f"{escape(words)}</text>"
    )
