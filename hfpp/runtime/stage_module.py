"""A stage: the model's own forward over its own layers, the other layers hollow.

A hollow layer keeps its place, class and attributes but has no weights and hands the hidden state
through. What was received replaces the arguments of the stage's own layers; the first foreign layer
after them takes what crosses the next cut and ends the forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfpp.errors import PipelineConfigError
from hfpp.runtime.auxiliary_loss import auxiliary_loss_in, check_flag, check_taken
from hfpp.runtime.auxiliary_term import asks_for_auxiliary_loss, flagged_configs
from hfpp.runtime.crossing import IDS
from hfpp.runtime.emitting import make_capturing
from hfpp.runtime.hollow import CutReached, Running, disguise
from hfpp.runtime.hollow_modules import foreign_modules, make_replaceable
from hfpp.runtime.layer_list import several_outputs
from hfpp.runtime.needed_gradients import mark
from hfpp.runtime.paths import get_at, set_at
from hfpp.runtime.stage_kinds import OwnRole, StageKind, kind_for, stage_kind, use_kind
from hfpp.runtime.torch_compat import uncompiled, uncompiled_itself, unseen_writing

if TYPE_CHECKING:
    from hfpp.runtime.auxiliary_loss import AuxiliaryLoss
    from hfpp.runtime.needed_gradients import NeededGradients
    from hfpp.runtime.paths import Path
    from hfpp.runtime.stage_boundary import StageBoundary

_MARK = "_hfpp_received"


_own_layer_classes: weakref.WeakKeyDictionary[type, weakref.ref[type]] = weakref.WeakKeyDictionary()
"""One per class of layers: torch.compile tells code apart by the class that runs it."""


def _own_layer_class(base: type[nn.Module]) -> type[nn.Module]:
    known = _own_layer_classes.get(base)
    found = None if known is None else known()
    if found is not None:
        return found

    class OwnLayer(base):  # type: ignore[misc, valid-type]
        # a compiled layer takes what was received as its arguments, and knows nothing of them
        @uncompiled_itself
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = _with_received(self, args, kwargs)
            return super().__call__(*args, **kwargs)

    disguise(OwnLayer, base)
    _own_layer_classes[base] = weakref.ref(OwnLayer)
    return OwnLayer


def inject_into(layer: nn.Module) -> None:
    """Make ``layer`` take received values where its role says so; its class keeps its name."""
    layer.__class__ = _own_layer_class(type(layer))
    layer.__dict__["_hfpp_role"] = None


@uncompiled
def _with_received(layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Put what was received in the place of what the model's code before this layer computed.

    Around the call and not in a pre-hook: checkpointing that replays a layer would run the hook
    again and inject another microbatch. Where a replay comes through here all the same, the mark on
    the dummy argument tells which microbatch it belongs to.
    """
    role: OwnRole | None = layer.__dict__["_hfpp_role"]
    if role is None:
        return args, kwargs
    dummy = get_at((args, kwargs), role.hidden_path)
    received = role.running.received
    if received is not None:
        setattr(dummy, _MARK, (received, role))
        role.running.injected.add(role.layer)
        _write_arguments(layer, (args, kwargs), role.writes, received)
    else:
        received, role = getattr(dummy, _MARK, (None, role))
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


def _write_arguments(
    layer: nn.Module,
    call: tuple[Any, Any],
    writes: tuple[tuple[int, Path], ...],
    received: tuple[Any, ...],
) -> None:
    """Write what was received into the tensors themselves that the model's code made.

    A loop that adds residuals or collects states by itself looks at its own variables again.
    """
    storages: dict[int, int] = {}
    for position, path in writes:
        argument, value = get_at(call, path), received[position]
        storage = argument.untyped_storage().data_ptr()
        alike = (argument.shape, argument.dtype) == (value.shape, value.dtype)
        if not alike or storages.setdefault(storage, position) != position:
            raise RuntimeError(
                f"a {type(layer).__name__} of a pipeline stage is called with other arguments than "
                f"when the model was split: its {argument.dtype} {list(argument.shape)} is to hold "
                f"{value.dtype} {list(value.shape)} that the model's code reads again, apart from "
                f"all others. Keep the layers on one stage (pipeline size 1)."
            )
        with unseen_writing(argument):  # what checkpointing has noted of it is still true
            argument.copy_(value)


