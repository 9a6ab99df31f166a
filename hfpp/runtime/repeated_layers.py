"""One module at several places of a list of layers: each place gets a module of its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn


def separate_repeats(skeleton: nn.Module) -> None:
    """Let no module with parameters stand twice in a list of ``skeleton``.

    Each place has parameters of its own, which show what happens there.
    """
    for layers in list(skeleton.modules()):
        if isinstance(layers, nn.ModuleList | nn.Sequential):
            _separate(layers, dict(layers._modules), skeleton, {})


def separate_places(
    places: nn.Module, model: nn.Module, layers: nn.Module, memo: Mapping[int, Any]
) -> None:
    """Give each of ``places``, a copied list, a module of its own.

    Args:
        places: the copy of ``layers`` in the copy of ``model``; changed in place.
        model: what was copied.
        layers: the list inside of it.
        memo: what ``copy.deepcopy`` made of the objects of ``model``; tensors that are to be shared
            map to themselves.
    """
    _separate(places, dict(layers._modules), model, memo)


def _separate(
    places: nn.Module,
    originals: Mapping[str, nn.Module | None],
    model: nn.Module,
    memo: Mapping[int, Any],
) -> None:
    seen: set[int] = set()
    for key, place in places._modules.items():
        original = originals[key]
        if id(place) in seen and original is not None and any(True for _ in original.parameters()):
            places._modules[key] = _copy_again(original, model, memo)
        seen.add(id(place))


def _copy_again(layer: nn.Module, model: nn.Module, memo: Mapping[int, Any]) -> nn.Module:
    """One more copy of a layer of ``model``; what it shares with the rest stays shared.

    Args:
        layer: to copy, with its submodules.
        model: what it belongs to.
        memo: the first copy's; objects that it lacks were not copied.
    """
    own = {id(module) for module in layer.modules()}
    rest = [module for module in model.modules() if id(module) not in own]
    things = [thing for module in rest for thing in (module, *module.__dict__.values())]
    tensors = {key: value for key, value in memo.items() if id(value) == key}
    shared = {id(t): memo.get(id(t), t) for t in things if id(t) not in own}
    again = {**tensors, **shared}
    copied: nn.Module = copy.deepcopy(layer, again)
    return copied
