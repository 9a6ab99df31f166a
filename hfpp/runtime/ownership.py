"""Which stage owns which parameter, and which parameters several stages share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

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


def find_ownership(model: nn.Module, anatomy: Anatomy, offsets: Sequence[int]) -> Ownership:
    """Give every parameter its stage by what the stages' data flow needs.

    Parameters that no stage's output depends on go to stage 0 (those inside a layer stay with it).

    Args:
        model: the live model; which of its parameters are one tensor is read off it.
        anatomy: its anatomy.
        offsets: stage s has layers ``offsets[s]`` to ``offsets[s + 1] - 1``.
    """
    spans = list(itertools.pairwise(offsets))
    outer = [set(anatomy.outer_parameters(start, stop)) for start, stop in spans]
    prefix = f"{anatomy.layers_name}."
    names = [name for name, _ in anatomy.skeleton.named_parameters()]
    everywhere = set().union(*outer)
    outer[0] |= {n for n in names if not n.startswith(prefix) and n not in everywhere}
    layers = tuple(range(start, stop) for start, stop in spans)
    holders: dict[str, list[int]] = {name: [] for name in names}
    for stage, kept in enumerate(outer):
        for name in kept:
            holders[name].append(stage)
    stage_of_layer = {layer: stage for stage, span in enumerate(layers) for layer in span}
    for name in names:
        if name.startswith(prefix):
            holders[name].append(stage_of_layer[int(name[len(prefix) :].split(".")[0])])
    return Ownership(layers, tuple(map(frozenset, outer)), _find_tied(model, holders))


def _find_tied(model: nn.Module, holders: dict[str, list[int]]) -> tuple[TiedParameter, ...]:
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
