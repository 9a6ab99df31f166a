"""A torch schedule from a name or a file, checked before anything runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hfpp.errors import PipelineConfigError
from hfpp.plan.placement import Placement
from hfpp.plan.schedules import (
    ScheduleTable,
    check_microbatches,
    compute_table,
    find_schedule,
    read_csv,
    verify,
)
from hfpp.plan.schedules.actions import ActionKind
from hfpp.runtime import torch_compat as compat
from hfpp.runtime.auxiliary_loss import AuxiliaryLosses
from hfpp.runtime.compiled import refuse_wrapping_compilation, spare_late_weights
from hfpp.runtime.controlled_schedule import add_step_context, controlled
from hfpp.runtime.data_parallel import fit_wrappers
from hfpp.runtime.tied_weights import TiedGradients

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage

    from hfpp.plan.schedules import ScheduleSpec

__all__ = ["add_step_context", "build_pipeline_schedule", "check_pipeline_schedule"]

logger = logging.getLogger(__name__)

LossFn = Callable[..., torch.Tensor]


def build_pipeline_schedule(
    pipeline_parallel_schedule_csv: ScheduleTable | str | os.PathLike[str] | None,
    pipeline_parallel_schedule: str | None,
    microbatch_size: int,
    local_batch_size: int,
    stages: Sequence[PipelineStage],
    loss_fn: LossFn | None,
    scale_grads: bool = False,
) -> Any:
    """Builds this rank's schedule: see `hfpp.functional.build_pipeline_schedule`.

    Beyond it: a table in place of a CSV file.
    """
    stages = _checked_stages(stages)
    request = _check(
        pipeline_parallel_schedule_csv,
        pipeline_parallel_schedule,
        microbatch_size,
        local_batch_size,
        stages,
    )
    n_microbatches, num_stages = request.n_microbatches, stages[0].num_stages
    auxiliary = AuxiliaryLosses(stages)
    if loss_fn is not None:
        loss_fn = _Loss(loss_fn, n_microbatches if scale_grads else 1, auxiliary)
    name, single = request.name, compat.takes_one_stage(request.torch_class)
    refuse_wrapping_compilation(stages, name)
    schedule = controlled(request.torch_class)(
        stages[0] if single else stages, n_microbatches, loss_fn=loss_fn, scale_grads=False
    )
    schedule.auxiliary = auxiliary
    if single:
        compat.show_order(schedule, stages[0].group_size, request.make_table)
        splits_backward = False
    else:
        table = request.make_table()
        compat.load_table(schedule, table, request.make_table)
        splits_backward = table.has(ActionKind.BACKWARD_WEIGHT)
    fit_wrappers(stages, splits_backward=splits_backward)
    if splits_backward:
        spare_late_weights(stages, name)
    tied = TiedGradients(stages)
    if tied:
        add_step_context(schedule, tied.around_step)
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
        stages[0].group_size,
        [stage.stage_index for stage in stages],
        num_stages,
        n_microbatches,
        microbatch_size,
    )
    return schedule


def check_pipeline_schedule(
    pipeline_parallel_schedule_csv: ScheduleTable | str | os.PathLike[str] | None,
    pipeline_parallel_schedule: str | None,
    microbatch_size: int,
    local_batch_size: int,
    stages: Sequence[PipelineStage],
) -> None:
    """Raises what `build_pipeline_schedule` would raise, without building: no rank waits for it.

    Args:
        pipeline_parallel_schedule_csv: as there.
        pipeline_parallel_schedule: as there.
        microbatch_size: as there.
        local_batch_size: as there.
        stages: this rank's.

    Raises:
        PipelineConfigError: the schedule cannot run with these sizes and stages.
        FileNotFoundError: no such CSV file.
    """
    _check(
        pipeline_parallel_schedule_csv,
        pipeline_parallel_schedule,
        microbatch_size,
        local_batch_size,
        _checked_stages(stages),
    )


class _Request(NamedTuple):
    """A schedule that can run."""

    n_microbatches: int
    name: str
    torch_class: type[compat.TorchSchedule]
    make_table: Callable[[], ScheduleTable]
    """The compute actions of all ranks, or all that a file has; called more than once."""


def _check(
    csv: ScheduleTable | str | os.PathLike[str] | None,
    name: str | None,
    microbatch_size: int,
    local_batch_size: int,
    stages: list[PipelineStage],
) -> _Request:
    n_microbatches = _count_microbatches(microbatch_size, local_batch_size)
    if csv:
        table = csv if isinstance(csv, ScheduleTable) else read_csv(csv)
        verify(table)
        _check_table(table, stages, n_microbatches)
        return _Request(n_microbatches, table.name, compat.runtime_class(), lambda: table)
    if not name:
        raise PipelineConfigError(
            "pipeline_parallel_schedule and pipeline_parallel_schedule_csv are both empty; give "
            "the name of a schedule or the path of a schedule file: "
            "use pipeline_parallel_schedule='1F1B'"
        )
    spec = find_schedule(name)
    _check_count(spec, len(stages))
    _check_indices(spec.name, stages, spec.placement)
    check_microbatches(
        spec,
        pp_size=stages[0].group_size,
        num_stages=stages[0].num_stages,
        n_microbatches=n_microbatches,
        microbatch_size=microbatch_size,
    )
    make_table = partial(
        compute_table,
        spec,
        pp_size=stages[0].group_size,
        n_microbatches=n_microbatches,
        stages_per_rank=len(stages),
    )
    return _Request(n_microbatches, spec.name, compat.schedule_class(spec.name), make_table)


def _check_count(spec: ScheduleSpec, count: int) -> None:
    if spec.stages_per_rank is None or count == spec.stages_per_rank:
        return
    wanted = "1 stage" if spec.stages_per_rank == 1 else f"{spec.stages_per_rank} stages"
    remedy = "one that takes several, such as Interleaved1F1B" if count > 1 else "1F1B or GPipe"
    raise PipelineConfigError(
        f"pipeline_parallel_schedule {spec.name} runs exactly {wanted} per rank, but stages has "
        f"{count}: split the model for {spec.name}, or use {remedy}"
    )


def _checked_stages(stages: Sequence[PipelineStage]) -> list[PipelineStage]:
    found = list(stages) if isinstance(stages, Sequence) else [stages]
    if not found:
        raise PipelineConfigError("stages is empty: a rank of a pipeline has at least one stage")
    return sorted(found, key=lambda stage: stage.stage_index)


def _count_microbatches(microbatch_size: int, local_batch_size: int) -> int:
    for name, value, remedy in (
        ("microbatch_size", microbatch_size, 1),
        ("local_batch_size", local_batch_size, microbatch_size),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise PipelineConfigError(
                f"{name} must be an integer, not {value!r}: use {name}={remedy}"
            )
        if value < 1:
            raise PipelineConfigError(f"{name} ({value}) must be at least 1: use {name}={remedy}")
    if local_batch_size % microbatch_size:
        lower = local_batch_size - local_batch_size % microbatch_size
        counts = [lower, lower + microbatch_size] if lower else [microbatch_size]
        raise PipelineConfigError(
            f"local_batch_size ({local_batch_size}) must be divisible by microbatch_size "
            f"({microbatch_size}): "
            f"use {' or '.join(f'local_batch_size={count}' for count in counts)}"
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


class _Loss:
    """The user's loss plus the model's auxiliary loss, its gradient divided by a number.

    Its value is not divided.

    Dividing here gives the mean over microbatches however many steps accumulate. torch's own
    `scale_grads` divides whatever is in `.grad` at the end of every step: with several steps before
    the optimizer it divides the earlier ones again.
    """

    def __init__(self, loss_fn: LossFn, divisor: int, auxiliary: AuxiliaryLosses) -> None:
        self.loss_fn = loss_fn
        self.divisor = divisor
        self.auxiliary = auxiliary

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = self.auxiliary.add_to(self.loss_fn(*args, **kwargs))
        divided: torch.Tensor = _DivideGradient.apply(loss, self.divisor)  # type: ignore[no-untyped-call]
        return divided


class _DivideGradient(torch.autograd.Function):
    """A copy, whose backward divides by a number.

    A copy, as schedules with a split backward detach the loss in place, which views forbid.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, divisor: int) -> torch.Tensor:
        ctx.divisor = divisor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] if ctx.divisor == 1 else gradients[0] / ctx.divisor, None
