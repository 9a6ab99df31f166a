"""What the keys of a config do not tell: how each family's layers are built, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hfpp.plan.model import family_changes as changes
from hfpp.plan.model.family import Family

__all__ = ["FAMILIES"]

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


FAMILIES: Mapping[str, Family] = {
    "afmoe": replace(_QWEN3, layer_norms=4, attention_gate="width", score_bias=True),
    "apertus": replace(_QWEN3, gated=False, mlp_besides=lambda _: 2),
    "arcee": replace(_LLAMA, gated=False),
    "aria_text": replace(_LLAMA, shared_width=changes.doubled_intermediate),
    "axk1": replace(_LLAMA, sparse_besides=changes.hidden),
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
        _LLAMA,
        attention_besides=lambda c, _h, _k, _d: changes.hidden(c),
        mlp_besides=lambda width: width,
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
        layer_besides=lambda c: 2 * changes.hidden(c),
        attention_besides=lambda c, _h, kv, dim: (
            kv + kv * kv * dim + (kv if c.flag("attention_bias") else 0)
        ),
        change=changes.no_experts_unless("is_moe"),
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
        layer_norms=changes.falcon_norms,
        qkv_bias="bias",
        out_bias="bias",
        mlp_bias="bias",
        gated=False,
        tied=True,
        change=changes.falcon_change,
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
        layer_besides=changes.per_layer_inputs,
        embedding_besides=changes.per_layer_embedding,
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
        change=changes.bigcode_change,
    ),
    "gpt_neo": replace(
        _ALL_BIASES,
        is_multi_head=True,
        qkv_bias=False,
        tied=True,
        positions=("max_position_embeddings", 0),
        change=changes.gpt_neo_change,
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
        last_layer_besides=changes.hidden,
        change=changes.japanese_change,
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
    "helium": replace(_LLAMA, out_bias=False, change=changes.helium_change),
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
    "laguna": replace(_QWEN3, attention_gate="head", score_bias=True, change=changes.laguna_change),
    "lfm2": replace(_QWEN3, tied=True, recurrence="conv", change=changes.lfm2_change),
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
    "llama4_text": replace(_LLAMA, change=changes.llama4_change),
    "mamba": _MAMBA,
    "mamba2": replace(_MAMBA, recurrence="mamba2", tied=False),
    "mellum": _QWEN3,
    "minicpm3": replace(_LLAMA, tied=True),
    "minimax": replace(_LLAMA, recurrence="lightning"),
    "minimax_m2": replace(_OLMO2, qkv_bias=False, out_bias=False),
    "minimax_m3_vl_text": replace(
        _QWEN3, norm="rms32", qkv_bias=False, out_bias=False, change=changes.minimax_m3_change
    ),
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "mpt": replace(
        _PLAIN_LAYER_NORM, is_multi_head=True, gated=False, tied=True, change=changes.mpt_change
    ),
    "nanochat": replace(_LLAMA, norm="plain", gated=False),
    "nemotron": replace(_LAYER_NORM, gated=False),
    "nemotron_h": replace(
        _LLAMA, layer_norms=1, single=True, gated=False, change=changes.nemotron_h_change
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
        change=changes.opt_change,
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
        change=changes.recurrent_gemma_change,
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
        change=changes.zamba_change,
    ),
    "zamba2": replace(
        _LLAMA,
        single=True,
        layer_norms=1,
        tied=True,
        change=changes.zamba_change,
        refuse=("use_shared_attention_adapter", "add_bias_linear"),
    ),
}
"""By model_type; other types are read as the usual keys say."""
