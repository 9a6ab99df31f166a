"""The best plans for a model on a cluster, and why each lost against the best."""

from __future__ import annotations

import bisect
import math
from typing import TYPE_CHECKING, NamedTuple

from hfpp.errors import PipelineConfigError
from hfpp.plan.estimates.workload import Workload
from hfpp.plan.pipeline_plan import ModelFingerprint, PipelinePlan
from hfpp.plan.search.candidates import candidates
from hfpp.plan.search.comparison import why_it_lost
from hfpp.plan.search.cost_sources import AnalyticCosts, MeasuredCosts
from hfpp.plan.search.evaluation import Evaluation, Evaluator
from hfpp.plan.search.infeasible import Change, least_of, too_large
from hfpp.plan.search.replicas import Replicas

if TYPE_CHECKING:
    from hfpp.plan.costs import UnitCost
    from hfpp.plan.model.shape import ModelShape
    from hfpp.plan.prediction import Prediction
    from hfpp.plan.schedules.simulator import Link
    from hfpp.plan.search.candidates import Candidate, PlanRequest
    from hfpp.plan.search.cluster import Cluster
    from hfpp.plan.search.cost_sources import CostSource, Measured

__all__ = ["RankedPlan", "find_plans"]


_AS_FAST = 1 + 1e-9  # the last digits of a time depend on the order of its summands only


class RankedPlan(NamedTuple):
    """A plan and its place among all.

    Attributes:
        plan: with its prediction.
        lost_by: why the best plan is better, in a sentence; empty for the best itself.
        stages: what its stages cost.
        link: between ranks of its pipeline.
        boundary_bytes: that cross from stage to stage.
    """

    plan: PipelinePlan
    lost_by: str
    stages: tuple[UnitCost, ...]
    link: Link
    boundary_bytes: int

    @property
    def prediction(self) -> Prediction:
        """What the plan costs."""
        assert self.plan.prediction is not None  # every plan that is found has one
        return self.plan.prediction


def find_plans(
    shape: ModelShape,
    cluster: Cluster,
    request: PlanRequest,
    *,
    measured: Measured | None = None,
) -> list[RankedPlan]:
    """The plans with most tokens per second that fit into memory, best first.

    All pipeline sizes, schedules, virtual stages, microbatch sizes and kinds of recomputation that
    the request leaves open are candidates, each with the partition whose slowest rank is fastest
    (or, where that does not fit, the fastest that is known to). They are run in the simulator in
    the order of a lower bound of their time, until no other can be among the best.

    Args:
        shape: of the model.
        cluster: the devices.
        request: what the job must do, and what is already decided.
        measured: costs by microbatch size, measured on one such device; only these sizes are
            candidates then. None: costs follow from the shape and the hardware.

    Returns:
        At most ``request.top`` plans with their predictions.

    Raises:
        PipelineConfigError: no sizes fit together, or nothing fits into memory; the message says
            which part of the memory is too large, and what would help.
    """
    search = _Search.of(shape, cluster, request, measured)
    best = search.run(request.top)
    if not best:
        least = least_of(search.evaluator, search.possible)
        raise too_large(
            least,
            search.evaluator.prediction(least),
            cluster,
            request,
            lambda change: _fits(shape, change, measured),
        )
    fingerprint = fingerprint_of(shape)
    predictions = [search.evaluator.prediction(found) for found in best]
    return [
        RankedPlan(
            plan_of(found, prediction, fingerprint, request.seq_len),
            why_it_lost(predictions[0], prediction) if found is not best[0] else "",
            search.evaluator.stages(found.candidate, found.offsets),
            cluster.pipeline_link(found.candidate.pp_size, found.candidate.parallel),
            search.evaluator.costs(found.candidate).boundary_bytes,
        )
        for found, prediction in zip(best, predictions, strict=True)
    ]


class _Search(NamedTuple):
    evaluator: Evaluator
    possible: list[Candidate]
    capacity: int

    @classmethod
    def of(
        cls, shape: ModelShape, cluster: Cluster, request: PlanRequest, measured: Measured | None
    ) -> _Search:
        """What is to be searched.

        Raises:
            PipelineConfigError: no sizes fit together.
        """
        work = Workload(
            microbatch_size=1,
            seq_len=request.seq_len,
            dtype=request.dtype or shape.dtype or "bfloat16",
            tp=request.tp,
            ep=request.ep,
            cp=request.cp,
            attention=request.attention,
        )
        source: CostSource
        if measured is None:
            source = AnalyticCosts(shape, work, cluster)
        else:
            source = MeasuredCosts(measured)
            source.check(len(shape.layers))
            request = source.narrowed(request)
        replicas = Replicas(shape=shape, work=work, cluster=cluster, sharding=request.sharding)
        possible = candidates(request, gpus=cluster.gpus, num_layers=len(shape.layers))
        return cls(Evaluator(cluster, source, replicas), possible, cluster.hardware.memory_bytes)

    def run(self, top: int) -> list[Evaluation]:
        """The best that fit, fastest first; of equally fast ones, the one with less memory."""
        least = [self.evaluator.least_seconds(candidate) for candidate in self.possible]
        best: list[Evaluation] = []
        for index in sorted(range(len(least)), key=least.__getitem__):
            if len(best) == top and least[index] > best[-1].step_time * _AS_FAST:
                break
            candidate = self.possible[index]
            if self.evaluator.least_memory(candidate) > self.capacity:
                continue
            worst = best[-1].step_time if len(best) == top else math.inf
            found = self.evaluator.evaluate(candidate, worst)
            if found.fits:
                bisect.insort(best, found, key=_order)
                del best[top:]
        return best


def _fits(shape: ModelShape, change: Change, measured: Measured | None) -> bool:
    try:
        return bool(_Search.of(shape, change.cluster, change.request, measured).run(1))
    except PipelineConfigError:  # no sizes fit together
        return False


def _order(found: Evaluation) -> tuple[float, int, int]:
    """Times to nine digits, which is `_AS_FAST`."""
    time = float(f"{found.step_time:.9g}")
    return time, found.peak_memory, found.candidate.num_stages


def fingerprint_of(shape: ModelShape) -> ModelFingerprint:
    """What a live model of this shape is known by."""
    is_whole = shape.is_known and not shape.not_counted
    return ModelFingerprint(
        model_type=shape.model_type,
        num_layers=len(shape.layers),
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        parameters=shape.parameters if is_whole else None,
        is_tied=shape.is_tied,
    )


def plan_of(
    found: Evaluation, prediction: Prediction, model: ModelFingerprint, seq_len: int
) -> PipelinePlan:
    """What is handed to those who run it."""
    candidate = found.candidate
    return PipelinePlan(
        model=model,
        pp_size=candidate.pp_size,
        schedule=candidate.spec.name,
        stages_per_rank=candidate.stages_per_rank,
        n_microbatches=candidate.n_microbatches,
        microbatch_size=candidate.microbatch_size,
        seq_len=seq_len,
        offsets=found.offsets,
        recompute=candidate.recompute,
        parallel=candidate.parallel,
        prediction=prediction,
    )
