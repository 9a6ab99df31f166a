"""Gradients of a whole pipeline: dividing them, and clipping by one norm over stages and shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hfpp.errors import PipelineConfigError
from hfpp.runtime.stage_boundary import boundary_of, places_of

__all__ = ["clip_grad_norm_", "scale_grads_by_divisor"]


def scale_grads_by_divisor(stages: Sequence[Any], divisor: float) -> None:
    """Divides the gradients of every local stage, in place and under `no_grad`.

    Args:
        stages: this rank's `PipelineStage` objects. A parameter that two of them share is divided
            once; parameters without a gradient are left alone.
        divisor: for example the count of microbatches, or of tokens in the batch.

    Raises:
        PipelineConfigError: a divisor that is zero or no finite number.

    Example:
        >>> scale_grads_by_divisor([], 8)
    """
    if isinstance(divisor, bool) or not math.isfinite(divisor) or divisor == 0:
        raise PipelineConfigError(
            f"divisor ({divisor}) must be a finite number other than zero: give the count to "
            "average over, for example the number of microbatches."
        )
    grads = {
        id(parameter): parameter.grad
        for stage in stages
        for parameter in stage.submod.parameters()
        if parameter.grad is not None
    }
    with torch.no_grad():
        for grad in grads.values():
            grad.div_(divisor)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | nn.Module | Iterable[Tensor] | Iterable[nn.Module],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    pp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Clips the gradients of the whole model by their norm over all stages and shards.

    Every parameter counts once: FSDP2's shards (DTensors) add up over their mesh, stages over the
    pipeline group, and of a tensor that two stages hold (tied embeddings) only its owner counts.
    All gradients, the copies' too, are scaled. Every rank of the pipeline (and of the shards' mesh)
    must call it, one that has no gradients as well: the norm is agreed on by all.

    Args:
        parameters: this rank's model parts (`pipeline_model(...).model_parts`, also when FSDP2, DDP
            or torch.compile wrapped them), or one of them. Plain parameters are taken as well; then
            `pp_group` says where the other stages are, and tied copies cannot be told apart.
        max_norm: the largest norm to leave; infinity only measures.
        norm_type: the p of the norm; infinity for the largest absolute value.
        error_if_nonfinite: raise, on every rank, when the norm is infinite or NaN.
        foreach: as in `torch.nn.utils.clip_grad_norm_`: None decides by the device.
        pp_group: the ranks of this pipeline. None takes the group that the parts were made for;
            without parts, None means that the given parameters are all there is.

    Returns:
        The norm before clipping, a float64 scalar, the same on every rank.

    Raises:
        PipelineConfigError: a `max_norm` or `norm_type` out of range, parts of different pipelines.
        RuntimeError: a norm that is not finite, with `error_if_nonfinite`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([weight], max_norm=1.0).item()
        5.0
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    _check_norms(max_norm, norm_type)
    scope = _scope(parameters, pp_group)
    shares = _shares(scope.counted)
    total = _total_norm(shares, scope, float(norm_type), foreach)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(
            f"The norm of order {norm_type:g} of all gradients is {total.item()}: nothing was "
            "clipped. Lower the learning rate, or pass error_if_nonfinite=False."
        )
    coefficient = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for grads in _by_kind([_local(p.grad) for p in scope.scaled if p.grad is not None]):
        factor = coefficient.to(grads[0].device, _norm_dtype(grads[0]))
        if _use_foreach(grads, foreach):
            torch._foreach_mul_(grads, factor)
        else:
            for grad in grads:
                grad.mul_(factor)
    return total


@dataclass(frozen=True, slots=True)
class _Scope:
    """What one call covers: the parameters to scale, those to count, and who else has some."""

    scaled: list[Tensor]
    counted: list[Tensor]
    pp_group: dist.ProcessGroup | None


class _Share(NamedTuple):
    """The gradients whose norms add up over the same groups of shards."""

    groups: tuple[dist.ProcessGroup, ...]
    device: torch.device
    grads: list[Tensor]


def _scope(
    parameters: Tensor | nn.Module | Iterable[Tensor] | Iterable[nn.Module],
    pp_group: dist.ProcessGroup | None,
) -> _Scope:
    given: list[Any] = (
        [parameters] if isinstance(parameters, Tensor | nn.Module) else list(parameters)
    )
    scaled: dict[int, Tensor] = {}
    counted: dict[int, Tensor] = {}
    groups: list[dist.ProcessGroup] = [] if pp_group is None else [pp_group]
    for item in given:
        if isinstance(item, nn.Module):
            boundary = boundary_of(item)
            copies: set[int] = set()
            if boundary is not None:
                places = places_of(item) if boundary.tied_names else {}
                copies = {id(places[name].parameter) for name in boundary.tied_names}
                if boundary.pp_group is not None and pp_group is None:
                    groups.append(boundary.pp_group)
            for parameter in item.parameters():
                scaled[id(parameter)] = parameter
                if id(parameter) not in copies:
                    counted[id(parameter)] = parameter
        elif isinstance(item, Tensor):
            scaled[id(item)] = counted[id(item)] = item
        else:
            raise PipelineConfigError(
                f"parameters holds a {type(item).__name__}: give the model parts, or their "
                "parameters."
            )
    if any(group != groups[0] for group in groups):
        raise PipelineConfigError(
            "parameters holds parts of different pipelines: clip each pipeline by itself."
        )
    return _Scope(list(scaled.values()), list(counted.values()), groups[0] if groups else None)


def _shares(parameters: list[Tensor]) -> list[_Share]:
    """Sorts gradients by the groups their shards are spread over, by the parameters' own layout.

    The layout and not the gradients decides, so that all ranks of a mesh make the same list, also
    where one has no gradient yet.
    """
    shares: dict[tuple[int, ...], _Share] = {}
    for parameter in parameters:
        groups: list[dist.ProcessGroup] = []
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            for dim, placement in enumerate(parameter.placements):
                if not placement.is_replicate():
                    groups.append(mesh.get_group(dim))
        key = tuple(id(group) for group in groups)
        share = shares.setdefault(key, _Share(tuple(groups), parameter.device, []))
        if parameter.grad is not None:
            share.grads.append(_local(parameter.grad))
    return list(shares.values())


def _total_norm(
    shares: list[_Share], scope: _Scope, norm_type: float, foreach: bool | None
) -> Tensor:
    """The norm over all shares, the shards of each, and all stages.

    It is added up in float64, where the p-th power neither overflows nor rounds small stages away.
    """
    largest = math.isinf(norm_type)
    own_device = scope.scaled[0].device if scope.scaled else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=own_device)
    for share in shares:
        part = torch.zeros((), dtype=torch.float64, device=share.device)
        for norm in _norms(share.grads, norm_type, foreach):
            value = norm.to(part.device, torch.float64)
            part = torch.maximum(part, value) if largest else part + value**norm_type
        for group in share.groups:
            part = _over_group(part, group, largest)
        part = part.to(total.device)
        total = torch.maximum(total, part) if largest else total + part
    if scope.pp_group is not None:
        total = _over_group(total, scope.pp_group, largest)
    return total if largest else total ** (1.0 / norm_type)


def _over_group(value: Tensor, group: dist.ProcessGroup, largest: bool) -> Tensor:
    """The sum, or the largest, of one value per rank; NaN wherever a rank has NaN."""
    sent = value.to(_group_device(group, value.device), copy=True)
    if not largest:
        dist.all_reduce(sent, group=group)
        return sent.to(value.device)
    # A maximum over ranks may lose a NaN, depending on the order: it travels as a flag.
    both = torch.stack([sent.nan_to_num(nan=math.inf, posinf=math.inf), sent.isnan().to(sent)])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    return torch.where(both[1] > 0, math.nan, both[0]).to(value.device)


def _norms(grads: list[Tensor], norm_type: float, foreach: bool | None) -> list[Tensor]:
    norms: list[Tensor] = []
    for alike in _by_kind([grad for grad in grads if grad.numel() > 0]):
        dtype = _norm_dtype(alike[0])
        if _use_foreach(alike, foreach):
            norms += torch._foreach_norm(alike, norm_type, dtype=dtype)
        else:
            norms += [torch.linalg.vector_norm(grad, norm_type, dtype=dtype) for grad in alike]
    return norms


def _norm_dtype(grad: Tensor) -> torch.dtype:
    return torch.float64 if grad.dtype == torch.float64 else torch.float32


def _by_kind(grads: list[Tensor]) -> list[list[Tensor]]:
    """Gradients of one device and dtype together, as the foreach operators want them."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        kinds.setdefault((grad.device, grad.dtype), []).append(grad)
    return list(kinds.values())


def _use_foreach(grads: list[Tensor], foreach: bool | None) -> bool:
    return grads[0].device.type in ("cpu", "cuda") if foreach is None else foreach


def _local(grad: Tensor) -> Tensor:
    """This rank's shard of a gradient: the tensor itself, so that writing into it is seen."""
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _group_device(group: dist.ProcessGroup | None, own: torch.device) -> torch.device:
    """A device that the group's collectives take: NCCL takes none of the host's tensors."""
    if group is None or own.type != "cpu" or "nccl" not in dist.get_backend(group):
        return own
    return torch.device("cuda", torch.cuda.current_device())


def _check_norms(max_norm: float, norm_type: float) -> None:
    if not max_norm >= 0:
        raise PipelineConfigError(
            f"max_norm ({max_norm}) must not be negative: use a positive norm, or infinity to "
            "measure without clipping."
        )
    if not norm_type > 0:
        raise PipelineConfigError(
            f"norm_type ({norm_type}) must be positive: use 2.0, or infinity for the largest value."
        )