class _OwnGradients(torch.autograd.Function):
    """Identity over all that was received, whose gradients can be sent.

    They are contiguous, and there is one for each value: zeros for a value that this stage hands on
    to nobody. Sends refuse other layouts, and torch before 2.13 a gradient that is missing.
    """

    @staticmethod
    def forward(_ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give the tensors themselves: no views, as models may write into their hidden state."""
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(_ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give the gradients in a layout that can be sent; autograd made the missing ones."""
        return tuple(gradient.contiguous() for gradient in gradients)


def _with_own_gradients(received: tuple[Any, ...], *, needed: bool) -> tuple[Any, ...]:
    if not needed:
        return tuple(tensor.detach() for tensor in received)
    differentiable = [tensor for tensor in received if tensor.requires_grad]
    if not differentiable:
        return received
    joined = iter(_OwnGradients.apply(*differentiable))  # type: ignore[no-untyped-call]
    return tuple(next(joined) if tensor.requires_grad else tensor for tensor in received)


def _stage_class(base: type[nn.Module]) -> type[nn.Module]:
    class Stage(base):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return _run_stage(self, super().forward, args, kwargs)

    return disguise(Stage, base)


def _run_stage(
    stage: nn.Module, own_forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    running: Running = stage.__dict__["_hfpp_running"]
    ids_name: str = stage.__dict__["_hfpp_ids_name"]
    check_flag(stage, kwargs)
    check_taken(stage)
    needed: NeededGradients = stage.__dict__["_hfpp_gradients"]
    kind = kind_for(stage, args, kwargs)
    use_kind(stage, kind)
    boundary = kind.boundary
    kwargs = {name: value for name, value in kwargs.items() if name not in kind.dropped}
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
        if args:
            kwargs.pop(ids_name, None)
        ids = args[0] if args else kwargs.get(ids_name)
    else:
        slots = boundary.slots_in()
        if not args and len(slots) == 1 and _is_floating(kwargs.get(ids_name)):
            args = (kwargs.pop(ids_name),)  # a wrapper around the stage names what it hands on
        if len(args) != len(slots):
            raise ValueError(
                f"stage {boundary.stage_index} of {boundary.num_stages} takes {len(slots)} "
                f"tensors from the stage before, got {len(args)}. A wrapper around the stage must "
                f"hand on positional arguments as such."
            )
        _adapt_stand_ins(stage, boundary, args[0])
        received = _with_own_gradients(args, needed=needed.incoming)
        ids = kwargs.pop(ids_name, None)
        if ids is None:
            ids = _ids_for(boundary, received)
        args, kwargs[ids_name], running.received = (), ids, received
        running.with_gradients = torch.is_grad_enabled()
    running.capturing = True
    try:
        try:
            result = own_forward(*args, **kwargs)
        except CutReached:
            _check_injected(kind, running)
            return _outgoing(boundary, running, ids, needed=needed.outgoing)
        _check_injected(kind, running)
        if boundary.is_last:
            running.auxiliary = _auxiliary_loss(stage, boundary, running, result)
    finally:
        running.clear()
    if not boundary.is_last:
        raise _skipped(boundary, boundary.layers.stop)
    return primary_output(result)


def _auxiliary_loss(
    stage: nn.Module, boundary: StageBoundary, running: Running, result: Any
) -> AuxiliaryLoss | None:
    anatomy = boundary.anatomy
    if anatomy is None or anatomy.auxiliary is None:
        return None
    expected = {
        path: tensor
        for slot, tensor in zip(boundary.slots_in(), running.received or (), strict=True)
        for path in anatomy.returned.get(slot.key, ())
    }
    return auxiliary_loss_in(stage, anatomy.auxiliary, result, expected)


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _check_injected(kind: StageKind, running: Running) -> None:
    missed = kind.injected - running.injected
    if missed:
        raise _skipped(kind.boundary, min(missed))


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


def _outgoing(boundary: StageBoundary, running: Running, ids: Any, *, needed: bool) -> Any:
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
        if not needed:
            tensor = tensor.detach()
        elif slot.is_floating and torch.is_grad_enabled() and not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_()  # behind frozen layers
        out.append(tensor)
    return out[0] if len(out) == 1 else tuple(out)


def primary_output(result: Any) -> Any:
    """The tensor that a model's forward is called for: the logits, else the hidden state."""
    if isinstance(result, Mapping):
        for name in ("logits", "last_hidden_state"):
            if isinstance(result.get(name), torch.Tensor):
                return result[name]
        tensors = [name for name, item in result.items() if isinstance(item, torch.Tensor)]
        if len(tensors) > 1:
            raise several_outputs("the model", tensors)
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
    running, anatomy, configs = Running(), boundary.anatomy, flagged_configs(stage)
    mark(stage)
    stage.__class__ = _stage_class(type(stage))
    stage.__dict__.update(
        _hfpp_boundary=boundary,
        _hfpp_running=running,
        _hfpp_ids_name=ids_name,
        _hfpp_constants=dict(constants),
        _hfpp_stand_in_owners=stand_in_owners,
        _hfpp_flagged_configs=configs,
        _hfpp_flag=asks_for_auxiliary_loss(configs) if anatomy is None else anatomy.flagged,
    )
    kind = stage_kind(boundary, running)
    layers: dict[int, nn.Module] = {}
    encoders: dict[str, nn.Module] = {}
    unused: set[str] = set()
    takes = kind.injected
    if anatomy is not None:
        layers = dict(enumerate(stage.get_submodule(anatomy.layers_name).children()))
        unused = anatomy.unused_parameters()
        if unused and not boundary.is_first:
            takes = frozenset(boundary.layers)  # encoders may hand values to any layer
            names = foreign_modules(stage, anatomy.layers_name, unused)
            encoders = {name: stage.get_submodule(name) for name in names}
    gives = {place: layers[place[0]].get_submodule(place[1]) for place in kind.results}
    for module in gives.values():
        make_capturing(module, running)
    for index in takes:
        inject_into(layers[index])
    for module in encoders.values():
        make_replaceable(module)
    stage.__dict__.update(
        _hfpp_layers=layers,
        _hfpp_encoders=encoders,
        _hfpp_takes=takes,
        _hfpp_gives=gives,
        _hfpp_takes_media=bool(unused),
        _hfpp_text_kind=kind,
        _hfpp_kinds={},
    )
    use_kind(stage, kind)
