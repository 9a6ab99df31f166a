"""One tensor on several stages trains as one: summed gradients, the same bits everywhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hfpp import PipelineConfigError
from hfpp.runtime.stage_boundary import boundary_of
from hfpp.runtime.tied_weights import TiedGradients
from tests.models import relative_error, tiny_model
from tests.ranks import run_ranks
from tests.runtime.real_pipelines import (
    MICROBATCHES,
    batches,
    build,
    data_and_pipeline_mesh,
    loss,
    plain_name,
    split,
    step,
    unsplit_gradients,
    whole,
    wrong_gradients,
)
from tests.runtime.tied_training import refusal

STEPS = 5
EMBEDDING = ("model.embed_tokens.weight", "lm_head.weight")


@contextmanager
def without_the_sum() -> Iterator[None]:
    """The planted fault: every holder keeps the gradient that it computed itself."""
    right, check = TiedGradients._sum_over_ranks, TiedGradients._check
    TiedGradients._sum_over_ranks = lambda self, ranks, values: None  # type: ignore[method-assign]
    TiedGradients._check = lambda self, *, with_contents: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        TiedGradients._sum_over_ranks = right  # type: ignore[method-assign]
        TiedGradients._check = check  # type: ignore[method-assign]


def differing_copies(parts: list[nn.Module], group: Any) -> list[str]:
    """Tied tensors whose copies, gathered over the pipeline, are not equal bit for bit."""
    mine: dict[int, list[tuple[str, Tensor]]] = {}
    for part in parts:
        boundary = boundary_of(part)
        assert boundary is not None
        named = {plain_name(n): p for n, p in part.named_parameters(remove_duplicate=False)}
        for index, tied in enumerate(boundary.tied):
            for stage, names in tied.names:
                if stage == boundary.stage_index:
                    mine.setdefault(index, []).append((names[0], whole(named[names[0]].detach())))
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    wrong = []
    for index in range(len(boundary.tied)):
        copies = [held for rank in everyone for held in rank.get(index, ())]
        assert len(copies) == len(boundary.tied[index].stages) > 1
        wrong += [name for name, t in copies[1:] if not torch.equal(t, copies[0][1])]
    return wrong


def train_unsplit(model: nn.Module, replicas: int) -> list[dict[str, Tensor]]:
    """Parameters by name after each of `STEPS` AdamW steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    states = []
    for ids in batches(STEPS):
        for rows in ids.chunk(MICROBATCHES * replicas):
            (loss(model(rows).logits, rows) / replicas).backward()
        optimizer.step()
        optimizer.zero_grad()
        named = model.named_parameters(remove_duplicate=False)
        states.append({name: p.detach().clone() for name, p in named})
    return states


def tied(
    rank: int,
    world_size: int,
    cases: list[tuple[str, str]],
    *,
    pp_size: int = 2,
    changes: dict[str, Any] | None = None,
    trains: bool = False,
    fault: bool = False,
) -> list[str]:
    """What is wrong: gradients that two steps accumulate and, with `trains`, what AdamW makes."""
    mesh = data_and_pipeline_mesh(world_size, pp_size)
    replicas, group = mesh["dp"].size(), mesh.get_group("pp")
    wrong = []
    for family, schedule in cases:
        model = tiny_model(family, tie_word_embeddings=True, **(changes or {}))
        expected = unsplit_gradients(model, batches(2), replicas=replicas)
        trained = train_unsplit(copy.deepcopy(model), replicas) if trains else []
        pipeline = build(model, mesh, schedule)
        parts = pipeline.model_parts
        with without_the_sum() if fault else nullcontext():
            for ids in batches(2):
                step(pipeline, mesh, ids)
            found = wrong_gradients(parts, expected)
            optimizer = torch.optim.AdamW([p for m in parts for p in m.parameters()], lr=1e-2)
            for ids, parameters in zip(batches(STEPS), trained):  # noqa: B905 (none if not trained)
                optimizer.zero_grad()
                step(pipeline, mesh, ids)
                optimizer.step()
                found += [f"trained, {name}" for name in wrong_values(parts, parameters)]
        found += [f"{name}: copies differ" for name in differing_copies(parts, group)]
        wrong += [f"{family}, {schedule}, {what}" for what in found]
    return wrong


def wrong_values(parts: list[nn.Module], expected: dict[str, Tensor]) -> list[str]:
    return [
        name
        for part in parts
        for name, parameter in part.named_parameters(remove_duplicate=False)
        if relative_error(whole(parameter), expected[plain_name(name)]) > 1e-8
    ]


def test_both_ends_have_the_sum_of_two_steps():
    cases = [
        ("llama", "GPipe"),
        ("llama", "InterleavedZeroBubble"),
        ("llama", "ZBVZeroBubble"),
        ("gemma", "1F1B"),
        ("gemma", "DualPipeV"),
    ]
    assert run_ranks(tied, 2, args=(cases,)) == [[], []]


def no_sum(rank: int, world_size: int) -> list[str]:
    return tied(rank, world_size, [("llama", "1F1B")], trains=True, fault=True)


