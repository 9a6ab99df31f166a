"""Models of plain torch: checked, and trained over gloo, with no hook and nothing registered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hfpp import check_model
from tests.check.strangers import STRANGERS, stranger
from tests.models import tiny_model, token_ids
from tests.ranks import run_ranks
from tests.runtime.real_pipelines import build, data_and_pipeline_mesh, loss, step, wrong_gradients

EXTRA = {
    "positional": ["memory of layer 2"],
    "one by one": [],
    "sequential": [],
    "dict": ["state['level'] of layer 2", "state['first'] of layer 2 and 1 more"],
    "prompt": ["prompt of layer 2 and 1 more"],
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_model_is_exact(name: str) -> None:
    report = check_model(stranger(name), pp_sizes=(2, 4))
    assert report.exact, str(report)
    assert not report.is_shrunk
    assert {kind.kind for size in report.sizes for kind in size.kinds} == {"plain", "long"}
    crossings = report.sizes[0].cuts[0].crossings
    assert [c.description for c in crossings] == ["hidden state", *EXTRA[name]]
    owned = [name for part in report.sizes[1].stages for name in part.parameters]
    assert len(owned) == len(set(owned))
    held = {*owned, *(name for part in report.sizes[1].stages for name in part.copies)}
    assert held == {n for n, _ in stranger(name).named_parameters(remove_duplicate=False)}


def train(rank: int, size: int) -> dict[str, Any]:
    mesh = data_and_pipeline_mesh(size)
    found = {}
    for name in STRANGERS:
        for schedule in ("Interleaved1F1B", *(["1F1B"] if name == "dict" else [])):
            model, reference = stranger(name), stranger(name)
            pipeline = build(model, mesh, schedule)
            ids = token_ids(8, 11)
            step(pipeline, mesh, ids)
            for rows in ids.chunk(4):
                out = reference(rows)
                out = out["logits"] if isinstance(out, dict) else out
                loss(out[0] if isinstance(out, tuple) else out, rows).backward()
            named = reference.named_parameters(remove_duplicate=False)
            wanted = {n: p.grad for n, p in named}
            found[f"{name} {schedule}"] = wrong_gradients(pipeline.model_parts, wanted)
    return found


def test_a_strangers_model_trains_over_two_ranks() -> None:
    for result in run_ranks(train, 2, timeout_s=120):
        assert len(result) == 1 + len(STRANGERS)
        assert {name: wrong for name, wrong in result.items() if wrong} == {}


def test_the_callers_random_numbers_are_left_alone() -> None:
    """Its training forward draws numbers, which is found by drawing."""
    before = torch.random.get_rng_state()
    assert check_model(tiny_model("opt").config, pp_sizes=(2,)).exact
    tiny = torch.random.get_rng_state()
    torch.random.set_rng_state(before)
    tiny_model("opt")
    assert torch.equal(tiny, torch.random.get_rng_state())


def test_the_callers_model_is_left_as_it_was() -> None:
    model = stranger("sequential")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_model(model, pp_sizes=(2,))
    assert model.training
    assert model.head.weight is model.embed.weight
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert value.dtype == torch.float64
