"""The machines that a job runs on, and which links its groups of ranks have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hfpp.errors import PipelineConfigError
from hfpp.plan.pipeline_plan import LARGEST_WORLD
from hfpp.plan.schedules.simulator import Link

if TYPE_CHECKING:
    from hfpp.plan.estimates.hardware import Hardware
    from hfpp.plan.pipeline_plan import ParallelSizes

__all__ = ["Cluster"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal devices in equal nodes.

    Ranks are numbered so that tensor-parallel ranks are neighbours, then those of context
    parallelism, then replicas, and pipeline ranks are furthest apart: a group lies within a node
    where its number of ranks times the distance of neighbours is at most the node's devices.

    Attributes:
        gpus: devices of the job.
        hardware: one of them and its links.
    """

    gpus: int
    hardware: Hardware

    def __post_init__(self) -> None:
        if type(self.gpus) is not int or not 1 <= self.gpus <= LARGEST_WORLD:
            raise PipelineConfigError(
                f"gpus ({self.gpus!r}) must be an integer from 1 to {LARGEST_WORLD}: use gpus=8"
            )

    @property
    def without_links(self) -> Hardware:
        """The same device with links that cost nothing."""
        endless = 1e300
        return replace(
            self.hardware, node_bandwidth=endless, network_bandwidth=endless, latency=1e-300
        )

    def link(self, *, ranks: int, stride: int) -> Link:
        """What the slowest neighbours of a group have.

        Args:
            ranks: of the group.
            stride: distance of neighbours in ranks of the job.
        """
        hardware = self.hardware
        is_near = ranks * stride <= hardware.gpus_per_node
        rate = hardware.node_bandwidth if is_near else hardware.network_bandwidth
        return Link(latency=hardware.latency, bandwidth=rate * hardware.bandwidth_efficiency)

    def pipeline_link(self, pp_size: int, parallel: ParallelSizes) -> Link:
        """Between neighbours of the pipeline."""
        return self.link(ranks=pp_size, stride=parallel.tp * parallel.cp * parallel.dp)
