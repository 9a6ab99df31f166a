"""Layers compiled one by one, before or after the split: one graph each kind, and no breaks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

from hfpp.runtime.find_anatomy import find_anatomy
from hfpp.runtime.ownership import find_ownership
from hfpp.runtime.split_model import build_stages
from hfpp.runtime.stage_boundary import own_layers
from tests.models import relative_error, tiny_model, token_ids

TOLERANCE = 1e-9


class Graphs:
    """What was compiled, by a backend that runs it as it is."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

        def backend(graph: Any, _inputs: Any) -> Callable[..., Any]:
            self.seen.append(graph)
            return graph.forward  # type: ignore[no-any-return]

        self.backend = backend

    def __len__(self) -> int:
        return len(self.seen)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def in_place(layers: Sequence[nn.Module], _holder: nn.ModuleList, graphs: Graphs) -> None:
    for layer in layers:
        layer.compile(backend=graphs.backend, fullgraph=True)


def wrapped(layers: Sequence[nn.Module], holder: nn.ModuleList, graphs: Graphs) -> None:
    for index, layer in enumerate(holder):
        if any(layer is one for one in layers):
            holder[index] = torch.compile(layer, backend=graphs.backend, fullgraph=True)


def split(model: Any, num_stages: int) -> list[Any]:
    anatomy = find_anatomy(model)
    offsets = [n * anatomy.num_layers // num_stages for n in range(num_stages + 1)]
    ownership = find_ownership(model, anatomy, offsets)
    return build_stages(model, anatomy, ownership, range(num_stages))


def train(stages: Sequence[nn.Module], ids: Tensor) -> Tensor:
    """One microbatch forward and backward through all stages; the logits."""
    entered: list[Tensor] = []
    left: list[Tensor] = []
    value = ids
    for stage in stages:
        entered.append(value)
        left.append(stage(value))
        value = left[-1].detach().requires_grad_()
    left[-1].square().sum().backward()
    for output, received in zip(left[-2::-1], entered[:0:-1], strict=True):
        output.backward(received.grad)
    return left[-1].detach()


def check_against_plain(stages: Sequence[nn.Module], plain: nn.Module, ids: Tensor) -> None:
    for module in (*stages, plain):
        module.zero_grad()
    logits = train(stages, ids)
    wanted = plain(ids, use_cache=False).logits
    wanted.square().sum().backward()
    assert relative_error(logits, wanted) < TOLERANCE
    gradients = {n: p.grad for n, p in plain.named_parameters()}
    found = {
        name.replace("_orig_mod.", ""): parameter.grad
        for stage in stages
        for name, parameter in stage.named_parameters()
    }
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert relative_error(found[name], gradient) < TOLERANCE, name


@pytest.mark.parametrize(
    ("compile_layers", "when", "attention"),
    [
        (in_place, "before", "sdpa"),
        (in_place, "after", "eager"),
        (wrapped, "before", "eager"),
        (wrapped, "after", "sdpa"),
    ],
)
def test_no_breaks_and_no_recompilation(
    compile_layers: Callable[..., None], when: str, attention: str
) -> None:
    model, plain, graphs = tiny_model("llama"), tiny_model("llama"), Graphs()
    for each in (model, plain):
        each.set_attn_implementation(attention)
    if when == "before":
        compile_layers(list(model.model.layers), model.model.layers, graphs)
    stages = split(model, 2)
    if when == "after":
        for stage in stages:
            compile_layers(own_layers(stage), stage.model.layers, graphs)
    for microbatch in range(3):
        check_against_plain(stages, plain, token_ids(2, seed=microbatch))
        # one for plain layers, and at most one for the class of those that take what was received
        assert 1 <= len(graphs) <= 2
    assert counters["stats"]["unique_graphs"] == len(graphs)
    assert not counters["graph_break"]
    assert not counters["unimplemented"]


@pytest.mark.parametrize("compile_layers", [in_place, wrapped])
def test_stages_share_what_was_compiled(compile_layers: Callable[..., None]) -> None:
    """However many stages a process holds, and however often it splits a model."""
    graphs = Graphs()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for seed in range(2):
            stages = split(tiny_model("llama", seed=seed), 4)
            for stage in stages:
                compile_layers(own_layers(stage), stage.model.layers, graphs)
            check_against_plain(stages, tiny_model("llama", seed=seed), token_ids(2))
    assert len(graphs) == 2


def test_the_model_itself_still_compiles_after_it_was_taken_apart() -> None:
    model, graphs = tiny_model("llama"), Graphs()
    wrapped(list(model.model.layers), model.model.layers, graphs)
    find_anatomy(model)
    assert not graphs
    model(token_ids(2), use_cache=False)
    assert len(graphs) == 1


def test_a_whole_model_compiled_in_place_is_said_to_lose_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, graphs = tiny_model("llama"), Graphs()
    model.compile(backend=graphs.backend)
    with caplog.at_level(logging.WARNING):
        stages = split(model, 2)
    assert [r.message for r in caplog.records if "compiled before the split" in r.message] == [
        "LlamaForCausalLM '' of LlamaForCausalLM was compiled before the split, its stages run it "
        "uncompiled: compile the layers of each part in parallelize_fn."
    ] * len(stages)
    check_against_plain(stages, tiny_model("llama"), token_ids(2))
    assert len(graphs) == 0
