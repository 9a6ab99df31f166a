"""Which stage owns which parameter, and which parameters several stages share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from hfpp.runtime.shared_memory import refuse_shared_memory

if TYPE_CHECKING:
    from hfpp.runtime.anatomy import Anatomy


@dataclass(frozen=True, slots=True)
class TiedParameter:
    """One tensor that several stages hold, each a copy: gradients are summed over them.

    ``names``: for every stage that holds it, in order, the FQNs under which it does.
    """

    names: tuple[tuple[int, tuple[str, ...]], ...]

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages, the owner first."""
        return tuple(stage for stage, _ in self.names)


@dataclass(frozen=True, slots=True)
class Ownership:
    """Parameters by stage.

    Attributes:
        layers: layer indices by stage.
        outer: FQNs outside of the layer list by stage.
        tied: parameters on more than one stage.
    """

    layers: tuple[range, ...]
    outer: tuple[frozenset[str], ...]
    tied: tuple[TiedParameter, ...]

    def copies(self, stage: int) -> frozenset[str]:
        """FQNs on ``stage`` of tensors that an earlier stage owns."""
        return frozenset(
            name
            for tied in self.tied
            for holder, names in tied.names[1:]
            if holder == stage
            for name in names
        )


def find_ownership(
    model: nn.Module,
    anatomy: Anatomy,
    offsets: Sequence[int],
    listed: Callable[[str], int | None] = lambda _: None,
) -> Ownership:
    """Give every parameter its stage by what the stages' data flow needs.

    Parameters that no stage's output depends on go where they are listed, else to the stage that
    has all of their module that is used (an adapter leaves the weights it replaces unused), else to
    stage 0; those inside a layer stay with it.

    Args:
        model: the live model; which of its parameters are one tensor is read off it.
        anatomy: its anatomy.
        offsets: stage s has layers ``offsets[s]`` to ``offsets[s + 1] - 1``.
        listed: the stage on which the caller lists a parameter by FQN; None where nowhere.
    """
    prefix = f"{anatomy.layers_name}."
    layers = tuple(range(start, stop) for start, stop in itertools.pairwise(offsets))
    stage_of_layer = {layer: stage for stage, span in enumerate(layers) for layer in span}
    same = _names_of_modules(anatomy.skeleton)
    outer: list[set[str]] = [set() for _ in layers]
    for span, kept in zip(layers, outer, strict=True):
        for name in anatomy.parameters_reached(span.start, span.stop):
            kept.update(name for name in same[name] if not name.startswith(prefix))
    for name, names in same.items():
        if name.startswith(prefix):  # a layer's module that the model holds elsewhere, too
            stage = stage_of_layer[int(name[len(prefix) :].split(".")[0])]
            outer[stage].update(name for name in names if not name.startswith(prefix))
    users = {name: stage for stage, used in enumerate(outer) for name in used}
    for name, names in same.items():
        if not name.startswith(prefix) and name not in users:
            place = listed(names[0])
            if place is None:
                place = _stage_of_relatives(names[0], users, prefix)
            outer[place].add(name)
    holders: dict[str, list[int]] = {name: [] for name in same}
    for stage, kept in enumerate(outer):
        for name in kept:
            holders[name].append(stage)
    for name in same:
        if name.startswith(prefix):
            holders[name].append(stage_of_layer[int(name[len(prefix) :].split(".")[0])])
    return Ownership(layers, tuple(map(frozenset, outer)), find_tied(model, holders))


def _names_of_modules(skeleton: nn.Module) -> dict[str, tuple[str, ...]]:
    """Of every FQN all FQNs of the parameter: several where its module is registered so often."""
    names: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(same) for same in names.values() for name in same}


def _stage_of_relatives(name: str, users: Mapping[str, int], layers_prefix: str) -> int:
    """The stage of the nearest used parameters of a module that does not hold the layers."""
    parent = name.rpartition(".")[0]
    while parent and not layers_prefix.startswith(f"{parent}."):
        stages = {stage for used, stage in users.items() if used.startswith(f"{parent}.")}
        if stages:
            return stages.pop() if len(stages) == 1 else 0
        parent = parent.rpartition(".")[0]
    return 0


def find_tied(model: nn.Module, holders: Mapping[str, Sequence[int]]) -> tuple[TiedParameter, ...]:
    """The tensors of ``model`` that several stages hold, from the holders of every FQN.

    Raises:
        PipelineConfigError: for two parameters over the same memory on different stages.
    """
    refuse_shared_memory(model, holders)
    same: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in holders:
            same.setdefault(id(parameter), []).append(name)
    tied = []
    for names in same.values():
        by_stage: dict[int, list[str]] = {}
        for name in names:
            for stage in holders[name]:
                by_stage.setdefault(stage, []).append(name)
        if len(by_stage) > 1:
            tied.append(TiedParameter(tuple((s, tuple(by_stage[s])) for s in sorted(by_stage))))
    return tuple(tied)


def separate_copies(
    stage: nn.Module, tied: Sequence[TiedParameter], index: int, held: set[int]
) -> None:
    """Give a stage tensors of its own where an earlier stage of this rank trains the same.

    Args:
        stage: to change, in place.
        tied: the tensors that several stages hold.
        index: which stage it is.
        held: the stages of this rank that hold the model's own tensors.
    """
    for parameter in tied:
        names = dict(parameter.names)
        if index not in names or held.isdisjoint(names):
            continue
        original = stage.get_parameter(names[index][0])
        mine = nn.Parameter(original.detach().clone(), requires_grad=original.requires_grad)
        for name in names[index]:
            owner, _, own_name = name.rpartition(".")
            stage.get_submodule(owner)._parameters[own_name] = mine
