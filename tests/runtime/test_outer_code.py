"""Loops that compute something between their layers: cut exactly, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from hfpp import check_model
from hfpp.errors import PipelineConfigError
from hfpp.runtime.find_anatomy import find_anatomy
from hfpp.runtime.stage_boundary import boundary_of
from tests.models import VOCAB, token_ids
from tests.ranks import run_ranks
from tests.runtime.real_pipelines import (
    build,
    data_and_pipeline_mesh,
    loss,
    split,
    step,
    wrong_gradients,
)

WIDTH = 12


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, states: Tensor | None = None) -> Tensor:
        if states is not None:
            x = x + states.mean(-2)
        return self.down(torch.tanh(self.up(x))).cumsum(1) / x.shape[1]


class Loop(nn.Module):
    """Embedding, a loop over blocks that subclasses write, a head."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Mix() for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(depth))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.loop(self.embed(ids)))

    def loop(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Residuals(Loop):
    """Adds the residuals and normalizes between the blocks."""

    def loop(self, x: Tensor) -> Tensor:
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = norm(x + block(x))
        return x


class InPlace(Loop):
    """The same, writing into its own tensor."""

    def loop(self, x: Tensor) -> Tensor:
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = norm(x + block(x))
            x *= 2.0
        return x


class Collecting(Loop):
    """Collects the states and hands all of them to every block."""

    def loop(self, x: Tensor) -> Tensor:
        states = x.new_zeros(*x.shape[:-1], 1, x.shape[-1])
        for block in self.blocks:
            new = block(x, states)
            states = torch.cat([states, x.unsqueeze(-2)], -2)
            x = new
        return x + states.sum(-2)


class NormFirst(Loop):
    """Normalizes before the block and adds what was before: no block ever takes that."""

    def loop(self, x: Tensor) -> Tensor:
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + block(norm(x))
        return x


EXACT = (Residuals, InPlace, Collecting)


def made(kind: type[Loop]) -> Loop:
    torch.manual_seed(3)
    return kind().double()


@pytest.mark.parametrize("kind", EXACT)
def test_what_a_loop_reads_again_is_there(kind: type[Loop]) -> None:
    report = check_model(made(kind), pp_sizes=(2, 3, 4))
    assert report.exact, str(report)


def checkpointed(part: nn.Module, *_: Any, **__: Any) -> None:
    boundary = boundary_of(part)
    assert boundary is not None
    for index in boundary.layers:
        part.blocks[index] = checkpoint_wrapper(part.blocks[index])


def train(rank: int, size: int) -> dict[str, list[str]]:
    mesh = data_and_pipeline_mesh(size)
    found = {}
    for kind in EXACT:
        for schedule in ("GPipe", "Interleaved1F1B", "ZBVZeroBubble", "GPipe, checkpointed"):
            model, reference = made(kind), made(kind)
            name, _, again = schedule.partition(", ")
            pipeline = build(model, mesh, name, parallelize_fn=checkpointed if again else None)
            ids = token_ids(8, 11)
            step(pipeline, mesh, ids)
            for rows in ids.chunk(4):
                loss(reference(rows), rows).backward()
            wanted = {name: parameter.grad for name, parameter in reference.named_parameters()}
            found[f"{kind.__name__} {schedule}"] = wrong_gradients(pipeline.model_parts, wanted)
    return found


def test_such_loops_train_over_two_ranks() -> None:
    for found in run_ranks(train, 2, timeout_s=120):
        assert len(found) == 12
        assert {run: wrong for run, wrong in found.items() if wrong} == {}


def test_a_value_that_no_layer_takes_is_refused() -> None:
    with pytest.raises(PipelineConfigError, match=r"NormFirst cannot be cut before layer 2"):
        find_anatomy(made(NormFirst)).slots(2)


def test_arguments_of_another_shape_are_an_error_and_no_other_result() -> None:
    stages = split(made(Collecting), 2)
    sent = stages[0](token_ids(2))
    assert stages[1](*sent).shape[:2] == sent[0].shape[:2]
    with pytest.raises(RuntimeError, match="that the model's code reads again"):
        stages[1](sent[0], sent[1][..., 1:, :])


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: nn.ModuleList) -> Tensor:
        for block in blocks:
            x = block(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class ByItself(Loop):
    """Its layers run where autograd does not look."""

    def loop(self, x: Tensor) -> Tensor:
        return _Twice.apply(x, self.blocks)


def test_layers_within_an_autograd_function_are_refused() -> None:
    with pytest.raises(PipelineConfigError, match=r"ByItself .* torch.autograd.Function \(_Twice"):
        find_anatomy(made(ByItself))


class Codebooks(Loop):
    """Takes four rows of ids for one sample, as models of parallel codebooks do."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.loop(self.embed(ids.reshape(-1, 4, ids.shape[-1])).sum(1)))

    def loop(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_model_that_takes_several_rows_for_one_sample() -> None:
    model = made(Codebooks)
    stages, ids = split(model, 2), token_ids(8)
    sent = stages[0](ids)
    assert torch.equal(stages[1](*sent), model(ids))
    boundary = boundary_of(stages[0])
    assert boundary is not None
    assert [meta.shape for meta in boundary.tensor_metas(16, 9, None)[1]] == [(4, 9, 12), (16, 9)]
