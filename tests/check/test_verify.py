"""pipeline_model(verify=): a difference is an error on every rank, before anything is built."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from hfpp import PipelineConfigError
from hfpp.check import instance, twin
from hfpp.check.chain import build_stage
from hfpp.check.twin import verify_twin
from tests.check.strangers import stranger
from tests.models import tiny_model, token_ids
from tests.ranks import run_ranks
from tests.runtime.real_pipelines import build, data_and_pipeline_mesh, step


def spoil_one_rank(rank: int) -> None:
    """On rank 1 alone, stages are made with a weight that is off by 0.1 %."""

    def off(model: nn.Module, anatomy: Any, ownership: Any, index: int) -> nn.Module:
        made = build_stage(model, anatomy, ownership, index)
        with torch.no_grad():
            next(p for p in made.parameters() if p.dim() == 2).mul_(1.001)
        return made

    if rank == 1:
        twin.check_instance = functools.partial(instance.check_instance, build=off)


def verified(rank: int, size: int) -> dict[str, Any]:
    mesh = data_and_pipeline_mesh(size)
    found: dict[str, Any] = {}

    def attempt(name: str, model: nn.Module, **changes: Any) -> None:
        try:
            pipeline = build(model, mesh, "Interleaved1F1B", copy_model=False, **changes)
            step(pipeline, mesh, token_ids(8, 11))
            found[name] = "trained"
        except PipelineConfigError as error:
            found[name] = str(error)

    attempt("grads", tiny_model("gemma2"), verify="grads")
    attempt("logits", stranger("dict"), verify="logits")
    attempt("unknown", tiny_model("llama"), verify="loss" if rank == 0 else "logits")
    attempt("one rank", tiny_model("llama"), verify="logits" if rank == 0 else None)
    spoil_one_rank(rank)
    attempt("difference", tiny_model("llama"), verify="logits")
    return found


def test_every_rank_hears_of_a_difference() -> None:
    first, second = run_ranks(verified, 2, timeout_s=120)
    assert first["grads"] == second["grads"] == "trained"
    assert first["logits"] == second["logits"] == "trained"
    assert "verify ('loss') is unknown: use 'logits', 'grads' or None" in first["unknown"]
    assert second["unknown"].startswith("rank 0 refused its part of the setup: verify ('loss')")
    assert first["one rank"] == second["one rank"]
    assert "the ranks disagree on verify" in first["one rank"]
    assert "verify ('logits'): LlamaForCausalLM on 4 stages is different" in second["difference"]
    assert "is not the model's: off by" in second["difference"]
    assert first["difference"].startswith("rank 1 refused its part of the setup: verify")


def test_a_model_without_weights_and_config_cannot_be_verified() -> None:
    with pytest.raises(PipelineConfigError, match=r"verify \('grads'\) finds nothing to run"):
        verify_twin("grads", stranger("dict").to("meta"), 2)


def test_more_stages_than_a_twin_has_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def watch(model: nn.Module, **options: Any) -> Any:
        report = instance.check_instance(model, **options, kinds=[instance.Kind.PLAIN])
        sizes.extend(size.pp_size for size in report.sizes)
        return report

    monkeypatch.setattr(twin, "check_instance", watch)
    with torch.device("meta"):
        model = tiny_model("llama", num_hidden_layers=16)
    verify_twin("logits", model, 16)
    verify_twin("logits", stranger("one by one"), 6)
    verify_twin("logits", model, 1)
    assert sizes == [8, 4]
