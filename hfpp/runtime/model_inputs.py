"""What a hollow run calls a model with."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from hfpp.errors import PipelineConfigError

ROWS = (3, 5, 7, 2, 11)
ROUND_ROWS = (8, 24, 40, 56)  # where several rows are one sample, such as one per codebook


def forward_constants(model: nn.Module) -> dict[str, Any]:
    """Arguments that every stage's own forward gets: no key-value cache while training."""
    return {"use_cache": False} if "use_cache" in _argument_names(model) else {}


def first_argument(model: nn.Module) -> str:
    """Name of the argument that takes the token ids."""
    names = _argument_names(model)
    if not names:
        raise PipelineConfigError(
            f"{type(model).__name__}.forward takes no argument: a pipeline needs one for the input."
        )
    return "input_ids" if "input_ids" in names else names[0]


def _argument_names(model: nn.Module) -> list[str]:
    """What the forward takes by name, also through wrappers that hand on whatever they are given.

    Such a wrapper has ``**kwargs`` and the model as its only child.
    """
    names: list[str] = []
    module: nn.Module | None = model
    while module is not None:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names += [p.name for p in parameters if p.kind not in variable]
        hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        children = list(module.children())
        module = children[0] if hands_on and len(children) == 1 else None
    return names


def run_sizes(model: nn.Module, rows: tuple[int, ...]) -> tuple[int, int]:
    """A batch size and a sequence length that, like their product, are no size of the model."""
    taken = {size for parameter in model.parameters() for size in parameter.shape}
    config = getattr(model, "config", None)
    values: dict[str, Any] = getattr(config, "to_dict", dict)()
    taken |= {v for v in values.values() if isinstance(v, int)}
    sizes = ((batch, seq) for seq in (13, *range(8, 40)) for batch in rows)
    free = (s for s in sizes if taken.isdisjoint((*s, s[0] * s[1])) and s[0] != s[1])
    found = next(free, None)
    if found is None:
        raise PipelineConfigError(
            f"{type(model).__name__} cannot be split: no batch size of {list(rows)} and sequence "
            f"length up to 39 differs from all sizes of the model, which tells them apart."
        )
    return found


def plain_ids(model: nn.Module, batch: int, seq: int) -> torch.Tensor:
    """Token ids, int64 [batch, seq], that are nobody's special token."""
    values: dict[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    special = {
        v
        for k, v in values.items()
        if k.endswith(("token_id", "_token_index")) and isinstance(v, int)
    }
    plain = [i for i in range(len(special) + 8) if i not in special][:7]
    ids = torch.tensor(plain, dtype=torch.int64)
    return ids.repeat(batch * seq // len(plain) + 1)[: batch * seq].reshape(batch, seq).clone()
