"""What layers are made of: matrices, and what happens between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

__all__ = [
    "Attention",
    "Experts",
    "FeedForward",
    "LayerShape",
    "Linear",
    "Mixer",
    "NormKind",
    "Recurrence",
]

NormKind = Literal["rms", "rms32", "layer", "plain"]
"""Root mean square with the weight applied in the model's dtype, the same in float32, LayerNorm,
and a norm without weights."""


class Linear(NamedTuple):
    """A matrix that every token is multiplied by.

    Attributes:
        inputs: width in.
        outputs: width out.
        bias: whether it adds one.
        is_split: whether tensor parallelism divides it.
    """

    inputs: int
    outputs: int
    bias: bool = False
    is_split: bool = True

    @property
    def weights(self) -> int:
        """Elements of the matrix."""
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        """Elements of matrix and bias."""
        return self.weights + (self.outputs if self.bias else 0)


def _parameters(linears: tuple[Linear, ...]) -> int:
    return sum(linear.parameters for linear in linears)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Softmax attention.

    Attributes:
        inward: the matrices before it, of queries, keys, values and gates.
        outward: those after it.
        heads: of queries.
        kv_heads: of keys and values, as attention sees them.
        head_dim: width of one head's queries and keys.
        value_dim: width of one head's values.
        reach: how many tokens, itself included, a token sees at most; None: all before it.
        is_chunked: whether the reach is a chunk that starts anew instead of a window that slides.
        besides: parameters in no matrix: norms of queries and keys, sinks.
        qk_norm: the kind of norm on queries and keys; None without.
        is_gated: whether the output is multiplied by a gate as wide as it.
        latent: widths of the compressed queries and of the compressed keys and values, where
            these are normed in between; empty without compression.
        is_fused: whether one matrix makes queries, keys and values, whose whole output is kept for
            the values' sake.
        has_softcap: whether scores are capped.
        has_plain_softmax: whether the softmax computes in the model's dtype.
    """

    inward: tuple[Linear, ...]
    outward: tuple[Linear, ...]
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    reach: int | None = None
    is_chunked: bool = False
    besides: int = 0
    qk_norm: NormKind | None = None
    is_gated: bool = False
    latent: tuple[int, ...] = ()
    is_fused: bool = False
    has_softcap: bool = False
    has_plain_softmax: bool = False

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All matrices."""
        return self.inward + self.outward

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return _parameters(self.linears) + self.besides

    def pairs(self, seq_len: int) -> float:
        """Pairs of tokens that see each other in one sequence of ``seq_len`` tokens."""
        reach = seq_len if self.reach is None else min(self.reach, seq_len)
        if self.is_chunked:
            chunks, rest = divmod(seq_len, reach)
            return chunks * reach * (reach + 1) / 2 + rest * (rest + 1) / 2
        return reach * (reach + 1) / 2 + (seq_len - reach) * reach


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """A mixer whose cost grows with the sequence, not with its square.

    Attributes:
        kind: state-space model, linear attention, gated convolution or gated linear recurrence.
        linears: the matrices.
        width: inner width, in elements.
        state: elements of state per element of the inner width.
        conv_width: width that the short convolution runs over; 0 without.
        conv_kernel: tokens that it spans.
        chunk: tokens that are handled at once; 0 where one after another.
        besides: parameters in no matrix.
    """

    kind: Literal["mamba", "mamba2", "delta", "linear", "conv", "lru"]
    linears: tuple[Linear, ...]
    width: int
    state: int = 0
    conv_width: int = 0
    conv_kernel: int = 0
    chunk: int = 0
    besides: int = 0

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return _parameters(self.linears) + self.besides


Mixer: TypeAlias = Attention | Recurrence


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """A dense feed-forward.

    Attributes:
        linears: the matrices, the one down last.
        width: inner width.
        is_gated: whether one matrix's activations multiply another's outputs.
        activation: its name in the config.
        besides: parameters in no matrix.
    """

    linears: tuple[Linear, ...]
    width: int
    is_gated: bool = True
    activation: str = "silu"
    besides: int = 0

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return _parameters(self.linears) + self.besides


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts.

    Attributes:
        count: routed experts.
        top_k: how many of them each token goes to.
        expert: one of them.
        router: what chooses; its matrix is held whole by every rank.
        shared: what every token goes through beside them; None without.
        besides: parameters in no matrix, held whole by every rank.
        is_routed_in_float32: whether the router computes in float32.
    """

    count: int
    top_k: int
    expert: FeedForward
    router: Linear
    shared: FeedForward | None = None
    besides: int = 0
    is_routed_in_float32: bool = False

    @property
    def parameters(self) -> int:
        """Number of parameters, those of all experts."""
        shared = 0 if self.shared is None else self.shared.parameters
        return self.count * self.expert.parameters + self.router.parameters + shared + self.besides

    @property
    def active_parameters(self) -> int:
        """Number of parameters that one token is multiplied by."""
        return self.parameters - (self.count - self.top_k) * self.expert.parameters


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One layer.

    Attributes:
        kind: what it is, in a word or two.
        mixers: what mixes tokens: none, one, or several side by side.
        feed_forwards: what each token goes through by itself: none, one, or several side by side.
        norm: the kind of its norms.
        norms: the widths of the norms around them, whose inputs are kept for the backward.
        is_parallel: whether attention and feed-forward take the same hidden state.
        linears: further matrices.
        besides: parameters in no matrix, those of the norms included.
        held_elsewhere: parameters of the parts above that an earlier layer holds.
    """

    kind: str
    mixers: tuple[Mixer, ...]
    feed_forwards: tuple[FeedForward | Experts, ...]
    norm: NormKind = "rms"
    norms: tuple[int, ...] = ()
    is_parallel: bool = False
    linears: tuple[Linear, ...] = ()
    besides: int = 0
    held_elsewhere: int = 0

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, those left out that an earlier layer holds."""
        parts = sum(part.parameters for part in (*self.mixers, *self.feed_forwards))
        return parts + _parameters(self.linears) + self.besides - self.held_elsewhere

    @cached_property
    def active_parameters(self) -> int:
        """Number of parameters that one token is multiplied by."""
        idle = sum(
            part.parameters - part.active_parameters
            for part in self.feed_forwards
            if isinstance(part, Experts)
        )
        return self.parameters + self.held_elsewhere - idle
