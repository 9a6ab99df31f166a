"""What crosses a cut, and how a model calls its layers: plain data, read off a hollow run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hfpp.runtime.emission import Source
    from hfpp.runtime.paths import Path

IDS = "input ids"
"""Key of the slot that carries the token ids themselves."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One value that crosses a cut.

    ``key`` is equal at two cuts that the same value crosses. ``uses``: (layer, path in the call's
    ``(args, kwargs)``) of every layer from the cut on that takes the value; none for the token ids.
    ``read_outside``: whether the model's code between the layers reads the first layer's argument
    again, as a loop does that adds residuals or collects states by itself.
    ``source``: where a layer gives out a value that is read outside of the layers.
    """

    key: Any
    shape: tuple[int, ...]
    dtype: torch.dtype
    uses: tuple[tuple[int, Path], ...]
    read_outside: bool = False
    source: Source | None = None

    @property
    def is_floating(self) -> bool:
        """True where a gradient comes back."""
        return self.dtype.is_floating_point or self.dtype.is_complex


@dataclass(frozen=True, slots=True)
class LayerCall:
    """How the model calls one layer: where the hidden state goes in, and the result's structure."""

    hidden_path: Path
    hidden_shape: tuple[int, ...]
    output: Any


@dataclass(frozen=True, slots=True)
class TensorLike:
    """What is left of a recorded tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Hidden:
    """Marks the hidden state's place in a layer's result."""
