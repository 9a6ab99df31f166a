"""A stage: the model's own forward over its own layers, the other layers hollow.

A hollow layer keeps its place, class and attributes but has no weights and hands the hidden state
through. What was received replaces the arguments of the stage's own layers; the first foreign layer
after them takes what crosses the next cut and ends the forward.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from hfpp.errors import PipelineConfigError
from hfpp.runtime.anatomy import IDS, Anatomy, Hidden, LayerCall, Slot, TensorLike
from hfpp.runtime.trace import Key, Path

if TYPE_CHECKING:
    from hfpp.runtime.ownership import TiedParameter

_MARK = "_hfpp_received"


class TensorMeta(NamedTuple):
    """Shape, dtype and gradient of a tensor at a stage's boundary."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBoundary:
    """What is known of one stage from outside.

    Attributes:
        stage_index: the stage, of ``num_stages``.
        layers: indices of its layers.
        tied_names: FQNs in this part whose tensor an earlier stage counts as its own.
        tied: the parameters that several stages of the pipeline hold.
        pp_group: process group of the pipeline; None until it is known.
        anatomy: the split model's; None for a model that could not be cut, on one stage.
    """

    stage_index: int
    num_stages: int
    layers: range
    tied_names: frozenset[str]
    tied: tuple[TiedParameter, ...]
    pp_group: dist.ProcessGroup | None
    anatomy: Anatomy | None

    def __deepcopy__(self, memo: Any) -> StageBoundary:
        return self  # immutable, and a process group cannot be copied

    @property
    def is_first(self) -> bool:
        """True for the stage that takes the token ids."""
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        """True for the stage that returns the model's output."""
        return self.stage_index == self.num_stages - 1

    def slots_in(self) -> tuple[Slot, ...]:
        """What arrives from the previous stage; nothing at the first."""
        return (
            () if self.is_first or self.anatomy is None else self.anatomy.slots(self.layers.start)
        )

    def slots_out(self) -> tuple[Slot, ...]:
        """What goes to the next stage; nothing at the last."""
        return () if self.is_last or self.anatomy is None else self.anatomy.slots(self.layers.stop)

    def tensor_metas(
        self, microbatch_size: int, seq_len: int, dtype: torch.dtype | None
    ) -> tuple[tuple[TensorMeta, ...], tuple[TensorMeta, ...]] | None:
        """Inputs and outputs of the stage for microbatches of int64 ``[microbatch_size, seq_len]``.

        Args:
            microbatch_size: sequences in a microbatch.
            seq_len: tokens in a sequence.
            dtype: what the model computes in; None: what it was split in.

        Returns:
            The metas, or None where the stage's anatomy is not known.
        """
        if self.anatomy is None:
            return None
        sizes = (microbatch_size, seq_len, dtype)
        inputs: tuple[TensorMeta, ...]
        if self.is_first:
            inputs = (TensorMeta((microbatch_size, seq_len), torch.int64, False),)
        else:
            inputs = _metas(self.anatomy.slot_metas(self.layers.start, *sizes))
        if self.is_last:
            return inputs, _metas((self.anatomy.output_meta(*sizes),))
        return inputs, _metas(self.anatomy.slot_metas(self.layers.stop, *sizes))


def _metas(tensors: tuple[TensorLike, ...]) -> tuple[TensorMeta, ...]:
    return tuple(TensorMeta(t.shape, t.dtype, t.dtype.is_floating_point) for t in tensors)


def boundary_of(module: nn.Module) -> StageBoundary | None:
    """The boundary of a stage that hfpp made, also when wrapped; None for any other module."""
    boundary = unwrapped(module).__dict__.get("_hfpp_boundary")
    assert boundary is None or isinstance(boundary, StageBoundary)
    return boundary


def unwrapped(module: nn.Module) -> nn.Module:
    """The stage, or a plain module, inside of whatever wraps it."""
    stage = next((m for m in module.modules() if "_hfpp_boundary" in m.__dict__), None)
    while stage is None and isinstance(module, nn.parallel.DistributedDataParallel):
        module = module.module
    return module if stage is None else stage


