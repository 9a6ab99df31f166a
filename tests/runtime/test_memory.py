"""Predicted memory against the bytes of live tensors, counted on every rank of a real run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.runtime.measured_memory import Case, Measured, measure_all, predict

WITHIN = 0.10

_BASE = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 8,
    "vocab_size": 384,
    "max_position_embeddings": 64,
    "use_cache": False,
    "tie_word_embeddings": False,
}
_MODELS: dict[str, dict[str, Any]] = {
    "llama": _BASE,
    "qwen3_moe": {
        **_BASE,
        "head_dim": 16,
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gpt_neox": {**_BASE, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "deepseek_v3": {
        **_BASE,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 48,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
    },
}


_LARGE_VOCABULARY = {**_BASE, "vocab_size": 6000, "tie_word_embeddings": True}

CASES = (
    Case("llama", _MODELS["llama"], "1F1B", (0, 3, 8)),
    Case("llama", _MODELS["llama"], "1F1B", (0, 5, 8), dtype="bfloat16"),
    Case("llama", _MODELS["llama"], "Interleaved1F1B", (0, 3, 5, 7, 8)),
    Case("llama", _MODELS["llama"], "ZBVZeroBubble", (0, 3, 4, 6, 8)),
    Case("llama", _LARGE_VOCABULARY, "1F1B", (0, 5, 8), dtype="bfloat16"),
    Case("llama", _LARGE_VOCABULARY, "1F1B", (0, 5, 8), outputs=True),
    # The gradient of the head's matrix is larger than those of the logits.
    Case("llama", _LARGE_VOCABULARY, "1F1B", (0, 5, 8), rows=1, seq_len=12),
    Case("llama", _LARGE_VOCABULARY, "ZBVZeroBubble", (0, 3, 4, 6, 8)),
    Case("llama", _MODELS["llama"], "Interleaved1F1B", (0, 3, 5, 7, 8), outputs=True),
    Case("qwen3_moe", _MODELS["qwen3_moe"], "Interleaved1F1B", (0, 3, 5, 7, 8)),
    Case("deepseek_v3", _MODELS["deepseek_v3"], "1F1B", (0, 5, 8)),
    Case("gpt_neox", _MODELS["gpt_neox"], "1F1B", (0, 3, 8)),
    Case("llama", _MODELS["llama"], "1F1B", (0, 5, 8), recompute="full"),
    Case(
        "llama", _MODELS["llama"], "Interleaved1F1B", (0, 3, 5, 7, 8), "bfloat16", recompute="full"
    ),
    Case("qwen3_moe", _MODELS["qwen3_moe"], "1F1B", (0, 5, 8), recompute="full"),
    Case("gpt_neox", _MODELS["gpt_neox"], "1F1B", (0, 3, 8), recompute="full"),
    Case("llama", _LARGE_VOCABULARY, "InterleavedZeroBubble", (0, 3, 5, 7, 8), recompute="full"),
    Case("llama", _MODELS["llama"], "1F1B", (0, 3, 4, 6, 8), pp_size=4),
)


@pytest.fixture(scope="module")
def measured() -> dict[str, list[Measured]]:
    """By case, what each rank counted."""
    found: dict[str, list[Measured]] = {}
    for pp_size in (2, 4):
        cases = tuple(case for case in CASES if case.pp_size == pp_size)
        ranks = run_ranks(measure_all, pp_size, args=(cases,), timeout_s=180)
        found |= {case.name: [rank[i] for rank in ranks] for i, case in enumerate(cases)}
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_predicted_memory_is_what_a_run_holds(
    case: Case, measured: dict[str, list[Measured]]
) -> None:
    for rank, (real, stages) in enumerate(measured[case.name]):
        predicted = predict(case, rank, stages, case.schedule)
        assert predicted.parameters == real.parameters
        assert predicted.gradients == real.gradients
        moving = predicted.activations + predicted.logits + predicted.receive_buffers
        assert moving == pytest.approx(real.activations + real.receive_buffers, rel=WITHIN)
        assert predicted.total == pytest.approx(real.total, rel=WITHIN)


def test_another_schedule_is_told_apart() -> None:
    """The prediction that is compared above depends on the order of actions."""
    case = CASES[0]
    one = predict(case, 0, (0,), "1F1B")
    all_at_once = predict(case, 0, (0,), "GPipe")
    assert all_at_once.total > one.total * (1 + 2 * WITHIN)
