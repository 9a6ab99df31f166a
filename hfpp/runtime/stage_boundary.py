"""What is known of a stage from outside, and finding it inside of what wraps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    import torch.distributed as dist

    from hfpp.runtime.anatomy import Anatomy
    from hfpp.runtime.crossing import Slot, TensorLike
    from hfpp.runtime.ownership import Ownership, TiedParameter


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
        layers: indices of its layers; empty where there is no anatomy to know them from.
        tied_names: FQNs in this part whose tensor an earlier stage counts as its own.
        tied: the parameters that several stages of the pipeline hold.
        pp_group: process group of the pipeline; None until it is known.
        anatomy: the split model's; None for a model that could not be cut, on one stage, and for
            one that keeps its own forward.
        ownership: which stage holds what; None where there is no anatomy.
    """

    stage_index: int
    num_stages: int
    layers: range
    tied_names: frozenset[str]
    tied: tuple[TiedParameter, ...]
    pp_group: dist.ProcessGroup | None
    anatomy: Anatomy | None
    ownership: Ownership | None = None

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
    split_in = {name: p.dtype for name, p in boundary.anatomy.skeleton.named_parameters()}
    for name, parameter in unwrapped(part).named_parameters():
        before = split_in.get(_without_wrappers(name))  # None for adapters that came after
        if before is not None and parameter.is_floating_point():
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


def places_of(part: nn.Module) -> dict[str, Place]:
    """Where ``part``, a stage in whatever wraps it, registers its parameters, by FQN.

    Modules inside may be wrapped too: what wraps one is looked through by what its names lack.
    """
    places = {}
    for module_name, module in unwrapped(part).named_modules(remove_duplicate=False):
        for own_name in module._parameters:
            full = f"{module_name}.{own_name}" if module_name else own_name
            places[_without_wrappers(full)] = Place(module, own_name)
    return places


_WRAPPERS = frozenset(("_checkpoint_wrapped_module", "_orig_mod", "base_layer"))


def _without_wrappers(name: str) -> str:
    """The FQN without the steps of checkpoint_wrapper, torch.compile and adapters."""
    return ".".join(step for step in name.split(".") if step not in _WRAPPERS)


def own_layers(part: nn.Module) -> list[nn.Module]:
    """The layers that a stage runs itself, to shard, compile or checkpoint one by one."""
    boundary = boundary_of(part)
    if boundary is None or boundary.anatomy is None:
        return []
    layers = unwrapped(part).get_submodule(boundary.anatomy.layers_name)
    return [layers[index] for index in boundary.layers]  # type: ignore[index]
