"""Modules whose forward runs again for the backward: checkpointing, by who does it."""

from __future__ import annotations

from torch import nn

__all__ = ["is_recomputed"]


def is_recomputed(module: nn.Module) -> bool:
    """Whether a module with weights is computed again for its backward.

    Transformers' layers have a switch; torch's ``checkpoint_wrapper`` is a module around them.
    """
    has_switch = getattr(module, "gradient_checkpointing", False) is True
    is_wrapper = hasattr(module, "checkpoint_fn") and (
        "_checkpoint_wrapped_module" in module._modules
    )
    return (has_switch or is_wrapper) and next(module.parameters(), None) is not None
