"""One layer of a config, from its kind: attention and feed-forward; recurrences live beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfpp.plan.model.family import Family, count_of, holds
from hfpp.plan.model.layer_kinds import EXPERT_KEYS, LayerKind
from hfpp.plan.model.layer_shape import (
    Attention,
    Experts,
    FeedForward,
    LayerShape,
    Linear,
    Mixer,
    NormKind,
)
from hfpp.plan.model.recurrence_reading import read_recurrence
from hfpp.plan.model.shared_block_reading import read_shared_block

if TYPE_CHECKING:
    from hfpp.plan.model.config import ModelConfig

__all__ = ["HIDDEN_KEYS", "norm_parameters", "read_layer"]

HIDDEN_KEYS = ("hidden_size", "n_embd", "d_model", "model_dim")
HEAD_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_KV_HEAD_KEYS = ("num_key_value_heads", "kv_n_heads", "num_kv_heads")
WIDTH_KEYS = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "dff")
_TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
)
_EXPERT_WIDTH_KEYS = ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size")
_SHARED_COUNT_KEYS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_SHARED_WIDTH_KEYS = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
)
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation")
MOST_EXPERTS = 1_000_000
MOST_HEADS = 1 << 20


def norm_parameters(kind: NormKind, width: int, *, bias: bool) -> int:
    """Number of parameters of one norm."""
    if kind == "plain":
        return 0
    return 2 * width if bias else width


def read_layer(config: ModelConfig, family: Family, kind: LayerKind) -> LayerShape:
    """One layer.

    Raises:
        PipelineConfigError: a size is absent or absurd.
    """
    hidden = config.integer(*HIDDEN_KEYS)
    mixers: list[Mixer] = []
    if kind.mixer in ("full", "sliding", "chunked"):
        mixers.append(_attention(config, family, kind.mixer, hidden))
        if family.parallel:
            mixers.append(read_recurrence(config, family.recurrence, hidden))
    elif kind.mixer == "recurrent":
        mixers.append(read_recurrence(config, family.recurrence, hidden))
    elif kind.mixer == "hybrid":
        return read_shared_block(config, family, hidden, nth=kind.nth, count=kind.of)
    feed_forwards: list[FeedForward | Experts] = []
    if kind.has_feed_forward:
        part = (
            _experts(config, family, hidden) if kind.is_sparse else _dense(config, family, hidden)
        )
        feed_forwards.append(part)
    norms = (hidden,) * count_of(family.layer_norms, config)
    besides = sum(norm_parameters(family.norm, n, bias=family.norm_bias) for n in norms)
    besides += count_of(family.layer_besides, config)
    if kind.is_sparse:
        besides += count_of(family.sparse_besides, config)
    return LayerShape(
        kind=_kind_name(kind),
        mixers=tuple(mixers),
        feed_forwards=tuple(feed_forwards),
        norm=family.norm,
        norms=norms,
        is_parallel=len(norms) == 1 or holds(family.parallel_residual, config),
        besides=besides,
    )


def _kind_name(kind: LayerKind) -> str:
    words = [] if kind.mixer == "none" else [kind.mixer]
    if kind.has_feed_forward:
        words.append("experts" if kind.is_sparse else "dense")
    return " ".join(words)


def _attention(config: ModelConfig, family: Family, mixer: str, hidden: int) -> Attention:
    reach = None
    if mixer == "sliding":
        reach = config.integer("sliding_window", "sliding_window_size", "window_size")
    elif mixer == "chunked":
        reach = config.integer("attention_chunk_size")
    heads = config.integer(*HEAD_KEYS, maximum=MOST_HEADS)
    kv_heads = config.optional(*_KV_HEAD_KEYS, maximum=MOST_HEADS)
    if config.has("kv_lora_rank"):
        return _latent_attention(config, family, hidden, heads, reach)
    kv_heads = heads if kv_heads is None or family.is_multi_head else kv_heads
    config.check_multiple(HEAD_KEYS, heads, _KV_HEAD_KEYS, kv_heads)
    dim = config.optional("head_dim", "attention_head_dim")
    if dim is None:
        config.check_multiple(HIDDEN_KEYS, hidden, HEAD_KEYS, heads)
        dim = hidden // heads
    bias, out_bias = holds(family.qkv_bias, config), holds(family.out_bias, config)
    inward = [
        Linear(hidden, heads * dim, bias),
        Linear(hidden, kv_heads * dim, bias),
        Linear(hidden, kv_heads * dim, bias),
    ]
    gate = family.attention_gate if holds(family.attention_gate_if, config) else None
    if gate is not None:
        gate_bias = holds(family.attention_gate_bias, config)
        inward.append(Linear(hidden, heads * (dim if gate == "width" else 1), gate_bias))
    besides = heads if family.sinks else 0
    qk_norm = family.qk_norm if holds(family.qk_norm_if, config) else None
    if qk_norm is not None:
        widths = (dim, dim) if qk_norm == "head" else (heads * dim, kv_heads * dim)
        besides += sum(
            norm_parameters(family.norm, width, bias=family.qk_norm_bias) for width in widths
        )
    if family.attention_besides is not None:
        besides += family.attention_besides(config, heads, kv_heads, dim)
    return Attention(
        inward=tuple(inward),
        outward=(Linear(heads * dim, hidden, out_bias),),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        value_dim=dim,
        reach=reach,
        is_chunked=mixer == "chunked",
        besides=besides,
        qk_norm=None if qk_norm is None else family.norm,
        is_gated=gate is not None,
        is_fused=family.fused,
        has_softcap=config.has("attn_logit_softcapping"),
        has_plain_softmax=family.plain_softmax,
    )


def _latent_attention(
    config: ModelConfig, family: Family, hidden: int, heads: int, reach: int | None
) -> Attention:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1)."""
    bias = holds(family.qkv_bias, config)
    out_bias = holds(family.out_bias, config)
    kv_rank = config.integer("kv_lora_rank")
    q_rank = config.optional("q_lora_rank")
    rotary = config.integer("qk_rope_head_dim")
    plain = config.integer("qk_nope_head_dim")
    value = config.integer("v_head_dim")
    inward = [
        Linear(hidden, kv_rank + rotary, bias, is_split=False),
        Linear(kv_rank, heads * (plain + value)),
    ]
    if q_rank is None:
        inward.append(Linear(hidden, heads * (plain + rotary)))
    else:
        inward.append(Linear(hidden, q_rank, bias, is_split=False))
        inward.append(Linear(q_rank, heads * (plain + rotary)))
    besides = kv_rank + (q_rank or 0)
    if config.has("index_n_heads"):  # the indexer of sparse attention (arXiv 2512.02556)
        index_dim = config.integer("index_head_dim")
        index_heads = config.integer("index_n_heads", maximum=MOST_HEADS)
        inward.append(Linear(q_rank or hidden, index_heads * index_dim, is_split=False))
        inward.append(Linear(hidden, index_dim, is_split=False))
        inward.append(Linear(hidden, index_heads, is_split=False))
        besides += 2 * index_dim
        reach = config.optional("index_topk")
    if family.attention_gate is not None:
        inward.append(Linear(hidden, heads))
    return Attention(
        inward=tuple(inward),
        outward=(Linear(heads * value, hidden, out_bias),),
        heads=heads,
        kv_heads=heads,
        head_dim=plain + rotary,
        value_dim=value,
        reach=reach,
        besides=besides,
        latent=(kv_rank,) if q_rank is None else (kv_rank, q_rank),
        is_gated=family.attention_gate is not None,
    )


