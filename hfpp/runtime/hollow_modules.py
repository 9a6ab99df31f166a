"""Encoders on stages that hold none of their weights: run without data, for shapes alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfpp.runtime.hollow import disguise, filling
from hfpp.runtime.paths import map_tensors, walk_tensors
from hfpp.runtime.trace import HollowRun

if TYPE_CHECKING:
    from hfpp.runtime.anatomy import Anatomy

_FEW = 1024  # elements whose values may be part of a key


@dataclass(slots=True)
class HollowModule:
    """What runs in the place of a foreign module: the same module of the skeleton, without data.

    Whatever depends on its weights comes out as NaN, in the right shapes.
    """

    anatomy: Anatomy
    name: str
    _known: dict[Any, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> Any:
        """What the module computes in."""
        return self.anatomy.skeleton.get_submodule(self.name).dtype

    def __call__(self, args: Any, kwargs: Any) -> Any:
        """The module's result for these arguments."""
        tensors = [tensor for _, tensor in walk_tensors((args, kwargs))]
        device = tensors[0].device if tensors else torch.device("cpu")
        key = _key(args, kwargs)
        result = None if key is None else self._known.get(key)
        if result is None:
            module = self.anatomy.skeleton.get_submodule(self.name)
            leaves = [("param", name, p) for name, p in module.named_parameters()]
            plain_args, plain_kwargs = map_tensors(_without_data, (args, dict(kwargs)))
            with (
                torch.no_grad(),
                torch.autocast("cpu", enabled=False),
                torch.autocast(device.type, enabled=False),
                HollowRun(leaves),
            ):
                result = module(*plain_args, **plain_kwargs)
            if key is not None:
                self._known[key] = result
        return _filled(result, device)


def foreign_modules(stage: nn.Module, layers_name: str, foreign: set[str]) -> list[str]:
    """The outermost modules of ``stage`` whose parameters are all among ``foreign``.

    Args:
        stage: whose modules.
        layers_name: FQN of the list of layers, which none of them may hold or be part of.
        foreign: FQNs of parameters.
    """
    owners = {name.rpartition(".")[0] for name in foreign}
    found: list[str] = []
    for name, module in stage.named_modules():
        inside = f"{name}."
        if not name or layers_name.startswith(inside) or inside.startswith(f"{layers_name}."):
            continue
        if any(inside.startswith(f"{outer}.") for outer in found):
            continue
        holds = any(owner == name or owner.startswith(inside) for owner in owners)
        if holds and next(module.parameters(), None) is None:
            found.append(name)
    return found


def make_replaceable(module: nn.Module) -> None:
    """Let ``module`` be run hollow where its attribute ``_hfpp_hollow`` says so."""
    module.__class__ = _replaceable_class(type(module))
    module.__dict__["_hfpp_hollow"] = None


def _replaceable_class(base: type[nn.Module]) -> type[nn.Module]:
    class Replaceable(base):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            hollow: HollowModule | None = self.__dict__["_hfpp_hollow"]
            return super().forward(*args, **kwargs) if hollow is None else hollow(args, kwargs)

    if isinstance(inspect.getattr_static(base, "dtype", None), property):

        def dtype(self: Any) -> Any:
            """The skeleton's: transformers reads it off the parameters, and there are none."""
            hollow: HollowModule | None = self.__dict__["_hfpp_hollow"]
            return super(Replaceable, self).dtype if hollow is None else hollow.dtype

        Replaceable.dtype = property(dtype)
    return disguise(Replaceable, base)


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return torch.empty_like(tensor, device="meta")
    return tensor.detach().to("cpu")


def _filled(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        if value.device.type != "meta":
            return value.to(device)
        scalar = torch.full((), filling(value.dtype), dtype=value.dtype, device=device)
        return scalar.expand(value.shape)
    if isinstance(value, Mapping):
        items = {name: _filled(item, device) for name, item in value.items()}
        return type(value)(**items) if hasattr(value, "to_tuple") else items
    if isinstance(value, list):
        return [_filled(item, device) for item in value]
    if isinstance(value, tuple):
        items_ = [_filled(item, device) for item in value]
        return type(value)(*items_) if hasattr(value, "_fields") else tuple(items_)
    return value


def _key(args: Any, kwargs: Any) -> Any:
    """What the result depends on, or None where that is too much to compare."""

    def part(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                return (tuple(value.shape), value.dtype)
            if value.numel() > _FEW:
                raise TypeError
            return (tuple(value.shape), value.dtype, tuple(value.flatten().tolist()))
        if isinstance(value, Mapping):
            return tuple((name, part(item)) for name, item in value.items())
        if isinstance(value, list | tuple):
            return tuple(map(part, value))
        return (type(value), value)

    try:
        key = (part(args), part(kwargs))
        hash(key)
    except TypeError:
        return None
    return key
