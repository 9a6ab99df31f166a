"""Optimizer steps of a tied model, by one process and by a pipeline, for comparison."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hfpp import PipelineConfigError, clip_grad_norm_
from hfpp.runtime.pipeline import Pipeline
from hfpp.runtime.stage_boundary import boundary_of, places_of
from tests.models import relative_error, tiny_model, token_ids
from tests.runtime.real_pipelines import build, loss, plain_name, step, whole
from tests.runtime.tied_models import tied_model

SEQ = 6
MAX_NORM = 0.05  # below the norms that occur
LLAMA: dict[str, Any] = {
    "tie_word_embeddings": True,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
}

Bits = dict[tuple[int, int], str]  # of every copy, by (number of the tensor, stage)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained and how; ``model``: llama, or the name of a plain tied model."""

    model: str
    microbatches: int = 2  # of one row, for each replica
    replicas: int = 1
    steps: int = 20
    accumulated: int = 2  # schedule steps per optimizer step
    scale_grads: bool = False
    clips: bool = False

    def make(self) -> nn.Module:
        """The model, the same on every call."""
        return tiny_model("llama", **LLAMA) if self.model == "llama" else tied_model(self.model)

    def batches(self) -> list[list[Tensor]]:
        """Token ids by optimizer step and schedule step, each int64 [rows, SEQ]."""
        rows = self.microbatches * self.replicas
        number = iter(range(self.steps * self.accumulated))
        return [
            [token_ids(rows, SEQ, seed=next(number)) for _ in range(self.accumulated)]
            for _ in range(self.steps)
        ]


def optimizer_of(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with weight decay, which changes what has a gradient, be it zero."""
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


def train_unsplit(case: Case) -> dict[str, Tensor]:
    """Every parameter, by each of its names, after plain training on the same microbatches."""
    model = case.make()
    optimizer = optimizer_of(model.parameters())
    divisor = case.replicas * (case.microbatches if case.scale_grads else 1)
    for number, batches in enumerate(case.batches()):
        for ids in batches:
            for row in ids.split(1):
                output = model(row)
                (loss(getattr(output, "logits", output), row) / divisor).backward()
        if case.clips:
            assert nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM) > MAX_NORM
        optimizer.step()
        optimizer.zero_grad(set_to_none=number % 2 == 0)
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


def build_case(case: Case, mesh: DeviceMesh, schedule: str, **changes: Any) -> Pipeline:
    """The pipeline of a case."""
    settings: dict[str, Any] = {
        "local_batch_size": case.microbatches,
        "microbatch_size": 1,
        "seq_len": SEQ,
        "scale_grads": case.scale_grads,
    }
    return build(case.make(), mesh, schedule, copy_model=False, **{**settings, **changes})


def train_split(
    case: Case, mesh: DeviceMesh, schedule: str, **changes: Any
) -> tuple[Pipeline, list[Bits]]:
    """The same training by a pipeline, and after every step the bits of this rank's copies."""
    pipeline = build_case(case, mesh, schedule, **changes)
    parts = pipeline.model_parts
    optimizer = optimizer_of([p for part in parts for p in part.parameters()])
    bits = []
    for number, batches in enumerate(case.batches()):
        for ids in batches:
            step(pipeline, mesh, ids)
        if case.clips:
            clip_grad_norm_(parts, MAX_NORM)
        optimizer.step()
        bits.append(bits_of_copies(pipeline, optimizer))
        optimizer.zero_grad(set_to_none=number % 2 == 0)
    return pipeline, bits


def copies(pipeline: Pipeline) -> dict[tuple[int, int], nn.Parameter]:
    """This rank's copies of tied tensors, by (number of the tensor, stage)."""
    found = {}
    for part in pipeline.model_parts:
        boundary = boundary_of(part)
        assert boundary is not None
        places = places_of(part)
        for number, tied in enumerate(boundary.tied):
            for stage, names in tied.names:
                if stage == boundary.stage_index:
                    found[number, stage] = places[names[0]].parameter
    return found


def bits_of_copies(pipeline: Pipeline, optimizer: torch.optim.Optimizer) -> Bits:
    """A digest of every copy and of what the optimizer knows of it."""
    return {
        key: hashlib.sha256(
            b"".join(
                _bytes(tensor)
                for tensor in (parameter, *optimizer.state[parameter].values())
                if isinstance(tensor, Tensor)
            )
        ).hexdigest()
        for key, parameter in copies(pipeline).items()
    }


def _bytes(tensor: Tensor) -> bytes:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def wrong_values(pipeline: Pipeline, expected: dict[str, Tensor], tolerance: float) -> list[str]:
    """Every parameter that is not what plain training makes of it, and by how much."""
    wrong = []
    for part in pipeline.model_parts:
        for name, parameter in part.named_parameters(remove_duplicate=False):
            error = relative_error(whole(parameter), expected[plain_name(name)])
            if error > tolerance:
                wrong.append(f"{name}: off by {error:.1e}")
    return wrong


def refusal(pipeline: Pipeline, mesh: DeviceMesh, ids: Tensor) -> str:
    """What a step says; empty where it runs."""
    try:
        step(pipeline, mesh, ids)
    except PipelineConfigError as error:
        return str(error)
    return ""
