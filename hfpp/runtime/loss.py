"""The causal language-model loss, which microbatches of different token counts add up exactly."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hfpp.errors import PipelineConfigError

__all__ = ["IGNORED_LABEL", "causal_lm_loss"]

IGNORED_LABEL = -100


def causal_lm_loss(
    logits: Tensor, labels: Tensor, num_items: int | float | Tensor | None = None
) -> Tensor:
    """Cross-entropy of every token given the ones before it, in nats per token.

    The labels are the input ids themselves: position t of the logits is compared with label t + 1.
    float16 and bfloat16 logits are computed in float32; float32 and float64 stay what they are.

    Args:
        logits: `[..., sequence, vocabulary]`, floating point.
        labels: `[..., sequence]`, integers; -100 is ignored.
        num_items: what the summed loss is divided by. Give the number of targets (labels that are
            not ignored, without each sequence's first) of the whole batch, and the losses of its
            microbatches add up to the batch's mean, and their gradients to its gradient, whatever
            the microbatches' own token counts. None divides by this microbatch's own count. A
            tensor is not read on the host, so a GPU is not waited for.

    Returns:
        A scalar. Without a single target it is 0 with zero gradients, never NaN: a microbatch of
        padding adds nothing.

    Raises:
        PipelineConfigError: shapes that do not belong together, a label type that is no integer,
            a `num_items` that is not positive.

    Example:
        >>> import torch
        >>> logits, labels = torch.zeros(2, 4, 8), torch.ones(2, 4, dtype=torch.int64)
        >>> round(causal_lm_loss(logits, labels).item(), 4)  # ln 8
        2.0794
    """
    _check(logits, labels, num_items)
    vocabulary = logits.shape[-1]
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    # Shifting the labels and not the logits spares a copy of the largest tensor of the step.
    targets = functional.pad(labels[..., 1:].long(), (0, 1), value=IGNORED_LABEL).to(logits.device)
    total = functional.cross_entropy(
        logits.reshape(-1, vocabulary),
        targets.reshape(-1),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )
    if num_items is None:
        num_items = (targets != IGNORED_LABEL).sum()
    if isinstance(num_items, Tensor):
        num_items = num_items.to(logits.device)
        num_items = torch.where(num_items == 0, torch.ones_like(num_items), num_items)
    return total / num_items


def _check(logits: Tensor, labels: Tensor, num_items: int | float | Tensor | None) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 2:
        shown = (
            f"{logits.dtype} {tuple(logits.shape)}"
            if isinstance(logits, Tensor)
            else type(logits).__name__
        )
        raise PipelineConfigError(
            f"logits ({shown}) must be one floating-point tensor [..., sequence, vocabulary]: "
            "give the model's logits, not its whole output."
        )
    if logits.shape[-2] == 0:
        raise PipelineConfigError(
            f"logits {tuple(logits.shape)} must hold a sequence of at least one token."
        )
    if labels.shape != logits.shape[:-1]:
        raise PipelineConfigError(
            f"labels {tuple(labels.shape)} must have the shape of logits {tuple(logits.shape)} "
            f"without its last dimension, {tuple(logits.shape[:-1])}: give the input ids, not "
            "shifted (or a copy with -100 where nothing is to be learned)."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise PipelineConfigError(
            f"labels ({labels.dtype}) must be integers: give token ids, for example labels.long()."
        )
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise PipelineConfigError(
                f"num_items (a tensor {tuple(num_items.shape)}) must be one number: "
                "give the count of targets of the whole batch."
            )
        # A GPU's value is not read: that would wait for the GPU in every microbatch.
        if num_items.device.type == "cpu" and num_items.item() < 0:
            raise PipelineConfigError(
                f"num_items ({num_items.item()}) must not be negative: give the count of targets "
                "of the whole batch."
            )
    elif num_items is not None and not num_items > 0:
        raise PipelineConfigError(
            f"num_items ({num_items}) must be positive: give the count of targets of the whole "
            "batch, or None for this microbatch's own."
        )
