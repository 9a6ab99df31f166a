"""No gradient where none is needed: before the first stage that trains something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from hfpp.errors import PipelineConfigError
from hfpp.runtime import torch_compat as compat
from hfpp.runtime.stage_boundary import unwrapped

__all__ = ["NeededGradients", "SparingStage", "agree_on_gradients", "check_nothing_thawed", "mark"]

_MARK = "_hfpp_gradients"


@dataclass(slots=True)
class NeededGradients:
    """Which gradients a stage has to do with; all, until the pipeline's ranks have agreed.

    Attributes:
        incoming: whether what arrives needs one: a stage before trains something.
        outgoing: whether what leaves does: this stage or one before trains something.
    """

    incoming: bool = True
    outgoing: bool = True


def mark(module: nn.Module) -> None:
    """Give a stage's module, whose forward looks there, what will be known of its gradients."""
    module.__dict__[_MARK] = NeededGradients()


class SparingStage(PipelineStage):
    """A stage without a backward, and without messages for one, where nobody needs it.

    Schedules still have its backward actions, which do nothing then: all ranks leave out the same
    messages, so those that remain meet in the same order.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.needed = NeededGradients()
        self._late: dict[int, Any] = {}  # losses by microbatch whose backward waits

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """Run one microbatch's forward; what it sends is what the next stage waits for.

        Raises:
            PipelineConfigError: if not. Buffers of another type would be filled with other numbers.
        """
        output = super().forward_one_chunk(*args, **kwargs)
        told = None if self.is_last else compat.told_outputs(self)
        if told is not None:
            values = output if isinstance(output, tuple | list) else (output,)
            found = [(tuple(v.shape), v.dtype) for v in values if isinstance(v, torch.Tensor)]
            if found != told:
                raise PipelineConfigError(
                    f"stage {self.stage_index} of {type(unwrapped(self.submod)).__name__} made "
                    f"{found} where the next stage waits for {told}: leave out seq_len, so that "
                    f"torch finds the shapes, or call reset_pp_stage_shapes for the new ones."
                )
        return output

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Any = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        """Run one microbatch's backward, as far as it is needed."""
        if self.has_backward and not self.needed.outgoing:
            compat.drop_microbatch(self, bwd_chunk_id)
        elif self._sends_none_back() and not full_backward:
            self._late[bwd_chunk_id] = loss  # all of it is left for the weights' turn
        else:
            super().backward_one_chunk(
                bwd_chunk_id, loss=loss, full_backward=full_backward, last_backward=last_backward
            )

    def _sends_none_back(self) -> bool:
        """On the pipeline's first stage torch knows that by itself."""
        return bool(self.has_backward) and not self.needed.incoming and not self.is_first

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Run what `backward_one_chunk` has left of one microbatch's backward."""
        if self.has_backward and not self.needed.outgoing:
            return
        if bwd_chunk_id in self._late:
            super().backward_one_chunk(
                bwd_chunk_id, loss=self._late.pop(bwd_chunk_id), last_backward=last_backward
            )
            compat.drop_input_gradients(self, bwd_chunk_id)
        else:
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """The receives of one microbatch's gradients."""
        return super().get_bwd_recv_ops(bwd_chunk_id) if self.needed.outgoing else []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """The sends of one microbatch's gradients."""
        if self.needed.incoming:
            return super().get_bwd_send_ops(bwd_chunk_id)
        compat.drop_input_gradients(self, bwd_chunk_id)
        return []

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """One microbatch's gradients for the stage before, which is on the same rank."""
        if self.needed.incoming:
            return cast("Any", super()).get_local_bwd_output(mb_index)
        compat.drop_input_gradients(self, mb_index)
        return ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        """Take one microbatch's gradients from the stage after, which is on the same rank."""
        if self.needed.outgoing:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def clear_runtime_states(self) -> None:
        """Forget a run."""
        self._late.clear()
        super().clear_runtime_states()


def agree_on_gradients(stages: Sequence[PipelineStage]) -> None:
    """Learn from all ranks of the pipeline which stages train something.

    Args:
        stages: this rank's, before torch makes them ready. Every rank must come here.

    Raises:
        PipelineConfigError: on every rank, if no stage trains anything.
    """
    mine = {stage.stage_index: _trains(stage) for stage in stages}
    everyone: list[Any] = [mine]
    if stages[0].group_size > 1:
        everyone = [None] * stages[0].group_size
        dist.all_gather_object(everyone, mine, group=stages[0].group)
    found: dict[int, bool | None] = {s: t for theirs in everyone for s, t in theirs.items()}
    if None in found.values():
        return  # stages of another make: gradients go everywhere
    if not any(found.values()):
        raise PipelineConfigError(
            "no parameter of any stage has requires_grad=True, so that step would train nothing: "
            "set it on what is to be trained, or call eval for losses and outputs only."
        )
    first = min(stage for stage, trains in found.items() if trains)
    for stage in stages:
        assert isinstance(stage, SparingStage)
        stage.needed = unwrapped(stage.submod).__dict__[_MARK]
        stage.needed.incoming = stage.stage_index > first
        stage.needed.outgoing = stage.stage_index >= first
        compat.set_static_gradients(
            stage, inputs=stage.needed.incoming, outputs=stage.needed.outgoing
        )


def check_nothing_thawed(stages: Sequence[PipelineStage]) -> None:
    """Before a step: a stage that gets no gradient must not have begun to want one.

    The reverse is fine: a stage that was frozen since hands gradients on.

    Raises:
        PipelineConfigError: naming the stage.
    """
    for stage in stages:
        if isinstance(stage, SparingStage) and not stage.needed.outgoing and _trains(stage):
            raise PipelineConfigError(
                f"stage {stage.stage_index} has parameters with requires_grad=True, but it and all "
                f"stages before it were frozen on the first step, so that no gradients are sent to "
                f"it: set requires_grad before the first step, or call reset_pp_stage_shapes on "
                f"every rank after changing it."
            )


def _trains(stage: PipelineStage) -> bool | None:
    """Whether any parameter is trained; None for a stage that cannot do without gradients."""
    if not isinstance(stage, SparingStage) or _MARK not in unwrapped(stage.submod).__dict__:
        return None
    return any(parameter.requires_grad for parameter in stage.submod.parameters())
