"""A partition as it was asked for, and the layers that it gives to each stage of a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeVar

from hfpp.errors import PipelineConfigError
from hfpp.plan.partition import uniform_offsets
from hfpp.plan.partitioning.balance import balance_layers, balanced_partition
from hfpp.plan.placement import Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfpp.plan.costs import ModelCosts
    from hfpp.plan.partitioning.balance import MemoryCap

__all__ = ["PartitionKind", "PartitionSpec"]

T = TypeVar("T")


class PartitionKind(StrEnum):
    """What decides where the cuts are."""

    UNIFORM = "uniform"
    COUNTS = "counts"
    ENDS = "ends"
    WEIGHTS = "weights"
    PARAMETERS = "parameters"
    TYPE = "type"
    NAMES = "names"
    BALANCED = "balanced"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionSpec:
    """A partition as it was asked for; `parse_partition` makes it.

    Attributes:
        text: as it was written.
        argument: what the caller calls it, for errors.
        kind: what decides where the cuts are.
        counts: layers of each stage (counts and layouts).
        first: layers of the first stage; None for an even share.
        last: layers of the last stage; None for an even share.
        input_weight: layers that the embedding counts as.
        output_weight: layers that the head counts as.
        pattern: matches the class names of the layers to share out, anywhere and in any case.
        names: the modules of each stage.
    """

    text: str
    argument: str
    kind: PartitionKind
    counts: tuple[int, ...] = ()
    first: int | None = None
    last: int | None = None
    input_weight: int = 0
    output_weight: int = 0
    pattern: str = ""
    names: tuple[tuple[str, ...], ...] = ()

    @property
    def num_stages(self) -> int | None:
        """The number of stages that the partition itself fixes, if it does."""
        return len(self.counts) or len(self.names) or None

    def offsets(
        self,
        *,
        num_layers: int,
        num_stages: int,
        pp_size: int | None = None,
        placement: Placement = Placement.LOOP,
        costs: ModelCosts | None = None,
        parameters: Sequence[int] | None = None,
        layer_types: Sequence[str] | None = None,
        layers_name: str | None = None,
        memory: MemoryCap | None = None,
    ) -> tuple[int, ...]:
        """Gives each stage of a model its layers.

        Args:
            num_layers: Layers of the model.
            num_stages: Stages of the pipeline.
            pp_size: Ranks of the pipeline; None for one stage per rank. `parameters`, `type:` and
                `balanced` balance ranks: the sums of their stages.
            placement: Which rank has which stages.
            costs: Of the model; `balanced` needs them, and `parameters` if it is not given these.
            parameters: Parameters per layer, the first with the embedding and the last with the
                head.
            layer_types: The class name of each layer; `type:` needs them.
            layers_name: FQN of the list of layers, for lists of names; None finds it.
            memory: A cap for `balanced`.

        Returns:
            Stage s has the layers ``offsets[s]`` to ``offsets[s + 1] - 1``, at least one.

        Raises:
            PipelineConfigError: If the partition does not fit the model or the number of stages;
                the message names both numbers.

        Example:
            >>> from hfpp.plan.partitioning.grammar import parse_partition
            >>> parse_partition("first=2,last=1").offsets(num_layers=11, num_stages=4)
            (0, 2, 6, 10, 11)
        """
        if num_stages > num_layers:
            raise self._error(
                f"num_stages ({num_stages}) must not be larger than num_layers ({num_layers}), as "
                f"every stage needs a layer: use {num_layers} stages or fewer"
            )
        if self.num_stages not in (None, num_stages):
            raise self._error(
                f"has {self.num_stages} stages, but the pipeline has {num_stages}: write "
                f"{num_stages} of them"
            )
        ranks = num_stages if pp_size is None else pp_size
        match self.kind:
            case PartitionKind.UNIFORM:
                return uniform_offsets(num_stages, num_layers).row()
            case PartitionKind.COUNTS:
                return self._of_counts(self.counts, num_layers)
            case PartitionKind.ENDS:
                return self._of_ends(num_layers, num_stages)
            case PartitionKind.WEIGHTS:
                return self._of_weights(num_layers, num_stages)
            case PartitionKind.NAMES:
                return self._of_names(num_layers, layers_name)
            case PartitionKind.BALANCED:
                costs = self._needed(costs, "costs")
                self._check_length("costs", len(costs.layers), num_layers)
                return balanced_partition(
                    costs,
                    pp_size=ranks,
                    stages_per_rank=num_stages // ranks,
                    placement=placement,
                    memory=memory,
                ).offsets
            case PartitionKind.PARAMETERS:
                weights = list(parameters or ()) or self._parameters_of(costs)
            case PartitionKind.TYPE:
                weights = self._matches(self._needed(layer_types, "layer_types"))
        self._check_length(self.kind.value, len(weights), num_layers)
        return balance_layers(
            weights, pp_size=ranks, num_stages=num_stages, placement=placement
        ).offsets

    def _of_counts(self, counts: Sequence[int], num_layers: int) -> tuple[int, ...]:
        offsets = (0, *accumulate(counts))
        if offsets[-1] != num_layers:
            raise self._error(
                f"gives its {len(counts)} stages {offsets[-1]} layers, but the model has "
                f"{num_layers}: make the counts sum to {num_layers}"
            )
        return offsets

    def _of_ends(self, num_layers: int, num_stages: int) -> tuple[int, ...]:
        first = () if self.first is None else (self.first,)
        last = () if self.last is None else (self.last,)
        between = num_stages - len(first) - len(last)
        left = num_layers - sum(first) - sum(last)
        if between < 0:
            raise self._error("needs two stages, but the pipeline has 1: use uniform")
        if (left < between) if between else (left != 0):
            wanted = "no layers" if not between else f"at least {between}"
            raise self._error(
                f"leaves {left} of {num_layers} layers for the {between} other stages, which need "
                f"{wanted}: change first or last"
            )
        middle = uniform_offsets(between, left).row() if between else (0,)
        counts = [b - a for a, b in pairwise(middle)]
        return self._of_counts((*first, *counts, *last), num_layers)

    def _of_weights(self, num_layers: int, num_stages: int) -> tuple[int, ...]:
        """As torchtitan: even shares of layers and weights, the first shares longer by one."""
        if num_stages == 1:
            return (0, num_layers)
        each, longer = divmod(num_layers + self.input_weight + self.output_weight, num_stages)
        counts = [each + (stage < longer) for stage in range(num_stages)]
        counts[0] -= self.input_weight
        counts[-1] -= self.output_weight
        for stage, name, weight in (
            (0, "input_weight", self.input_weight),
            (num_stages - 1, "output_weight", self.output_weight),
        ):
            if counts[stage] < 1:
                raise self._error(
                    f"leaves stage {stage} no layer: its share is {counts[stage] + weight} of "
                    f"{num_layers} layers and the weights, {name} ({weight}) takes all of it, and "
                    f"every stage needs a layer: use a {name} below {counts[stage] + weight}, or "
                    "balanced"
                )
        return self._of_counts(counts, num_layers)

    def _of_names(self, num_layers: int, layers_name: str | None) -> tuple[int, ...]:
        name = self._list_of_layers(num_layers) if layers_name is None else layers_name
        layers = re.compile(rf"{re.escape(name)}\.([0-9]{{1,9}})")
        found = [
            [int(match[1]) for match in map(layers.fullmatch, modules) if match]
            for modules in self.names
        ]
        listed = [index for stage in found for index in stage]
        wrong = next((i for i, index in enumerate(listed) if index != i), None)
        if wrong is None and len(listed) != num_layers:
            wrong = min(len(listed), num_layers)
        if wrong is not None:
            place = "nothing" if wrong >= len(listed) else f"{name}.{listed[wrong]}"
            raise self._error(
                f"lists {place} where {name}.{wrong} of {num_layers} layers must stand: list each "
                "layer once, in order"
                if wrong < num_layers
                else f"lists {place}, but {name!r} has {num_layers} layers: leave it out"
            )
        empty = next((stage for stage, indices in enumerate(found) if not indices), None)
        if empty is not None:
            raise self._error(
                f"gives stage {empty} no layer of {name!r}, and every stage needs one: use fewer "
                "stages or move a layer there"
            )
        return self._of_counts([len(indices) for indices in found], num_layers)

    def _list_of_layers(self, num_layers: int) -> str:
        """The list whose last layer is listed."""
        suffix = f".{num_layers - 1}"
        for modules in reversed(self.names):
            for module in reversed(modules):
                if module.endswith(suffix):
                    return module.removesuffix(suffix)
        raise self._error(
            f"lists no module that ends in {suffix!r}, the last of {num_layers} layers: list each "
            "layer once, in order"
        )

    def _matches(self, layer_types: Sequence[str]) -> list[int]:
        pattern = re.compile(self.pattern, re.IGNORECASE)
        matches = [1 if pattern.search(name) else 0 for name in layer_types]
        if not any(matches):
            names = ", ".join(list(dict.fromkeys(layer_types))[:8])
            raise self._error(
                f"matches none of the model's layers: use a pattern for one of these classes: "
                f"{names}"
            )
        return matches

    def _parameters_of(self, costs: ModelCosts | None) -> list[int]:
        costs = self._needed(costs, "parameters or costs")
        weights = [layer.parameters for layer in costs.layers]
        weights[0] += costs.embedding.parameters
        weights[-1] += costs.head.parameters
        return weights

    def _needed(self, value: T | None, name: str) -> T:
        if value is None:
            raise self._error(f"needs {name} of the model: give them, or use uniform")
        return value

    def _check_length(self, what: str, length: int, num_layers: int) -> None:
        if length != num_layers:
            raise self._error(
                f"is asked for {num_layers} layers, but the {what} are of {length}: give those of "
                "this model"
            )

    def _error(self, problem: str) -> PipelineConfigError:
        text = self.text if len(self.text) <= 60 else f"{self.text[:57]}..."
        return PipelineConfigError(f"{self.argument} ({text!r}) {problem}.")
