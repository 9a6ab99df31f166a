"""What config classes leave open and their models need: values as released models have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _pattern(*kinds: str, times: int) -> list[str]:
    return [*kinds] * times


# Config classes whose defaults build no model, one kind of layer of several, or an encoder whose
# images do not fit its sizes.
OPEN_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "bloom": {"n_layer": 24},
    "chameleon": {"vocabulary_map": {"<image>": 8, "IMGIMGA": 4, "IMGIMGB": 5}},
    "cohere_compass_text": {
        "layer_types": _pattern(*["sliding_attention"] * 3, "full_attention", times=10),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50000.0},
            "full_attention": None,
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500000.0},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        "d_model": 6144,
        "n_heads": 48,
    },
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense"] + ["sparse"] * 11,
        "num_experts_per_tok": 6,
        "n_routed_experts": 64,
    },
    "deepseek_v2": {"num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "diffusion_gemma_text": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    "dots1": {
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
    },
    "emu3": {"vocabulary_map": {"<image>": 8, "<|visual token 000000|>": 9}},
    "gemma3": {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "image_size": 896,
            "patch_size": 14,
        }
    },
    "granite4_vision": {
        "deepstack_layer_map": [(-19, 9), (-13, 6), (-7, 3), (-1, 0)],
        "downsample_rate": "4/8",
    },
    "granitemoehybrid": {
        "layer_types": _pattern(*["linear_attention"] * 5, "full_attention", times=5)
        + ["linear_attention"] * 2
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {
        "head_dim": 128,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [16, 16, 16, 16],
        },
    },
    "idefics3": {"vision_config": {"image_size": 364, "patch_size": 14}},
    "lfm2": {"layer_types": _pattern("conv", "conv", "full_attention", "conv", times=8)},
    "lfm2_moe": {"layer_types": _pattern("conv", "conv", "full_attention", "conv", times=8)},
    "llama4_vision_model": {"hidden_size": 1408, "vision_output_dim": 4096},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 128,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [2, 18],
        "eos_token_id": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000.0,
            "partial_rotary_factor": 0.25,
        },
    },
    "reformer": {"is_decoder": True},
    "smolvlm": {"vision_config": {"image_size": 512, "patch_size": 16}},
    "step3p5": {
        "layer_types": _pattern("full_attention", *["sliding_attention"] * 2, times=15),
        "sliding_window": 512,
        "num_sliding_attention_heads": 96,
    },
    "xmod": {"default_language": "en_XX"},
}

# The sections that a model's rotary embedding takes for granted where its config names none: they
# fit the full head dimension only.
MROPE_SECTIONS: Mapping[str, tuple[int, ...]] = {
    "cohere_compass_text": (24, 20, 20),
    "cosmos3_edge_text": (24, 20, 20),
    "ernie4_5_vl_moe_text": (22, 22, 20),
    "glm4v_moe_text": (8, 12, 12),
    "glm4v_text": (8, 12, 12),
    "glm_image_text": (8, 12, 12),
    "glm_ocr_text": (8, 12, 12),
    "paddleocr_vl_text": (16, 24, 24),
    "qwen2_5_omni_text": (16, 24, 24),
    "qwen2_5_vl_text": (16, 24, 24),
    "qwen2_vl_text": (16, 24, 24),
    "qwen3_5_moe_text": (11, 11, 10),
    "qwen3_5_text": (11, 11, 10),
    "qwen3_omni_moe_text": (24, 20, 20),
    "qwen3_vl_moe_text": (24, 20, 20),
    "qwen3_vl_text": (24, 20, 20),
    "qwen4_exp_text": (11, 11, 10),
}
