"""What the parts of a model compute: FLOPs and bytes moved, group of operations by group.

A matrix product of m x k by k x n is 2 m n k FLOPs. Attention counts the pairs of tokens that see
each other: half of all pairs where it is causal, fewer in windows; kernels that compute the masked
half too do twice as many. A backward is one more such product for the inputs and one for the
weights; attention's backward computes its scores anew and makes the gradients of queries, keys,
values and scores: 2.5 times its forward (FlashAttention, arXiv 2205.14135, algorithm 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from hfpp.plan.model.layer_shape import (
    Attention,
    Experts,
    FeedForward,
    LayerShape,
    Linear,
    Recurrence,
)

if TYPE_CHECKING:
    from hfpp.plan.estimates.workload import Workload
    from hfpp.plan.model.shape import ModelShape

__all__ = ["Operation", "embedding_operations", "head_operations", "layer_operations"]

FLASH_BACKWARD = 2.5  # of attention's forward
PLAIN_BACKWARD = 2.0
_FLOAT = 4


class Operation(NamedTuple):
    """A group of operations on one rank, for one microbatch.

    Attributes:
        kind: a product with weights, a mixer of tokens, or anything that is bound by memory.
        flops: of the forward.
        bytes_moved: of the forward, between memory and the device.
        backward_flops: of the part that makes the inputs' gradients.
        backward_bytes: of that part.
        weight_flops: of the part that makes the weights' gradients.
        weight_bytes: of that part.
    """

    kind: str
    flops: float
    bytes_moved: float
    backward_flops: float
    backward_bytes: float
    weight_flops: float = 0.0
    weight_bytes: float = 0.0


def layer_operations(layer: LayerShape, work: Workload) -> Iterator[Operation]:
    """What one layer computes."""
    tokens = work.tokens
    for mixer in layer.mixers:
        yield from _linears(mixer.linears, tokens, work)
        yield _attention(mixer, work) if isinstance(mixer, Attention) else _recurrence(mixer, work)
    for part in layer.feed_forwards:
        if isinstance(part, Experts):
            yield from _experts(part, work)
        else:
            yield from _feed_forward(part, tokens, work)
    yield from _linears(layer.linears, tokens, work)
    hidden = sum(layer.norms) + 3 * len(layer.mixers + layer.feed_forwards) * _first(layer)
    yield _moved(2 * hidden * tokens / work.tp * work.width)


def embedding_operations(shape: ModelShape, work: Workload) -> Iterator[Operation]:
    """Looking up tokens: memory traffic alone, and for the backward that of adding gradients."""
    rows = work.tokens / work.tp * shape.hidden_size * work.width
    yield Operation("memory", 0.0, 2 * rows, 0.0, 0.0, 0.0, 3 * rows)


def head_operations(shape: ModelShape, work: Workload) -> Iterator[Operation]:
    """The final norm, the product with the vocabulary, and the loss in float32."""
    tokens = work.tokens
    yield from _linears((Linear(shape.hidden_size, shape.vocab_size),), tokens, work)
    logits = tokens / work.tp * shape.vocab_size
    # logits to float32, their softmax read and written; backward: its gradient, and to the dtype
    yield _moved(logits * (work.width + 4 * _FLOAT))
    yield _moved(2 * tokens / work.tp * shape.hidden_size * work.width)


def _first(layer: LayerShape) -> int:
    part = (layer.mixers or layer.feed_forwards)[0]
    return (part.expert if isinstance(part, Experts) else part).linears[0].inputs


def _moved(count: float) -> Operation:
    return Operation("memory", 0.0, count, 0.0, 1.5 * count)


def _linears(
    linears: tuple[Linear, ...], tokens: float, work: Workload, copies: float = 1.0
) -> Iterator[Operation]:
    """Products with weights; those that tensor parallelism leaves whole it divides by tokens.

    ``copies`` of the weights are read, as experts' are.
    """
    for linear in linears:
        flops = 2.0 * tokens * linear.weights / work.tp
        weights = copies * linear.weights / (work.tp if linear.is_split else 1) * work.width
        ins, outs = (tokens * n / work.tp * work.width for n in (linear.inputs, linear.outputs))
        moved = weights + ins + outs
        yield Operation("linear", flops, moved, flops, moved, flops, moved)


def _feed_forward(
    part: FeedForward, tokens: float, work: Workload, copies: float = 1.0
) -> Iterator[Operation]:
    yield from _linears(part.linears, tokens, work, copies)
    yield _moved((3 if part.is_gated else 2) * tokens * part.width / work.tp * work.width)


def _experts(part: Experts, work: Workload) -> Iterator[Operation]:
    """Balanced routing: every rank's experts together have as many tokens as it routes."""
    yield from _linears((part.router,), work.tokens, work)
    routed = work.tokens * part.top_k
    local = part.count / work.ep
    yield from _feed_forward(part.expert, routed, work, copies=local)
    hidden = part.router.inputs
    yield _moved(4 * routed * hidden / work.tp * work.width)  # permuted, and back
    if part.shared is not None:
        yield from _feed_forward(part.shared, work.tokens, work)


def _attention(part: Attention, work: Workload) -> Operation:
    pairs = work.microbatch_size * part.pairs(work.seq_len) / (work.tp * work.cp)
    flops = 2.0 * pairs * part.heads * (part.head_dim + part.value_dim)
    queries = part.heads * (part.head_dim + part.value_dim)
    keys = part.kv_heads * (part.head_dim + part.value_dim)
    moved = work.tokens / work.tp * (queries + keys) * work.width
    if work.attention == "eager":  # scores are written, read for the softmax, written and read
        scores = work.tokens * work.seq_len * part.heads / work.tp
        moved += scores * (2 * work.width + 2 * _FLOAT)
    backward = PLAIN_BACKWARD if work.attention == "eager" else FLASH_BACKWARD
    return Operation("mixer", flops, moved, backward * flops, 2 * moved)


def _recurrence(part: Recurrence, work: Workload) -> Operation:
    """Mixers whose state is carried along: chunks by matrix products, or one token at a time.

    In chunks of c tokens (arXiv 2405.21060, section 6) each channel meets c / 2 others in its
    chunk, and its state is updated and read.
    """
    per_token = 2.0 * part.conv_width * part.conv_kernel
    per_token += part.width * (4.0 * part.state + 2.0 * part.chunk)
    if part.kind == "delta":  # and the triangular system of each chunk
        per_token += 2.0 * part.width * part.chunk
    flops = work.tokens / work.tp * per_token
    moved = work.tokens / work.tp * (part.conv_width + 4 * part.width) * work.width
    return Operation("mixer", flops, moved, 2 * flops, 2 * moved)
