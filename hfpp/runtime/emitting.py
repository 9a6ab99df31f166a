"""Give out and take in what leaves layers other than into the next one (see ``emission``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfpp.runtime.hollow import Running, disguise
from hfpp.runtime.paths import Path, get_at, map_tensors, set_at

if TYPE_CHECKING:
    from hfpp.runtime.emission import Emission
    from hfpp.runtime.stage_boundary import StageBoundary

_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


class _Emitter(nn.Module):
    """Stands for a module whose hooks collect what it returns."""

    def forward(self, output: Any) -> Any:
        """Return just this."""
        return output


class Emitting:
    """What a hollow layer gives out: made once per stage, run in every forward.

    Args:
        emissions: of one layer.
        layer: the layer without weights, as the run that found the emissions left it.
        positions: by value, where it is among what the stage receives.
    """

    def __init__(
        self, emissions: Sequence[Emission], layer: nn.Module, positions: Mapping[Any, int]
    ) -> None:
        self._hooked: list[tuple[nn.Module, Any, list[tuple[Path, int]]]] = []
        self._in_result: list[tuple[Path, int]] = []
        for emission in emissions:
            places = [(value.path, positions[value.key]) for value in emission.values]
            if not emission.hooked:
                self._in_result = places
                continue
            emitter = _Emitter()
            original = layer.get_submodule(emission.module)
            for registry in _HOOKS:
                getattr(emitter, registry).update(getattr(original, registry))
            self._hooked.append((emitter, emission.output, places))

    def emit(self, result: Any, received: Sequence[torch.Tensor]) -> Any:
        """Let the hooks collect their values; return the layer's result with those in it."""
        for emitter, output, places in self._hooked:
            emitter(_filled(map_tensors(lambda t: t, output), places, received))
        return _filled(result, self._in_result, received)


def _filled(
    value: Any, places: Sequence[tuple[Path, int]], received: Sequence[torch.Tensor]
) -> Any:
    for path, position in places:
        value = set_at(value, path, received[position])
    return value


def emitting(boundary: StageBoundary, layer: int) -> Emitting | None:
    """What a hollow layer before the last stage's own gives out for the code after the layers."""
    anatomy = boundary.anatomy
    assert anatomy is not None
    emissions = [emission for emission in anatomy.emissions if emission.layer == layer]
    if not emissions:
        return None
    bare = anatomy.skeleton.get_submodule(f"{anatomy.layers_name}.{layer}")
    positions = {slot.key: position for position, slot in enumerate(boundary.slots_in())}
    return Emitting(emissions, bare, positions)


def make_capturing(module: nn.Module, running: Running) -> None:
    """Let a module of an own layer note parts of its results for the next stage.

    Its ``_hfpp_captures`` say which: (position among the outgoing slots, where in the result).

    Args:
        module: changes its class, to one of the same name.
        running: the forward in progress.
    """
    module.__class__ = _capturing_class(type(module))
    module.__dict__.update(_hfpp_running_stage=running, _hfpp_captures=())


def _capturing_class(base: type[nn.Module]) -> type[nn.Module]:
    class Capturing(base):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            result = super().__call__(*args, **kwargs)
            running: Running = self.__dict__["_hfpp_running_stage"]
            if running.capturing:  # not where checkpointing runs the layer again
                for position, path in self.__dict__["_hfpp_captures"]:
                    running.captured[position] = get_at(result, path)
            return result

    return disguise(Capturing, base)
