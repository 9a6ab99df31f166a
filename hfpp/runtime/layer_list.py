"""The list of layers among a model's modules, and how the model calls it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfpp.errors import PipelineConfigError
from hfpp.runtime.crossing import Hidden, LayerCall, TensorLike
from hfpp.runtime.paths import Key
from hfpp.runtime.trace import Call, Trace, Value

_ONCE_PER_CALL = "as nn.ModuleList([layer] * calls) does with one set of weights"


def find_layers(name: str, skeleton: nn.Module, trace: Trace) -> str:
    """The outermost list whose elements map a hidden state to a hidden state, largest first."""
    counts: dict[str, list[int]] = {}
    for call in trace.calls:
        if hidden_of(call) is not None:
            counts.setdefault(call.list_name, []).append(call.index)
    lists = [n for n, indices in counts.items() if len(set(indices)) >= 2]
    outermost = [n for n in lists if not any(n.startswith(f"{o}.") for o in lists if o != n)]
    if not outermost:
        again = next((n for n, indices in counts.items() if len(indices) > 1), None)
        remedy = ""
        if again is not None:
            layer = f"{again}.{counts[again][0]}"
            remedy = f" Register {layer}, which it calls again, once per call, {_ONCE_PER_CALL}."
        raise PipelineConfigError(
            f"{name} cannot be split: no nn.ModuleList or nn.Sequential of two or more layers is "
            f"called with a hidden state that it returns in the same shape.{remedy}"
        )

    def size(list_name: str) -> int:
        return sum(p.numel() for p in skeleton.get_submodule(list_name).parameters())

    best = max(outermost, key=size)
    indices = counts[best]
    if sorted(set(indices)) != indices:
        raise PipelineConfigError(
            f"{name} cannot be split: its forward calls the layers of {best!r} in the order "
            f"{_shortened(indices)}; a stage needs each layer once, in order. Register a layer "
            f"that is called again once per call, {_ONCE_PER_CALL}, in the order of the calls."
        )
    function = next((c.function for c in trace.calls if c.list_name == best and c.function), "")
    if function:
        raise PipelineConfigError(
            f"{name} cannot be split: its forward calls the layers of {best!r} within a "
            f"torch.autograd.Function ({function}), which computes their gradients by itself, all "
            f"at once. Keep the layers on one stage (pipeline size 1)."
        )
    return best


def check_calls(name: str, layers_name: str, trace: Trace) -> None:
    """The layers that token ids alone showed, also with further arguments."""
    calls = [call for call in trace.calls if call.list_name == layers_name]
    indices = [call.index for call in calls]
    if not calls or sorted(set(indices)) != indices:
        raise PipelineConfigError(
            f"{name} cannot be split: with these arguments its forward calls the layers of "
            f"{layers_name!r} in the order {_shortened(indices)}; a stage needs each layer once, "
            f"in order."
        )
    odd = [call.index for call in calls if hidden_of(call) is None]
    if odd:
        raise PipelineConfigError(
            f"{name} cannot be split: with these arguments layer {odd[0]} of {layers_name!r} "
            f"returns no hidden state in the shape that it takes."
        )


def list_of_layers(module: nn.Module) -> nn.ModuleList | nn.Sequential:
    """``module``, which is known to be a list of layers."""
    assert isinstance(module, nn.ModuleList | nn.Sequential)
    return module


def hidden_of(call: Call) -> Value | None:
    """The argument that the layer hands on: floating, of the shape of a floating result."""
    shapes = {v.shape for v in call.outputs if v.is_floating}
    candidates = [v for v in call.inputs if v.is_floating and len(v.shape) >= 2]
    named = [v for v in candidates if v.path == (1, Key("hidden_states"))]
    return next((v for v in named + candidates if v.shape in shapes), None)


def _shortened(indices: list[int]) -> str:
    return str(indices) if len(indices) <= 16 else f"{str(indices[:16])[:-1]}, ...]"


def describe_call(call: Call) -> LayerCall:
    """How the model calls the layer of ``call``."""
    hidden = hidden_of(call)
    assert hidden is not None
    found = False

    def describe(value: Any) -> Any:
        nonlocal found
        if isinstance(value, torch.Tensor):
            if not found and value.is_floating_point() and tuple(value.shape) == hidden.shape:
                found = True
                return Hidden()
            return TensorLike(tuple(value.shape), value.dtype)
        if isinstance(value, Mapping) and hasattr(value, "to_tuple"):
            return type(value)(**{k: describe(v) for k, v in value.items()})
        if isinstance(value, dict):
            return {k: describe(v) for k, v in value.items()}
        if isinstance(value, list):
            return [describe(item) for item in value]
        if isinstance(value, tuple):
            items = [describe(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return value

    return LayerCall(hidden.path, hidden.shape, describe(call.output))


def primary_value(name: str, result: list[Value]) -> Value:
    """The tensor that the forward is called for, by the same rule as ``stage_module``."""
    paths = {value.path: value for value in result}
    for path in ((), (Key("logits"),), (Key("last_hidden_state"),)):
        if path in paths:
            return paths[path]
    top = [value for value in result if len(value.path) == 1]
    named = [step.name for value in top for step in value.path if isinstance(step, Key)]
    if len(named) > 1:
        raise several_outputs(name, named)
    if not top:
        raise PipelineConfigError(
            f"{name} cannot be split: its forward returns no tensor at its top level."
        )
    return top[0]


def several_outputs(name: str, outputs: Sequence[str]) -> PipelineConfigError:
    """What to say of a model that names several results, none of them the one that is meant."""
    return PipelineConfigError(
        f"{name} returns several tensors ({', '.join(outputs)}), but a pipeline returns "
        f"one: wrap the model in a module whose forward joins them, as torch.stack does, or names "
        f"the one that the loss takes 'logits'."
    )