def cast_dtype(part: nn.Module) -> torch.dtype | None:
    """What a stage was cast to after the split; None while it has the dtype it was split in."""
    boundary = boundary_of(part)
    if boundary is None or boundary.anatomy is None:
        return None
    for name, parameter in unwrapped(part).named_parameters():
        if parameter.is_floating_point():
            before = boundary.anatomy.skeleton.get_parameter(_without_wrappers(name)).dtype
            return None if parameter.dtype == before else parameter.dtype
    return None


class Place(NamedTuple):
    """Where a parameter is registered: wrappers such as FSDP2 put another object there."""

    owner: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that is there now."""
        parameter = self.owner._parameters[self.name]
        assert parameter is not None
        return parameter


def place_of(part: nn.Module, name: str) -> Place:
    """Where ``part``, a stage in whatever wraps it, registers the parameter of FQN ``name``.

    Modules inside may be wrapped too: what wraps one is looked through by what its names lack.
    """
    for module_name, module in unwrapped(part).named_modules():
        for own_name in module._parameters:
            full = f"{module_name}.{own_name}" if module_name else own_name
            if full == name or _without_wrappers(full) == name:
                return Place(module, own_name)
    raise KeyError(name)


def _without_wrappers(name: str) -> str:
    """The FQN without the steps of checkpoint_wrapper and torch.compile."""
    return ".".join(
        s for s in name.split(".") if s not in ("_checkpoint_wrapped_module", "_orig_mod")
    )


def own_layers(part: nn.Module) -> list[nn.Module]:
    """The layers that a stage runs itself, to shard, compile or checkpoint one by one."""
    boundary = boundary_of(part)
    if boundary is None or boundary.anatomy is None:
        return []
    layers = unwrapped(part).get_submodule(boundary.anatomy.layers_name)
    return [layers[index] for index in boundary.layers]  # type: ignore[index]


class _CutReached(BaseException):
    """Ends a stage's forward; no model's ``except Exception`` may swallow it."""


class _Running:
    """What the forward in progress received and captured; empty between forwards."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the forward, whether it went well or not."""
        self.received: tuple[Any, ...] | None = None
        self.with_gradients = False
        self.injected: set[int] = set()  # layers that took what was received
        self.captured: dict[int, torch.Tensor] = {}


@dataclass(frozen=True, slots=True)
class _HollowRole:
    running: _Running
    call: LayerCall
    captures: tuple[tuple[int, Path], ...]  # (position among the outgoing slots, where)
    ends: bool


@dataclass(frozen=True, slots=True)
class _OwnRole:
    running: _Running
    layer: int
    hidden_path: Path
    injections: tuple[tuple[int, Path], ...]  # (position among the incoming slots, where)


