"""How many parameters one rank holds: matrices and experts are divided among ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfpp.plan.model.layer_shape import Experts, FeedForward, LayerShape, Linear

if TYPE_CHECKING:
    from hfpp.plan.estimates.workload import Workload
    from hfpp.plan.model.shape import ModelShape

__all__ = [
    "embedding_parameters",
    "expert_parameters",
    "head_parameters",
    "layer_parameters",
]


def layer_parameters(layer: LayerShape, work: Workload) -> int:
    """Parameters of one layer on one rank."""
    if work.tp == work.ep == 1:
        return layer.parameters
    total = float(layer.besides) + _linears(layer.linears, work.tp)
    for mixer in layer.mixers:
        total += _linears(mixer.linears, work.tp) + mixer.besides
    for part in layer.feed_forwards:
        if isinstance(part, FeedForward):
            total += _dense(part, work.tp)
        else:
            total += part.router.parameters + part.besides + _routed(part, work)
            total += 0 if part.shared is None else _dense(part.shared, work.tp)
    kept = 1 - layer.held_elsewhere / (layer.parameters + layer.held_elsewhere)
    return round(total * kept)


def expert_parameters(layer: LayerShape, work: Workload) -> int:
    """Those of them that expert parallelism divides: fewer replicas hold them."""
    return round(
        sum(_routed(part, work) for part in layer.feed_forwards if isinstance(part, Experts))
    )


def embedding_parameters(shape: ModelShape, work: Workload) -> int:
    """Parameters of what precedes the first layer on one rank; the vocabulary is divided."""
    return -(-shape.embedding_parameters // work.tp)


def head_parameters(shape: ModelShape, work: Workload) -> int:
    """Parameters of what follows the last layer on one rank, a tied matrix included."""
    return -(-shape.head_parameters // work.tp)


def _routed(part: Experts, work: Workload) -> float:
    return part.count / work.ep * _dense(part.expert, work.tp)


def _dense(part: FeedForward, tp: int) -> float:
    return _linears(part.linears, tp) + part.besides


def _linears(linears: tuple[Linear, ...], tp: int) -> float:
    return sum(
        linear.parameters / tp if linear.is_split else linear.parameters for linear in linears
    )
