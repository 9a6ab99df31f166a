"""Shapes at the stages' boundaries, told to torch before the first step or for a new length."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfpp.errors import PipelineConfigError
from hfpp.plan.tensor_shapes import hidden_and_vocab_size
from hfpp.runtime import torch_compat as compat
from hfpp.runtime.stage_boundary import boundary_of, cast_dtype, unwrapped

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage

__all__ = ["precompute_stage_shapes", "reset_pp_stage_shapes"]

logger = logging.getLogger(__name__)

_Tensors = tuple[torch.Tensor, ...]


def precompute_stage_shapes(
    stages: Sequence[PipelineStage],
    model_config: Any,
    microbatch_size: int,
    seq_len: int,
    tensor_dtype: torch.dtype | None = None,
) -> int:
    """Gives local stages their shapes: see `hfpp.functional._precompute_stage_shapes`."""
    metas = _all_metas(stages, model_config, microbatch_size, seq_len, tensor_dtype)
    return _apply(stages, metas, microbatch_size * seq_len)


def reset_pp_stage_shapes(
    schedule: Any,
    stages: Sequence[PipelineStage],
    model_config: Any,
    microbatch_size: int,
    seq_len: int,
    tensor_dtype: torch.dtype | None = None,
) -> int:
    """Readies a schedule for another length: see `hfpp.functional.reset_pp_stage_shapes`."""
    # First what can fail: an error leaves the schedule as it was.
    metas = _all_metas(stages, model_config, microbatch_size, seq_len, tensor_dtype)
    for stage in stages:
        compat.forget_infrastructure(stage)
    compat.forget_initialization(schedule)
    if isinstance(schedule, compat.PreparedSchedule):
        schedule.shapes_were_reset()
    return _apply(stages, metas, microbatch_size * seq_len)


def _all_metas(
    stages: Sequence[PipelineStage],
    model_config: Any,
    microbatch_size: int,
    seq_len: int,
    tensor_dtype: torch.dtype | None,
) -> list[tuple[_Tensors, _Tensors]]:
    _check_size("microbatch_size", microbatch_size)
    _check_size("seq_len", seq_len)
    return [_metas(stage, model_config, microbatch_size, seq_len, tensor_dtype) for stage in stages]


def _apply(
    stages: Sequence[PipelineStage], metas: list[tuple[_Tensors, _Tensors]], batch_tokens: int
) -> int:
    """Tells each stage its shapes; returns the largest token count of their primary outputs."""
    tokens = []
    for stage, (inputs, outputs) in zip(stages, metas, strict=True):
        if not compat.set_static_metadata(stage, inputs, outputs):
            logger.info(
                "torch %s takes no static shapes: they are inferred on the first step",
                torch.__version__,
            )
            return batch_tokens
        tokens.append(_token_count(outputs[0]))
    return max(tokens, default=batch_tokens)


def _metas(
    stage: PipelineStage,
    model_config: Any,
    microbatch_size: int,
    seq_len: int,
    tensor_dtype: torch.dtype | None,
) -> tuple[_Tensors, _Tensors]:
    """A stage's inputs and outputs: from its boundary, its model's hook, or the usual shapes."""
    module = stage.submod
    boundary = boundary_of(module) if isinstance(module, nn.Module) else None
    if boundary is not None:
        dtype = tensor_dtype or cast_dtype(module)
        metas = boundary.tensor_metas(microbatch_size, seq_len, dtype)
        if metas is not None:
            inputs, outputs = metas
            return tuple(map(_from_boundary, inputs)), tuple(map(_from_boundary, outputs))
    inner = unwrapped(module) if isinstance(module, nn.Module) else module
    dtype = tensor_dtype or _first_dtype(module)
    hook = getattr(inner, "get_pipeline_stage_metas", None)
    if callable(hook):
        given_in, given_out = hook(
            is_first=stage.is_first,
            microbatch_size=microbatch_size,
            seq_len=seq_len,
            dtype=dtype,
        )
        return (
            _on_meta(given_in, differentiable=not stage.is_first),
            _on_meta(given_out, differentiable=True),
        )
    hidden_size, vocab_size = hidden_and_vocab_size(model_config)
    batch = (microbatch_size, seq_len)
    if stage.is_first:
        taken = torch.empty(batch, dtype=torch.int64, device="meta")
    else:
        taken = _activation((*batch, hidden_size), dtype)
    has_head = (
        getattr(inner, "lm_head", None) is not None
        and getattr(inner, "_pp_return_hidden_states", False) is not True
    )
    given = _activation((*batch, vocab_size if has_head else hidden_size), dtype)
    return (taken,), (given,)


def _first_dtype(module: Any) -> torch.dtype:
    first = next(iter(module.parameters()), None)
    return first.dtype if first is not None else torch.bfloat16


def _activation(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def _from_boundary(meta: Any) -> torch.Tensor:
    return torch.empty(
        meta.shape, dtype=meta.dtype, device="meta", requires_grad=meta.requires_grad
    )


def _on_meta(tensors: torch.Tensor | Iterable[torch.Tensor], *, differentiable: bool) -> _Tensors:
    given = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
    return tuple(
        torch.empty(
            tensor.shape,
            dtype=tensor.dtype,
            device="meta",
            requires_grad=differentiable and tensor.dtype.is_floating_point,
        )
        for tensor in given
    )


def _token_count(output: torch.Tensor) -> int:
    """Tokens in a primary output: ``[tokens, hidden]`` or ``[microbatch, seq, …]``."""
    return output.shape[0] if output.dim() <= 2 else output.shape[0] * output.shape[1]


def _check_size(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise PipelineConfigError(f"{name} must be an integer, not {value!r}")
    if value < 1:
        raise PipelineConfigError(f"{name} ({value}) must be at least 1")
