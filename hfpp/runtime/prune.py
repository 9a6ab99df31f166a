"""Stages of models that handle missing modules by themselves: foreign modules become None."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from hfpp.errors import PipelineConfigError
from hfpp.plan.partition import generate_hf_model_fqn_per_model_part


def prune(
    model: nn.Module,
    module_names_per_stage: list[list[str]] | None,
    num_stages: int,
    stage_ids: Sequence[int],
) -> list[nn.Module]:
    """Copies of ``model`` with its own forward and only the named modules.

    A list of layers becomes an ``nn.ModuleDict`` with the layers' indices as keys, so that FQNs
    stay; other foreign modules become None. Tensors are shared, not copied.
    """
    if module_names_per_stage is None:
        module_names_per_stage = _generated(model, num_stages)
    return [_pruned(model, set(module_names_per_stage[index])) for index in stage_ids]


def _generated(model: nn.Module, num_stages: int) -> list[list[str]]:
    prefix = "model." if isinstance(getattr(model, "model", None), nn.Module) else ""
    layers = getattr(model.get_submodule(prefix.rstrip(".")), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise PipelineConfigError(
            f"{type(model).__name__} keeps its own forward, but has no nn.ModuleList at "
            f"'{prefix}layers': give module_names_per_stage."
        )
    names = generate_hf_model_fqn_per_model_part(num_stages, len(layers), fqn_prefix=prefix)
    return [[name for name in part if _holds(model, name)] for part in names]


def _holds(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _pruned(model: nn.Module, kept: set[str]) -> nn.Module:
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    ancestors = {name[:end] for name in kept for end in _dots(name)}
    for name, module in model.named_modules():
        inside = any(name == k or name.startswith(f"{k}.") for k in kept)
        if name and not inside and name not in ancestors:
            memo[id(module)] = None
    stage = copy.deepcopy(model, memo)
    for name, module in list(stage.named_modules()):
        if isinstance(module, nn.ModuleList) and any(child is None for child in module):
            present = {key: child for key, child in module._modules.items() if child is not None}
            parent, _, own_name = name.rpartition(".")
            setattr(stage.get_submodule(parent), own_name, nn.ModuleDict(present))
    return stage


def _dots(name: str) -> list[int]:
    return [index for index, character in enumerate(name) if character == "."]
