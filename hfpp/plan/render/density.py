"""Rows with more bars than there is room for: what share of each cell a computation takes."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import TYPE_CHECKING

from hfpp.plan.render.colours import IDLE, Colour, shade

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfpp.plan.render.timeline import Timeline
    from hfpp.plan.schedules.actions import ActionKind

__all__ = ["Shares", "blend", "cell_shares", "png_row"]

_PNG_HEIGHT = 12

Shares = dict[tuple["ActionKind", int, int], float]
"""Of one cell: by kind, which of its rank's stages and how many it has, the share of the time."""


def cell_shares(timeline: Timeline, row: int, cells: int, end: float) -> list[Shares]:
    """What each of `cells` equal parts of the time from 0 to `end` is used for.

    Args:
        timeline: whose row.
        row: the row.
        cells: number of parts.
        end: of the last one; not before any bar's end.
    """
    found: list[Shares] = [{} for _ in range(cells)]
    per_cell = end / cells
    for bar in timeline.bars[row]:
        key = (bar.action.kind, *timeline.chunks[bar.action.stage])
        start, stop = bar.start / per_cell, bar.end / per_cell
        for cell in range(int(start), min(int(stop) + 1, cells)):
            share = min(stop, cell + 1) - max(start, cell)
            if share > 0:
                found[cell][key] = found[cell].get(key, 0.0) + share
    return found


def blend(shares: Shares, *, idle_colour: Colour = IDLE) -> Colour:
    """The mean colour of a cell, as from afar."""
    idle = max(0.0, 1.0 - sum(shares.values()))
    parts = [(idle_colour, idle), *((shade(*key), share) for key, share in shares.items())]
    total = sum(share for _, share in parts)
    red, green, blue = (
        round(sum(colour[i] * share for colour, share in parts) / total) for i in range(3)
    )
    return red, green, blue


def png_row(colours: Sequence[Colour]) -> str:
    """A picture of vertical lines in these colours, as a data URI: PNG, 8 bits per channel.

    Some pixels high, as viewers that smooth what they stretch let the edges fade.
    """
    width = 3 * len(colours)
    pixels = b"\0" + bytes(channel for colour in colours for channel in colour)
    pixels += (b"\2" + bytes(width)) * (_PNG_HEIGHT - 1)  # no difference to the line above
    size = struct.pack(">IIBBBBB", len(colours), _PNG_HEIGHT, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", size), (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()
