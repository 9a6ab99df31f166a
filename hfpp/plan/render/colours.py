"""The colours of pictures, in the terminal too, and what they stand for."""

from __future__ import annotations

from functools import cache

from hfpp.plan.schedules.actions import ActionKind

__all__ = [
    "COMMUNICATION",
    "DIM",
    "IDLE",
    "LIVE",
    "NAMES",
    "Colour",
    "hex_of",
    "ink_on",
    "shade",
]

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

_PLAIN: dict[ActionKind, Colour] = {
    ActionKind.FORWARD: (45, 105, 214),
    ActionKind.FULL_BACKWARD: (22, 146, 100),
    ActionKind.BACKWARD_INPUT: (12, 143, 158),
    ActionKind.BACKWARD_WEIGHT: (235, 150, 30),
}
NAMES = {
    ActionKind.FORWARD: "forward",
    ActionKind.FULL_BACKWARD: "backward",
    ActionKind.BACKWARD_INPUT: "backward: inputs",
    ActionKind.BACKWARD_WEIGHT: "backward: weights",
}
IDLE: Colour = (230, 234, 240)
DIM: Colour = (128, 134, 145)
"""Idle time in terminals, whose paper may be dark or light."""
COMMUNICATION: Colour = (214, 40, 100)
LIVE: Colour = (118, 88, 190)


@cache  # a picture asks for the same few some hundred thousand times
def shade(kind: ActionKind, chunk: int, chunks: int) -> Colour:
    """The colour of a kind of computation, lighter for a rank's later stages.

    Args:
        kind: of the computation.
        chunk: which of its rank's stages it is on, from 0.
        chunks: stages of that rank.
    """
    share = 0.0 if chunks == 1 else 0.55 * chunk / (chunks - 1)
    red, green, blue = (round(c + (255 - c) * share) for c in _PLAIN[kind])
    return red, green, blue


def hex_of(colour: Colour) -> str:
    """As HTML and terminals take it, such as #2d69d6."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def ink_on(colour: Colour) -> Colour:
    """A colour for text on another one."""
    red, green, blue = colour
    light = 0.3 * red + 0.59 * green + 0.11 * blue > 140
    return (28, 37, 51) if light else (255, 255, 255)
