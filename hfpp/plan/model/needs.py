"""Keys that a known model type's config has to have, for its class fills in values of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfpp.plan.model.config import ModelConfig

__all__ = ["NEEDS", "check_needs"]

_EXPERTS = "num_experts|num_local_experts|n_routed_experts|moe_num_experts"
_WIDTH = "moe_intermediate_size"
_SHARED = "n_shared_experts|num_shared_experts|moe_num_shared_experts"
_SHARED_WIDTH = "shared_expert_intermediate_size|shared_intermediate_size"
_DENSE = "first_k_dense_replace|mlp_layer_types|num_dense_layers|mlp_only_layers|moe_layer_freq"
_KINDS = "layer_types|layers_block_type|full_attention_interval|attn_layer_indices|full_attn_idxs"
_KV = "num_key_value_heads"
_LATENT = f"kv_lora_rank {_EXPERTS} {_WIDTH} {_SHARED} {_DENSE}"
_ROUTED = f"{_EXPERTS} {_WIDTH} {_SHARED} {_DENSE}"
_GEMMA = f"head_dim {_KV}"

NEEDS: Mapping[str, str] = {
    "afmoe": f"{_ROUTED} head_dim",
    "apertus": "intermediate_size",
    "arcee": "intermediate_size",
    "aria_text": f"moe_num_experts {_SHARED}",
    "axk1": f"{_LATENT} q_lora_rank",
    "bailing_hybrid": f"{_LATENT} {_KINDS}",
    "bamba": f"{_KINDS} {_KV}",
    "beam": f"head_dim {_EXPERTS} {_WIDTH} {_DENSE} {_KV}",
    "bitnet": _KV,
    "cohere2_moe": _EXPERTS,
    "ctrl": "dff",
    "cwm": _KV,
    "dbrx": "kv_n_heads|num_key_value_heads",
    "deepseek_v2": f"{_LATENT} q_lora_rank",
    "deepseek_v3": f"{_LATENT} q_lora_rank",
    "deepseek_v32": f"{_LATENT} q_lora_rank index_n_heads",
    "dots1": _ROUTED,
    "emu3_text_model": _KV,
    "ernie4_5": f"head_dim {_KV}",
    "ernie4_5_moe": f"{_EXPERTS} {_WIDTH} {_SHARED} {_KV} moe_layer_start_index",
    "exaone_moe": f"{_ROUTED}",
    "falcon_h1": f"mamba_rms_norm {_KV}",
    "flex_olmo": _EXPERTS,
    "flint": f"head_dim {_EXPERTS} {_WIDTH} {_KV} {_SHARED_WIDTH} {_DENSE}",
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma4_text": f"{_GEMMA} hidden_size_per_layer_input per_layer_config",
    "gemma4_unified_text": f"{_GEMMA} per_layer_config",
    "glm": f"attention_bias {_KV}",
    "glm4": f"attention_bias {_KV}",
    "glm4_moe": f"{_ROUTED} {_KV}",
    "glm4_moe_lite": f"{_LATENT} q_lora_rank",
    "glm_moe_dsa": f"{_LATENT} q_lora_rank index_n_heads",
    "gpt_oss": f"attention_bias head_dim {_EXPERTS} {_KV}",
    "granite_swa": _KV,
    "granitemoe": _EXPERTS,
    "granitemoe_swa": _EXPERTS,
    "granitemoehybrid": f"{_EXPERTS} {_KINDS} {_SHARED_WIDTH}",
    "granitemoeshared": _EXPERTS,
    "hunyuan_v1_moe": _EXPERTS,
    "hy_v3": f"head_dim {_KV} {_ROUTED}",
    "jais2": "attention_bias mlp_bias intermediate_size",
    "jamba": f"attn_layer_period|layers_block_type expert_layer_period {_EXPERTS} {_KV}",
    "kimi_linear": f"{_LATENT} {_KINDS}",
    "kolibri1": f"head_dim {_KV} {_SHARED_WIDTH} {_EXPERTS} {_WIDTH}",
    "laguna": f"head_dim {_KV} {_SHARED_WIDTH} {_EXPERTS} {_WIDTH} {_DENSE}",
    "lfm2": f"{_KINDS} {_KV}",
    "lfm2_moe": f"{_KINDS} {_KV} {_EXPERTS} {_WIDTH} num_dense_layers",
    "lfm3": f"{_KINDS} {_KV}",
    "llama4_text": f"{_KV} {_EXPERTS}",
    "mellum": f"head_dim {_KV} {_EXPERTS} {_WIDTH}",
    "minicpm3": "kv_lora_rank q_lora_rank",
    "minimax": f"{_KV} {_EXPERTS} layer_types|attn_type_list",
    "minimax_m2": f"head_dim {_KV} {_EXPERTS}",
    "minimax_m3_vl_text": f"head_dim {_KV} {_EXPERTS} {_SHARED_WIDTH}",
    "ministral": _KV,
    "ministral3": _KV,
    "mistral": _KV,
    "mixtral": f"{_KV} {_EXPERTS}",
    "nanochat": "intermediate_size",
    "nemotron": _KV,
    "nemotron_h": f"{_KV} intermediate_size {_WIDTH} mamba_head_dim",
    "olmo_hybrid": _KINDS,
    "olmoe": _EXPERTS,
    "phimoe": f"{_KV} {_EXPERTS}",
    "qwen2_moe": f"{_EXPERTS} {_WIDTH} {_SHARED_WIDTH}",
    "qwen3_5_moe_text": f"head_dim {_KV} {_KINDS} {_EXPERTS} {_WIDTH} {_SHARED_WIDTH}",
    "qwen3_5_text": f"head_dim {_KV} {_KINDS}",
    "qwen3_moe": f"{_KV} {_EXPERTS} {_WIDTH}",
    "qwen3_next": f"head_dim {_KV} {_KINDS} {_EXPERTS} {_WIDTH} {_SHARED_WIDTH}",
    "seed_oss": f"attention_bias head_dim {_KV}",
    "smollm3": _KV,
    "solar_open": f"head_dim {_KV} {_SHARED} {_EXPERTS} {_WIDTH}",
    "starcoder2": _KV,
    "vaultgemma": _GEMMA,
    "youtu": "kv_lora_rank q_lora_rank",
    "zamba": "layers_block_type",
    "zamba2": "layers_block_type adapter_rank",
}
"""By model type, keys apart by spaces, which may be null; of those joined by bars one is enough."""


def check_needs(config: ModelConfig) -> None:
    """Refuse a config that leaves to its class what its layers are.

    Raises:
        PipelineConfigError: naming the keys, one of which it should have.
    """
    for names in NEEDS.get(config.model_type, "").split():
        keys = names.split("|")
        if not config.has(*keys) and not (len(keys) == 1 and names in config.values):
            config.fail_missing(keys)
