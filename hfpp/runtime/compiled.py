"""Compiled modules in a stage: what a split loses of them, and what late weights cost them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from hfpp.errors import PipelineConfigError
from hfpp.runtime import torch_compat as compat

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.pipelining import PipelineStage

__all__ = [
    "nothing_left",
    "refuse_wrapping_compilation",
    "spare_late_weights",
    "warn_of_lost_compilation",
]

logger = logging.getLogger(__name__)

_LATE_WEIGHTS = frozenset(("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"))
"""Schedules for which torch refuses modules that torch.compile has wrapped."""


def nothing_left() -> Callable[[], None]:
    """A stage's dw_builder: the whole backward runs when the inputs' gradients are asked for."""
    return lambda: None


def warn_of_lost_compilation(model: nn.Module) -> None:
    """Stages are copies, and copies of a module that was compiled in place are not compiled."""
    if any(map(compat.is_compiled_in_place, model.modules())):
        logger.warning(
            "%s has modules that were compiled before the split, which its stages run uncompiled: "
            "call module.compile() on the stages' layers in parallelize_fn.",
            type(model).__name__,
        )


def refuse_wrapping_compilation(stages: Iterable[PipelineStage], schedule: str) -> None:
    """What torch refuses, said with what works.

    Raises:
        PipelineConfigError: naming the stage and a module.
    """
    if schedule not in _LATE_WEIGHTS:
        return
    for stage in stages:
        for name, module in stage.submod.named_modules():
            if compat.is_compiled_by_wrapping(module):
                raise PipelineConfigError(
                    f"stage {stage.stage_index} has a module that torch.compile has wrapped, "
                    f"{name or 'itself'!r}, which torch's {schedule} does not run: compile layers "
                    f"in place with layer.compile(), or use 1F1B, GPipe, Interleaved1F1B or "
                    f"LoopedBFS."
                )


def spare_late_weights(stages: Sequence[PipelineStage], schedule: str) -> None:
    """A compiled layer's backward cannot be split: in two steps it would run twice."""
    for stage in stages:
        compiled = any(
            compat.is_compiled_in_place(module) or compat.is_compiled_by_wrapping(module)
            for module in stage.submod.modules()
        )
        if compiled and stage.dw_builder is None:
            stage.dw_builder = nothing_left
            logger.warning(
                "stage %d has compiled modules, whose backward is of one piece: %s computes the "
                "gradients of its weights together with those of its inputs.",
                stage.stage_index,
                schedule,
            )
