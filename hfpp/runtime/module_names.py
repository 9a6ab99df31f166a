"""Lists of module names (FQNs) per stage: made for a model, and checked against it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfpp.errors import PipelineConfigError
from hfpp.plan.partition import MULTIMODAL_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from hfpp.runtime.anatomy import Anatomy
    from hfpp.runtime.ownership import Ownership

_MAY_BE_MISSING = frozenset((*MULTIMODAL_NAMES, "rotary_emb"))


def module_names_of(ownership: Ownership, anatomy: Anatomy) -> list[list[str]]:
    """Every stage's modules in the model's own names and order."""
    order = [name for name, _ in anatomy.skeleton.named_parameters()]
    prefix = f"{anatomy.layers_name}."
    first_layer = next(i for i, name in enumerate(order) if name.startswith(prefix))
    rank = {name: i for i, name in enumerate(order)}
    parent = anatomy.layers_name.rpartition(".")[0]
    rotary = f"{parent}.rotary_emb" if parent else "rotary_emb"
    shared = [rotary] if _find(anatomy.skeleton, rotary) is not None else []
    lists = []
    for span, outer in zip(ownership.layers, ownership.outer, strict=True):
        # of a module that is registered several times, the first name
        kept = sorted(outer.intersection(rank), key=rank.__getitem__)
        others = [name for name in order if name not in outer]
        before = [_component(name, anatomy, others) for name in kept if rank[name] < first_layer]
        after = [_component(name, anatomy, others) for name in kept if rank[name] > first_layer]
        layers = [f"{prefix}{index}" for index in span]
        lists.append(list(dict.fromkeys([*before, *layers, *after, *shared])))
    return lists


HOOK = "customize_pipeline_stage_modules"
"""The method with which a model changes the list that hfpp makes for it."""


def customized(model: nn.Module, names: list[list[str]], parent: str) -> list[list[str]]:
    """Generated names, or what the model's hook makes of them.

    Args:
        model: with or without the hook.
        names: by stage.
        parent: FQN of the module that holds the list of layers; empty for the model itself.

    Raises:
        PipelineConfigError: if the hook gives another number of stages.
    """
    hook = getattr(model, HOOK, None)
    custom = (
        None
        if hook is None
        else hook(
            [list(part) for part in names],
            layers_prefix=f"{parent}." if parent else "",
            text_model=model.get_submodule(parent) if parent else model,
        )
    )
    if custom is None:
        return names
    if len(custom) != len(names):
        raise PipelineConfigError(
            f"{type(model).__name__}.{HOOK} returned {len(custom)} lists of names for {len(names)} "
            f"stages: return one list per stage, or None to keep the generated ones."
        )
    return [list(part) for part in custom]


def offsets_of(names: list[list[str]], anatomy: Anatomy, argument: str) -> tuple[int, ...]:
    """Layer offsets of the stages, stage s having ``offsets[s]`` to ``offsets[s + 1] - 1``.

    Args:
        names: module names by stage.
        anatomy: of the model that they are for.
        argument: what the caller calls the names.

    Raises:
        PipelineConfigError: if the layers are not each on one stage, in order, or the model lacks
            a name; with FQN and stage.
    """
    if not all(isinstance(name, str) for modules in names for name in modules):
        raise PipelineConfigError(f"{argument} must be one list of module names per stage.")
    prefix, total = f"{anatomy.layers_name}.", anatomy.num_layers
    offsets = [0]
    for stage, modules in enumerate(names):
        following = offsets[-1]
        for name in modules:
            if not name.startswith(prefix):
                _check_exists(f"{argument}[{stage}]", name, anatomy)
                continue
            index = name[len(prefix) :]
            if not index.isdecimal() or int(index) >= total:
                raise _error(
                    f"{argument}[{stage}]",
                    name,
                    f"is no layer: {prefix}0 to {prefix}{total - 1} are",
                )
            if int(index) != following:
                if following == total:
                    rule = "is listed twice"
                else:
                    rule = f"stands where {prefix}{following} must: list each layer once, in order"
                raise _error(f"{argument}[{stage}]", name, rule)
            following += 1
        if following == offsets[-1]:
            raise PipelineConfigError(
                f"{argument}[{stage}] has no layer of {anatomy.layers_name!r}: every "
                f"stage needs at least one; use fewer stages or move a layer there."
            )
        offsets.append(following)
    if offsets[-1] != total:
        raise PipelineConfigError(
            f"{argument} lacks {prefix}{offsets[-1]} ({anatomy.model_name} has {total} "
            f"layers): add it to stage {len(names) - 1}."
        )
    return tuple(offsets)


def check_module_names(
    names: list[list[str]], anatomy: Anatomy, ownership: Ownership, argument: str
) -> None:
    """Compare names with what the stages' forwards need.

    Args:
        names: module names by stage.
        anatomy: of the model that they are for.
        ownership: parameters by stage, as the forward needs them.
        argument: what the caller calls the names.

    Raises:
        PipelineConfigError: for a module that its stage's forward needs and the list lacks, or one
            that another stage needs; with FQN and stage.
    """
    prefix = f"{anatomy.layers_name}."
    parameters = [name for name, _ in anatomy.skeleton.named_parameters()]
    needed = _needed(anatomy, ownership)
    for stage, modules in enumerate(names):
        seen: set[str] = set()
        for name in modules:
            if name in seen:
                raise _error(f"{argument}[{stage}]", name, "is listed twice: list it once")
            seen.add(name)
            if name.startswith(prefix):
                continue
            if prefix.startswith(f"{name}."):
                raise _error(
                    f"{argument}[{stage}]",
                    name,
                    "holds the layers: list what is inside it by itself",
                )
            for parameter in parameters:
                if _covers(name, parameter) and needed.get(parameter, {stage}).isdisjoint({stage}):
                    right = min(needed[parameter])
                    rule = f"is needed by stage {right} and not here: list it on stage {right} only"
                    raise _error(f"{argument}[{stage}]", name, rule)
        for parameter, stages in needed.items():
            if stage in stages and not any(_covers(name, parameter) for name in modules):
                module = _component(parameter, anatomy)
                raise PipelineConfigError(
                    f"{argument}[{stage}] lacks {module!r}, which the forward of "
                    f"{anatomy.model_name} needs on stage {stage}: add it there."
                )


def stage_listing(names: list[list[str]], parameter: str) -> int | None:
    """The first stage whose names cover a parameter's FQN; None where none does."""
    stages = enumerate(names)
    return next((s for s, modules in stages if any(_covers(m, parameter) for m in modules)), None)


