"""Compiled modules: stages compile what the model had; where weights had better not be late."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from hfpp.errors import PipelineConfigError
from hfpp.runtime import torch_compat as compat
from hfpp.runtime.recomputed import is_recomputed

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.pipelining import PipelineStage

__all__ = [
    "compile_alike",
    "nothing_left",
    "refuse_wrapping_compilation",
    "spare_late_weights",
]

logger = logging.getLogger(__name__)

_LATE_WEIGHTS = frozenset(("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"))
"""Schedules for which torch refuses modules that torch.compile has wrapped."""


def nothing_left() -> Callable[[], None]:
    """A stage's dw_builder: the whole backward runs when the inputs' gradients are asked for."""
    return lambda: None


def compile_alike(model: nn.Module, stage: nn.Module, layers_name: str) -> None:
    """Compile what ``model`` has compiled by ``module.compile()``, which copies leave behind.

    What holds the list of layers stays as it is: a stage leaves its forward in the middle.

    Args:
        model: the unsplit model.
        stage: the copy, its foreign layers hollow; changed in place.
        layers_name: FQN of the list of layers.
    """
    modules = dict(stage.named_modules(remove_duplicate=False))
    for name, module in model.named_modules():
        compiled, twin = module.__dict__.get("_compiled_call_impl"), modules.get(name)
        if compiled is None or twin is None:
            continue
        around = not name or layers_name == name or layers_name.startswith(f"{name}.")
        alike = None if around else compat.compiled_alike(compiled, twin._call_impl)
        if alike is None:
            logger.warning(
                "%s %r of %s was compiled before the split, its stages run it uncompiled: compile "
                "the layers of each part in parallelize_fn.",
                type(module).__name__, name, type(model).__name__,
            )  # fmt: skip
        twin._compiled_call_impl = alike


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
    """A whole backward for stages where one in two steps costs more than it gains.

    A compiled layer's is of one piece, and would run twice; a layer that is computed again for its
    backward would be so for its inputs and then for each of its weights.
    """
    for stage in stages:
        modules = list(stage.submod.modules())
        compiled = any(
            compat.is_compiled_in_place(module) or compat.is_compiled_by_wrapping(module)
            for module in modules
        )
        if stage.dw_builder is not None or not (compiled or any(map(is_recomputed, modules))):
            continue
        stage.dw_builder = nothing_left
        logger.warning(
            "stage %d has %s: %s computes the gradients of its weights together with those of its "
            "inputs.",
            stage.stage_index,
            "compiled modules, whose backward is of one piece"
            if compiled
            else "layers with checkpointing, which would be computed again for every weight",
            schedule,
        )
