"""What tensor, expert and context parallelism send within a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hfpp.plan.model.layer_shape import Attention, Experts

if TYPE_CHECKING:
    from hfpp.plan.estimates.workload import Workload
    from hfpp.plan.model.layer_shape import LayerShape

__all__ = ["LayerTraffic", "Sent", "layer_traffic"]


class Sent(NamedTuple):
    """What one rank sends.

    Attributes:
        nbytes: all together.
        messages: how many collective operations that is.
    """

    nbytes: float = 0.0
    messages: int = 0


class LayerTraffic(NamedTuple):
    """What one rank sends in one layer's forward on one microbatch; backward it is as much.

    Attributes:
        tensor: gathering and scattering the hidden state around each part (arXiv 2205.05198).
        expert: tokens to the ranks of their experts, and back.
        context: keys and values to the other ranks of the sequence.
    """

    tensor: Sent
    expert: Sent
    context: Sent


def layer_traffic(layer: LayerShape, work: Workload) -> LayerTraffic:
    """What one layer sends; nothing where a group has one rank."""
    mixers, parts = layer.mixers, layer.feed_forwards
    hidden = layer.norms[0] if layer.norms else 0
    gathered = 2 * (len(mixers[:1]) + len(parts[:1]))
    experts = [part for part in parts if isinstance(part, Experts)]
    routed = sum(part.top_k * part.router.inputs for part in experts)
    attentions = [mixer for mixer in mixers if isinstance(mixer, Attention)]
    wide = sum(mixer.kv_heads * (mixer.head_dim + mixer.value_dim) for mixer in attentions)
    nbytes = work.tokens * work.width  # per element of a token
    tensor = Sent(gathered * nbytes * hidden * (work.tp - 1) / work.tp, gathered)
    expert = Sent(2 * nbytes / work.tp * routed * (work.ep - 1) / work.ep, 2 * len(experts))
    context = Sent((work.cp - 1) * nbytes / work.tp * wide, len(attentions))
    return LayerTraffic(
        tensor if work.tp > 1 else Sent(),
        expert if work.ep > 1 else Sent(),
        context if work.cp > 1 else Sent(),
    )
