"""Tensors that one stage holds under several names stay one, also when weights are made anew."""

from __future__ import annotations

from typing import Any

from torch import nn

from hfpp.runtime.hollow import disguise


def keep_ties(stage: nn.Module) -> None:
    """Let ``tie_weights`` of a stage, where its class has it, tie what the stage holds itself.

    transformers calls it after it has initialised weights, and means tensors of other stages, too.
    """
    base = type(stage)
    if not hasattr(base, "tie_weights"):
        return
    same: dict[int, list[str]] = {}
    for name, parameter in stage.named_parameters(remove_duplicate=False):
        same.setdefault(id(parameter), []).append(name)
    stage.__dict__["_hfpp_same"] = tuple(tuple(names) for names in same.values() if len(names) > 1)

    class OwnTies(base):  # type: ignore[misc, valid-type]
        def tie_weights(self, *_args: Any, **_kwargs: Any) -> None:
            _tie_again(self, self.__dict__["_hfpp_same"])

    stage.__class__ = disguise(OwnTies, base)


def _tie_again(stage: nn.Module, same: tuple[tuple[str, ...], ...]) -> None:
    for first, *others in same:
        parameter = stage.get_parameter(first)
        for name in others:
            owner, _, own_name = name.rpartition(".")
            stage.get_submodule(owner)._parameters[own_name] = parameter