def _needed(anatomy: Anatomy, ownership: Ownership) -> dict[str, set[int]]:
    """Stages whose forward uses a parameter outside of the layers; unused ones are left out."""
    needed: dict[str, set[int]] = {}
    for stage, span in enumerate(ownership.layers):
        for name in anatomy.outer_parameters(span.start, span.stop):
            needed.setdefault(name, set()).add(stage)
    return needed


def _component(parameter: str, anatomy: Anatomy, others: Iterable[str] = ()) -> str:
    """The outermost module of a parameter that holds neither the layers nor ``others``.

    Without one, the parameter itself.
    """
    steps = parameter.split(".")
    inside = [other for other in others if other.startswith(f"{steps[0]}.")]
    for depth in range(1, len(steps)):
        name = ".".join(steps[:depth])
        inside = [other for other in inside if _covers(name, other)]
        if not f"{anatomy.layers_name}.".startswith(f"{name}.") and not inside:
            return name
    return parameter


def _covers(name: str, parameter: str) -> bool:
    return parameter == name or parameter.startswith(f"{name}.")


def _check_exists(where: str, name: str, anatomy: Anatomy) -> None:
    exists = _find(anatomy.skeleton, name) is not None or any(
        name == parameter for parameter, _ in anatomy.skeleton.named_parameters()
    )
    if not exists and not may_be_missing(name):
        raise _error(where, name, f"is no module of {anatomy.model_name}: check the spelling")


def may_be_missing(name: str) -> bool:
    """Whether a list may hold the name without the model: the generator adds some to every list."""
    return name.rpartition(".")[2] in _MAY_BE_MISSING


def _find(model: nn.Module, name: str) -> nn.Module | None:
    module: nn.Module | None = model
    for step in name.split("."):
        module = None if module is None else module._modules.get(step)
    return module


def _error(where: str, name: str, rule: str) -> PipelineConfigError:
    return PipelineConfigError(f"{where}: {name!r} {rule}.")
