"""What a device can do: peak rates, memory and links of well-known accelerators."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from hfpp.errors import PipelineConfigError

__all__ = ["HARDWARE", "Hardware", "find_hardware"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One device and its links.

    Attributes:
        name: of the device.
        flops: peak of dense bfloat16 matrix products, in FLOPs per second.
        memory_bandwidth: peak, in bytes per second.
        memory_bytes: that a process can have.
        node_bandwidth: of one device to the others of its node, one direction, bytes per second.
        network_bandwidth: of one device to other nodes, one direction, bytes per second.
        gpus_per_node: devices that share a node's links.
        latency: of one message, in seconds.
        efficiency: share of the peak FLOPs that large matrix products reach.
        bandwidth_efficiency: share of the peak bandwidths that is reached.
    """

    name: str
    flops: float
    memory_bandwidth: float
    memory_bytes: int
    node_bandwidth: float
    network_bandwidth: float
    gpus_per_node: int = 8
    latency: float = 10e-6
    efficiency: float = 0.65
    bandwidth_efficiency: float = 0.8

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            share = field.name.endswith("efficiency")
            if not (math.isfinite(value) and value > 0 and (value <= 1 or not share)):
                rule = "between 0 and 1" if share else "positive and finite"
                raise PipelineConfigError(
                    f"{field.name} ({value}) must be {rule}: give what the device does, or take "
                    f"one of {', '.join(HARDWARE)}"
                )


# Dense bfloat16 without sparsity, SXM form; one direction of NVLink; one network port per device.
# Sources: NVIDIA's data sheets of A100 (2021), H100 and H200 (2023, 2024) and HGX B200 (2024).
HARDWARE: Mapping[str, Hardware] = MappingProxyType(
    {
        device.name: device
        for device in (
            Hardware(
                name="A100",
                flops=312e12,
                memory_bandwidth=2.039e12,
                memory_bytes=80 << 30,
                node_bandwidth=300e9,
                network_bandwidth=25e9,
            ),
            Hardware(
                name="H100",
                flops=989.4e12,
                memory_bandwidth=3.35e12,
                memory_bytes=80 << 30,
                node_bandwidth=450e9,
                network_bandwidth=50e9,
            ),
            Hardware(
                name="H200",
                flops=989.4e12,
                memory_bandwidth=4.8e12,
                memory_bytes=141_000_000_000,
                node_bandwidth=450e9,
                network_bandwidth=50e9,
            ),
            Hardware(
                name="B200",
                flops=2.25e15,
                memory_bandwidth=8e12,
                memory_bytes=180_000_000_000,
                node_bandwidth=900e9,
                network_bandwidth=50e9,
            ),
        )
    }
)
"""By name."""


def find_hardware(name: str) -> Hardware:
    """A device by its name, in any case.

    Raises:
        PipelineConfigError: the name is unknown.
    """
    found = HARDWARE.get(name.upper())
    if found is None:
        raise PipelineConfigError(
            f"hardware ({name!r}) must be one of {', '.join(HARDWARE)}: or describe the device by "
            "a Hardware of your own"
        )
    return found
