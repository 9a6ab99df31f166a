"""The quick copy of a structure is the one that copy.deepcopy makes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hfpp.runtime.module_copy import copy_structure
from tests.models import tiny_model


def described(module: nn.Module) -> Any:
    """Everything about a structure but identities."""
    return [
        (
            name,
            type(m),
            list(m.__dict__),
            {k: v for k, v in m.__dict__.items() if isinstance(v, int | float | str | set)},
            {n: id(p) for n, p in m._parameters.items()},
            {n: id(b) for n, b in m._buffers.items()},
            list(m._modules),
        )
        for name, m in module.named_modules(remove_duplicate=False)
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "mamba", "gemma3n_text"])
def test_equal_to_deepcopy(family: str) -> None:
    model = tiny_model(family)
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    quick, slow = copy_structure(model, dict(tensors)), copy.deepcopy(model, dict(tensors))
    assert described(quick) == described(slow)
    originals = {id(m) for m in model.modules()}
    assert all(id(m) not in originals for m in quick.modules())
    assert quick.config is not model.config
    assert quick.config.to_dict() == model.config.to_dict()
    configs = {id(m.config) for m in quick.modules() if hasattr(m, "config")}
    assert len(configs) == len({id(m.config) for m in slow.modules() if hasattr(m, "config")})


class Custom(nn.Module):
    """Says itself how it is copied."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.copies = 0
        self.weights = sum(p.numel() for p in inner.parameters())

    def __deepcopy__(self, memo: dict[int, Any]) -> Custom:
        copied = Custom(copy.deepcopy(self.inner, memo))
        copied.copies = self.copies + 1
        return copied


class Counted(nn.Module):
    """Leaves something out of its state."""

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "secret"}


def test_what_modules_share_stays_shared() -> None:
    model = nn.Module()
    model.a, model.b = nn.Linear(2, 3), nn.Linear(3, 2)
    model.again = model.a
    shared: dict[str, Any] = {}
    model.a.notes, model.b.notes = shared, shared  # type: ignore[assignment]
    object.__setattr__(model.b, "parent", model)
    copied: Any = copy_structure(model, {})
    assert copied.again is copied.a
    assert copied.a.notes is copied.b.notes is not shared
    assert copied.b.parent is copied
    assert torch.equal(copied.a.weight, model.a.weight)
    assert copied.a.weight is not model.a.weight


def test_modules_that_copy_themselves_do() -> None:
    counted = Counted()
    counted.secret = 1
    model = nn.Sequential(Custom(nn.Linear(2, 2)), counted)
    copied: Any = copy_structure(model, {})
    assert copied[0].copies == 1
    assert copied[0].weights == 6
    assert copied[0].inner.weight is not model[0].inner.weight
    assert not hasattr(copied[1], "secret")


def test_hooks_are_copied_and_stand_ins_used() -> None:
    model, calls = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    stand_in = nn.Identity()
    copied: Any = copy_structure(model, {id(model[1]): stand_in})
    assert copied[1] is stand_in
    copied(torch.zeros(1, 2))
    assert calls == ["hook"]
    copied[0]._forward_hooks.clear()
    assert model[0]._forward_hooks
