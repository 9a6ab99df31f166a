"""Nothing fits into memory: which part of it is too large, and what would make it fit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from hfpp.errors import PipelineConfigError
from hfpp.plan.sizes import bytes_as_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hfpp.plan.prediction import Prediction
    from hfpp.plan.search.candidates import Candidate, PlanRequest
    from hfpp.plan.search.cluster import Cluster
    from hfpp.plan.search.evaluation import Evaluation, Evaluator

__all__ = ["Change", "least_of", "too_large"]

_MOST_REMEDIES = 3
_OPTIONS = {
    "pp_sizes": "pp",
    "microbatch_sizes": "microbatch_size",
    "stages_per_rank": "stages_per_rank",
    "schedules": "schedule",
}
"""What may be decided beforehand, as messages call it."""
_WORDS = {"receive_buffers": "receive buffers", "optimizer": "optimizer states"}


class Change(NamedTuple):
    """Another job that might fit.

    Attributes:
        words: what to change.
        cluster: its devices.
        request: its request.
    """

    words: str
    cluster: Cluster
    request: PlanRequest


def least_of(evaluator: Evaluator, possible: Sequence[Candidate]) -> Evaluation:
    """The candidate that needs least memory with its fastest partition."""
    bounds = [evaluator.least_memory(candidate) for candidate in possible]
    order = sorted(range(len(bounds)), key=bounds.__getitem__)
    least = evaluator.evaluate(possible[order[0]])
    for index in order[1:]:
        if bounds[index] >= least.peak_memory:
            break
        found = evaluator.evaluate(possible[index])
        least = min(least, found, key=lambda evaluation: evaluation.peak_memory)
    return least


def too_large(
    least: Evaluation,
    prediction: Prediction,
    cluster: Cluster,
    request: PlanRequest,
    fits: Callable[[Change], bool],
) -> PipelineConfigError:
    """The error of a job whose candidates all need more memory than there is.

    Args:
        least: the candidate that needs least.
        prediction: its figures.
        cluster: the devices.
        request: of the job.
        fits: whether a changed job fits.
    """
    candidate = least.candidate
    memory, capacity = prediction.peak_memory, cluster.hardware.memory_bytes
    parts = sorted(memory.parts().items(), key=lambda part: -part[1])
    listed = ", ".join(f"{_WORDS.get(n, n)} {bytes_as_text(s)}" for n, s in parts if s)
    largest = _WORDS.get(parts[0][0], parts[0][0])
    remedies = [f"memory={-(-least.peak_memory >> 20)}MiB"]
    helping = (next(filter(fits, changes), None) for changes in _changes(cluster, request))
    for change in itertools.islice(filter(None, helping), _MOST_REMEDIES):
        remedies.append(change.words)
    return PipelineConfigError(
        f"memory ({bytes_as_text(capacity)} per device) does not suffice: the plan that needs "
        f"least ({candidate.spec.name}, pp {candidate.pp_size}, {candidate.stages_per_rank} stages "
        f"per rank, microbatch_size {candidate.microbatch_size}, recompute {candidate.recompute}) "
        f"needs {bytes_as_text(memory.total)} on rank {prediction.fullest_rank}, most of it "
        f"{largest} ({listed}): use {' or '.join(remedies)}"
    )


def _changes(cluster: Cluster, request: PlanRequest) -> Iterator[list[Change]]:
    """What else could be asked for, mildest first: what was decided beforehand, then devices."""
    if request.sharding == "none":
        yield [Change("sharding=optimizer", cluster, replace(request, sharding="optimizer"))]
    if request.recompute:
        yield [Change("recompute=full", cluster, replace(request, recompute=("full",)))]
    for name, option in _OPTIONS.items():
        if getattr(request, name):
            left_open: dict[str, Any] = {name: ()}
            yield [Change(f"no {option}", cluster, replace(request, **left_open))]
    wider = [request.tp * factor for factor in (2, 4, 8)]
    near = [tp for tp in wider if tp <= cluster.hardware.gpus_per_node]
    yield [Change(f"tp={tp}", cluster, replace(request, tp=tp)) for tp in near]
    more = [replace(cluster, gpus=cluster.gpus * factor) for factor in (2, 4, 8, 16, 64)]
    yield [Change(f"gpus={other.gpus}", other, request) for other in more]
