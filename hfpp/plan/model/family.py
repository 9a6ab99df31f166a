"""How one model type's layers are built, where the keys of a config do not tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from hfpp.plan.model.config import ModelConfig

if TYPE_CHECKING:
    from hfpp.plan.model.layer_shape import NormKind

__all__ = ["Count", "Family", "Rule", "count_of", "holds"]

Rule: TypeAlias = bool | str | Callable[[ModelConfig], bool]
"""Always, the name of a flag (absent: false), or a function of the config."""

Count: TypeAlias = int | Callable[[ModelConfig], int]


def holds(rule: Rule, config: ModelConfig) -> bool:
    """Whether a rule holds for a config."""
    if isinstance(rule, bool):
        return rule
    return config.flag(rule) if isinstance(rule, str) else rule(config)


def count_of(count: Count, config: ModelConfig) -> int:
    """A count that may depend on the config."""
    return count if isinstance(count, int) else count(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one model type's layers are built.

    Attributes:
        is_multi_head: whether every head has keys and values of its own, whatever the config says.
        norm: the kind of norm.
        norm_bias: whether its norms have biases.
        layer_norms: norms as wide as the hidden state, in each layer.
        final_norm: whether one precedes the head.
        embedding_norm: whether one follows the embedding.
        qkv_bias: whether queries, keys and values have biases.
        out_bias: whether attention's last matrix has one.
        qk_norm: norms of queries and keys: over each head, or over all of them together.
        qk_norm_if: when they are there.
        qk_norm_bias: whether these have biases.
        attention_gate: what attention's output is multiplied by: nothing, one number per head, or
            as many as it is wide.
        attention_gate_if: when it is there.
        attention_gate_bias: whether it has a bias.
        sinks: whether attention has a learned sink per head.
        attention_besides: further parameters of attention, by config, heads, kv_heads, head_dim.
        gated: whether the feed-forward is gated.
        mlp_bias: whether the feed-forward has biases.
        is_four_wide: whether it is four times as wide as the hidden state where the config does
            not say.
        mlp_besides: further parameters of the dense feed-forward, by its width.
        expert_bias: whether experts have biases.
        router_bias: whether the router has one.
        score_bias: whether the router has a learned bias that is added to its scores.
        shared_gate: whether a gate weighs the shared experts.
        shared_width: inner width of what all tokens go through beside the experts.
        sparse_besides: further parameters of layers with experts.
        layer_besides: further parameters of each layer.
        last_layer_besides: further parameters of the last layer.
        embedding_besides: further parameters before the first layer.
        head_bias: whether the head has a bias.
        tied: whether the head shares the embedding's weights where the config does not say.
        never_tied: whether it does not, whatever the config says.
        positions: key of the number of learned positions, and how many there are beyond it.
        recurrence: what layers are that are no attention.
        linear_heads: of recurrences.
        parallel: whether attention and recurrence stand side by side in every layer.
        single: whether each layer is either a mixer or a feed-forward.
        fused: whether one matrix makes queries, keys and values, rotated afterwards.
        parallel_residual: whether attention and feed-forward take the same hidden state.
        plain_softmax: whether attention's softmax computes in the model's dtype.
        window_pattern: every which layer sees everything, where no list tells.
        nested: sub-configs whose entries count as the config's own.
        defaults: values of keys that a config may lack.
        change: what a config says that has to be read otherwise.
        refuse: keys that must not be set (to something else than null, false or zero).
    """

    is_multi_head: bool = False
    norm: NormKind = "rms"
    norm_bias: bool = False
    layer_norms: Count = 2
    final_norm: Rule = True
    embedding_norm: bool = False
    qkv_bias: Rule = "attention_bias"
    out_bias: Rule = "attention_bias"
    qk_norm: Literal["head", "width"] | None = None
    qk_norm_if: Rule = True
    qk_norm_bias: bool = False
    attention_gate: Literal["head", "width"] | None = None
    attention_gate_if: Rule = True
    attention_gate_bias: Rule = False
    sinks: bool = False
    attention_besides: Callable[[ModelConfig, int, int, int], int] | None = None
    gated: Rule = True
    mlp_bias: Rule = "mlp_bias"
    is_four_wide: bool = False
    mlp_besides: Callable[[int], int] | None = None
    expert_bias: Rule = False
    router_bias: Rule = False
    score_bias: bool = False
    shared_gate: bool = False
    shared_width: Callable[[ModelConfig], int] | None = None
    sparse_besides: Count = 0
    layer_besides: Count = 0
    last_layer_besides: Count = 0
    embedding_besides: Count = 0
    head_bias: Rule = False
    tied: bool = False
    never_tied: bool = False
    positions: tuple[str, int] | None = None
    recurrence: str = "mamba2"
    parallel: bool = False
    single: bool = False
    fused: bool = False
    parallel_residual: Rule = False
    plain_softmax: bool = False
    window_pattern: int = 0
    nested: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[ModelConfig], Mapping[str, Any]] | None = None
    refuse: tuple[str, ...] = ()
