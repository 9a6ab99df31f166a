"""What training keeps for every parameter, and what replicas exchange once per step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from hfpp.errors import PipelineConfigError
from hfpp.plan.estimates.local_parameters import (
    embedding_parameters,
    expert_parameters,
    head_parameters,
    layer_parameters,
)
from hfpp.plan.estimates.memory import Keeping
from hfpp.plan.estimates.traffic import layer_traffic
from hfpp.plan.prediction import MemoryParts

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hfpp.plan.estimates.workload import Workload
    from hfpp.plan.model.shape import ModelShape
    from hfpp.plan.pipeline_plan import ParallelSizes
    from hfpp.plan.search.cluster import Cluster

__all__ = ["SHARDING", "Held", "Replicas", "Sharding"]

Sharding = Literal["none", "optimizer"]
SHARDING: tuple[Sharding, ...] = get_args(Sharding)

_MASTER = 4  # bytes of a parameter in float32
_MOMENTS = 8  # and of both moments of Adam
_UPDATE_TRAFFIC = 2 * (_MASTER + _MOMENTS)  # read and written by the optimizer


class Held(NamedTuple):
    """Parameters that one device holds.

    Attributes:
        dense: those that every replica has.
        expert: those that expert parallelism divides, which fewer replicas have.
    """

    dense: int
    expert: int

    @property
    def total(self) -> int:
        """Both."""
        return self.dense + self.expert


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """What training keeps for parameters and exchanges between replicas, with Adam.

    Weights and gradients are kept in the dtype of the model. The optimizer keeps both moments and,
    where that dtype is shorter than float32, the weights in float32 (arXiv 1910.02054, section
    3.1: 16 bytes per parameter in bfloat16).

    Attributes:
        shape: the model.
        work: what one rank works on for one sequence.
        cluster: the devices.
        sharding: whether replicas divide the optimizer's states among them, as FSDP2 does where a
            pipeline keeps its weights gathered, and ZeRO-1; or each keeps all.
    """

    shape: ModelShape
    work: Workload
    cluster: Cluster
    sharding: Sharding = "optimizer"

    def __post_init__(self) -> None:
        if self.sharding not in SHARDING:
            raise PipelineConfigError(
                f"sharding ({self.sharding!r}) must be one of {', '.join(SHARDING)}: use "
                "sharding='optimizer'"
            )

    @cached_property
    def _sums(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Parameters of the layers before each layer: all, and the experts'."""
        made: dict[int, tuple[int, int]] = {}
        for layer in self.shape.layers:
            if id(layer) not in made:
                made[id(layer)] = (
                    layer_parameters(layer, self.work),
                    expert_parameters(layer, self.work),
                )
        each = [made[id(layer)] for layer in self.shape.layers]
        everything = tuple(itertools.accumulate((all_of for all_of, _ in each), initial=0))
        experts = tuple(itertools.accumulate((expert for _, expert in each), initial=0))
        return everything, experts

    def held(self, offsets: Sequence[int], stages: Iterable[int]) -> Held:
        """Parameters of some stages."""
        everything, experts = self._sums
        total = expert = 0
        for stage in stages:
            begin, end = offsets[stage], offsets[stage + 1]
            total += everything[end] - everything[begin]
            expert += experts[end] - experts[begin]
            total += embedding_parameters(self.shape, self.work) if stage == 0 else 0
            is_last = stage == len(offsets) - 2
            total += head_parameters(self.shape, self.work) if is_last else 0
        if self.shape.is_tied and len(offsets) == 2:
            total -= self._matrix  # one stage has both ends, and the matrix once
        return Held(total - expert, expert)

    @cached_property
    def _matrix(self) -> int:
        return -(-self.shape.vocab_size * self.shape.hidden_size // self.work.tp)

    # ---- memory

    def keeping(self, parallel: ParallelSizes) -> Keeping:
        """What a device keeps for each parameter."""
        dense, expert = self._groups(parallel) if self.sharding == "optimizer" else (1, 1)
        return Keeping(
            optimizer_bytes=_MOMENTS + (_MASTER if self.work.width < _MASTER else 0),
            replicas=dense,
            expert_replicas=expert,
        )

    def static_memory(self, held: Held, parallel: ParallelSizes) -> MemoryParts:
        """Bytes that stay on a device for its parameters."""
        width = self.work.width
        return MemoryParts(
            parameters=held.total * width,
            gradients=held.total * width,
            optimizer=self._updated(held, parallel) * self.keeping(parallel).optimizer_bytes,
        )

    def whole(self, parallel: ParallelSizes) -> int:
        """The same for the whole model on one device."""
        return self.static_memory(self._whole, parallel).total

    def bytes_per_parameter(self, parallel: ParallelSizes) -> float:
        """The same on average over the model's parameters."""
        return self.whole(parallel) / self._whole.total

    @cached_property
    def _whole(self) -> Held:
        return self.held((0, len(self.shape.layers)), (0,))

    def _updated(self, held: Held, parallel: ParallelSizes) -> int:
        """Parameters whose optimizer states a device has."""
        keeping = self.keeping(parallel)
        return -(-held.dense // keeping.replicas) - (-held.expert // (keeping.expert_replicas or 1))

    @staticmethod
    def _groups(parallel: ParallelSizes) -> tuple[int, int]:
        """Devices that hold the same dense parameters, and the same experts."""
        ranks = parallel.dp * parallel.cp
        return ranks, max(1, ranks // parallel.ep)

    # ---- time and bytes

    def exchanged_bytes(self, held: Held, parallel: ParallelSizes) -> int:
        """Bytes that a device sends to other replicas in one step.

        Gradients are scattered and weights (or, without sharding, reduced gradients) gathered, each
        in a ring of n devices in (n - 1) / n of their bytes.
        """
        return round(
            sum(
                2 * (ranks - 1) / ranks * count * self.work.width
                for count, ranks in zip(held, self._groups(parallel), strict=True)
            )
        )

    def exchange_seconds(self, held: Held, parallel: ParallelSizes) -> float:
        """Seconds of that: bytes over bandwidth, and latencies as of a tree."""
        seconds = 0.0
        for count, ranks, stride in zip(
            held, self._groups(parallel), (parallel.tp, parallel.tp * parallel.ep), strict=True
        ):
            if count and ranks > 1:
                link = self.cluster.link(ranks=ranks, stride=stride)
                share = (ranks - 1) / ranks
                seconds += 2 * share * count * self.work.width / link.bandwidth
                seconds += 2 * link.latency * (ranks - 1).bit_length()
        return seconds

    def update_seconds(self, held: Held, parallel: ParallelSizes) -> float:
        """Seconds in which the optimizer updates a device's parameters: its memory traffic."""
        hardware = self.cluster.hardware
        each = _UPDATE_TRAFFIC + 2 * self.work.width
        rate = hardware.memory_bandwidth * hardware.bandwidth_efficiency
        return self._updated(held, parallel) * each / rate

    def layer_bytes(self, offsets: Sequence[int], stages: Iterable[int]) -> list[float]:
        """Bytes that a device sends within some stages for one sequence, one way, by kind."""
        spans = [(offsets[stage], offsets[stage + 1]) for stage in stages]
        return [sum(sums[end] - sums[begin] for begin, end in spans) for sums in self._traffic]

    @cached_property
    def _traffic(self) -> list[list[float]]:
        """By kind, what the layers before each layer send."""
        made = {id(layer): layer for layer in self.shape.layers}
        sent = {
            key: [kind.nbytes for kind in layer_traffic(layer, self.work)]
            for key, layer in made.items()
        }
        kinds = zip(*(sent[id(layer)] for layer in self.shape.layers), strict=True)
        return [list(itertools.accumulate(kind, initial=0.0)) for kind in kinds]
