"""Kept activations by formula against what autograd saves in transformers' models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from hfpp.plan.estimates.activations import forward_bytes, head_bytes, layer_bytes
from hfpp.plan.estimates.workload import Workload
from hfpp.plan.model.shape import ModelShape
from hfpp.runtime.loss import causal_lm_loss

ROWS, SEQ = 2, 40
WITHIN = 0.02
_BASE = {
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
_LATENT = {
    "hidden_size": 48,
    "intermediate_size": 112,
    "moe_intermediate_size": 56,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_BASE, "head_dim": 16},
    "qwen2": _BASE,
    "qwen3": {**_BASE, "head_dim": 16},
    "gemma2": {**_BASE, "head_dim": 16, "sliding_window": 8},
    "gemma3_text": {**_BASE, "head_dim": 16, "sliding_window": 8},
    "mistral": {**_BASE, "sliding_window": 8},
    "phi3": {**_BASE, "pad_token_id": 0},
    "olmo2": _BASE,
    "gpt_neox": _BASE,
    "gpt2": {
        "n_embd": 48,
        "n_inner": 112,
        "n_head": 6,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
    "opt": {
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "ffn_dim": 112,
        "num_attention_heads": 6,
        "dropout": 0.0,
    },
    "mixtral": {**_BASE, "num_local_experts": 4},
    "qwen3_moe": {**_BASE, "head_dim": 16, "moe_intermediate_size": 40, "num_experts": 16},
    "deepseek_v3": _LATENT,
}
_EAGER_ONLY = frozenset({"gemma2"})


def _saved(model: Any, ids: torch.Tensor) -> int:
    """Bytes of the distinct storages that autograd saves, parameters and buffers left out."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), ids)}
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        causal_lm_loss(model(ids).logits, ids)
    return sum(count for count, _ in saved.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", _CONFIGS)
def test_kept_activations_are_what_autograd_saves(
    model_type: str, attention: Any, dtype: str
) -> None:
    if model_type in _EAGER_ONLY:
        attention = "eager"
    layers = {"n_layer" if model_type == "gpt2" else "num_hidden_layers": 4}
    config = AutoConfig.for_model(
        model_type, vocab_size=400, use_cache=False, **layers, **_CONFIGS[model_type]
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    model.train()
    real = _saved(model, torch.randint(0, 400, (ROWS, SEQ)))
    shape = ModelShape.from_config(json.loads(config.to_json_string(use_diff=False)))
    work = Workload(microbatch_size=ROWS, seq_len=SEQ, dtype=dtype, attention=attention)
    predicted = sum(layer_bytes(layer, work) for layer in shape.layers)
    predicted += head_bytes(shape, work) + forward_bytes(shape, work)
    assert predicted == pytest.approx(real, rel=WITHIN)


def test_what_is_computed_again_is_not_kept() -> None:
    config = AutoConfig.for_model("llama", **_CONFIGS["llama"])
    shape = ModelShape.from_config(json.loads(config.to_json_string(use_diff=False)))
    kept = [
        layer_bytes(
            shape.layers[0],
            Workload(microbatch_size=1, seq_len=512, recompute=recompute, attention="eager"),
        )
        for recompute in ("none", "selective", "full")
    ]
    assert kept[0] > 2 * kept[1] > 4 * kept[2]
    assert kept[2] == 512 * 48 * 2
