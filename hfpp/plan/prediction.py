"""What a plan is expected to cost: seconds of a step, bytes of each rank and of the network."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hfpp.errors import PipelineConfigError

__all__ = ["MemoryParts", "NetworkParts", "Prediction", "TimeParts"]


class _Parts:
    """Figures that add up."""

    def __post_init__(self) -> None:
        for name, value in self.parts().items():
            if not (math.isfinite(value) and value >= 0):
                raise PipelineConfigError(
                    f"{name} ({value}) must be a finite number that is not negative: "
                    f"use {name}=0 where there is none"
                )

    def parts(self) -> dict[str, float]:
        """The figures by name."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class MemoryParts(_Parts):
    """Bytes of one rank at its peak.

    Attributes:
        parameters: the rank's own, as they lie between steps or, where larger, during one.
        gradients: theirs.
        optimizer: moments and, where the optimizer keeps them, full-precision copies.
        activations: kept from forwards to backwards, for as many microbatches as are in flight.
        receive_buffers: for what arrives from other ranks, and for what is being sent.
        logits: what the head and the loss add for one microbatch, on the rank that has them.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    receive_buffers: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(int(value) for value in self.parts().values())


@dataclass(frozen=True, kw_only=True)
class TimeParts(_Parts):
    """Seconds of one step, in parts that add up to it.

    Attributes:
        compute: what the slowest rank would compute if all ranks had equal shares.
        recompute: the same of what is computed again for the backward.
        collectives: tensor, expert and context parallel traffic within the layers, likewise.
        imbalance: what the slowest rank has more than the mean.
        bubble: what the slowest rank waits for within the pipeline.
        reduction: what the data-parallel traffic adds after the pipeline.
        optimizer: the update of the parameters.
    """

    compute: float = 0.0
    recompute: float = 0.0
    collectives: float = 0.0
    imbalance: float = 0.0
    bubble: float = 0.0
    reduction: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return math.fsum(self.parts().values())


@dataclass(frozen=True, kw_only=True)
class NetworkParts(_Parts):
    """Bytes that the busiest rank sends in one step.

    Attributes:
        pipeline: activations and gradients between stages.
        data: gradients and parameters between replicas.
        tensor: within layers, between tensor-parallel ranks.
        expert: tokens between expert-parallel ranks.
        context: keys and values between context-parallel ranks.
    """

    pipeline: int = 0
    data: int = 0
    tensor: int = 0
    expert: int = 0
    context: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(int(value) for value in self.parts().values())


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a plan is expected to cost.

    Attributes:
        time: seconds of a step, in parts.
        memory: bytes of each rank of the pipeline.
        network: bytes that the busiest rank sends in a step, in parts.
        idle_share: share of all ranks' time between the pipeline's start and end that is idle.
        tokens_per_second: of the whole job.
        source: whether the costs follow from the model's shape or were measured.
    """

    time: TimeParts
    memory: tuple[MemoryParts, ...]
    network: NetworkParts
    idle_share: float
    tokens_per_second: float
    source: str

    def __post_init__(self) -> None:
        if not self.memory:
            raise PipelineConfigError("memory is empty: a pipeline has at least one rank")
        if not 0 <= self.idle_share <= 1:
            raise PipelineConfigError(f"idle_share ({self.idle_share}) must be from 0 to 1")
        if not (math.isfinite(self.tokens_per_second) and self.tokens_per_second >= 0):
            raise PipelineConfigError(
                f"tokens_per_second ({self.tokens_per_second}) must be finite and not negative"
            )

    @property
    def step_time(self) -> float:
        """Seconds of one step."""
        return self.time.total

    @property
    def fullest_rank(self) -> int:
        """The rank that needs most memory; the first of several."""
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].total)

    @property
    def peak_memory(self) -> MemoryParts:
        """Bytes of the rank that needs most."""
        return self.memory[self.fullest_rank]
