"""What single families' configs say in ways of their own, read as the usual keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hfpp.plan.model.config import MOST_LAYERS

if TYPE_CHECKING:
    from hfpp.plan.model.config import ModelConfig


def hidden(config: ModelConfig) -> int:
    """The hidden size."""
    return config.integer("hidden_size", "n_embd", "d_model")


def bigcode_change(config: ModelConfig) -> Mapping[str, Any]:
    """One head of keys and values, unless told otherwise."""
    return {"num_key_value_heads": 1 if config.flag("multi_query", default=True) else None}


def falcon_change(config: ModelConfig) -> Mapping[str, Any]:
    """Heads of keys and values by generation."""
    heads = config.integer("num_attention_heads", "n_head")
    new = config.flag("new_decoder_architecture")
    many = config.optional("num_kv_heads", "n_head_kv") or heads
    one = config.flag("multi_query", default=True)
    return {
        "num_key_value_heads": many if new else 1 if one else heads,
        "intermediate_size": config.optional("ffn_hidden_size") or 4 * hidden(config),
    }


def falcon_norms(config: ModelConfig) -> int:
    """Norms by generation."""
    if config.flag("new_decoder_architecture"):
        return config.optional("num_ln_in_parallel_attn", maximum=2) or 2
    return 1 if config.flag("parallel_attn", default=True) else 2


def gpt_neo_change(config: ModelConfig) -> Mapping[str, Any]:
    """Local and global attention under names of its own."""
    return {
        "sliding_window": config.optional("window_size"),
        "layer_types": config.listed("attention_layers"),
    }


def mpt_change(config: ModelConfig) -> Mapping[str, Any]:
    """The feed-forward's width as a ratio."""
    ratio = config.optional("expansion_ratio") or 4
    return {"intermediate_size": ratio * hidden(config)}


def lfm2_change(config: ModelConfig) -> Mapping[str, Any]:
    """The feed-forward's width, adjusted."""
    width = config.integer("intermediate_size", "block_ff_dim")
    if config.flag("block_auto_adjust_ff_dim", default=True):
        width = int(2 * width / 3)
        width = int(config.number("block_ffn_dim_multiplier", 1.0) * width)
        multiple = config.optional("block_multiple_of") or 256
        width = multiple * -(-width // multiple)
    return {"intermediate_size": width}


def llama4_change(config: ModelConfig) -> Mapping[str, Any]:
    """Experts and dense layers under swapped names."""
    return {
        "moe_intermediate_size": config.integer("intermediate_size"),
        "intermediate_size": config.optional("intermediate_size_mlp"),
        "n_shared_experts": 1,
    }


def recurrent_gemma_change(config: ModelConfig) -> Mapping[str, Any]:
    """A pattern of kinds, a feed-forward counted twice, a window of its own name."""
    layers = config.integer("num_hidden_layers", maximum=MOST_LAYERS)
    pattern = config.listed("block_types") or ["recurrent", "recurrent", "attention"]
    return {
        "layer_types": [pattern[i % len(pattern)] for i in range(layers)],
        "intermediate_size": config.integer("intermediate_size") // 2,
        "sliding_window": config.optional("attention_window_size"),
    }


def zamba_change(config: ModelConfig) -> Mapping[str, Any]:
    """Shared blocks, whose sharing follows that of the embedding."""
    if not config.flag("tie_word_embeddings", default=True):
        config.fail("tie_word_embeddings", "is false, so that shared blocks are not shared either")
    expand = config.optional("mamba_expand") or 2
    return {
        "layer_types": config.listed("layers_block_type"),
        "mamba_d_ssm": expand * hidden(config),
        "mamba_conv_bias": config.flag("mamba_conv_bias", default=True),
    }


def nemotron_h_change(config: ModelConfig) -> Mapping[str, Any]:
    """Kinds of layers as letters."""
    pattern = config.values.get("hybrid_override_pattern")
    names = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    if isinstance(pattern, str) and not config.has("layers_block_type", "layer_types"):
        if set(pattern) - set(names):
            config.fail("hybrid_override_pattern", "may hold the letters M, *, - and E only")
        return {"layer_types": [names[letter] for letter in pattern]}
    return {"layer_types": config.listed("layers_block_type") or config.listed("layer_types")}


def opt_change(config: ModelConfig) -> Mapping[str, Any]:
    """Refuses what changes norms and embeddings."""
    if not config.flag("layer_norm_elementwise_affine", default=True):
        config.fail("layer_norm_elementwise_affine", "is false, which is not known")
    embedding = config.optional("word_embed_proj_dim")
    if embedding not in (None, hidden(config)):
        config.fail("word_embed_proj_dim", "differs from hidden_size, which is not known")
    return {}


def helium_change(config: ModelConfig) -> Mapping[str, Any]:
    """Its last matrix is square."""
    wide = config.integer("num_attention_heads") * (config.optional("head_dim") or 0)
    if wide not in (0, hidden(config)):
        config.fail("head_dim", "times num_attention_heads must be hidden_size")
    return {}


def laguna_change(config: ModelConfig) -> Mapping[str, Any]:
    """Gates are per head."""
    if not config.flag("gating", default=True):
        config.fail("gating", "is false, which is not known")
    return {}


def no_experts_unless(flag: str) -> Callable[[ModelConfig], Mapping[str, Any]]:
    """No experts where a flag is off."""
    return lambda config: {} if config.flag(flag) else {"num_experts": 0}


def minimax_m3_change(config: ModelConfig) -> Mapping[str, Any]:
    """Experts and dense layers under swapped names."""
    return {
        "moe_intermediate_size": config.integer("intermediate_size"),
        "intermediate_size": config.optional("dense_intermediate_size"),
    }


def japanese_change(config: ModelConfig) -> Mapping[str, Any]:
    """The feed-forward's width as a multiple."""
    multiple = config.optional("intermediate_multiple_size") or 4
    return {"intermediate_size": multiple * hidden(config)}


def per_layer_inputs(config: ModelConfig) -> int:
    """Parameters that a layer's own inputs take."""
    width = config.optional("hidden_size_per_layer_input", minimum=0) or 0
    return 2 * width * hidden(config) + hidden(config) if width else 0


def per_layer_embedding(config: ModelConfig) -> int:
    """Parameters that all layers' own inputs take."""
    width = config.optional("hidden_size_per_layer_input", minimum=0) or 0
    if not width:
        return 0
    all_layers = width * config.integer("num_hidden_layers", maximum=MOST_LAYERS)
    rows = config.integer("vocab_size_per_layer_input") + hidden(config)
    return rows * all_layers + width


def doubled_intermediate(config: ModelConfig) -> int:
    """The shared experts' width."""
    return config.integer("intermediate_size") * (
        config.optional("moe_num_shared_experts", minimum=0) or 0
    )
