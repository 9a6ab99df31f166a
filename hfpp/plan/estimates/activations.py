"""Bytes that autograd keeps from the forward to the backward, by what keeps them.

The terms are those of transformers' layers in torch's eager mode, per token; norms compute in
float32. With tensor parallelism all of them are divided by it, as with Megatron's sequence
parallelism (arXiv 2205.05198, table 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfpp.plan.model.layer_shape import (
    Attention,
    Experts,
    FeedForward,
    LayerShape,
    NormKind,
    Recurrence,
)

if TYPE_CHECKING:
    from hfpp.plan.estimates.workload import Workload
    from hfpp.plan.model.shape import ModelShape

__all__ = ["forward_bytes", "head_bytes", "layer_bytes", "split_backward_bytes"]

_FLOAT = 4  # bytes: norms, softmax and losses compute in float32
_INDEX = 8  # bytes

# Activations of feed-forwards without a gate: tensors of their width that are kept, the input of
# the next matrix among them.
_KEPT_BY_ACTIVATION = {
    "relu": 1,
    "gelu": 2,
    "silu": 2,
    "gelu_pytorch_tanh": 2,
    "relu2": 2,
    "gelu_new": 5,
    "gelu_fast": 6,
}
_KEPT_OTHERWISE = 2


def layer_bytes(layer: LayerShape, work: Workload) -> int:
    """Bytes that one layer keeps per microbatch.

    Args:
        layer: the layer.
        work: the microbatch.

    Returns:
        Bytes per rank. With full recomputation the layer's input alone.
    """
    width = work.width
    hidden = _hidden(layer)
    if work.recompute == "full":
        return round(work.tokens / work.tp * hidden * width)
    per_token = sum(_norm(layer.norm, norm, width) for norm in layer.norms)
    parts = len(layer.mixers[:1]) + len(layer.feed_forwards[:1])
    inputs = min(parts, len(layer.norms)) if layer.norms else parts
    per_token += inputs * hidden * width
    if layer.is_parallel and len(layer.norms) > 1:  # the norms' inputs are one tensor
        is_shared = layer.norm == "layer" or width >= _FLOAT
        per_token -= (len(layer.norms) - 1) * hidden * width if is_shared else 0
    for mixer in layer.mixers:
        per_token += (
            _attention(mixer, work) if isinstance(mixer, Attention) else _recurrence(mixer, width)
        )
    for part in layer.feed_forwards:
        per_token += (
            _experts(part, hidden, width)
            if isinstance(part, Experts)
            else _feed_forward(part, width)
        )
    per_token += sum(linear.inputs * width for linear in layer.linears)
    return round(work.tokens / work.tp * per_token)


def head_bytes(shape: ModelShape, work: Workload) -> int:
    """Bytes that the final norm, the head and the loss keep per microbatch.

    The loss keeps its logarithm of the softmax in float32.
    """
    width = work.width
    per_token: float = shape.hidden_size * width + shape.vocab_size * max(width, _FLOAT) + _INDEX
    if shape.has_logit_softcap:
        per_token += shape.vocab_size * width
    if shape.has_final_norm:
        per_token += _norm(shape.norm, shape.hidden_size, width)
    return round(work.tokens / work.tp * per_token)


def forward_bytes(shape: ModelShape, work: Workload) -> int:
    """Bytes that all layers of a stage keep together: the angles of rotary embeddings."""
    return round(2 * shape.widest_head * work.seq_len * work.width / work.cp)


def split_backward_bytes(layer: LayerShape, work: Workload) -> int:
    """Bytes that lie beside what is kept between the two parts of a split backward.

    The gradients of what matrices and norms gave, from which those of their weights are made.
    """
    outputs = float(sum(layer.norms))
    for mixer in layer.mixers:
        outputs += sum(linear.outputs for linear in mixer.linears)
    for part in layer.feed_forwards:
        if isinstance(part, Experts):
            outputs += part.top_k * sum(linear.outputs for linear in part.expert.linears)
            shared = part.shared.linears if part.shared is not None else ()
            outputs += part.router.outputs + sum(linear.outputs for linear in shared)
        else:
            outputs += sum(linear.outputs for linear in part.linears)
    outputs += sum(linear.outputs for linear in layer.linears)
    return round(work.tokens / work.tp * outputs * work.width)


def _hidden(layer: LayerShape) -> int:
    if layer.mixers:
        return layer.mixers[0].linears[0].inputs
    part = layer.feed_forwards[0]
    return (part.expert if isinstance(part, Experts) else part).linears[0].inputs


def _norm(kind: NormKind, width: int, element: int) -> float:
    """A norm's input, and where it is written in Python what it multiplies by the weight."""
    if kind == "layer":
        return width * element
    if kind == "plain":
        return width * max(element, _FLOAT) + _FLOAT
    scaled = element if kind == "rms" else max(element, _FLOAT)
    return width * (max(element, _FLOAT) + scaled) + _FLOAT


def _attention(part: Attention, work: Workload) -> float:
    width = work.width
    queries = part.heads * part.head_dim
    keys, values = part.kv_heads * part.head_dim, part.kv_heads * part.value_dim
    out = part.heads * part.value_dim
    kept = float(out * width)  # what attention gives: the input of the last matrix
    for rank in part.latent:
        kept += _norm("rms", rank, width) + rank * width
    if part.qk_norm is not None:
        kept += _norm(part.qk_norm, queries + keys, width)
    if part.is_gated:
        kept += 2 * out * width
    scores = part.heads * work.seq_len
    is_fused = part.head_dim == part.value_dim or work.attention == "flash"
    if work.attention != "eager" and is_fused:
        if work.attention == "sdpa" and part.reach is not None:
            # With a mask there are as many heads of keys as of queries.
            keys, values = queries, out
            kept += work.seq_len * width
        kept += (queries + keys + values) * width + part.heads * _FLOAT
        if part.is_fused:  # what is not rotated, and the output laid out anew
            kept += (queries + keys + out) * width
        return kept
    wide = max(width, _FLOAT)
    if work.attention == "sdpa":
        kept += (2 * queries + out) * wide
        return kept + (scores * wide if work.recompute == "none" else 0)
    kept += (2 * queries + out) * width
    if work.recompute == "none":
        kept += scores * (width if part.has_plain_softmax else wide)
        kept += scores * width if width < _FLOAT and not part.has_plain_softmax else 0
        kept += scores * width if part.has_softcap else 0
    return kept


def _recurrence(part: Recurrence, width: int) -> float:
    """What fused kernels keep: every matrix's output, the convolution's, and the mixer's own."""
    outputs = sum(linear.outputs for linear in part.linears[:-1])
    return (outputs + part.conv_width + 2 * part.width) * width


def _feed_forward(part: FeedForward, width: int) -> float:
    if part.is_gated:
        return 4 * part.width * width  # both products, the activation, and their product
    return _KEPT_BY_ACTIVATION.get(part.activation, _KEPT_OTHERWISE) * part.width * width


def _experts(part: Experts, hidden: int, width: int) -> float:
    """What the router and all experts of a token keep.

    The router's scores are float32; each expert keeps what a feed-forward does, the token's copy
    before and its result after.
    """
    kept: float = part.count * _FLOAT + part.top_k * (5 * _INDEX + _FLOAT)
    kept += hidden * _FLOAT if part.is_routed_in_float32 and width < _FLOAT else 0
    kept += part.top_k * (2 * hidden * width + _feed_forward(part.expert, width))
    return kept + (0 if part.shared is None else _feed_forward(part.shared, width))
