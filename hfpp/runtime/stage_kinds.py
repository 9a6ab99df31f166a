"""What a stage's layers do, for each kind of arguments that its forward is called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from hfpp.errors import PipelineConfigError
from hfpp.runtime.crossing import IDS
from hfpp.runtime.emitting import emitting
from hfpp.runtime.hollow import HollowRole, Running
from hfpp.runtime.hollow_modules import HollowModule
from hfpp.runtime.input_kinds import InputKind, check_kind, find_kind, further_arguments, remember
from hfpp.runtime.stage_boundary import cast_dtype

if TYPE_CHECKING:
    from torch import nn

    from hfpp.runtime.paths import Path
    from hfpp.runtime.stage_boundary import StageBoundary


Results = Mapping[tuple[int, str], list[tuple[int, "Path"]]]
"""(position among the outgoing slots, where in the result), by layer and module."""


@dataclass(frozen=True, slots=True)
class OwnRole:
    """What a layer of the stage takes from what was received."""

    running: Running
    layer: int
    hidden_path: Path
    injections: tuple[tuple[int, Path], ...]  # (position among the incoming slots, where)
    writes: tuple[tuple[int, Path], ...] = ()  # those that are written into the argument itself


@dataclass(frozen=True, slots=True)
class StageKind:
    """A stage's part in one kind of forward.

    Attributes:
        boundary: the stage from outside, with the anatomy of this kind.
        roles: of the layers that have one, by index.
        injected: the layers that must take what was received.
        dropped: names of keyword arguments that this stage leaves out.
        encoders: what runs in the place of modules whose weights another stage has, by FQN.
        results: what is sent of the results of modules of own layers, by layer and FQN in it.
    """

    boundary: StageBoundary
    roles: Mapping[int, OwnRole | HollowRole]
    injected: frozenset[int]
    dropped: frozenset[str] = frozenset()
    encoders: Mapping[str, HollowModule] = field(default_factory=dict)
    results: Results = field(default_factory=dict)


def stage_kind(boundary: StageBoundary, running: Running) -> StageKind:
    """The roles of a stage's layers, from the anatomy in ``boundary``."""
    anatomy = boundary.anatomy
    if anatomy is None:
        return StageKind(boundary, {}, frozenset())
    slots_in, slots_out = boundary.slots_in(), boundary.slots_out()
    known = {slot.key for slot in slots_in}
    captures: dict[int, list[tuple[int, Path]]] = {}
    results: dict[tuple[int, str], list[tuple[int, Path]]] = {}
    last = -1 if boundary.is_last else anatomy.first_called(boundary.layers.stop)
    for position, slot in enumerate(slots_out):
        if slot.key in known or slot.key == IDS:
            continue
        if slot.uses:
            layer, path = slot.uses[0]
            captures.setdefault(layer, []).append((position, path))
            last = max(last, layer)
        else:
            assert slot.source is not None
            results.setdefault(slot.source[:2], []).append((position, slot.source.path))
    roles: dict[int, OwnRole | HollowRole] = {}
    injected: set[int] = set()
    for index, call in anatomy.calls.items():
        if index in boundary.layers:
            taken = [
                (position, path)
                for position, slot in enumerate(slots_in)
                for used_by, path in slot.uses
                if used_by == index
            ]
            if taken:
                writes = tuple(
                    (position, path)
                    for position, path in taken
                    if slots_in[position].read_outside and slots_in[position].uses[0][0] == index
                )
                injections = tuple(place for place in taken if place not in writes)
                roles[index] = OwnRole(running, index, call.hidden_path, injections, writes)
                injected.add(index)
        else:
            roles[index] = HollowRole(
                running,
                call,
                tuple(captures.get(index, ())) if index >= boundary.layers.stop else (),
                ends=not boundary.is_last and index == last,
                emitting=emitting(boundary, index) if boundary.is_last else None,
            )
    return StageKind(boundary, roles, frozenset(injected), results=results)


def use_kind(stage: nn.Module, kind: StageKind) -> None:
    """Give the stage's layers their roles; does nothing where they have them."""
    if stage.__dict__.get("_hfpp_kind") is kind:
        return
    takes: frozenset[int] = stage.__dict__["_hfpp_takes"]
    if not kind.injected <= takes:
        raise PipelineConfigError(
            f"{type(stage).__name__} hands values to layer {min(kind.injected - takes)} with these "
            f"keyword arguments that it does not without them: pass them from the model's own "
            f"code, or keep the layers on one stage."
        )
    gives: Mapping[tuple[int, str], nn.Module] = stage.__dict__["_hfpp_gives"]
    if not kind.results.keys() <= gives.keys():
        raise PipelineConfigError(
            f"{type(stage).__name__} collects outputs of other modules with these keyword "
            f"arguments than without them: keep the layers on one stage."
        )
    for place, module in gives.items():
        module.__dict__["_hfpp_captures"] = tuple(kind.results.get(place, ()))
    for index, layer in stage.__dict__["_hfpp_layers"].items():
        layer.__dict__["_hfpp_role"] = kind.roles.get(index)
    for name, module in stage.__dict__["_hfpp_encoders"].items():
        module.__dict__["_hfpp_hollow"] = kind.encoders.get(name)
    stage.__dict__["_hfpp_kind"] = kind


def kind_for(stage: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> StageKind:
    """The part of ``stage`` in a forward with these arguments; found on the first one of a kind.

    Raises:
        PipelineConfigError: if the model cannot be cut so with these arguments, or its token ids
            are missing.
    """
    text: StageKind = stage.__dict__["_hfpp_text_kind"]
    boundary = text.boundary
    anatomy = boundary.anatomy
    if anatomy is None or boundary.num_stages == 1:
        return text
    further = further_arguments(kwargs, anatomy.ids_name)
    if not further:
        return text
    ids = kwargs.get(anatomy.ids_name)
    if ids is None and boundary.is_first and args:
        ids = args[0]
    elif ids is None and args and boundary.slots_in()[-1].key == IDS:
        ids = args[-1]
    if not isinstance(ids, torch.Tensor):
        raise PipelineConfigError(
            f"stage {boundary.stage_index} got {', '.join(sorted(further))} without "
            f"{anatomy.ids_name}: pass {anatomy.ids_name} by keyword to every stage, as the "
            f"schedule's step does."
        )
    found = find_kind(anatomy, ids, kwargs, cast_dtype(stage))
    return _known_kind(stage, boundary, found)


def _known_kind(stage: nn.Module, boundary: StageBoundary, found: InputKind) -> StageKind:
    kinds: dict[Any, StageKind] = stage.__dict__["_hfpp_kinds"]
    kind = kinds.get(id(found.anatomy))
    if kind is None:
        assert boundary.ownership is not None
        check_kind(found, boundary.ownership)
        dropped = frozenset() if boundary.is_first else found.dropped(boundary.layers.start)
        running: Running = stage.__dict__["_hfpp_running"]
        names = stage.__dict__["_hfpp_encoders"]
        kind = replace(
            stage_kind(replace(boundary, anatomy=found.anatomy), running),
            dropped=dropped,
            encoders={name: HollowModule(found.anatomy, name) for name in names},
        )
        remember(kinds, id(found.anatomy), kind)
    return kind
