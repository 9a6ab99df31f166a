"""A copy of a model's structure without its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hfpp.runtime.module_copy import copy_structure
from hfpp.runtime.repeated_layers import separate_repeats

_SMALL_BUFFER_ELEMENTS = 1 << 16


def meta_skeleton(model: nn.Module) -> nn.Module:
    """Copy ``model`` with every parameter on the meta device; the model is not touched.

    Small buffers keep their values on the CPU (models read them), large ones go to the meta device.
    Tied parameters are separated, so that each name shows where it is used, and so are the places
    of a list that hold the same module; a module registered under other two names stays one module.
    The copy is in eval mode: dropout is not part of the anatomy.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = _meta_parameter(parameter)
    for buffer in model.buffers():
        memo[id(buffer)] = (
            buffer.detach().to("cpu", copy=True)
            if keeps_values(buffer)
            else torch.empty_like(buffer, device="meta")
        )
    with torch.no_grad():
        skeleton = copy_structure(model, memo)
    separate_repeats(skeleton)
    seen: set[int] = set()
    for module in skeleton.modules():
        for name, held in list(module._parameters.items()):
            if held is not None and id(held) in seen:
                module._parameters[name] = _meta_parameter(held)
            seen.add(id(held))
    _use_plain_attention(skeleton)
    return skeleton.eval()


def keeps_values(buffer: torch.Tensor) -> bool:
    """Whether a skeleton has the values of ``buffer``, and its forward can read them."""
    return buffer.numel() <= _SMALL_BUFFER_ELEMENTS and buffer.device.type != "meta"


def _use_plain_attention(skeleton: nn.Module) -> None:
    """Fused attention kernels cannot run without data; which one runs moves no layer."""
    chosen = getattr(getattr(skeleton, "config", None), "_attn_implementation", None)
    change = getattr(skeleton, "set_attn_implementation", None)
    if change is not None and chosen not in (None, "eager", "sdpa"):
        change("eager")


def _meta_parameter(parameter: nn.Parameter) -> nn.Parameter:
    if type(parameter) is nn.Parameter and parameter.layout is torch.strided:
        # by strides, as empty_like on the meta device is Python that takes ten times as long
        size, stride, dtype = parameter.size(), parameter.stride(), parameter.dtype
        empty = torch.empty_strided(size, stride, dtype=dtype, device="meta")
    else:
        empty = torch.empty_like(parameter, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)
