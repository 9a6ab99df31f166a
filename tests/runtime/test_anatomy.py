"""The anatomy read without weights is the one that autograd sees with them."""

from __future__ import annotations

import pytest
import torch

from hfpp.errors import PipelineConfigError
from hfpp.runtime.find_anatomy import find_anatomy
from hfpp.runtime.paths import Key
from hfpp.runtime.skeleton import meta_skeleton
from hfpp.runtime.trace import run_hollow
from tests.models import FAMILIES, PlainModel, tiny_model, token_ids
from tests.reference.autograd_anatomy import parameters_around

SEVERAL_VALUES = {"zamba2", "gemma3n_text"}
LAYERS = {
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "falcon": "transformer.h",
    "mamba": "backbone.layers",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_by_structure(family: str) -> None:
    model = tiny_model(family)
    anatomy = find_anatomy(model)
    assert anatomy.layers_name == LAYERS.get(family, "model.layers")
    assert anatomy.num_layers == model.config.num_hidden_layers
    assert sorted(anatomy.calls) == list(range(anatomy.num_layers))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - SEVERAL_VALUES))
def test_parameters_around_a_cut(family: str) -> None:
    model = tiny_model(family, **({} if family == "gpt2" else {"tie_word_embeddings": False}))
    if family == "gpt2":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    anatomy = find_anatomy(model)
    cut = anatomy.num_layers // 2
    before, after = parameters_around(model, anatomy.layers_name, cut, token_ids(2))
    prefix = f"{anatomy.layers_name}."

    def outer(names: set[str]) -> set[str]:
        return {name for name in names if not name.startswith(prefix)}

    assert anatomy.outer_parameters(0, cut) == outer(before)
    assert anatomy.outer_parameters(cut, anatomy.num_layers) == outer(after)
    assert outer(before), "the embedding at least"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_crosses(family: str) -> None:
    anatomy = find_anatomy(tiny_model(family))
    slots = anatomy.slots(anatomy.num_layers // 2)
    assert (len(slots) > 1) == (family in SEVERAL_VALUES)
    assert slots[0].uses[0][0] == anatomy.num_layers // 2
    assert slots[0].is_floating


def test_the_embedding_of_zamba_crosses_beside_the_hidden_state() -> None:
    anatomy = find_anatomy(tiny_model("zamba2"))
    hidden, original = anatomy.slots(3)
    assert hidden.shape == original.shape == (anatomy.batch, anatomy.seq, 32)
    assert [layer for layer, _ in original.uses] == [3, 4, 5]


def test_shapes_for_other_sizes() -> None:
    anatomy = find_anatomy(tiny_model("llama"))
    (hidden,) = anatomy.slot_metas(2, 7, 100, None)
    assert (hidden.shape, hidden.dtype) == ((7, 100, 32), torch.float64)
    (hidden,) = anatomy.slot_metas(2, 1, 1, torch.bfloat16)
    assert (hidden.shape, hidden.dtype) == ((1, 1, 32), torch.bfloat16)
    assert anatomy.output_meta(32, 32, None).shape == (32, 32, 96)


def test_a_stranger_s_model() -> None:
    anatomy = find_anatomy(PlainModel())
    assert (anatomy.layers_name, anatomy.ids_name) == ("blocks", "ids")
    assert [slot.uses[0][1] for slot in anatomy.slots(2)] == [(0, 0), (0, 1)]


def test_the_model_is_not_touched() -> None:
    model = tiny_model("gemma2")
    before = {name: p.clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    find_anatomy(model)
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_a_cut_before_an_uncalled_layer_is_refused() -> None:
    with pytest.raises(PipelineConfigError, match="does not call layer 9"):
        find_anatomy(tiny_model("llama")).slots(9)


class Masks(torch.nn.Module):
    """Python on real values of the inputs, and arithmetic that has no data."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8))

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        assert (ids > 2).all()
        assert ids.max().item() < 96
        scores = self.weight * ids[..., None]
        best = scores.topk(2).indices
        kept = torch.where(ids[..., None] > 50, scores, 0.0)
        return {"kept": kept, "best": best, "mask": ids > 50}


def test_a_hollow_run_has_inputs_but_no_weights() -> None:
    trace = run_hollow(meta_skeleton(Masks()), {"ids": token_ids(2, 8)}, {})
    kept, best, mask = trace.result
    assert [value.path for value in trace.result] == [
        (Key("kept"),),
        (Key("best"),),
        (Key("mask"),),
    ]
    graph = trace.graph

    def leaves(node: int) -> set[str]:
        return {graph.labels[n] for n in graph.reach([node], ()) if graph.kinds[n] != "op"}

    assert leaves(kept.node) >= {"weight", "ids"}
    assert leaves(best.node) >= {"weight", "ids"}
    assert "weight" not in leaves(mask.node)
    assert "ids" in leaves(mask.node)
    assert trace.reads, "ids.max().item() reads a value"
