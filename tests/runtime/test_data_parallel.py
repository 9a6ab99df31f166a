"""Gradients of sharded stages reduced after every microbatch, and what that frees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule, fully_shard

from hfpp.runtime.data_parallel import ReducingStage
from tests.ranks import RankError, run_ranks
from tests.runtime.real_pipelines import (
    batches,
    build,
    data_and_pipeline_mesh,
    step,
    tiny_llama,
    unsplit_gradients,
    wrong_gradients,
)


def shard(part: Any, world_mesh: Any, moe_mesh: Any, **_: Any) -> None:
    for layer in part.model.layers:
        fully_shard(layer, mesh=world_mesh["dp"])
    fully_shard(part, mesh=world_mesh["dp"])


def reduced(
    rank: int, world_size: int, schedules: list[str], per_microbatch: bool
) -> tuple[list[str], int]:
    """Wrong gradients after two steps, and reductions of the first stage's gradients seen."""
    mesh, steps = data_and_pipeline_mesh(world_size), batches(2)
    model = tiny_llama()
    expected = unsplit_gradients(model, steps, replicas=2)
    wrong: list[str] = []
    count = 0
    for schedule in schedules:
        pipeline = build(
            model, mesh, schedule, parallelize_fn=shard, reduce_grad_per_microbatch=per_microbatch
        )
        part = pipeline.model_parts[0]
        assert isinstance(part, FSDPModule)
        weight = next(iter(part.parameters()))

        def counted(_: torch.Tensor) -> None:
            nonlocal count
            count += 1

        weight.register_post_accumulate_grad_hook(counted)
        for ids in steps:
            step(pipeline, mesh, ids)
        wrong += wrong_gradients(pipeline.model_parts, expected)
        assert isinstance(pipeline.stages[0], ReducingStage) == per_microbatch
    return wrong, count


def test_reduction_per_microbatch_is_exact() -> None:
    schedules = ["1F1B", "GPipe", "Interleaved1F1B"]
    often = run_ranks(reduced, 4, args=(schedules, True), timeout_s=90)
    once = run_ranks(reduced, 4, args=(schedules, False), timeout_s=90)
    assert [wrong for wrong, _ in often + once] == [[]] * 8
    assert all(many > few for (_, many), (_, few) in zip(often, once, strict=True)), (often, once)


def test_not_where_weights_gradients_come_late() -> None:
    with pytest.raises(RankError, match="reduce_grad_per_microbatch"):
        run_ranks(reduced, 4, args=(["InterleavedZeroBubble"], True), timeout_s=60)
