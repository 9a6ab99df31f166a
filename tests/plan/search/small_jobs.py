"""Small models and clusters to plan for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfpp.plan.estimates.hardware import HARDWARE, Hardware
from hfpp.plan.estimates.workload import Workload
from hfpp.plan.model.shape import ModelShape
from hfpp.plan.search.candidates import PlanRequest
from hfpp.plan.search.cluster import Cluster
from hfpp.plan.search.cost_sources import AnalyticCosts
from hfpp.plan.search.evaluation import Evaluator
from hfpp.plan.search.replicas import Replicas

CONFIGS = Path(__file__).parents[1] / "configs"

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 50_000,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {
    **SMALL,
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def small_shape(**changes: Any) -> ModelShape:
    return ModelShape.from_config({**SMALL, **changes})


def small_cluster(gpus: int = 8, **changes: Any) -> Cluster:
    usual = HARDWARE["H100"]
    names = usual.__dataclass_fields__
    hardware = Hardware(**{**{name: getattr(usual, name) for name in names}, **changes})
    return Cluster(gpus=gpus, hardware=hardware)


def small_request(**changes: Any) -> PlanRequest:
    usual: dict[str, Any] = {"global_batch_size": 32, "seq_len": 1024}
    return PlanRequest(**{**usual, **changes})


def evaluator_of(shape: ModelShape, cluster: Cluster, request: PlanRequest) -> Evaluator:
    work = Workload(
        microbatch_size=1, seq_len=request.seq_len, tp=request.tp, cp=request.cp, ep=request.ep
    )
    replicas = Replicas(shape=shape, work=work, cluster=cluster, sharding=request.sharding)
    return Evaluator(cluster, AnalyticCosts(shape, work, cluster), replicas)
