"""What the keys of a config do not tell: how each family's layers are built, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from hfpp.plan.model_config import ModelConfig

if TYPE_CHECKING:
    from hfpp.plan.layer_shape import NormKind

__all__ = ["FAMILIES", "UNCOUNTED", "Family", "family_of", "holds"]

Rule: TypeAlias = bool | str | Callable[[ModelConfig], bool]
"""Always, the name of a flag (absent: false), or a function of the config."""

Count: TypeAlias = int | Callable[[ModelConfig], int]


def holds(rule: Rule, config: ModelConfig) -> bool:
    """Whether a rule holds for a config."""
    if isinstance(rule, bool):
        return rule
    return config.flag(rule) if isinstance(rule, str) else rule(config)


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


_LLAMA = Family()
_LAYER_NORM = Family(norm="layer", norm_bias=True)
_PLAIN_LAYER_NORM = Family(norm="layer")
_ALL_BIASES = replace(
    _LAYER_NORM, qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, is_four_wide=True
)
_QWEN3 = Family(qk_norm="head")
_GEMMA = Family(norm="rms32", tied=True)
_GEMMA2 = replace(_GEMMA, layer_norms=4, window_pattern=2)
_COHERE = replace(
    _PLAIN_LAYER_NORM,
    layer_norms=1,
    tied=True,
    qk_norm="head",
    qk_norm_if="use_qk_norm",
    attention_besides=lambda c, heads, kv, dim: (
        (heads + kv - 2) * dim if c.flag("use_qk_norm") else 0
    ),
)
_COHERE2 = replace(_PLAIN_LAYER_NORM, layer_norms=1, tied=True, window_pattern=4)
_OLMO2 = Family(norm="rms32", qk_norm="width")
_MAMBA = Family(layer_norms=1, recurrence="mamba", single=True, tied=True)
_DELTA = Family(
    recurrence="delta",
    qk_norm="head",
    attention_gate="width",
    attention_gate_bias="attention_bias",
    norm="rms32",
)


def _hidden(config: ModelConfig) -> int:
    return config.integer("hidden_size", "n_embd", "d_model")


def _bigcode_change(config: ModelConfig) -> Mapping[str, Any]:
    return {"num_key_value_heads": 1 if config.flag("multi_query", default=True) else None}


def _falcon_change(config: ModelConfig) -> Mapping[str, Any]:
    heads = config.integer("num_attention_heads", "n_head")
    new = config.flag("new_decoder_architecture")
    many = config.optional("num_kv_heads", "n_head_kv") or heads
    one = config.flag("multi_query", default=True)
    return {
        "num_key_value_heads": many if new else 1 if one else heads,
        "intermediate_size": config.optional("ffn_hidden_size") or 4 * _hidden(config),
    }


def _falcon_norms(config: ModelConfig) -> int:
    if config.flag("new_decoder_architecture"):
        return config.optional("num_ln_in_parallel_attn", maximum=2) or 2
    return 1 if config.flag("parallel_attn", default=True) else 2


def _gpt_neo_change(config: ModelConfig) -> Mapping[str, Any]:
    return {
        "sliding_window": config.optional("window_size"),
        "layer_types": config.listed("attention_layers"),
    }


def _mpt_change(config: ModelConfig) -> Mapping[str, Any]:
    ratio = config.optional("expansion_ratio") or 4
    return {"intermediate_size": ratio * _hidden(config)}


def _lfm2_change(config: ModelConfig) -> Mapping[str, Any]:
    width = config.integer("intermediate_size", "block_ff_dim")
    if config.flag("block_auto_adjust_ff_dim", default=True):
        width = int(2 * width / 3)
        width = int(config.number("block_ffn_dim_multiplier", 1.0) * width)
        multiple = config.optional("block_multiple_of") or 256
        width = multiple * -(-width // multiple)
    return {"intermediate_size": width}


def _llama4_change(config: ModelConfig) -> Mapping[str, Any]:
    return {
        "moe_intermediate_size": config.integer("intermediate_size"),
        "intermediate_size": config.optional("intermediate_size_mlp"),
        "n_shared_experts": 1,
    }


def _recurrent_gemma_change(config: ModelConfig) -> Mapping[str, Any]:
    layers = config.integer("num_hidden_layers", maximum=100_000)
    pattern = config.listed("block_types") or ["recurrent", "recurrent", "attention"]
    return {
        "layer_types": [pattern[i % len(pattern)] for i in range(layers)],
        "intermediate_size": config.integer("intermediate_size") // 2,
        "sliding_window": config.optional("attention_window_size"),
    }


def _zamba_change(config: ModelConfig) -> Mapping[str, Any]:
    if not config.flag("tie_word_embeddings", default=True):
        config.fail("tie_word_embeddings", "is false, so that shared blocks are not shared either")
    expand = config.optional("mamba_expand") or 2
    return {
        "layer_types": config.listed("layers_block_type"),
        "mamba_d_ssm": expand * _hidden(config),
        "mamba_conv_bias": config.flag("mamba_conv_bias", default=True),
    }


def _nemotron_h_change(config: ModelConfig) -> Mapping[str, Any]:
    pattern = config.values.get("hybrid_override_pattern")
    names = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    if isinstance(pattern, str) and not config.has("layers_block_type", "layer_types"):
        if set(pattern) - set(names):
            config.fail("hybrid_override_pattern", "may hold the letters M, *, - and E only")
        return {"layer_types": [names[letter] for letter in pattern]}
    return {"layer_types": config.listed("layers_block_type") or config.listed("layer_types")}


def _opt_change(config: ModelConfig) -> Mapping[str, Any]:
    if not config.flag("layer_norm_elementwise_affine", default=True):
        config.fail("layer_norm_elementwise_affine", "is false, which is not known")
    embedding = config.optional("word_embed_proj_dim")
    if embedding not in (None, _hidden(config)):
        config.fail("word_embed_proj_dim", "differs from hidden_size, which is not known")
    return {}


def _helium_change(config: ModelConfig) -> Mapping[str, Any]:
    wide = config.integer("num_attention_heads") * (config.optional("head_dim") or 0)
    if wide not in (0, _hidden(config)):
        config.fail("head_dim", "times num_attention_heads must be hidden_size")
    return {}


def _laguna_change(config: ModelConfig) -> Mapping[str, Any]:
    if not config.flag("gating", default=True):
        config.fail("gating", "is false, which is not known")
    return {}


def _no_experts_unless(flag: str) -> Callable[[ModelConfig], Mapping[str, Any]]:
    return lambda config: {} if config.flag(flag) else {"num_experts": 0}


def _minimax_m3_change(config: ModelConfig) -> Mapping[str, Any]:
    return {
        "moe_intermediate_size": config.integer("intermediate_size"),
        "intermediate_size": config.optional("dense_intermediate_size"),
    }


def _japanese_change(config: ModelConfig) -> Mapping[str, Any]:
    multiple = config.optional("intermediate_multiple_size") or 4
    return {"intermediate_size": multiple * _hidden(config)}


def _per_layer_inputs(config: ModelConfig) -> int:
    width = config.optional("hidden_size_per_layer_input", minimum=0) or 0
    return 2 * width * _hidden(config) + _hidden(config) if width else 0


def _per_layer_embedding(config: ModelConfig) -> int:
    width = config.optional("hidden_size_per_layer_input", minimum=0) or 0
    if not width:
        return 0
    all_layers = width * config.integer("num_hidden_layers", maximum=100_000)
    rows = config.integer("vocab_size_per_layer_input") + _hidden(config)
    return rows * all_layers + width


def _doubled_intermediate(config: ModelConfig) -> int:
    return config.integer("intermediate_size") * (
        config.optional("moe_num_shared_experts", minimum=0) or 0
    )


FAMILIES: Mapping[str, Family] = {
    "afmoe": replace(_QWEN3, layer_norms=4, attention_gate="width", score_bias=True),
    "apertus": replace(_QWEN3, gated=False, mlp_besides=lambda _: 2),
    "arcee": replace(_LLAMA, gated=False),
    "aria_text": replace(_LLAMA, shared_width=_doubled_intermediate),
    "axk1": replace(_LLAMA, sparse_besides=_hidden),
    "bailing_hybrid": replace(
        _LLAMA, recurrence="kda_full", attention_gate="head", never_tied=True
    ),
    "bamba": _LLAMA,
    "beam": replace(
        _QWEN3,
        layer_norms=4,
        attention_gate="width",
        attention_besides=lambda _c, heads, _k, _d: heads,
    ),
    "biogpt": replace(
        _ALL_BIASES, is_multi_head=True, tied=True, positions=("max_position_embeddings", 2)
    ),
    "bitnet": replace(
        _LLAMA, attention_besides=lambda c, _h, _k, _d: _hidden(c), mlp_besides=lambda width: width
    ),
    "bloom": replace(_ALL_BIASES, is_multi_head=True, tied=True, embedding_norm=True),
    "codegen": replace(
        _ALL_BIASES,
        is_multi_head=True,
        fused=True,
        layer_norms=1,
        qkv_bias=False,
        out_bias=False,
        head_bias=True,
    ),
    "cohere": _COHERE,
    "cohere2": _COHERE2,
    "cohere2_moe": replace(_COHERE2, refuse=("first_k_dense_replace",)),
    "cohere_compass_text": _COHERE2,
    "ctrl": replace(_ALL_BIASES, is_multi_head=True, tied=True, head_bias=True),
    "cwm": _LLAMA,
    "dbrx": replace(
        _PLAIN_LAYER_NORM, fused=True, nested=("attn_config", "ffn_config"), qkv_bias=False
    ),
    "deepseek_v2": _LLAMA,
    "deepseek_v3": _LLAMA,
    "deepseek_v32": replace(_LLAMA, mlp_bias=False),
    "diffllama": replace(_LLAMA, attention_besides=lambda _c, _h, _k, dim: 4 * dim),
    "doge": replace(
        _QWEN3,
        layer_besides=lambda c: 2 * _hidden(c),
        attention_besides=lambda c, _h, kv, dim: (
            kv + kv * kv * dim + (kv if c.flag("attention_bias") else 0)
        ),
        change=_no_experts_unless("is_moe"),
        refuse=("is_moe",),
    ),
    "dots1": _QWEN3,
    "emu3_text_model": _LLAMA,
    "ernie4_5": replace(
        _LLAMA, tied=True, qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias"
    ),
    "ernie4_5_moe": replace(
        _LLAMA,
        head_bias="use_bias",
        tied=True,
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        score_bias=True,
    ),
    "exaone4": _QWEN3,
    "exaone_moe": _QWEN3,
    "falcon": replace(
        _LAYER_NORM,
        fused=True,
        layer_norms=_falcon_norms,
        qkv_bias="bias",
        out_bias="bias",
        mlp_bias="bias",
        gated=False,
        tied=True,
        change=_falcon_change,
    ),
    "falcon_h1": replace(_LLAMA, parallel=True),
    "falcon_mamba": _MAMBA,
    "flex_olmo": _OLMO2,
    "flint": replace(_QWEN3, sinks=True),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, qk_norm="head", window_pattern=6),
    "gemma4_text": replace(
        _GEMMA,
        norm="rms",
        layer_norms=4,
        qk_norm="head",
        layer_besides=_per_layer_inputs,
        embedding_besides=_per_layer_embedding,
        refuse=("attention_k_eq_v", "num_kv_shared_layers", "enable_moe_block"),
    ),
    "gemma4_unified_text": replace(
        _GEMMA,
        norm="rms",
        layer_norms=4,
        qk_norm="head",
        refuse=("attention_k_eq_v", "num_kv_shared_layers"),
    ),
    "glm": replace(_LLAMA, out_bias=False),
    "glm4": replace(_LLAMA, out_bias=False, layer_norms=4),
    "glm4_moe": replace(_LLAMA, out_bias=False, qk_norm="head", qk_norm_if="use_qk_norm"),
    "glm4_moe_lite": _LLAMA,
    "glm_moe_dsa": replace(_LLAMA, mlp_bias=False),
    "gpt2": replace(
        _ALL_BIASES,
        is_multi_head=True,
        plain_softmax=True,
        refuse=("add_cross_attention",),
        tied=True,
        positions=("n_positions", 0),
    ),
    "gpt_bigcode": replace(
        _ALL_BIASES,
        refuse=("add_cross_attention",),
        tied=True,
        positions=("n_positions", 0),
        change=_bigcode_change,
    ),
    "gpt_neo": replace(
        _ALL_BIASES,
        is_multi_head=True,
        qkv_bias=False,
        tied=True,
        positions=("max_position_embeddings", 0),
        change=_gpt_neo_change,
    ),
    "gpt_neox": replace(
        _ALL_BIASES,
        is_multi_head=True,
        parallel_residual=lambda c: c.flag("use_parallel_residual", default=True),
        fused=True,
        qkv_bias=lambda c: c.flag("attention_bias", default=True),
        out_bias=lambda c: c.flag("attention_bias", default=True),
    ),
    "gpt_neox_japanese": replace(
        _LAYER_NORM,
        is_multi_head=True,
        fused=True,
        qkv_bias=False,
        out_bias=False,
        gated=False,
        tied=True,
        last_layer_besides=_hidden,
        change=_japanese_change,
    ),
    "gpt_oss": replace(_LLAMA, sinks=True, router_bias=True, expert_bias=True, window_pattern=2),
    "gptj": replace(
        _ALL_BIASES,
        is_multi_head=True,
        layer_norms=1,
        qkv_bias=False,
        out_bias=False,
        head_bias=True,
    ),
    "granite": _LLAMA,
    "granite_swa": replace(_LLAMA, tied=True, sinks=True),
    "granitemoe": _LLAMA,
    "granitemoe_swa": replace(_LLAMA, sinks=True),
    "granitemoehybrid": _LLAMA,
    "granitemoeshared": _LLAMA,
    "helium": replace(_LLAMA, out_bias=False, change=_helium_change),
    "hunyuan_v1_dense": _QWEN3,
    "hunyuan_v1_moe": replace(_QWEN3, shared_width=lambda c: c.integer("intermediate_size")),
    "hy_v3": _QWEN3,
    "hyperclovax": replace(
        _LLAMA, layer_norms=lambda c: 4 if c.flag("use_post_norm", default=True) else 2
    ),
    "jais2": replace(_LAYER_NORM, gated=False),
    "jamba": replace(_LLAMA, recurrence="mamba_normed"),
    "kimi_linear": replace(_LLAMA, recurrence="kda", never_tied=True),
    "kolibri1": replace(_QWEN3, layer_norms=4),
    "laguna": replace(_QWEN3, attention_gate="head", score_bias=True, change=_laguna_change),
    "lfm2": replace(_QWEN3, tied=True, recurrence="conv", change=_lfm2_change),
    "lfm2_moe": replace(_QWEN3, tied=True, recurrence="conv"),
    "lfm3": replace(
        _QWEN3,
        tied=True,
        recurrence="conv",
        layer_norms=lambda c: 4 if c.flag("use_sandwich_norm", default=True) else 2,
        attention_gate="head",
        attention_gate_if=lambda c: c.flag("use_attention_gate", default=True),
    ),
    "llama": _LLAMA,
    "llama4_text": replace(_LLAMA, change=_llama4_change),
    "mamba": _MAMBA,
    "mamba2": replace(_MAMBA, recurrence="mamba2", tied=False),
    "mellum": _QWEN3,
    "minicpm3": replace(_LLAMA, tied=True),
    "minimax": replace(_LLAMA, recurrence="lightning"),
    "minimax_m2": replace(_OLMO2, qkv_bias=False, out_bias=False),
    "minimax_m3_vl_text": replace(
        _QWEN3, norm="rms32", qkv_bias=False, out_bias=False, change=_minimax_m3_change
    ),
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "mpt": replace(
        _PLAIN_LAYER_NORM, is_multi_head=True, gated=False, tied=True, change=_mpt_change
    ),
    "nanochat": replace(_LLAMA, norm="plain", gated=False),
    "nemotron": replace(_LAYER_NORM, gated=False),
    "nemotron_h": replace(
        _LLAMA, layer_norms=1, single=True, gated=False, change=_nemotron_h_change
    ),
    "olmo": replace(_LLAMA, norm="plain"),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "olmo_hybrid": replace(_OLMO2, recurrence="delta"),
    "olmoe": _OLMO2,
    "openai-gpt": replace(
        _ALL_BIASES,
        is_multi_head=True,
        tied=True,
        final_norm=False,
        positions=("n_positions", 0),
    ),
    "opt": replace(
        _ALL_BIASES,
        is_multi_head=True,
        tied=True,
        positions=("max_position_embeddings", 2),
        qkv_bias=lambda c: c.flag("enable_bias", default=True),
        out_bias=lambda c: c.flag("enable_bias", default=True),
        mlp_bias=lambda c: c.flag("enable_bias", default=True),
        final_norm=lambda c: (
            c.flag("do_layer_norm_before", default=True) and not c.flag("_remove_final_layer_norm")
        ),
        change=_opt_change,
        refuse=("_remove_final_layer_norm",),
    ),
    "persimmon": replace(
        _ALL_BIASES,
        is_multi_head=True,
        fused=True,
        qk_norm="head",
        qk_norm_if=lambda c: c.flag("qk_layernorm", default=True),
        qk_norm_bias=True,
    ),
    "phi": replace(
        _ALL_BIASES,
        layer_norms=1,
        head_bias=True,
        qk_norm="head",
        qk_norm_if="qk_layernorm",
        qk_norm_bias=True,
    ),
    "phi3": replace(_LLAMA, fused=True, qkv_bias=False, out_bias=False),
    "phimoe": replace(_LAYER_NORM, head_bias="lm_head_bias"),
    "qwen2": replace(_LLAMA, qkv_bias=True, out_bias=False),
    "qwen2_moe": replace(
        _LLAMA,
        qkv_bias=lambda c: c.flag("qkv_bias", default=True),
        out_bias=False,
        shared_gate=True,
    ),
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3,
    "qwen3_next": replace(_DELTA, shared_gate=True, recurrence="delta_fused"),
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": replace(_DELTA, shared_gate=True),
    "recurrent_gemma": replace(
        _GEMMA,
        out_bias=True,
        mlp_bias=True,
        recurrence="lru",
        change=_recurrent_gemma_change,
    ),
    "seed_oss": replace(_LLAMA, out_bias="attention_out_bias"),
    "smollm3": replace(_LLAMA, tied=True),
    "solar_open": replace(_LLAMA, out_bias=False),
    "stablelm": replace(
        _LAYER_NORM,
        qkv_bias="use_qkv_bias",
        out_bias=False,
        layer_norms=lambda c: 1 if c.flag("use_parallel_residual") else 2,
        refuse=("qk_layernorm",),
    ),
    "starcoder2": replace(
        _LAYER_NORM,
        qkv_bias=lambda c: c.flag("use_bias", default=True),
        out_bias=lambda c: c.flag("use_bias", default=True),
        mlp_bias=lambda c: c.flag("use_bias", default=True),
        gated=False,
        tied=True,
    ),
    "vaultgemma": replace(_GEMMA, window_pattern=2),
    "xglm": replace(_ALL_BIASES, is_multi_head=True, tied=True, refuse=("add_cross_attention",)),
    "youtu": replace(_LLAMA, tied=True),
    "zamba": replace(
        _LLAMA,
        recurrence="mamba_heads",
        single=True,
        layer_norms=1,
        tied=True,
        change=_zamba_change,
    ),
    "zamba2": replace(
        _LLAMA,
        single=True,
        layer_norms=1,
        tied=True,
        change=_zamba_change,
        refuse=("use_shared_attention_adapter", "add_bias_linear"),
    ),
}
"""By model_type; other types are read as the usual keys say."""

_ENCODER = "an encoder's layers"
_DECODER = "the decoder of an encoder-decoder"

UNCOUNTED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "albert",
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "git",
            "megatron-bert",
            "modernbert-decoder",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        ),
        _ENCODER,
    ),
    **dict.fromkeys(
        (
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "moshi",
            "musicgen",
            "musicgen_decoder",
            "musicgen_melody",
            "musicgen_melody_decoder",
            "mvp",
            "pegasus",
            "plbart",
            "prophetnet",
            "t5",
            "trocr",
            "whisper",
        ),
        _DECODER,
    ),
    "axk2": "gated norms",
    "blt": "several stacks",
    "cpmant": "segments and relative positions",
    "deepseek_v4": "compressed attention and hyper-connections",
    "dots3_note": "compressed attention that differs by layer",
    "dots3_note_text": "compressed attention that differs by layer",
    "fuyu": "images that its decoder embeds itself",
    "gemma3n": "alternating updates",
    "gemma3n_text": "alternating updates",
    "hrm_text": "two stacks that run again and again",
    "hy_v4": "hyper-connections",
    "inkling": "relative attention",
    "inkling_text": "relative attention",
    "inkling2": "relative attention",
    "inkling2_text": "relative attention",
    "jetmoe": "experts in attention",
    "longcat_flash": "two attentions a layer",
    "mimo_v2_flash": "heads that differ by layer",
    "mllama": "cross-attention layers",
    "mllama_text_model": "cross-attention layers",
    "phi4_multimodal": "adapters and encoders inside the embedding",
    "qwen4_exp": "hyper-connections",
    "qwen4_exp_text": "hyper-connections",
    "reformer": "reversible layers",
    "rwkv": "time mixing",
    "xlm": "lists of parts instead of layers",
    "xlnet": "relative attention",
    "xlstm": "matrix memories",
    "zaya": "convolved attention",
}
"""Model types that the keys do not tell enough of, with what is missing."""


_STRANGE = re.compile(
    r"^hc_|hyper_connection|altup|laurel|per_layer|cross_attention|encoder_|type_vocab|ngram"
    r"|gated_norm|zero_expert|adapter_rank|compress|mem_blocks|_lru|altern"
)


def family_of(config: ModelConfig) -> Family | None:
    """The family of a config; None where its model_type is not known.

    Raises:
        PipelineConfigError: its keys do not tell enough.
    """
    if config.model_type in UNCOUNTED:
        config.fail(
            "model_type",
            f"is {config.model_type!r}, of which a config does not tell all parameters "
            f"({UNCOUNTED[config.model_type]}): make the shape from the live model",
        )
    family = FAMILIES.get(config.model_type)
    if family is None:
        for key, value in config.values.items():
            if isinstance(key, str) and value and _STRANGE.search(key):
                config.fail(
                    key,
                    f"is set, and what it means for the model type {config.model_type!r} is not "
                    "known: make the shape from the live model",
                )
    return family
