"""Forward-only runs of any schedule: no activations kept, no backward, with or without a target."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule

from hfpp.plan.schedules import forward_table
from hfpp.plan.schedules.actions import Action, ActionKind
from hfpp.plan.schedules.lowering import lower
from hfpp.runtime import torch_compat as compat

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage

__all__ = ["forward_actions", "run_forward"]

_MAX_SENDS = 2  # microbatches whose sends may be under way, per stage


def forward_actions(stage_to_rank: dict[int, int], rank: int, n_microbatches: int) -> list[Action]:
    """One rank's forwards, sends and receives, in an order in which no two ranks block each other.

    Args:
        stage_to_rank: the rank of every stage of the pipeline.
        rank: the rank whose actions are wanted.
        n_microbatches: microbatches per batch.
    """
    ranks = [stage_to_rank[stage] for stage in range(len(stage_to_rank))]
    table = lower(forward_table(ranks, n_microbatches), unshard=False, reduce_grad=False)
    return [action for action in table.row(rank) if action is not None]


@torch.no_grad()
def run_forward(
    actions: list[Action],
    stages: list[PipelineStage],
    arguments: list[tuple[Any, ...]],
    keywords: list[dict[str, Any]],
    on_output: Callable[[int, Any], None],
) -> None:
    """Runs one batch forward through this rank's stages.

    Args:
        actions: from `forward_actions`.
        stages: this rank's; made ready to run.
        arguments: positional arguments of the first stage, per microbatch.
        keywords: keyword arguments of every stage, per microbatch.
        on_output: called with the microbatch and the output of the pipeline's last stage.
    """
    by_index = {stage.stage_index: stage for stage in stages}
    receives: dict[tuple[int, int], list[dist.Work]] = {}
    sends: dict[int, deque[tuple[int, list[dist.Work]]]] = {index: deque() for index in by_index}

    def finish_sends(stage: PipelineStage, left: int) -> None:
        under_way = sends[stage.stage_index]
        while len(under_way) > left:
            microbatch, works = under_way.popleft()
            _wait(works)
            compat.drop_microbatch(stage, microbatch)

    for action in actions:
        stage, microbatch = by_index[action.stage], action.microbatch
        assert microbatch is not None
        if action.kind is ActionKind.RECEIVE_FORWARD:
            receives[action.stage, microbatch] = compat.receive(stage, microbatch)
        elif action.kind is ActionKind.SEND_FORWARD:
            sends[action.stage].append((microbatch, compat.send(stage, microbatch)))
            finish_sends(stage, _MAX_SENDS)
        else:
            _wait(receives.pop((action.stage, microbatch), []))
            output = compat.forward(stage, microbatch, arguments[microbatch], keywords[microbatch])
            if stage.is_last:
                on_output(microbatch, output)
            if (following := by_index.get(action.stage + 1)) is not None:
                compat.hand_over(output, following, microbatch)
            del output
            if stage.is_last or following is not None:
                compat.drop_microbatch(stage, microbatch)
    for stage in stages:
        finish_sends(stage, 0)
        for module in stage.submod.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # as training expects to find them


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()
