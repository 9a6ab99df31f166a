"""Bytes that a backward works in beside what is kept: gradients of one group of operations."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hfpp.plan.estimates.activations import layer_bytes
from hfpp.plan.model.layer_shape import Attention, Experts, LayerShape

if TYPE_CHECKING:
    from hfpp.plan.estimates.workload import Workload
    from hfpp.plan.model.shape import ModelShape

__all__ = ["embedding_work_space", "head_work_space", "layer_work_space"]

_FLOAT = 4


def layer_work_space(layer: LayerShape, work: Workload) -> int:
    """Bytes at most while one layer's backward runs.

    Of a feed-forward: the gradients of both products and of the hidden state; of attention that
    keeps its scores: theirs; or a weight's gradient, before it is added to what is there.
    """
    width = work.width
    per_token = 0.0
    weights = 0
    for mixer in layer.mixers:
        weights = max(weights, *(linear.weights for linear in mixer.linears))
        if isinstance(mixer, Attention):
            wide = mixer.heads * (mixer.head_dim + mixer.value_dim)
            scores = mixer.heads * work.seq_len if work.attention == "eager" else 0
            per_token = max(per_token, 2 * wide * width + 2 * scores * max(width, _FLOAT))
    for part in layer.feed_forwards:
        dense, rows = (part.expert, part.top_k) if isinstance(part, Experts) else (part, 1)
        hidden = dense.linears[0].inputs
        own = rows * (2 * dense.width + hidden) * width
        per_token = max(per_token, own)
        matrices = part.count // work.ep if isinstance(part, Experts) else 1
        weights = max(weights, matrices * dense.linears[0].weights * (2 if matrices > 1 else 1))
    kept = 0
    if work.recompute == "full":  # one layer is run again, and keeps all but its input, kept before
        kept = layer_bytes(layer, replace(work, recompute="none"))
        kept -= layer_bytes(layer, work) if layer.norm == "layer" or width >= _FLOAT else 0
    gradients = work.tokens / work.tp * per_token
    return round(kept + max(gradients, weights / work.tp * width))


def head_work_space(shape: ModelShape, work: Workload) -> int:
    """Bytes at most while the loss's backward runs, beside what it keeps.

    First two gradients of the logits in float32; then that of the head's matrix beside one of the
    logits, when the loss's own softmax is freed already.
    """
    tokens = work.tokens / work.tp
    softmax = tokens * shape.vocab_size * max(work.width, _FLOAT)
    of_head = (tokens + shape.hidden_size / work.tp) * shape.vocab_size * work.width
    return round(max(2 * softmax, of_head - softmax))


def embedding_work_space(shape: ModelShape, work: Workload) -> int:
    """Bytes of the embedding's gradient, which is made whole before it is added."""
    return round(shape.vocab_size * shape.hidden_size / work.tp * work.width)
