"""What one candidate costs: partition, simulated time, memory of every rank, bytes sent."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from hfpp.errors import PipelineConfigError
from hfpp.plan.partitioning.balance import MemoryCap, balanced_partition
from hfpp.plan.prediction import NetworkParts, Prediction, TimeParts
from hfpp.plan.schedules import compute_table
from hfpp.plan.schedules.simulator import simulate, uniform_costs
from hfpp.plan.search.candidates import ranks_of
from hfpp.plan.search.rank_bytes import RankBytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfpp.plan.costs import ModelCosts, UnitCost
    from hfpp.plan.prediction import MemoryParts
    from hfpp.plan.schedules.actions import ScheduleTable
    from hfpp.plan.schedules.simulator import Simulation
    from hfpp.plan.search.candidates import Candidate
    from hfpp.plan.search.cluster import Cluster
    from hfpp.plan.search.cost_sources import CostShares, CostSource
    from hfpp.plan.search.replicas import Replicas

__all__ = ["Evaluation", "Evaluator"]

_KEPT_ACTIONS = 1 << 22  # over all tables that are remembered: 32 MiB


class Evaluation(NamedTuple):
    """A candidate with its partition and what it costs.

    Attributes:
        candidate: the sizes.
        offsets: of the partition.
        step_time: seconds of a step, the exchange between replicas and the optimizer included.
        simulation: of the pipeline.
        memory: bytes of each rank, counted from above.
        fits: whether the memory of every rank suffices.
    """

    candidate: Candidate
    offsets: tuple[int, ...]
    step_time: float
    simulation: Simulation
    memory: tuple[MemoryParts, ...]
    fits: bool

    @property
    def peak_memory(self) -> int:
        """Bytes of the rank that needs most."""
        return max(parts.total for parts in self.memory)


class Evaluator:
    """Evaluates candidates of one model on one cluster; remembers what they share."""

    def __init__(self, cluster: Cluster, costs: CostSource, replicas: Replicas) -> None:
        self.cluster = cluster
        self._source = costs
        self._replicas = replicas
        self._bytes = RankBytes(replicas)
        self._costs: dict[object, ModelCosts] = {}
        self._shares: dict[object, CostShares] = {}
        self._stages: dict[object, tuple[UnitCost, ...]] = {}
        self._partitions: dict[object, tuple[int, ...]] = {}
        self._tables: OrderedDict[object, ScheduleTable] = OrderedDict()

    # ---- bounds, before anything is run

    def least_seconds(self, candidate: Candidate) -> float:
        """What a step takes at least, whatever the partition."""
        return candidate.least_seconds(self.costs(candidate))

    def least_memory(self, candidate: Candidate) -> int:
        """What the fullest rank needs at least: the mean, with one microbatch in flight.

        Every cut has two receive buffers for every microbatch.
        """
        costs = self.costs(candidate)
        kept = sum(unit.activation_bytes for unit in costs.layers)
        received = 2 * (candidate.num_stages - 1) * candidate.n_microbatches * costs.boundary_bytes
        whole = self._replicas.whole(candidate.parallel)
        return (whole + kept + received) // candidate.pp_size

    def costs(self, candidate: Candidate) -> ModelCosts:
        """What the model's parts cost per microbatch."""
        key = (candidate.microbatch_size, candidate.recompute)
        if key not in self._costs:
            self._costs[key] = self._source.costs(*key)
        return self._costs[key]

    # ---- evaluations

    def evaluate(self, candidate: Candidate, seconds_to_beat: float = math.inf) -> Evaluation:
        """Partitions and runs the schedule.

        The partition is the fastest; where that needs more memory than there is, the fastest that
        is known to fit.

        Args:
            candidate: the sizes.
            seconds_to_beat: of a step; a partition that fits is not looked for where even the
                fastest takes longer.
        """
        fastest = self._run(candidate, self._fastest(candidate))
        mean = sum(parts.total for parts in fastest.memory) / candidate.pp_size
        hopeless = mean > self.cluster.hardware.memory_bytes
        if fastest.fits or hopeless or fastest.step_time > seconds_to_beat:
            return fastest
        try:
            offsets = self._fitting(candidate, fastest)
        except PipelineConfigError:  # none is known
            return fastest
        other = self._run(candidate, offsets)
        return min((fastest, other), key=lambda one: (not one.fits, one.peak_memory))

    def _fastest(self, candidate: Candidate) -> tuple[int, ...]:
        key = (
            candidate.microbatch_size,
            candidate.recompute,
            candidate.pp_size,
            candidate.stages_per_rank,
            candidate.spec.placement,
        )
        if key not in self._partitions:
            self._partitions[key] = balanced_partition(
                self.costs(candidate),
                pp_size=candidate.pp_size,
                stages_per_rank=candidate.stages_per_rank,
                placement=candidate.spec.placement,
            ).offsets
        return self._partitions[key]

    def _fitting(self, candidate: Candidate, fastest: Evaluation) -> tuple[int, ...]:
        """The cap counts layer by layer; what a rank holds besides is taken off it."""
        besides = max(parts.receive_buffers + parts.logits for parts in fastest.memory)
        held = self._bytes.of_stages(candidate, fastest.offsets)
        return balanced_partition(
            self.costs(candidate),
            pp_size=candidate.pp_size,
            stages_per_rank=candidate.stages_per_rank,
            placement=candidate.spec.placement,
            memory=MemoryCap(
                bytes_per_rank=max(1, self.cluster.hardware.memory_bytes - besides),
                live_microbatches=_live(
                    self._table(candidate),
                    ranks_of(candidate),
                    is_split=any(stage.late for stage in held),
                ),
                bytes_per_parameter=self._replicas.bytes_per_parameter(candidate.parallel),
            ),
        ).offsets

    def _run(self, candidate: Candidate, offsets: tuple[int, ...]) -> Evaluation:
        simulation = simulate(
            self._table(candidate),
            self.stages(candidate, offsets),
            link=self.cluster.pipeline_link(candidate.pp_size, candidate.parallel),
            boundary_bytes=self.costs(candidate).boundary_bytes,
        )
        memory = self._bytes.at_most(candidate, offsets, simulation)
        most = max(parts.total for parts in memory)
        return Evaluation(
            candidate,
            offsets,
            max(self._ends(candidate, offsets, simulation)),
            simulation,
            memory,
            most <= self.cluster.hardware.memory_bytes,
        )

    def stages(self, candidate: Candidate, offsets: tuple[int, ...]) -> tuple[UnitCost, ...]:
        """What the stages of a partition cost, and hold as torch runs them."""
        key = (candidate.microbatch_size, candidate.recompute, offsets)
        if key not in self._stages:
            held = self._bytes.of_stages(candidate, offsets)
            self._stages[key] = tuple(
                replace(cost, activation_bytes=stage.kept, weight_bytes=stage.late)
                for cost, stage in zip(self.costs(candidate).stages(offsets), held, strict=True)
            )
        return self._stages[key]

    def _table(self, candidate: Candidate) -> ScheduleTable:
        key = (
            candidate.spec.name,
            candidate.pp_size,
            candidate.stages_per_rank,
            candidate.n_microbatches,
        )
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        made = self._tables[key] = compute_table(
            candidate.spec,
            pp_size=candidate.pp_size,
            n_microbatches=candidate.n_microbatches,
            stages_per_rank=candidate.stages_per_rank,
        )
        kept = sum(table.native.num_actions for table in self._tables.values())
        while len(self._tables) > 1 and kept > _KEPT_ACTIONS:
            kept -= self._tables.popitem(last=False)[1].native.num_actions
        return made

    def _ends(
        self, candidate: Candidate, offsets: tuple[int, ...], simulation: Simulation
    ) -> list[float]:
        """When each rank has updated its parameters.

        It exchanges its gradients when it has computed the last of them, while others still
        compute, and then updates its parameters; none of that overlaps with its own computations.
        """
        ends = []
        for report, stages in zip(simulation.ranks, ranks_of(candidate), strict=True):
            held = self._replicas.held(offsets, stages)
            exchange = self._replicas.exchange_seconds(held, candidate.parallel)
            update = self._replicas.update_seconds(held, candidate.parallel)
            ends.append(report.last + exchange + update)
        return ends

    # ---- in full, for those that are shown

    def prediction(self, found: Evaluation) -> Prediction:
        """The figures of an evaluation in parts."""
        candidate = found.candidate
        sequences = candidate.n_microbatches * candidate.microbatch_size * candidate.parallel.dp
        time = self._time(found)
        return Prediction(
            time=time,
            memory=self._bytes.exactly(candidate, found.offsets, found.simulation.table),
            network=self._network(found),
            idle_share=found.simulation.idle_share,
            tokens_per_second=sequences * self._replicas.work.seq_len / time.total,
            source=self.costs(candidate).source,
        )

    def _time(self, found: Evaluation) -> TimeParts:
        candidate, simulation = found.candidate, found.simulation
        ends = self._ends(candidate, found.offsets, simulation)
        critical = max(range(len(ends)), key=ends.__getitem__)
        held = self._replicas.held(found.offsets, ranks_of(candidate)[critical])
        after = ends[critical] - simulation.step_time
        update = min(after, self._replicas.update_seconds(held, candidate.parallel))
        slowest = max(report.busy for report in simulation.ranks)
        key = (candidate.microbatch_size, candidate.recompute)
        shares = self._source.shares(*key)
        each = candidate.n_microbatches / candidate.pp_size
        mean = math.fsum(report.busy for report in simulation.ranks) / candidate.pp_size
        return TimeParts(
            compute=max(0.0, mean - each * (shares.recompute + shares.collectives)),
            recompute=each * shares.recompute,
            collectives=each * shares.collectives,
            imbalance=max(0.0, slowest - mean),
            bubble=max(0.0, simulation.step_time - slowest),
            reduction=max(0.0, after - update),
            optimizer=update,
        )

    def _network(self, found: Evaluation) -> NetworkParts:
        """Of the rank that sends most."""
        candidate = found.candidate
        passes = 2 + (candidate.recompute == "full")
        sequences = candidate.n_microbatches * candidate.microbatch_size
        ranks = []
        for report, stages in zip(found.simulation.ranks, ranks_of(candidate), strict=True):
            held = self._replicas.held(found.offsets, stages)
            tensor, expert, context = self._replicas.layer_bytes(found.offsets, stages)
            ranks.append(
                NetworkParts(
                    pipeline=report.sent_bytes,
                    data=self._replicas.exchanged_bytes(held, candidate.parallel),
                    tensor=round(passes * sequences * tensor),
                    expert=round(passes * sequences * expert),
                    context=round(passes * sequences * context),
                )
            )
        return max(ranks, key=lambda parts: parts.total)


def _live(
    table: ScheduleTable, ranks: Sequence[tuple[int, ...]], *, is_split: bool
) -> tuple[int, ...]:
    """Microbatches in flight at most, by stage.

    The order of a rank's own actions decides, so that any times will do: here the activations of
    one stage of each rank are counted at a time, to the weights' part where backwards are split.
    """
    live = [0] * (len(ranks) * len(ranks[0]))
    empty = uniform_costs(1)[0]
    full = uniform_costs(1, activation_bytes=1, weight_bytes=int(is_split))[0]
    for position in range(len(ranks[0])):
        counted = {own[position]: rank for rank, own in enumerate(ranks)}
        report = simulate(table, [full if s in counted else empty for s in range(len(live))])
        for stage, rank in counted.items():
            live[stage] = report.rank(rank).peak_activation_bytes
    return tuple(live)
