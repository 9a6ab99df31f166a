"""What stands for layers and weights of other stages: without storage, handing on hidden states."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from hfpp.runtime.crossing import Hidden, LayerCall, TensorLike
from hfpp.runtime.paths import get_at

if TYPE_CHECKING:
    from hfpp.runtime.auxiliary_loss import AuxiliaryLoss
    from hfpp.runtime.emitting import Emitting
    from hfpp.runtime.paths import Path


class CutReached(BaseException):
    """Ends a stage's forward; no model's ``except Exception`` may swallow it."""


class Running:
    """What the forward in progress received and captured; empty between forwards."""

    def __init__(self) -> None:
        self.auxiliary: AuxiliaryLoss | None = None  # stays after the forward until it is taken
        self.clear()

    def clear(self) -> None:
        """Forget the forward, whether it went well or not."""
        self.capturing = False  # whether the stage's forward is under way
        self.received: tuple[Any, ...] | None = None
        self.with_gradients = False
        self.injected: set[int] = set()  # layers that took what was received
        self.captured: dict[int, torch.Tensor] = {}


@dataclass(frozen=True, slots=True)
class HollowRole:
    """What a hollow layer takes from its arguments, and whether it ends the forward."""

    running: Running
    call: LayerCall
    captures: tuple[tuple[int, Path], ...]  # (position among the outgoing slots, where)
    ends: bool
    emitting: Emitting | None = None


def disguise(cls: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """Let a subclass read as ``base`` itself: same name, module and documentation."""
    cls.__name__, cls.__qualname__, cls.__doc__ = base.__name__, base.__qualname__, base.__doc__
    cls.__module__ = base.__module__
    return cls


def _hollow_layer_class(base: type[nn.Module]) -> type[nn.Module]:
    class HollowLayer(base):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return _call_hollow_layer(self, args, kwargs)

        def _apply(self, fn: Callable[..., Any], _recurse: bool = True) -> nn.Module:
            _apply_to_peeked(self, fn)
            return self

    return disguise(HollowLayer, base)


def hollow_layer(skeleton_layer: nn.Module) -> nn.Module:
    """A stand-in for a foreign layer: class and attributes of the layer, no weights, no submodules.

    Its children stay readable as attributes (models peek at them) but are no submodules: nothing
    that walks the module tree finds them.
    """
    layer = nn.Module.__new__(_hollow_layer_class(type(skeleton_layer)))
    empty = nn.Module().__dict__
    peeked = {**skeleton_layer._modules, **skeleton_layer._parameters, **skeleton_layer._buffers}
    layer.__dict__.update(skeleton_layer.__dict__)
    layer.__dict__.update(empty)
    layer.__dict__.update(peeked)
    layer.__dict__.update(_hfpp_peeked=tuple(peeked), _hfpp_role=None)
    return layer


def _call_hollow_layer(layer: nn.Module, args: Any, kwargs: Any) -> Any:
    role: HollowRole | None = layer.__dict__["_hfpp_role"]
    if role is None:
        raise RuntimeError(
            f"a {type(layer).__name__} of another stage was called, which the model's forward did "
            f"not call when it was split: the arguments must lead through the same layers."
        )
    for position, path in role.captures:
        role.running.captured[position] = get_at((args, kwargs), path)
    if role.ends:
        raise CutReached
    hidden = get_at((args, kwargs), role.call.hidden_path)
    sizes = dict(zip(role.call.hidden_shape, hidden.shape, strict=True))
    result = _result_like(role.call.output, hidden, sizes)
    if role.emitting is not None:
        assert role.running.received is not None
        result = role.emitting.emit(result, role.running.received)
    return result


def _apply_to_peeked(layer: nn.Module, fn: Callable[..., Any]) -> None:
    """Attributes that models peek at follow a change of dtype; they never get storage."""
    for name in layer.__dict__["_hfpp_peeked"]:
        value = layer.__dict__[name]
        old = value if isinstance(value, torch.Tensor) else _first_tensor(value)
        if old is None:
            continue
        dtype = fn(torch.zeros((), dtype=old.dtype)).dtype
        if dtype != old.dtype:
            # other stages share the skeleton's modules: never cast them in place
            layer.__dict__[name] = copy.deepcopy(value).to(dtype)


def _first_tensor(value: Any) -> torch.Tensor | None:
    return next(value.parameters(), None) if isinstance(value, nn.Module) else None


def _result_like(template: Any, hidden: torch.Tensor, sizes: Mapping[int, int]) -> Any:
    """The recorded result of a layer with ``hidden`` in it; other tensors are unknown."""
    if isinstance(template, Hidden):
        return hidden
    if isinstance(template, TensorLike):
        shape = [sizes.get(size, size) for size in template.shape]
        return torch.full(
            shape, filling(template.dtype), dtype=template.dtype, device=hidden.device
        )
    if isinstance(template, dict):
        items = {k: _result_like(v, hidden, sizes) for k, v in template.items()}
        return type(template)(**items) if hasattr(template, "to_tuple") else items
    if isinstance(template, list):
        return [_result_like(item, hidden, sizes) for item in template]
    if isinstance(template, tuple):
        values = [_result_like(item, hidden, sizes) for item in template]
        return type(template)(*values) if hasattr(template, "_fields") else tuple(values)
    return template


class _StandIn(NamedTuple):
    """What is left of a foreign parameter: a scalar that follows casts and moves.

    It is NaN, so that a use which the hollow run did not show cannot go unnoticed.
    """

    scalar: torch.Tensor
    shape: tuple[int, ...]
    split_dtype: torch.dtype


def filling(dtype: torch.dtype) -> float:
    """What stands for an unknown value: one that shows wherever it is used."""
    return math.nan if dtype.is_floating_point else 0


def hollow_parameters(module: nn.Module, names: list[str]) -> None:
    """Replace parameters of ``module`` by stand-ins of the same shape that hold no storage."""
    stand_ins = {}
    for name in names:
        parameter = module._parameters.pop(name)
        assert parameter is not None
        scalar = torch.full(
            (), filling(parameter.dtype), dtype=parameter.dtype, device=parameter.device
        )
        stand_ins[name] = _StandIn(scalar, tuple(parameter.shape), parameter.dtype)
    module.__dict__["_hfpp_stand_ins"] = stand_ins
    module.__class__ = _stand_in_class(type(module), names)


def _stand_in_class(base: type[nn.Module], names: list[str]) -> type[nn.Module]:
    class StandIns(base):  # type: ignore[misc, valid-type]
        def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
            stand_ins = self.__dict__["_hfpp_stand_ins"]
            for name, stand_in in stand_ins.items():
                scalar = fn(stand_in.scalar)
                scalar = torch.full_like(scalar, filling(scalar.dtype))  # to_empty leaves anything
                stand_ins[name] = stand_in._replace(scalar=scalar)
            return super()._apply(fn, recurse)

    for name in names:
        setattr(StandIns, name, _stand_in(name))
    return disguise(StandIns, base)


def _stand_in(name: str) -> property:
    def get(self: nn.Module) -> torch.Tensor:
        stand_in: _StandIn = self.__dict__["_hfpp_stand_ins"][name]
        expanded = stand_in.scalar.expand(stand_in.shape)
        # transformers' weight initialisation leaves tensors alone that carry this mark
        expanded._is_hf_initialized = True  # type: ignore[attr-defined]
        return expanded

    return property(get)
