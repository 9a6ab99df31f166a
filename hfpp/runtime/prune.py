"""Stages of models that handle missing modules by themselves: foreign modules become None."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from hfpp.errors import PipelineConfigError
from hfpp.plan.partition import generate_hf_model_fqn_per_model_part
from hfpp.runtime.module_names import HOOK, customized, may_be_missing
from hfpp.runtime.ownership import find_tied, separate_copies
from hfpp.runtime.stage_boundary import StageBoundary

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch.distributed as dist


def prune(
    model: nn.Module,
    module_names_per_stage: list[list[str]] | None,
    num_stages: int,
    stage_ids: Sequence[int],
    group: dist.ProcessGroup | None,
    argument: str,
) -> list[nn.Module]:
    """Copies of ``model`` with its own forward and only the named modules.

    A list of layers becomes an ``nn.ModuleDict`` with the layers' indices as keys, so that FQNs
    stay; other foreign modules become None. Tensors are shared, not copied, but for what two stages
    of this rank both train.

    Args:
        model: the whole model.
        module_names_per_stage: the modules of every stage; None for the uniform partition.
        num_stages: stages of the pipeline.
        stage_ids: this rank's.
        group: the pipeline's ranks.
        argument: what the caller calls the names.

    Raises:
        PipelineConfigError: for a name that the model lacks, and a parameter that no stage or more
            than one has.
    """
    names = module_names_per_stage
    if names is None:
        argument, names = HOOK, _generated(model, num_stages)
    holders = _holders(model, names, argument)
    tied, held = find_tied(model, holders), set[int]()
    modules = []
    for index in stage_ids:
        stage = _pruned(model, set(names[index]))
        separate_copies(stage, tied, index, held)
        held.add(index)
        copies = (n for t in tied for s, own in t.names[1:] if s == index for n in own)
        stage.__dict__["_hfpp_boundary"] = StageBoundary(
            stage_index=index,
            num_stages=num_stages,
            layers=range(0),
            tied_names=frozenset(copies),
            tied=tied,
            pp_group=group,
            anatomy=None,
        )
        modules.append(stage)
    return modules


def _generated(model: nn.Module, num_stages: int) -> list[list[str]]:
    parent = "model" if isinstance(getattr(model, "model", None), nn.Module) else ""
    prefix = f"{parent}." if parent else ""
    layers = getattr(model.get_submodule(parent), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise PipelineConfigError(
            f"{type(model).__name__} keeps its own forward, but has no nn.ModuleList at "
            f"'{prefix}layers': give module_names_per_stage."
        )
    names = generate_hf_model_fqn_per_model_part(num_stages, len(layers), fqn_prefix=prefix)
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    names = [[name for name in part if name in known] for part in names]
    return customized(model, names, parent)


def _holders(model: nn.Module, names: list[list[str]], argument: str) -> dict[str, list[int]]:
    """The stages of every parameter, by FQN, after checking the names."""
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    last: dict[str, int] = {}  # the highest index listed so far, by list of layers
    for stage, modules in enumerate(names):
        for name in modules:
            if name not in known and not may_be_missing(name):
                raise PipelineConfigError(
                    f"{argument}[{stage}]: {name!r} is no module of {type(model).__name__}: check "
                    f"the spelling."
                )
            parent, _, index = name.rpartition(".")
            if index.isdecimal():
                if int(index) <= last.get(parent, -1):
                    raise PipelineConfigError(
                        f"{argument}[{stage}]: {name!r} stands after {parent}.{last[parent]}: list "
                        f"each layer once, in order."
                    )
                last[parent] = int(index)
    holders: dict[str, list[int]] = {}
    for parameter, _ in model.named_parameters(remove_duplicate=False):
        stages = [
            stage
            for stage, modules in enumerate(names)
            if any(parameter.startswith(f"{name}.") for name in modules)
        ]
        if len(stages) != 1:
            problem = f"on stages {stages}" if stages else "on no stage"
            raise PipelineConfigError(
                f"{argument} has the parameter {parameter!r} of {type(model).__name__} {problem}: "
                f"list its module on exactly one stage."
            )
        holders[parameter] = stages
    return holders


def _pruned(model: nn.Module, kept: set[str]) -> nn.Module:
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    ancestors = {name[:end] for name in kept for end in _dots(name)} | {""}
    stays: set[int] = set()
    partly: list[str] = []  # holds kept modules and others
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name == k or name.startswith(f"{k}.") for k in kept)
        if inside or name in ancestors:
            stays.add(id(module))
        if name in ancestors and not inside:
            partly.append(name)
    memo.update({id(module): None for module in model.modules() if id(module) not in stays})
    stage = copy.deepcopy(model, memo)
    holders = {name: stage.get_submodule(name) for name in partly}
    for name, holder in holders.items():
        for key, child in holder._modules.items():
            full = f"{name}.{key}" if name else key
            if full not in kept and not any(child is other for other in holders.values()):
                holder._modules[key] = None  # also where it stays under another name
    for name, holder in holders.items():
        if isinstance(holder, nn.ModuleList) and None in holder._modules.values():
            present = {key: child for key, child in holder._modules.items() if child is not None}
            parent, _, own_name = name.rpartition(".")
            setattr(stage.get_submodule(parent), own_name, nn.ModuleDict(present))
    return stage


def _dots(name: str) -> list[int]:
    return [index for index, character in enumerate(name) if character == "."]
