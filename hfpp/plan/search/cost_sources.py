"""Where a planner's costs come from: a model's shape, or measurements of its layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from hfpp.errors import PipelineConfigError
from hfpp.plan.estimates.analytic_costs import workload_costs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hfpp.plan.costs import ModelCosts
    from hfpp.plan.estimates.workload import Workload
    from hfpp.plan.model.shape import ModelShape
    from hfpp.plan.pipeline_plan import Recompute
    from hfpp.plan.search.candidates import PlanRequest
    from hfpp.plan.search.cluster import Cluster

__all__ = ["AnalyticCosts", "CostShares", "CostSource", "Measured", "MeasuredCosts"]

Measured: TypeAlias = "Mapping[int, ModelCosts]"
"""Costs by microbatch size, as measured on one device without recomputation."""

_KNOWN: tuple[Recompute, ...] = ("none", "full")


class CostShares(NamedTuple):
    """Seconds of the whole model per microbatch.

    Attributes:
        compute: of the model itself.
        recompute: of what is computed again for the backward.
        collectives: of what is sent within layers.
    """

    compute: float
    recompute: float
    collectives: float


class CostSource(Protocol):
    """Where costs come from: the model's shape, or measurements."""

    def costs(self, microbatch_size: int, recompute: Recompute) -> ModelCosts:
        """The costs of a microbatch."""
        ...

    def shares(self, microbatch_size: int, recompute: Recompute) -> CostShares:
        """What of them is what."""
        ...


class AnalyticCosts:
    """Costs that follow from the model's shape and the hardware."""

    def __init__(self, shape: ModelShape, work: Workload, cluster: Cluster) -> None:
        self._shape, self._work, self._cluster = shape, work, cluster

    def costs(self, microbatch_size: int, recompute: Recompute) -> ModelCosts:
        """The costs of a microbatch."""
        work = replace(self._work, microbatch_size=microbatch_size, recompute=recompute)
        return workload_costs(self._shape, work, self._cluster.hardware)

    def shares(self, microbatch_size: int, recompute: Recompute) -> CostShares:
        """What of them is what."""
        everything = sum(self.costs(microbatch_size, recompute).seconds)
        work = replace(self._work, microbatch_size=microbatch_size)
        free = self._cluster.without_links
        compute = sum(workload_costs(self._shape, work, free).seconds)
        again = replace(work, recompute=recompute)
        without_links = sum(workload_costs(self._shape, again, free).seconds)
        return CostShares(compute, without_links - compute, everything - without_links)


class MeasuredCosts:
    """Costs that were measured, for some sizes of microbatches and without recomputation.

    With full recomputation, the forward of the layers runs once more in the backward. What would be
    selected for selective recomputation was not measured.
    """

    def __init__(self, measured: Measured) -> None:
        self._measured = dict(measured)

    def narrowed(self, request: PlanRequest) -> PlanRequest:
        """The request with what is known as its choices.

        Raises:
            PipelineConfigError: nothing that it asks for is known.
        """
        choices: dict[str, Any] = {}
        for name, argument, known in (
            ("microbatch_sizes", "microbatch_size", sorted(self._measured)),
            ("recompute", "recompute", _KNOWN),
        ):
            wanted = getattr(request, name)
            choices[name] = tuple(choice for choice in known if not wanted or choice in wanted)
            if not choices[name]:
                raise PipelineConfigError(
                    f"{argument} ({', '.join(map(str, wanted))}) was not measured, but "
                    f"{', '.join(map(str, known))}: use {argument}={known[0]}"
                )
        for name in ("tp", "cp", "ep"):
            if getattr(request, name) != 1:
                raise PipelineConfigError(
                    f"{name} ({getattr(request, name)}) must be 1 with measured costs, which are "
                    f"those of one device: use {name}=1"
                )
        return replace(request, **choices)

    def check(self, num_layers: int) -> None:
        """Checks that this is the model that was measured.

        Raises:
            PipelineConfigError: it has another number of layers, or nothing was measured.
        """
        if not self._measured:
            raise PipelineConfigError("measured is empty: give the costs of a microbatch size")
        for size, costs in self._measured.items():
            if len(costs.layers) != num_layers:
                raise PipelineConfigError(
                    f"measured costs of microbatches of {size} are of {len(costs.layers)} layers, "
                    f"but the model has {num_layers}: measure this model"
                )

    def costs(self, microbatch_size: int, recompute: Recompute) -> ModelCosts:
        """The costs of a microbatch.

        Raises:
            KeyError: they were not measured.
        """
        plain = self._measured[microbatch_size]
        return plain if recompute == "none" else plain.computed_again()

    def shares(self, microbatch_size: int, recompute: Recompute) -> CostShares:
        """What of them is what; what is sent within layers is part of what was measured."""
        everything = sum(self.costs(microbatch_size, recompute).seconds)
        compute = sum(self._measured[microbatch_size].seconds)
        return CostShares(compute, max(0.0, everything - compute), 0.0)
