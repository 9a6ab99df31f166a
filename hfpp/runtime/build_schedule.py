"""A torch schedule from a name or a file, checked before anything runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hfpp.errors import PipelineConfigError
from hfpp.plan.placement import Placement
from hfpp.plan.schedule import check_microbatches, find_schedule, read_csv, verify
from hfpp.runtime import torch_compat as compat
from hfpp.runtime.controlled_schedule import add_step_context, controlled

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage

    from hfpp.plan.schedule import ScheduleTable

__all__ = ["add_step_context", "build_pipeline_schedule"]

logger = logging.getLogger(__name__)

LossFn = Callable[..., torch.Tensor]


def build_pipeline_schedule(
    pipeline_parallel_schedule_csv: str | os.PathLike[str] | None,
    pipeline_parallel_schedule: str | None,
    microbatch_size: int,
    local_batch_size: int,
    stages: Sequence[PipelineStage],
    loss_fn: LossFn | None,
    scale_grads: bool = False,
) -> Any:
    """Builds this rank's schedule: see `hfpp.functional.build_pipeline_schedule`."""
    stages = _checked_stages(stages)
    n_microbatches = _count_microbatches(microbatch_size, local_batch_size)
    pp_size, num_stages = stages[0].group_size, stages[0].num_stages
    if loss_fn is not None and scale_grads:
        loss_fn = _MeanOverMicrobatches(loss_fn, n_microbatches)

    if pipeline_parallel_schedule_csv:
        table = read_csv(pipeline_parallel_schedule_csv)
        verify(table)
        _check_table(table, stages, n_microbatches)
        schedule_class = controlled(compat.runtime_class())
        schedule = schedule_class(stages, n_microbatches, loss_fn=loss_fn, scale_grads=False)
        compat.load_table(schedule, table)
        name = table.name
    elif pipeline_parallel_schedule:
        spec = find_schedule(pipeline_parallel_schedule)
        name = spec.name
        if spec.single_stage and len(stages) != 1:
            raise PipelineConfigError(
                f"pipeline_parallel_schedule {name} runs exactly 1 stage per rank, but stages has "
                f"{len(stages)}: use a schedule with several, such as Interleaved1F1B, or one stage"
            )
        if spec.placement is Placement.V and len(stages) != 2:
            raise PipelineConfigError(
                f"pipeline_parallel_schedule {name} runs exactly 2 stages per rank, but stages has "
                f"{len(stages)}: use 2 stages per rank, or another schedule"
            )
        _check_indices(name, stages, spec.placement)
        check_microbatches(
            spec, pp_size=pp_size, num_stages=num_stages, n_microbatches=n_microbatches
        )
        schedule_class = controlled(compat.schedule_class(name))
        schedule = schedule_class(
            stages[0] if spec.single_stage else stages,
            n_microbatches,
            loss_fn=loss_fn,
            scale_grads=False,
        )
    else:
        raise PipelineConfigError(
            "pipeline_parallel_schedule and pipeline_parallel_schedule_csv are both empty: give "
            "the name of a schedule, such as 1F1B, or the path of a schedule file"
        )
    if n_microbatches < num_stages:
        logger.warning(
            "%d microbatches are fewer than the pipeline's %d stages: some ranks idle most of the "
            "time. Use local_batch_size >= %d with microbatch_size %d.",
            n_microbatches,
            num_stages,
            num_stages * microbatch_size,
            microbatch_size,
        )
    logger.info(
        "Schedule %s on rank %d of %d: stages %s of %d, %d microbatches of %d",
        name,
        stages[0].group_rank,
        pp_size,
        [stage.stage_index for stage in stages],
        num_stages,
        n_microbatches,
        microbatch_size,
    )
    return schedule


def _checked_stages(stages: Sequence[PipelineStage]) -> list[PipelineStage]:
    found = list(stages) if isinstance(stages, Sequence) else [stages]
    if not found:
        raise PipelineConfigError("stages is empty: a rank of a pipeline has at least one stage")
    return sorted(found, key=lambda stage: stage.stage_index)


def _count_microbatches(microbatch_size: int, local_batch_size: int) -> int:
    for name, value in (
        ("microbatch_size", microbatch_size),
        ("local_batch_size", local_batch_size),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise PipelineConfigError(f"{name} must be an integer, not {value!r}")
        if value < 1:
            raise PipelineConfigError(f"{name} ({value}) must be at least 1")
    if local_batch_size % microbatch_size:
        lower = local_batch_size - local_batch_size % microbatch_size
        counts = f"{lower} or {lower + microbatch_size}" if lower else f"{microbatch_size}"
        raise PipelineConfigError(
            f"local_batch_size ({local_batch_size}) must be divisible by microbatch_size "
            f"({microbatch_size}): use local_batch_size {counts}, or another microbatch_size"
        )
    return local_batch_size // microbatch_size


def _check_indices(name: str, stages: list[PipelineStage], placement: Placement) -> None:
    rank, pp_size, num_stages = stages[0].group_rank, stages[0].group_size, stages[0].num_stages
    found = [stage.stage_index for stage in stages]
    if placement is Placement.V:
        wanted = sorted((rank, num_stages - 1 - rank))
        right = num_stages == 2 * pp_size
    else:
        wanted = list(range(rank, num_stages, pp_size))
        right = num_stages % pp_size == 0
    if found != wanted or not right:
        raise PipelineConfigError(
            f"stages on rank {rank} of {pp_size} are {found} of {num_stages}, but {name} lays them "
            f"out as a {placement.value}, {wanted}: split the model for the same schedule"
        )


def _check_table(table: ScheduleTable, stages: list[PipelineStage], n_microbatches: int) -> None:
    rank, pp_size = stages[0].group_rank, stages[0].group_size
    if table.pp_size != pp_size:
        raise PipelineConfigError(
            f"pipeline_parallel_schedule_csv {table.name} has rows for {table.pp_size} ranks, but "
            f"the pipeline has {pp_size}"
        )
    if table.n_microbatches != n_microbatches:
        raise PipelineConfigError(
            f"pipeline_parallel_schedule_csv {table.name} runs {table.n_microbatches} "
            f"microbatches, but local_batch_size // microbatch_size is {n_microbatches}"
        )
    found = [stage.stage_index for stage in stages]
    wanted = list(table.stages_by_rank[rank])
    if found != wanted or stages[0].num_stages != table.num_stages:
        raise PipelineConfigError(
            f"pipeline_parallel_schedule_csv {table.name} has stages {wanted} of "
            f"{table.num_stages} on rank {rank}, but stages has {found} of "
            f"{stages[0].num_stages}: split the model for this file"
        )


class _MeanOverMicrobatches:
    """A loss whose gradient is divided by the number of microbatches; its value is not.

    torch's own `scale_grads` divides whatever has accumulated in `.grad` at the end of every step,
    so that with several steps before the optimizer the earlier ones are divided again.
    """

    def __init__(self, loss_fn: LossFn, n_microbatches: int) -> None:
        self.loss_fn = loss_fn
        self.n_microbatches = n_microbatches

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = self.loss_fn(*args, **kwargs)
        scaled: torch.Tensor = _DivideGradient.apply(loss, self.n_microbatches)  # type: ignore[no-untyped-call]
        return scaled


class _DivideGradient(torch.autograd.Function):
    """The identity, whose backward divides by a number."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, divisor: int) -> torch.Tensor:
        ctx.divisor = divisor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] / ctx.divisor, None
