"""What torch itself makes of a schedule: the order of actions of all ranks, without processes."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.pipelining import schedules as torch_schedules

from hfpp.plan.schedules import SCHEDULES

if TYPE_CHECKING:
    from collections.abc import Sequence


def _is_known(name: str) -> bool:
    try:
        torch_schedules.get_schedule_class(name)
    except ValueError:
        return False
    return True


TORCH_NAMES = tuple(name for name in SCHEDULES if _is_known(name))
"""The schedules that torch has a class for."""

_KNOWN = inspect.signature(torch_schedules._add_unshard_reshard).parameters

LOWERING = {
    "wait_send": hasattr(torch_schedules, "_add_wait_send"),
    "wait_reduce_grad": hasattr(torch_schedules, "WAIT_REDUCE_GRAD"),
    "ordered_reshard": "unshard_lookahead" in _KNOWN,
}
"""How this version of torch lowers, as arguments of `hfpp.plan.schedules.lowering.lower`."""


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


def torch_lowered(
    name: str, *, pp_size: int, stages_per_rank: int, n_microbatches: int
) -> list[list[str]]:
    """All that torch itself runs of a schedule that it runs from a table."""
    schedule = torch_schedule(
        name,
        rank=0,
        pp_size=pp_size,
        stages_per_rank=stages_per_rank,
        n_microbatches=n_microbatches,
    )
    rows = schedule.pipeline_order_with_comms
    return [[str(action) for action in rows[rank]] for rank in range(pp_size)]


def torch_messages(
    rows: list[list[str]], stage_to_rank: Sequence[int], num_stages: int
) -> list[list[str]]:
    """Rows with the sends and receives that torch's own pass adds."""
    lowered = torch_schedules._add_send_recv(
        dict(enumerate(map(torch_row, rows))),
        stage_to_rank=lambda stage: stage_to_rank[stage],
        num_stages=num_stages,
    )
    return [[str(action) for action in lowered[rank]] for rank in range(len(rows))]


def torch_unshard(row: list[str]) -> list[str]:
    """A row with the gathering and freeing of parameters that torch's own pass adds."""
    return [str(action) for action in torch_schedules._add_unshard_reshard(torch_row(row))]


def torch_row(row: list[str]) -> list[Any]:
    """Actions of torch."""
    return [torch_schedules._Action.from_str(text) for text in row]
