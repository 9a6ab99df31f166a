"""One rank's training: its part of the model, and every step of it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from hfpp.functional import causal_lm_loss, clip_grad_norm_, pipeline_model
from hfpp.plan.costs_file import read_costs
from hfpp.runtime.recording import StepRecorder
from hfpp.runtime.stage_boundary import boundary_of, own_layers
from hfpp.train.errors import TrainingError
from hfpp.train.events import RunShape, StageRow, StepMetrics, StepTrace
from hfpp.train.model import Batches, build_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from hfpp.runtime.pipeline import Pipeline
    from hfpp.train.inputs import RunInputs
    from hfpp.train.options import TrainOptions

__all__ = ["train_rank"]

PP, DP = "pp", "dp"


@dataclass(frozen=True, slots=True)
class _Rank:
    """What one rank steps: its pipeline, its optimizer and its place in the world."""

    pipeline: Pipeline
    optimizer: torch.optim.Optimizer
    warmup: torch.optim.lr_scheduler.LRScheduler
    mesh: DeviceMesh
    device: torch.device


def train_rank(
    options: TrainOptions,
    inputs: RunInputs,
    mesh: DeviceMesh,
    device: torch.device,
    report: Callable[[RunShape | StepMetrics | StepTrace], None],
) -> None:
    """Trains this rank's part of the model; every rank of the mesh calls it.

    Args:
        options: the run, the same on every rank.
        inputs: its files, the same on every rank.
        mesh: dimensions `pp` and `dp`.
        device: of this rank.
        report: takes the run's shape, then the metrics of every step, and before them what was
            recorded of it, on the first rank only.

    Raises:
        TrainingError: the loss or the gradients' norm is not finite any more (on every rank).
    """
    rank = _build(options, inputs, mesh, device)
    shape = _run_shape(options, rank)
    first = dist.get_rank() == 0
    if first:
        report(shape)
    batches = Batches(options, inputs, replica=mesh.get_local_rank(DP), replicas=shape.replicas)
    for event in _steps(options, rank, batches):
        if first:
            report(event)


def _build(
    options: TrainOptions, inputs: RunInputs, mesh: DeviceMesh, device: torch.device
) -> _Rank:
    replicas = mesh[DP].size()
    # Every replica's mean is over its own share, and FSDP averages over replicas. All windows are
    # full, so the shares hold equally many targets.
    targets = options.batch_size // replicas * (options.seq_len - 1)
    pipeline = pipeline_model(
        build_model(options, inputs),
        mesh,
        None,
        pp_axis_name=PP,
        dp_axis_names=(DP,),
        layers_per_stage=None,
        pipeline_parallel_schedule_csv=None,
        pipeline_parallel_schedule=options.schedule,
        microbatch_size=options.microbatch_size,
        local_batch_size=options.batch_size // replicas,
        device=device,
        loss_fn=lambda logits, labels: causal_lm_loss(logits, labels, num_items=targets),
        parallelize_fn=_shard if replicas > 1 else None,
        seq_len=options.seq_len,
        partition=options.partition,
        costs=None if options.costs is None else read_costs(options.costs),
    )
    parameters = [p for part in pipeline.model_parts for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr)
    warmup = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(1, options.warmup_steps))
    )
    return _Rank(pipeline, optimizer, warmup, mesh, device)


def _shard(
    model: nn.Module,
    world_mesh: DeviceMesh,
    moe_mesh: DeviceMesh | None,  # noqa: ARG001
    **_axes: Any,
) -> None:
    """Shards one stage over its replicas: each of its own layers, and the rest as one."""
    for layer in own_layers(model):
        fully_shard(layer, mesh=world_mesh[DP], reshard_after_forward=False)
    fully_shard(model, mesh=world_mesh[DP], reshard_after_forward=False)


def _steps(
    options: TrainOptions, rank: _Rank, batches: Batches
) -> Iterator[StepMetrics | StepTrace]:
    pipeline = rank.pipeline
    tokens_per_step = options.batch_size * options.seq_len
    max_norm = options.max_grad_norm or math.inf
    recorder: StepRecorder | None = None
    for step in range(options.steps):
        if recorder is None and step >= options.steps - options.trace:
            recorder = StepRecorder(pipeline.schedule, rank.device)
        started = time.perf_counter()
        ids = batches[step].to(rank.device)
        losses: list[Tensor] = []
        arguments = (ids,) if pipeline.has_first_stage else ()
        ends: dict[str, Any] = {"target": ids, "losses": losses} if pipeline.has_last_stage else {}
        pipeline.schedule.step(*arguments, return_outputs=False, **ends)
        norm = clip_grad_norm_(pipeline.model_parts, max_norm)
        rank.optimizer.step()
        rank.warmup.step()
        rank.optimizer.zero_grad()
        loss = _mean_loss(losses, rank)
        grad_norm = norm.item()
        for name, value in (("loss", loss), ("norm of the gradients", grad_norm)):
            if not math.isfinite(value):  # on every rank: both are sums over all
                raise TrainingError(
                    f"The {name} is {value} at step {step + 1}: use a lower --lr ({options.lr}), a "
                    f"longer --warmup-steps ({options.warmup_steps}) or a smaller --max-grad-norm "
                    f"({options.max_grad_norm})."
                )
        seconds = time.perf_counter() - started
        if recorder is not None:
            yield StepTrace(step=step + 1, ranks=tuple(recorder.gather()))
        yield StepMetrics(
            step=step + 1,
            loss=loss,
            grad_norm=grad_norm,
            tokens_per_second=tokens_per_step / seconds,
            seconds=seconds,
        )


def _mean_loss(losses: list[Tensor], rank: _Rank) -> float:
    """The batch's loss on every rank: only last stages have losses, one per microbatch."""
    total = torch.zeros((), dtype=torch.float64, device=rank.device)
    for loss in losses:
        total += loss.detach().to(total)
    dist.all_reduce(total)
    return total.item() / rank.mesh[DP].size()


def _run_shape(options: TrainOptions, rank: _Rank) -> RunShape:
    rows: list[StageRow] = []
    for part in rank.pipeline.model_parts:
        boundary = boundary_of(part)
        assert boundary is not None
        parameters = list(part.parameters())
        rows.append(
            StageRow(
                stage=boundary.stage_index,
                ranks=(dist.get_rank(),),
                layers=boundary.layers,
                parameters=sum(p.numel() for p in parameters),
                bytes=sum(p.numel() * p.element_size() for p in parameters),
            )
        )
    everyone: list[list[StageRow]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, rows)
    by_stage: dict[int, list[StageRow]] = {}
    for row in (row for rows in everyone for row in rows):
        by_stage.setdefault(row.stage, []).append(row)
    replicas = rank.mesh[DP].size()
    return RunShape(
        stages=tuple(
            StageRow(
                stage=stage,
                ranks=tuple(row.ranks[0] for row in alike),
                layers=alike[0].layers,
                parameters=alike[0].parameters,
                bytes=alike[0].bytes,
            )
            for stage, alike in sorted(by_stage.items())
        ),
        world_size=dist.get_world_size(),
        replicas=replicas,
        n_microbatches=options.n_microbatches(replicas),
        device=_device_words(rank.device),
    )


def _device_words(device: torch.device) -> str:
    if device.type != "cuda":
        return "CPU"
    return torch.cuda.get_device_name(device)
