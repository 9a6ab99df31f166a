"""The examples run as their first lines say, and train what a plain loop trains."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from tests.commands import ROOT, run_command

pytestmark = pytest.mark.torch

STEPS = 6


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command_of(example: ModuleType) -> str:
    """The command in the docstring, from the root of the tree."""
    assert example.__doc__ is not None
    return re.search(r"^    (torchrun .*)$", example.__doc__, re.M)[1].replace(
        "examples/", f"{ROOT}/examples/"
    )


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_train_llama(tmp_path: Path) -> None:
    example = load("train_llama")
    output = run_command(f"{command_of(example)} --steps {STEPS}", tmp_path)
    found = [(int(n), float(x)) for n, x in re.findall(r"length +(\d+): loss (\S+),", output)]

    torch.manual_seed(0)
    model = LlamaForCausalLM(example.make_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=example.LEARNING_RATE)
    text = example.load_text()
    expected = []
    for step in range(STEPS):
        ids = example.get_batch(text, step)
        loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((ids.shape[1], loss.item()))
    assert len({length for length, _ in expected}) > 1
    assert [length for length, _ in found] == [length for length, _ in expected]
    assert [x for _, x in found] == pytest.approx([x for _, x in expected], abs=2e-4)


def test_finetune_fsdp2(tmp_path: Path) -> None:
    example = load("finetune_fsdp2")
    output = run_command(command_of(example), tmp_path)
    found = float(re.search(r"loss after 10 steps: (\S+)", output)[1])

    model = example.load_model(None)
    ids = torch.tensor(list(topics["assert"].encode())[: example.BATCH * example.LENGTH])
    ids = ids.view(example.BATCH, example.LENGTH)
    with torch.no_grad():
        assert loss_of(model, ids).item() > found + 0.5
        state = model.state_dict()
        dcp.load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
        model.load_state_dict(state)
        assert loss_of(model, ids).item() == pytest.approx(found, rel=1e-5)
