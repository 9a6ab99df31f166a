"""FLOPs by formula against those that torch counts in transformers' models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from hfpp.plan.estimates.operations import Operation, head_operations, layer_operations
from hfpp.plan.estimates.workload import Workload
from hfpp.plan.model.layer_shape import Attention
from hfpp.plan.model.shape import ModelShape
from tests.models import FAMILIES

ROWS, SEQ = 3, 24
_DEEPSEEK = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 20,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
_CONFIGS = {
    **{
        name: FAMILIES[name]
        for name in (
            "llama",
            "qwen2",
            "qwen3",
            "gemma3_text",
            "gpt2",
            "gpt_neox",
            "phi3",
            "mixtral",
            "qwen3_moe",
        )
    },
    "deepseek_v3": _DEEPSEEK,
}


def _counted(model_type: str) -> tuple[ModelShape, int, int]:
    """A tiny model's shape, and the FLOPs of its forward and of its backward."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **_CONFIGS[model_type])
    changes: dict[str, Any] = {"attn_implementation": "eager"}
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **changes)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # each expert's products by themselves
    ids = torch.randint(0, config.vocab_size, (ROWS, SEQ))
    with FlopCounterMode(display=False) as forward:
        logits = model(ids).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    shape = ModelShape.from_config(json.loads(config.to_json_string(use_diff=False)))
    return shape, forward.get_total_flops(), backward.get_total_flops()


def _whole_square(shape: ModelShape, work: Workload) -> tuple[float, float]:
    """FLOPs of forward and backward with the masked scores, which plain products compute too."""
    forward = backward = 0.0
    operations: list[Operation] = list(head_operations(shape, work))
    for layer in shape.layers:
        mixers = iter(layer.mixers)
        for operation in layer_operations(layer, work):
            times = 1.0
            if operation.kind == "mixer":
                mixer = next(mixers)
                assert isinstance(mixer, Attention)
                times = SEQ * SEQ / mixer.pairs(SEQ)
            forward += times * operation.flops
            backward += times * (operation.backward_flops + operation.weight_flops)
    forward += sum(operation.flops for operation in operations)
    backward += sum(o.backward_flops + o.weight_flops for o in operations)
    return forward, backward


@pytest.mark.parametrize("model_type", _CONFIGS)
def test_products_are_as_torch_counts_them(model_type: str) -> None:
    shape, forward, backward = _counted(model_type)
    work = Workload(microbatch_size=ROWS, seq_len=SEQ, dtype="float32", attention="eager")
    expected_forward, expected_backward = _whole_square(shape, work)
    # Rotary angles are products too: a token's position by the frequencies.
    assert forward == pytest.approx(expected_forward, rel=2e-3)
    assert backward == pytest.approx(expected_backward, rel=2e-3)
