"""Bytes of every rank of a candidate: quickly from above, and exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hfpp.plan.estimates.memory import StageBytes, exchanged_bytes, rank_memory, stage_bytes
from hfpp.plan.search.candidates import ranks_of

if TYPE_CHECKING:
    from hfpp.plan.estimates.workload import Workload
    from hfpp.plan.prediction import MemoryParts
    from hfpp.plan.schedules.actions import ScheduleTable
    from hfpp.plan.schedules.simulator import Simulation
    from hfpp.plan.search.candidates import Candidate
    from hfpp.plan.search.replicas import Replicas

__all__ = ["RankBytes"]


class RankBytes:
    """Counts memory; remembers what the stages of a partition hold."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._held: dict[object, tuple[StageBytes, ...]] = {}

    def of_stages(self, candidate: Candidate, offsets: tuple[int, ...]) -> tuple[StageBytes, ...]:
        """What the stages hold for one microbatch."""
        key = (candidate.microbatch_size, candidate.recompute, offsets)
        if key not in self._held:
            shape, work = self._replicas.shape, self._work(candidate)
            self._held[key] = tuple(
                stage_bytes(shape, work, offsets, stage) for stage in range(len(offsets) - 1)
            )
        return self._held[key]

    def at_most(
        self, candidate: Candidate, offsets: tuple[int, ...], simulation: Simulation
    ) -> tuple[MemoryParts, ...]:
        """Bytes of each rank, as if it worked in most while it keeps most.

        Args:
            candidate: the sizes.
            offsets: of its partition.
            simulation: with the bytes that `of_stages` says.
        """
        work, stages = self._work(candidate), self.of_stages(candidate, offsets)
        last = len(stages) - 1
        boundary = work.boundary_bytes * self._replicas.shape.hidden_size
        found = []
        for report, own in zip(simulation.ranks, ranks_of(candidate), strict=True):
            held = self._replicas.held(offsets, own)
            space = max(_space(stages[stage], work) for stage in own)
            exchanged = exchanged_bytes(self._replicas.shape, work, own, last)
            ends = sum((stage > 0) + (stage < last) for stage in own)
            stays = report.sent_bytes if len(own) > 1 else 0
            found.append(
                replace(
                    self._replicas.static_memory(held, candidate.parallel),
                    activations=max(report.peak_activation_bytes + space, exchanged),
                    receive_buffers=boundary * ends * candidate.n_microbatches + stays,
                )
            )
        return tuple(found)

    def exactly(
        self, candidate: Candidate, offsets: tuple[int, ...], table: ScheduleTable
    ) -> tuple[MemoryParts, ...]:
        """Bytes of each rank, going through its computations."""
        keeping = self._replicas.keeping(candidate.parallel)
        return tuple(
            rank_memory(
                self._replicas.shape,
                self._work(candidate),
                offsets=offsets,
                stages=own,
                actions=table.row(rank),
                n_microbatches=candidate.n_microbatches,
                keeping=keeping,
            )
            for rank, own in enumerate(ranks_of(candidate))
        )

    def _work(self, candidate: Candidate) -> Workload:
        return replace(
            self._replicas.work,
            microbatch_size=candidate.microbatch_size,
            recompute=candidate.recompute,
        )


def _space(stage: StageBytes, work: Workload) -> int:
    """Bytes beside those that are kept, at most."""
    of_layers = stage.work_space - (stage.freed_by_loss if work.has_whole_backwards else 0)
    return max(of_layers, stage.loss_work_space, stage.after)
