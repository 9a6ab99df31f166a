"""Under autocast other types cross the cuts than the stages were told of without it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import VOCAB, token_ids
from tests.ranks import RankError, run_ranks
from tests.runtime.real_pipelines import (
    ROWS,
    SEQ,
    build,
    data_and_pipeline_mesh,
    step,
    wrong_gradients,
)

WIDTH = 32


class Block(nn.Module):
    """Its result has the type of a matrix product: bfloat16 under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model() -> Model:
    torch.manual_seed(1)
    return Model()


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    logits, labels = logits[:, :-1].float().reshape(-1, VOCAB), labels[:, 1:].reshape(-1)
    return nn.functional.cross_entropy(logits, labels)


def autocast(*, enabled: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if enabled else nullcontext()


def on_and_off(rank: int, world_size: int) -> dict[str, list[str]]:
    """Steps and evals with and without it, in turn, by stages that were told their shapes."""
    mesh, ids = data_and_pipeline_mesh(world_size), token_ids(ROWS, SEQ)
    found = {}
    for schedule in ("1F1B", "Interleaved1F1B"):
        pipeline = build(model(), mesh, schedule, loss_fn=loss)
        for turn, enabled in enumerate((True, False, True)):
            reference = model()
            outputs = []
            with autocast(enabled=enabled):
                step(pipeline, mesh, ids)
                logits = pipeline.schedule.eval(*((ids,) if pipeline.has_first_stage else ()))
                for rows in ids.chunk(4):
                    outputs.append(reference(rows))
                    loss(outputs[-1], rows).backward()
            wanted = {n: copy.deepcopy(p.grad) for n, p in reference.named_parameters()}
            wrong = wrong_gradients(pipeline.model_parts, wanted)
            if pipeline.has_last_stage and not torch.equal(logits, torch.cat(outputs)):
                wrong.append("the logits of eval")
            found[f"{schedule}, turn {turn}"] = wrong
            for part in pipeline.model_parts:
                part.zero_grad()
    return found


def test_what_crosses_under_autocast_is_what_the_model_makes() -> None:
    for found in run_ranks(on_and_off, 2, timeout_s=90):
        assert len(found) == 6
        assert {run: wrong for run, wrong in found.items() if wrong} == {}


def cast_later(rank: int, world_size: int) -> None:
    mesh = data_and_pipeline_mesh(world_size)
    pipeline = build(model(), mesh, "1F1B", loss_fn=loss)
    for part in pipeline.model_parts:
        part.to(torch.bfloat16)
    step(pipeline, mesh, token_ids(ROWS, SEQ))


def test_values_of_another_type_than_was_told_are_never_sent() -> None:
    """torch 2.11 says so by itself."""
    refusal = r"(?s)rank 0 of 2 failed.*(of Model made .*bfloat16.* next stage waits for|mismatch)"
    with pytest.raises(RankError, match=refusal):
        run_ranks(cast_later, 2)