def _disguise(cls: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """Let a subclass read as ``base`` itself: same name, module and documentation."""
    cls.__name__, cls.__qualname__, cls.__doc__ = base.__name__, base.__qualname__, base.__doc__
    cls.__module__ = base.__module__
    return cls


# Hollow layers and parameters


def _hollow_layer_class(base: type[nn.Module]) -> type[nn.Module]:
    class HollowLayer(base):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return _call_hollow_layer(self, args, kwargs)

        def _apply(self, fn: Callable[..., Any], _recurse: bool = True) -> nn.Module:
            _apply_to_peeked(self, fn)
            return self

    return _disguise(HollowLayer, base)


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
    role: _HollowRole | None = layer.__dict__["_hfpp_role"]
    if role is None:
        raise RuntimeError(
            f"a {type(layer).__name__} of another stage was called, which the model's forward did "
            f"not call when it was split: the arguments must lead through the same layers."
        )
    for position, path in role.captures:
        role.running.captured[position] = get_at((args, kwargs), path)
    if role.ends:
        raise _CutReached
    hidden = get_at((args, kwargs), role.call.hidden_path)
    sizes = dict(zip(role.call.hidden_shape, hidden.shape, strict=True))
    return _result_like(role.call.output, hidden, sizes)


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
            shape, _filling(template.dtype), dtype=template.dtype, device=hidden.device
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


def _filling(dtype: torch.dtype) -> float:
    """What stands for an unknown value: one that shows wherever it is used."""
    return math.nan if dtype.is_floating_point else 0


def hollow_parameters(module: nn.Module, names: list[str]) -> None:
    """Replace parameters of ``module`` by stand-ins of the same shape that hold no storage."""
    stand_ins = {}
    for name in names:
        parameter = module._parameters.pop(name)
        assert parameter is not None
        scalar = torch.full(
            (), _filling(parameter.dtype), dtype=parameter.dtype, device=parameter.device
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
                scalar = torch.full_like(scalar, _filling(scalar.dtype))  # to_empty leaves anything
                stand_ins[name] = stand_in._replace(scalar=scalar)
            return super()._apply(fn, recurse)

    for name in names:
        setattr(StandIns, name, _stand_in(name))
    return _disguise(StandIns, base)


def _stand_in(name: str) -> property:
    def get(self: nn.Module) -> torch.Tensor:
        stand_in: _StandIn = self.__dict__["_hfpp_stand_ins"][name]
        expanded = stand_in.scalar.expand(stand_in.shape)
        # transformers' weight initialisation leaves tensors alone that carry this mark
        expanded._is_hf_initialized = True  # type: ignore[attr-defined]
        return expanded

    return property(get)


# The stage's own layers


def _own_layer_class(base: type[nn.Module]) -> type[nn.Module]:
    class OwnLayer(base):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = _with_received(self, args, kwargs)
            return super().__call__(*args, **kwargs)

    return _disguise(OwnLayer, base)


def inject_into(layer: nn.Module, role: _OwnRole) -> None:
    """Make ``layer`` take received values; its class keeps its name."""
    layer.__class__ = _own_layer_class(type(layer))
    layer.__dict__["_hfpp_role"] = role


def _with_received(layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Put what was received in the place of what the model's code before this layer computed.

    Around the call and not in a pre-hook: checkpointing that replays a layer would run the hook
    again and inject another microbatch. Where a replay comes through here all the same, the mark on
    the dummy argument tells which microbatch it belongs to.
    """
    role: _OwnRole = layer.__dict__["_hfpp_role"]
    dummy = get_at((args, kwargs), role.hidden_path)
    received = role.running.received
    if received is not None:
        setattr(dummy, _MARK, received)
        role.running.injected.add(role.layer)
    else:
        received = getattr(dummy, _MARK, None)
    if role.running.with_gradients and not torch.is_grad_enabled():
        raise PipelineConfigError(
            f"a {type(layer).__name__} of a pipeline stage runs without gradients within a forward "
            f"with them, as reentrant checkpointing (use_reentrant=True) around a layer does: its "
            f"gradients would be lost. Use use_reentrant=False (NO_REENTRANT)."
        )
    if received is None:
        raise RuntimeError(
            f"a {type(layer).__name__} of a pipeline stage was called outside of the stage's "
            f"forward, which has what the previous stage sent: call the stage itself."
        )
    call: Any = (args, dict(kwargs))
    for position, path in role.injections:
        call = set_at(call, path, received[position])
    return call[0], call[1]


def get_at(value: Any, path: Path) -> Any:
    """The item of nested containers at ``path``."""
    for step in path:
        value = value[step.name] if isinstance(step, Key) else value[step]
    return value


def set_at(value: Any, path: Path, new: Any) -> Any:
    """``value`` with ``new`` at ``path``.

    Tuples are rebuilt, lists and mappings written in place, so that a container that the model
    shares between layers stays shared.
    """
    if not path:
        return new
    step, rest = path[0], path[1:]
    if isinstance(step, Key):
        value = {} if value is None else value
        old = value.get(step.name, None)
        value[step.name] = set_at(old, rest, new)
        return value
    items = list(value) if value is not None else []
    items.extend([None] * (step + 1 - len(items)))
    items[step] = set_at(items[step], rest, new)
    if isinstance(value, list):
        value[:] = items
        return value
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


# The stage's forward


class _OwnGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous: sends refuse other layouts."""

    @staticmethod
    def forward(_ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        """Give the tensor itself: no view, as models may write into their hidden state."""
        return tensor.detach()

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Give the gradient in a layout that can be sent."""
        return gradient.contiguous()


def _own_gradient(tensor: torch.Tensor) -> torch.Tensor:
    same: torch.Tensor = _OwnGradient.apply(tensor)  # type: ignore[no-untyped-call]
    return same


def _stage_class(base: type[nn.Module]) -> type[nn.Module]:
    class Stage(base):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return _run_stage(self, super().forward, args, kwargs)

    return _disguise(Stage, base)


def _run_stage(
    stage: nn.Module, own_forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    boundary: StageBoundary = stage.__dict__["_hfpp_boundary"]
    running: _Running = stage.__dict__["_hfpp_running"]
    ids_name: str = stage.__dict__["_hfpp_ids_name"]
    for name, value in stage.__dict__["_hfpp_constants"].items():
        if kwargs.setdefault(name, value) != value:
            raise PipelineConfigError(
                f"{name}={kwargs[name]!r} cannot be passed to a pipeline stage, which runs with "
                f"{name}={value!r}: leave it out."
            )
    if boundary.is_first:
        if len(args) > 1 and not boundary.is_last:
            raise PipelineConfigError(
                f"the first stage got {len(args)} positional arguments, but only {ids_name} may be "
                f"one: the other stages would not see the rest. Pass it by keyword, on every rank."
            )
        ids = args[0] if args else kwargs.get(ids_name)
    else:
        slots = boundary.slots_in()
        if len(args) != len(slots):
            raise ValueError(
                f"stage {boundary.stage_index} of {boundary.num_stages} takes {len(slots)} "
                f"tensors from the stage before, got {len(args)}."
            )
        _adapt_stand_ins(stage, boundary, args[0])
        received = tuple(_own_gradient(x) if x.requires_grad else x for x in args)
        ids = kwargs.pop(ids_name, None)
        if ids is None:
            ids = _ids_for(boundary, received)
        args, kwargs[ids_name], running.received = (), ids, received
        running.with_gradients = torch.is_grad_enabled()
    try:
        try:
            result = own_forward(*args, **kwargs)
        except _CutReached:
            _check_injected(stage, boundary, running)
            return _outgoing(boundary, running, ids)
        _check_injected(stage, boundary, running)
    finally:
        running.clear()
    if not boundary.is_last:
        raise _skipped(boundary, boundary.layers.stop)
    return primary_output(result)


def _check_injected(stage: nn.Module, boundary: StageBoundary, running: _Running) -> None:
    missed = stage.__dict__["_hfpp_injected"] - running.injected
    if missed:
        raise _skipped(boundary, min(missed))


def _skipped(boundary: StageBoundary, layer: int) -> RuntimeError:
    return RuntimeError(
        f"the forward of stage {boundary.stage_index} did not call layer {layer}, which the model "
        f"called when it was split: turn off what skips layers (layerdrop, early exits)."
    )


def _adapt_stand_ins(stage: nn.Module, boundary: StageBoundary, hidden: torch.Tensor) -> None:
    """Stand-ins are no parameters: what moves or casts parameters one by one leaves them behind.

    FSDP2 computes in another dtype than it stores. Where the hidden state had the model's dtype
    and nobody has cast the stage, the one that arrives tells which; autocast is no cast.
    """
    assert boundary.anatomy is not None
    model_dtype = boundary.anatomy.dtype
    tells_dtype = boundary.slots_in()[0].dtype == model_dtype and not torch.is_autocast_enabled(
        hidden.device.type
    )
    for owner in stage.__dict__["_hfpp_stand_in_owners"]:
        stand_ins = owner.__dict__["_hfpp_stand_ins"]
        for name, (scalar, _, split_dtype) in stand_ins.items():
            untouched = scalar.dtype == split_dtype == model_dtype
            dtype = hidden.dtype if tells_dtype and untouched else scalar.dtype
            if (scalar.device, scalar.dtype) != (hidden.device, dtype):
                moved = scalar.to(hidden.device, dtype)
                stand_ins[name] = stand_ins[name]._replace(scalar=moved)


def _ids_for(boundary: StageBoundary, received: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The real token ids where the model needs their values, else zeros of their shape."""
    for slot, tensor in zip(boundary.slots_in(), received, strict=True):
        if slot.key == IDS:
            return tensor
    assert boundary.anatomy is not None
    sizes = boundary.anatomy.sizes_from(received[0], boundary.layers.start)
    return torch.zeros(sizes, dtype=torch.int64, device=received[0].device)


def _outgoing(boundary: StageBoundary, running: _Running, ids: Any) -> Any:
    known = {slot.key: index for index, slot in enumerate(boundary.slots_in())}
    out = []
    for position, slot in enumerate(boundary.slots_out()):
        if slot.key == IDS:
            tensor = ids
        elif slot.key in known:
            assert running.received is not None
            tensor = running.received[known[slot.key]]
        else:
            tensor = running.captured[position]
        tensor = tensor.contiguous()
        if tensor._is_view():
            tensor = tensor.clone()  # split backward detaches outputs in place, views forbid that
        if slot.is_floating and torch.is_grad_enabled() and not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_()  # behind frozen layers
        out.append(tensor)
    return out[0] if len(out) == 1 else tuple(out)


def primary_output(result: Any) -> Any:
    """The tensor that a model's forward is called for: the logits, else the hidden state."""
    if isinstance(result, Mapping):
        for name in ("logits", "last_hidden_state"):
            if isinstance(result.get(name), torch.Tensor):
                return result[name]
        result = tuple(result.values())
    if isinstance(result, tuple | list):
        tensors = [item for item in result if isinstance(item, torch.Tensor)]
        if not tensors:
            raise TypeError("the model's forward returned no tensor at its top level.")
        return tensors[0]
    return result


def make_stage(
    stage: nn.Module,
    boundary: StageBoundary,
    *,
    ids_name: str,
    constants: Mapping[str, Any],
    stand_in_owners: list[nn.Module],
) -> None:
    """Turn a structural copy, its foreign layers hollow, into a stage; in place."""
    running = _Running()
    stage.__class__ = _stage_class(type(stage))
    stage.__dict__.update(
        _hfpp_boundary=boundary,
        _hfpp_running=running,
        _hfpp_ids_name=ids_name,
        _hfpp_constants=dict(constants),
        _hfpp_stand_in_owners=stand_in_owners,
    )
    anatomy = boundary.anatomy
    injected: set[int] = set()
    stage.__dict__["_hfpp_injected"] = injected
    if anatomy is None:
        return
    layers = stage.get_submodule(anatomy.layers_name)
    slots_in, slots_out = boundary.slots_in(), boundary.slots_out()
    known = {slot.key for slot in slots_in}
    captures: dict[int, list[tuple[int, Path]]] = {}
    last = boundary.layers.stop
    for position, slot in enumerate(slots_out):
        if slot.key not in known and slot.key != IDS:
            layer, path = slot.uses[0]
            captures.setdefault(layer, []).append((position, path))
            last = max(last, layer)
    for index in anatomy.calls:
        layer = layers[index]  # type: ignore[index]
        if index in boundary.layers:
            injections = tuple(
                (position, path)
                for position, slot in enumerate(slots_in)
                for used_by, path in slot.uses
                if used_by == index
            )
            if injections:
                path = anatomy.calls[index].hidden_path
                inject_into(layer, _OwnRole(running, index, path, injections))
                injected.add(index)
        else:
            layer.__dict__["_hfpp_role"] = _HollowRole(
                running,
                anatomy.calls[index],
                tuple(captures.get(index, ())) if index >= boundary.layers.stop else (),
                ends=not boundary.is_last and index == last,
            )
