"""Which parameters lie before and after a cut, asked of autograd with real weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def parameters_around(
    model: nn.Module, layers_name: str, cut: int, ids: torch.Tensor
) -> tuple[set[str], set[str]]:
    """Names of parameters that the hidden state before layer ``cut`` depends on, and of those that
    the logits still depend on when that hidden state is given.
    """
    seen: list[torch.Tensor] = []

    def detach_hidden(_module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(hidden)
        if args:
            return (hidden.detach(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden.detach()}

    layer = model.get_submodule(layers_name)[cut]  # type: ignore[index]
    handle = layer.register_forward_pre_hook(detach_hidden, with_kwargs=True)
    try:
        logits = model(ids, use_cache=False).logits
    finally:
        handle.remove()
    return _reached(model, seen[0]), _reached(model, logits)


def _reached(model: nn.Module, output: torch.Tensor) -> set[str]:
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(output.sum(), list(model.parameters()), allow_unused=True)
    return {name for name, g in zip(names, gradients, strict=True) if g is not None}
