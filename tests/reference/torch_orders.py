"""What torch itself makes of a schedule: the order of actions of all ranks, without processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.pipelining import schedules as torch_schedules


def torch_schedule(
    name: str, *, rank: int, pp_size: int, stages_per_rank: int, n_microbatches: int
) -> Any:
    """torch's own schedule object over stages that hold nothing but their place."""
    num_stages = pp_size * stages_per_rank
    style = "v" if name in ("ZBVZeroBubble", "DualPipeV") else "loop"
    indices = [rank + k * pp_size for k in range(stages_per_rank)]
    if style == "v":
        indices = [rank, num_stages - 1 - rank]
    stages = [
        SimpleNamespace(
            stage_index=index,
            num_stages=num_stages,
            group_size=pp_size,
            group_rank=rank,
            submod=torch.nn.Identity(),
            is_last=index == num_stages - 1,
        )
        for index in indices
    ]
    schedule_class = torch_schedules.get_schedule_class(name)
    single = issubclass(schedule_class, torch_schedules.PipelineScheduleSingle)
    return schedule_class(stages[0] if single else stages, n_microbatches)


def torch_order(
    name: str, *, pp_size: int, stages_per_rank: int, n_microbatches: int
) -> list[list[str]]:
    """The compute actions of all ranks as torch prints them, without idle columns."""
    schedule = torch_schedule(
        name,
        rank=0,
        pp_size=pp_size,
        stages_per_rank=stages_per_rank,
        n_microbatches=n_microbatches,
    )
    return [
        [str(a) for a in schedule.pipeline_order[rank] if a is not None and a.is_compute_op]
        for rank in range(pp_size)
    ]


def torch_communication(
    name: str, *, pp_size: int, stages_per_rank: int, n_microbatches: int
) -> list[list[str]]:
    """The same with the sends and receives that torch's own pass adds."""
    schedule = torch_schedule(
        name,
        rank=0,
        pp_size=pp_size,
        stages_per_rank=stages_per_rank,
        n_microbatches=n_microbatches,
    )
    lowered = torch_schedules._add_send_recv(
        {rank: [a for a in schedule.pipeline_order[rank] if a] for rank in range(pp_size)},
        stage_to_rank=lambda stage: schedule.stage_index_to_group_rank[stage],
        num_stages=pp_size * stages_per_rank,
    )
    return [[str(action) for action in lowered[rank]] for rank in range(pp_size)]
