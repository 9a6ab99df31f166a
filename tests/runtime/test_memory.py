"""Predicted memory against the bytes of live tensors, counted on every rank of a real run."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from hfpp import pipeline_model
from hfpp.plan.memory import Keeping, rank_memory
from hfpp.plan.model_shape import ModelShape
from hfpp.plan.prediction import MemoryParts
from hfpp.plan.schedule import compute_table, find_schedule
from hfpp.plan.workload import Workload
from hfpp.runtime.loss import causal_lm_loss
from tests.ranks import run_ranks
from tests.runtime.live_bytes import LiveBytes

ROWS, SEQ, MICROBATCHES = 2, 48, 6
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


class Case(NamedTuple):
    """A run.

    Attributes:
        model_type: of `_MODELS`.
        schedule: its name.
        offsets: of the layers by stage.
        dtype: of the model.
        pp_size: ranks.
    """

    model_type: str
    schedule: str
    offsets: tuple[int, ...]
    dtype: str = "float32"
    pp_size: int = 2


CASES = (
    Case("llama", "1F1B", (0, 3, 8)),
    Case("llama", "1F1B", (0, 5, 8), dtype="bfloat16"),
    Case("llama", "Interleaved1F1B", (0, 3, 5, 7, 8)),
    Case("llama", "ZBVZeroBubble", (0, 3, 4, 6, 8)),
    Case("qwen3_moe", "Interleaved1F1B", (0, 3, 5, 7, 8)),
    Case("deepseek_v3", "1F1B", (0, 5, 8)),
    Case("gpt_neox", "1F1B", (0, 3, 8)),
    Case("llama", "1F1B", (0, 3, 4, 6, 8), pp_size=4),
)


def _names(config: Any, model: torch.nn.Module, offsets: tuple[int, ...]) -> list[list[str]]:
    """The modules of every stage, by FQN."""
    prefix = "gpt_neox" if config.model_type == "gpt_neox" else "model"
    children = [f"{prefix}.{name}" for name, _ in model.get_submodule(prefix).named_children()]
    layers = children.index(f"{prefix}.layers")
    last = len(offsets) - 2
    return [
        [
            *(children[:layers] if stage == 0 else ()),
            *(f"{prefix}.layers.{i}" for i in range(offsets[stage], offsets[stage + 1])),
            *((*(c for c in children[layers + 1 :]), "lm_head") if stage == last else ()),
        ]
        for stage in range(last + 1)
    ]


def _distinct(tensors: list[torch.Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


Measured = tuple[MemoryParts, tuple[int, ...]]


def measure_all(rank: int, world_size: int, cases: tuple[Case, ...]) -> list[Measured]:
    """Every case on the same processes: most of a case's time is starting them."""
    return [measure(world_size, case) for case in cases]


def measure(world_size: int, case: Case) -> Measured:
    """One rank's parameters, gradients, buffers and live bytes at the peak of its second step."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.model_type, **_MODELS[case.model_type])
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
    model.train()
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "pp"))
    pipeline = pipeline_model(
        model,
        mesh,
        None,
        pp_axis_name="pp",
        dp_axis_names=("dp",),
        layers_per_stage=None,
        pipeline_parallel_schedule_csv=None,
        pipeline_parallel_schedule=case.schedule,
        microbatch_size=ROWS,
        local_batch_size=ROWS * MICROBATCHES,
        device=torch.device("cpu"),
        loss_fn=causal_lm_loss,
        seq_len=SEQ,
        module_fqns_per_model_part=_names(config, model, case.offsets),
    )
    del model
    ids = torch.randint(0, config.vocab_size, (ROWS * MICROBATCHES, SEQ))

    def step() -> None:
        pipeline.schedule.step(
            *((ids,) if pipeline.has_first_stage else ()),
            target=ids if pipeline.has_last_stage else None,
        )

    step()
    parameters = [p for part in pipeline.model_parts for p in part.parameters()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    buffers = [b for part in pipeline.model_parts for b in part.buffers()]
    received = [
        info.buffer
        for stage in pipeline.stages
        for chunks in (stage.args_recv_info, stage.grad_recv_info)
        for infos in chunks.values()
        for info in infos
        if getattr(info, "buffer", None) is not None
    ]
    live = LiveBytes([*parameters, *gradients, *buffers, *received, ids])
    with live.counting():
        step()
    parts = MemoryParts(
        parameters=_distinct(list(parameters)),
        gradients=_distinct(list(gradients)),
        activations=live.peak,
        receive_buffers=_distinct(received),
    )
    return parts, tuple(stage.stage_index for stage in pipeline.stages)


def predict(case: Case, rank: int, stages: tuple[int, ...], schedule: str) -> MemoryParts:
    """The same by formula, with a schedule's order of actions."""
    config = AutoConfig.for_model(case.model_type, **_MODELS[case.model_type])
    table = compute_table(
        find_schedule(schedule),
        pp_size=case.pp_size,
        n_microbatches=MICROBATCHES,
        stages_per_rank=len(stages),
    )
    return rank_memory(
        ModelShape.from_config(json.loads(config.to_json_string(use_diff=False))),
        Workload(microbatch_size=ROWS, seq_len=SEQ, dtype=case.dtype, attention="sdpa"),
        offsets=case.offsets,
        stages=stages,
        actions=table.row(rank),
        n_microbatches=MICROBATCHES,
        keeping=Keeping(optimizer_bytes=0),
    )


@pytest.fixture(scope="module")
def measured() -> dict[Case, list[Measured]]:
    """By case, what each rank counted."""
    found: dict[Case, list[Measured]] = {}
    for pp_size in (2, 4):
        cases = tuple(case for case in CASES if case.pp_size == pp_size)
        ranks = run_ranks(measure_all, pp_size, args=(cases,), timeout_s=180)
        found |= {case: [rank[i] for rank in ranks] for i, case in enumerate(cases)}
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.model_type}-{c.schedule}-{c.dtype}")
def test_predicted_memory_is_what_a_run_holds(
    case: Case, measured: dict[Case, list[Measured]]
) -> None:
    for rank, (real, stages) in enumerate(measured[case]):
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
