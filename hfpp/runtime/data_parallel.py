"""What a data-parallel wrapper around a stage needs of the schedule that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

from hfpp.errors import PipelineConfigError
from hfpp.runtime import torch_compat as compat
from hfpp.runtime.needed_gradients import SparingStage

__all__ = ["ReducingStage", "fit_wrappers"]


class ReducingStage(SparingStage):
    """A stage whose FSDP2 module reduces its gradients after every microbatch.

    torch's stages do so once per step: unsharded gradients of the whole stage stay in memory until
    then. This costs a reduction per microbatch instead.
    """

    def backward_maybe_with_nosync(self, backward_type: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one microbatch's backward as torch does, then reduce."""
        result = super().backward_maybe_with_nosync(backward_type, *args, **kwargs)
        if isinstance(self.submod, FSDPModule):
            self.perform_reduce_grad(1)
            compat.expect_further_reductions(self.submod)
        return result


def fit_wrappers(stages: Sequence[PipelineStage], *, splits_backward: bool) -> None:
    """Make wrapped stages train right under their schedule, or refuse them.

    A schedule that computes the gradients of weights later than those of inputs finds only weights
    that are still in memory then: FSDP2's default, to free a layer's weights after its forward,
    would lose their gradients without an error. Such stages keep their weights unsharded from
    their first forward to their last backward of a step.

    Args:
        stages: this rank's.
        splits_backward: whether the schedule has separate actions for inputs' and weights'
            gradients.

    Raises:
        PipelineConfigError: for DistributedDataParallel where it would not reduce all gradients,
            and for a stage whose layers are sharded, but not the stage itself, where torch fails.
    """
    for stage in stages:
        part = stage.submod
        if isinstance(part, DistributedDataParallel):
            if len(stages) > 1:
                raise PipelineConfigError(
                    f"this rank's {len(stages)} stages are wrapped in DistributedDataParallel, "
                    f"which loses track of several stages' backward passes: use fully_shard "
                    f"(FSDP2), or a schedule with one stage per rank (1F1B, GPipe)."
                )
            if splits_backward:
                raise PipelineConfigError(
                    f"stage {stage.stage_index} is wrapped in DistributedDataParallel, which does "
                    f"not see gradients that the schedule computes apart from the backward: use "
                    f"fully_shard (FSDP2), or a schedule without separate actions for the weights' "
                    f"gradients (1F1B, GPipe)."
                )
        if not splits_backward:
            continue
        if isinstance(stage, ReducingStage):
            raise PipelineConfigError(
                "reduce_grad_per_microbatch frees the weights after every microbatch, but the "
                "schedule computes their gradients later: leave it False, or use a schedule "
                "without separate actions for the weights' gradients (1F1B, GPipe, "
                "Interleaved1F1B, LoopedBFS)."
            )
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(False)
        elif any(isinstance(module, FSDPModule) for module in part.modules()):
            raise PipelineConfigError(
                f"modules of stage {stage.stage_index} are sharded with fully_shard, but the stage "
                f"itself is not, and the schedule computes the weights' gradients apart: call "
                f"fully_shard on the stage too, after its layers."
            )
