"""What the parts of a model cost: the common currency of partitions, simulation and planning."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from hfpp.errors import PipelineConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["ModelCosts", "UnitCost", "total_cost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCost:
    """What one part of a model costs one rank: a layer, the embedding, the head, or a whole stage.

    Times and activations are those of one microbatch.

    Attributes:
        forward: seconds.
        backward_input: seconds of the part of the backward that makes the inputs' gradients,
            together with what has to be computed again for the backward.
        backward_weight: seconds of the part that makes the weights' gradients.
        parameters: number of parameters that the rank holds.
        activation_bytes: bytes kept from the forward to the backward.
        weight_bytes: bytes kept from the inputs' to the weights' part of a split backward.
        split_backward: seconds that the weights' part takes longer where a schedule splits the
            backward; torch then walks the graph twice.
    """

    forward: float
    backward_input: float
    backward_weight: float
    parameters: int = 0
    activation_bytes: int = 0
    weight_bytes: int = 0
    split_backward: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise PipelineConfigError(
                    f"{field.name} ({value}) must be a finite number that is not negative: "
                    f"use {field.name}=0 where a part costs nothing"
                )

    @property
    def backward(self) -> float:
        """Seconds of a whole backward."""
        return self.backward_input + self.backward_weight

    def in_one_piece(self) -> UnitCost:
        """The cost where schedules that split the backward run all of it for the inputs."""
        return replace(
            self,
            backward_input=self.backward,
            backward_weight=0.0,
            weight_bytes=0,
            split_backward=0.0,
        )

    @property
    def seconds(self) -> float:
        """Seconds of one microbatch, forward and backward."""
        return self.forward + self.backward


def total_cost(units: Iterable[UnitCost]) -> UnitCost:
    """The cost of several parts that run one after another on one rank."""
    rows = [
        (
            u.forward,
            u.backward_input,
            u.backward_weight,
            u.parameters,
            u.activation_bytes,
            u.weight_bytes,
            u.split_backward,
        )
        for u in units
    ]
    columns = list(zip(*rows, strict=True)) or [(0,)] * 7
    return UnitCost(
        forward=math.fsum(columns[0]),
        backward_input=math.fsum(columns[1]),
        backward_weight=math.fsum(columns[2]),
        parameters=sum(columns[3]),
        activation_bytes=sum(columns[4]),
        weight_bytes=sum(columns[5]),
        split_backward=math.fsum(columns[6]),
    )


@dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """What the parts of a model cost, in the order in which they run.

    Attributes:
        embedding: what runs before the first layer; always on the first stage.
        layers: one entry per layer.
        head: what runs after the last layer: norm, head and loss; always on the last stage.
        boundary_bytes: bytes of one microbatch that cross from one stage to the next.
        source: whether the numbers follow from the model's shape or were measured.
    """

    embedding: UnitCost
    layers: tuple[UnitCost, ...]
    head: UnitCost
    boundary_bytes: int
    source: Literal["analytic", "measured"]

    def __post_init__(self) -> None:
        if not self.layers:
            raise PipelineConfigError("layers is empty: a model has at least one layer")
        if self.boundary_bytes < 0:
            raise PipelineConfigError(
                f"boundary_bytes ({self.boundary_bytes}) must not be negative: "
                "use boundary_bytes=0 where nothing crosses"
            )

    @cached_property
    def seconds(self) -> tuple[float, ...]:
        """Seconds of each layer, the embedding added to the first and the head to the last."""
        seconds = [layer.seconds for layer in self.layers]
        seconds[0] += self.embedding.seconds
        seconds[-1] += self.head.seconds
        return tuple(seconds)

    @cached_property
    def total_seconds(self) -> float:
        """Seconds of the whole model."""
        return math.fsum(self.seconds)

    @cached_property
    def longest_layer(self) -> float:
        """Seconds of the slowest layer, without embedding and head."""
        return max(layer.seconds for layer in self.layers)

    def computed_again(self) -> ModelCosts:
        """The costs where whole layers run once more in the backward, which is not split then."""
        again = [
            replace(layer, backward_input=layer.backward_input + layer.forward)
            for layer in self.layers
        ]
        return replace(self, layers=tuple(again)).in_one_piece()

    def in_one_piece(self) -> ModelCosts:
        """The costs of parts whose backward is not split: see `UnitCost.in_one_piece`."""
        made = {id(layer): layer for layer in self.layers}
        whole = {key: layer.in_one_piece() for key, layer in made.items()}
        return replace(
            self,
            embedding=self.embedding.in_one_piece(),
            layers=tuple(whole[id(layer)] for layer in self.layers),
            head=self.head.in_one_piece(),
        )

    def stages(self, offsets: Sequence[int]) -> tuple[UnitCost, ...]:
        """The cost of each stage of a partition.

        Args:
            offsets: stage s has the layers ``offsets[s]`` to ``offsets[s + 1] - 1``.

        Returns:
            One entry per stage; the first includes the embedding, the last the head.

        Raises:
            PipelineConfigError: the offsets do not run from 0 to the number of layers.
        """
        if (
            len(offsets) < 2
            or offsets[0] != 0
            or offsets[-1] != len(self.layers)
            or any(a > b for a, b in itertools.pairwise(offsets))
        ):
            raise PipelineConfigError(
                f"offsets ({list(offsets)}) must rise from 0 to the number of layers "
                f"({len(self.layers)}): give the partition of this model"
            )
        last = len(offsets) - 2
        return tuple(
            total_cost(
                (
                    *((self.embedding,) if stage == 0 else ()),
                    *self.layers[offsets[stage] : offsets[stage + 1]],
                    *((self.head,) if stage == last else ()),
                )
            )
            for stage in range(last + 1)
        )