def _feed_forward(
    config: ModelConfig, family: Family, hidden: int, width: int, *, bias: bool
) -> FeedForward:
    gated = holds(family.gated, config)
    inward = (Linear(hidden, width, bias),) * (2 if gated else 1)
    activation = config.text(*_ACTIVATION_KEYS) or ("silu" if gated else "gelu")
    return FeedForward(
        linears=(*inward, Linear(width, hidden, bias)),
        width=width,
        is_gated=gated,
        activation=activation,
    )


def _dense(config: ModelConfig, family: Family, hidden: int) -> FeedForward:
    width = config.optional(*WIDTH_KEYS)
    if width is None:
        if not family.is_four_wide:
            config.fail_missing(WIDTH_KEYS)
        width = 4 * hidden
    part = _feed_forward(config, family, hidden, width, bias=holds(family.mlp_bias, config))
    if family.mlp_besides is None:
        return part
    return FeedForward(
        linears=part.linears,
        width=width,
        is_gated=part.is_gated,
        activation=part.activation,
        besides=family.mlp_besides(width),
    )


def _experts(config: ModelConfig, family: Family, hidden: int) -> Experts | FeedForward:
    count = config.integer(*EXPERT_KEYS, maximum=MOST_EXPERTS)
    if count == 1 and config.has("expert_layer_period"):
        return _dense(config, family, hidden)  # one expert is none
    top_k = config.integer(*_TOP_K_KEYS, maximum=MOST_EXPERTS)
    if top_k > count:
        config.fail(
            next(key for key in _TOP_K_KEYS if config.has(key)),
            f"({top_k}) is more than the number of experts ({count})",
        )
    width = config.integer(*_EXPERT_WIDTH_KEYS, *WIDTH_KEYS)
    bias = holds(family.expert_bias, config)
    mlp_bias = holds(family.mlp_bias, config)
    shared_width = _shared_width(config, family, width)
    besides = count if family.score_bias else 0
    if family.shared_gate and shared_width:
        besides += hidden
    return Experts(
        count=count,
        top_k=top_k,
        expert=_feed_forward(config, family, hidden, width, bias=bias),
        router=Linear(hidden, count, holds(family.router_bias, config), is_split=False),
        shared=(
            _feed_forward(config, family, hidden, shared_width, bias=mlp_bias)
            if shared_width
            else None
        ),
        besides=besides,
        is_routed_in_float32=config.has("n_group", "topk_group"),
    )


def _shared_width(config: ModelConfig, family: Family, width: int) -> int:
    if family.shared_width is not None:
        return family.shared_width(config)
    given = config.optional(*_SHARED_WIDTH_KEYS, minimum=0)
    if given is not None:
        return given
    return width * (config.optional(*_SHARED_COUNT_KEYS, minimum=0, maximum=MOST_EXPERTS) or 0)
