"""A tiny model trained by a real pipeline and by itself: gradients must be equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from hfpp import pipeline_model
from hfpp.plan.partition import uniform_offsets
from hfpp.runtime.find_anatomy import find_anatomy
from hfpp.runtime.ownership import find_ownership
from hfpp.runtime.pipeline import Pipeline
from hfpp.runtime.split_model import build_stages
from tests.models import VOCAB, relative_error, tiny_model, token_ids

SEQ = 11  # longer than the windows of the tiny models
ROWS = 8  # of a batch, over all replicas
MICROBATCHES = 4  # of each replica: on two ranks, several are in flight at once
TOLERANCE = 1e-9

SINGLE = ("GPipe", "1F1B")
LOOPED = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
SCHEDULES = (*SINGLE, *LOOPED, *V_SHAPED)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over a microbatch, written without hfpp."""
    logits, labels = logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)
    return nn.functional.cross_entropy(logits, labels)


def tiny_llama(**changes: Any) -> Any:
    return tiny_model("llama", **changes)


def data_and_pipeline_mesh(world_size: int, pp_size: int = 2) -> DeviceMesh:
    shape = (world_size // pp_size, pp_size)
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "pp"))


def batches(steps: int = 1) -> list[Tensor]:
    return [token_ids(ROWS, SEQ, seed=step) for step in range(steps)]


def unsplit_gradients(
    model: nn.Module, steps: Iterable[Tensor], *, replicas: int = 1
) -> dict[str, Tensor | None]:
    """By name, what plain training accumulates: the mean over replicas of sums over microbatches.

    The same microbatches: models that compute some things in float32 round by microbatch.
    """
    model.zero_grad(set_to_none=True)
    for ids in steps:
        for rows in ids.chunk(MICROBATCHES * replicas):
            output = model(rows)
            (loss(getattr(output, "logits", output), rows) / replicas).backward()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {n: None if p.grad is None else p.grad.clone() for n, p in parameters.items()}
    model.zero_grad(set_to_none=True)
    return found


def build(
    model: nn.Module,
    mesh: DeviceMesh,
    schedule: str | None,
    *,
    parallelize_fn: Callable[..., Any] | None = None,
    copy_model: bool = True,
    **changes: Any,
) -> Pipeline:
    """The pipeline of a copy of the model, for batches of `ROWS` rows over all replicas."""
    local_batch_size = ROWS // mesh["dp"].size()
    settings: dict[str, Any] = {
        "pp_axis_name": "pp",
        "dp_axis_names": ("dp",),
        "layers_per_stage": None,
        "pipeline_parallel_schedule_csv": None,
        "pipeline_parallel_schedule": schedule,
        "microbatch_size": local_batch_size // MICROBATCHES,
        "local_batch_size": local_batch_size,
        "device": torch.device("cpu"),
        "loss_fn": loss,
        "parallelize_fn": parallelize_fn,
        "seq_len": SEQ,
    }
    model = copy.deepcopy(model) if copy_model else model
    return pipeline_model(model, mesh, None, **{**settings, **changes})


def step(pipeline: Pipeline, mesh: DeviceMesh, ids: Tensor) -> None:
    """One step of the schedule on this replica's rows."""
    mine = ids.chunk(mesh["dp"].size())[mesh.get_local_rank("dp")]
    pipeline.schedule.step(
        *((mine,) if pipeline.has_first_stage else ()),
        target=mine if pipeline.has_last_stage else None,
    )


def split(model: nn.Module, num_stages: int, only: list[int] | None = None) -> list[nn.Module]:
    """The model's stages, all or some, in this process."""
    anatomy = find_anatomy(model)
    offsets = uniform_offsets(num_stages, anatomy.num_layers).row()
    ownership = find_ownership(model, anatomy, offsets)
    return build_stages(model, anatomy, ownership, only or list(range(num_stages)))


def plain_name(name: str) -> str:
    """Without what DistributedDataParallel and checkpoint_wrapper put into it."""
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wrong_gradients(
    parts: Iterable[nn.Module],
    expected: Mapping[str, Tensor | None],
    tolerance: float = TOLERANCE,
) -> list[str]:
    """Every parameter whose gradient is not what the unsplit model has, and by how much."""
    wrong = []
    for part in parts:
        for full_name, parameter in part.named_parameters(remove_duplicate=False):
            name = plain_name(full_name)
            want, got = expected[name], parameter.grad
            if (want is None) != (got is None):
                wrong.append(f"{name}: {'has a' if want is None else 'lost its'} gradient")
            elif want is not None and got is not None:
                error = relative_error(whole(got), want)
                if error > tolerance:
                    wrong.append(f"{name}: off by {error:.1e}")
    return wrong