def test_a_missing_sum_is_seen():
    """In the gradients, in what is trained, and in the copies."""
    first, last = run_ranks(no_sum, 2)
    for found, name in ((first, EMBEDDING[0]), (last, EMBEDDING[1])):
        assert any(what.startswith(f"llama, 1F1B, {name}: off by") for what in found)
        assert f"llama, 1F1B, trained, {name}" in found
        assert f"llama, 1F1B, {EMBEDDING[1]}: copies differ" in found


def shared_blocks(rank: int, world_size: int) -> list[str]:
    """Zamba 2: one attention block in four layers, and an embedding at both ends."""
    changes = {"num_hidden_layers": 4, "layers_block_type": ["hybrid"] * 4}
    return tied(rank, world_size, [("zamba2", "1F1B")], pp_size=4, changes=changes, trains=True)


def test_a_block_shared_by_four_ranks():
    assert run_ranks(shared_blocks, 4) == [[]] * 4


def test_the_shared_block_is_on_all_four():
    boundary = boundary_of(
        split(tiny_model("zamba2", num_hidden_layers=4, layers_block_type=["hybrid"] * 4), 4)[0]
    )
    assert boundary is not None
    holders = [tied.stages for tied in boundary.tied]
    assert holders.count((0, 1, 2, 3)) > 5
    assert holders.count((0, 3)) == 1


def with_settings(rank: int, world_size: int) -> list[str]:
    """`scale_grads` divides by the microbatches, once; frozen ends get nothing."""
    mesh = data_and_pipeline_mesh(world_size)
    model = tiny_model("llama", tie_word_embeddings=True)
    sums = unsplit_gradients(model, batches(2))
    means = {name: grad / MICROBATCHES for name, grad in sums.items() if grad is not None}
    wrong = []
    for schedule in ("1F1B", "DualPipeV"):
        pipeline = build(model, mesh, schedule, scale_grads=True)
        for ids in batches(2):
            step(pipeline, mesh, ids)
        wrong += wrong_gradients(pipeline.model_parts, means)
    model.lm_head.weight.requires_grad_(False)
    expected = unsplit_gradients(model, batches())
    assert expected[EMBEDDING[0]] is None
    for schedule in ("1F1B", "ZBVZeroBubble"):
        pipeline = build(model, mesh, schedule)
        step(pipeline, mesh, batches()[0])
        wrong += wrong_gradients(pipeline.model_parts, expected)
    return wrong


def test_scaled_and_frozen_ends():
    assert run_ranks(with_settings, 2) == [[], []]


def freeze_one_end(part: nn.Module, *_: Any, **__: Any) -> None:
    for name, parameter in part.named_parameters():
        parameter.requires_grad_(name != EMBEDDING[0])


def one_end_frozen(rank: int, world_size: int) -> str:
    model = tiny_model("llama", tie_word_embeddings=True)
    with pytest.raises(PipelineConfigError) as caught:
        build(model, data_and_pipeline_mesh(world_size), "1F1B", parallelize_fn=freeze_one_end)
    return str(caught.value)


def test_ends_of_which_one_is_frozen_are_refused_on_both_ranks():
    for message in run_ranks(one_end_frozen, 2):
        assert "model.embed_tokens.weight is one tensor" in message
        assert "(model.embed_tokens.weight of stage 0, lm_head.weight of stage 1)" in message
        assert "only 1 of 2 are trained" in message
        assert "freeze all of them or none" in message


def own_seeds(rank: int, world_size: int) -> list[str]:
    """Every rank has random weights of its own; then all load the same ones before a step."""
    mesh, (ids,) = data_and_pipeline_mesh(world_size), batches()
    found = []
    for load in (False, True):
        pipeline = build(tiny_model("gemma", seed=rank), mesh, "1F1B")
        if load:
            (part,) = pipeline.model_parts
            part.load_state_dict(tiny_model("gemma").state_dict(), strict=False)
        found += [refusal(pipeline, mesh, ids), refusal(pipeline, mesh, ids)]
    return found


def test_copies_that_differ_are_refused_on_every_step() -> None:
    for first, second, *loaded in run_ranks(own_seeds, 2, timeout_s=60):
        for message in (first, second):
            assert "(model.embed_tokens.weight of stage 0, lm_head.weight of stage 1)" in message
            assert "their values differ" in message
        assert loaded == ["", ""]


def lost_in_a_wrapper(rank: int, world_size: int) -> list[str]:
    """A wrapper of the user's own around each part: ties and names are found inside."""
    mesh, (ids,) = data_and_pipeline_mesh(world_size), batches()
    model = tiny_model("gemma")
    expected = unsplit_gradients(model, [ids])
    pipeline = build(
        model, mesh, "Interleaved1F1B", parallelize_fn=lambda part, *_, **__: Own(part)
    )
    step(pipeline, mesh, ids)
    assert all(isinstance(part, Own) for part in pipeline.model_parts)
    return wrong_gradients([part.inner for part in pipeline.model_parts], expected)  # type: ignore[misc]


class Own(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_ties_behind_a_wrapper_are_summed() -> None:
    assert run_ranks(lost_in_a_wrapper, 2, timeout_s=60) == [[], []]
