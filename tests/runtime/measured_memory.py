"""One rank's memory in a real run, counted, and the same by formula."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from hfpp import pipeline_model
from hfpp.plan.estimates.memory import Keeping, rank_memory
from hfpp.plan.estimates.workload import Workload
from hfpp.plan.model.shape import ModelShape
from hfpp.plan.pipeline_plan import Recompute
from hfpp.plan.prediction import MemoryParts
from hfpp.plan.schedules import compute_table, find_schedule
from hfpp.runtime.loss import causal_lm_loss
from tests.runtime.live_bytes import LiveBytes

# torch 2.15 makes receive buffers when they are needed.
BUFFERS_AHEAD = importlib.util.find_spec("torch.distributed.pipelining._recv_buffers") is None


class Case(NamedTuple):
    """A run.

    Attributes:
        model_type: of the config.
        values: of the config.
        schedule: its name.
        offsets: of the layers by stage.
        dtype: of the model.
        pp_size: ranks.
        rows: sequences per microbatch.
        seq_len: tokens of each.
        n_microbatches: in one step.
        outputs: whether the step returns them.
        recompute: whether layers are computed again for the backward.
    """

    model_type: str
    values: Mapping[str, Any]
    schedule: str
    offsets: tuple[int, ...]
    dtype: str = "float32"
    pp_size: int = 2
    rows: int = 2
    seq_len: int = 48
    n_microbatches: int = 6
    outputs: bool = False
    recompute: Recompute = "none"

    @property
    def name(self) -> str:
        """What the case is called."""
        size = self.values["vocab_size"]
        name = f"{self.model_type}-{size}-{self.schedule}-{self.dtype}-{self.pp_size}"
        name += "-outputs" if self.outputs else ""
        return f"{name}-{self.recompute}" if self.recompute != "none" else name

    @property
    def config(self) -> Any:
        """The model's config."""
        return AutoConfig.for_model(self.model_type, **self.values)


def _names(config: Any, model: torch.nn.Module, offsets: tuple[int, ...]) -> list[list[str]]:
    """The modules of every stage, by FQN."""
    prefix = "gpt_neox" if config.model_type == "gpt_neox" else "model"
    children = [f"{prefix}.{name}" for name, _ in model.get_submodule(prefix).named_children()]
    layers = children.index(f"{prefix}.layers")
    last = len(offsets) - 2
    return [
        [
            *(children[:layers] if stage == 0 else ()),
            *(f"{prefix}.layers.{i}" for i in range(offsets[stage], offsets[stage + 1])),
            *((*(c for c in children[layers + 1 :]), "lm_head") if stage == last else ()),
        ]
        for stage in range(last + 1)
    ]


def _distinct(tensors: list[torch.Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


Measured = tuple[MemoryParts, tuple[int, ...]]


def measure_all(rank: int, world_size: int, cases: tuple[Case, ...]) -> list[Measured]:
    """Every case on the same processes: most of a case's time is starting them."""
    return [measure(world_size, case) for case in cases]


def measure(world_size: int, case: Case) -> Measured:
    """One rank's parameters, gradients, buffers and live bytes at the peak of its second step."""
    torch.manual_seed(0)
    config = case.config
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
    model.train()
    if case.recompute == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "pp"))
    pipeline = pipeline_model(
        model,
        mesh,
        None,
        pp_axis_name="pp",
        dp_axis_names=("dp",),
        layers_per_stage=None,
        pipeline_parallel_schedule_csv=None,
        pipeline_parallel_schedule=case.schedule,
        microbatch_size=case.rows,
        local_batch_size=case.rows * case.n_microbatches,
        device=torch.device("cpu"),
        loss_fn=causal_lm_loss,
        seq_len=case.seq_len,
        module_fqns_per_model_part=_names(config, model, case.offsets),
    )
    del model
    ids = torch.randint(0, config.vocab_size, (case.rows * case.n_microbatches, case.seq_len))

    def step() -> None:
        pipeline.schedule.step(
            *((ids,) if pipeline.has_first_stage else ()),
            target=ids if pipeline.has_last_stage else None,
            return_outputs=case.outputs,
        )

    step()
    parameters = [p for part in pipeline.model_parts for p in part.parameters()]
    for parameter in parameters:
        parameter.grad = None
    buffers = [b for part in pipeline.model_parts for b in part.buffers()]
    received = [
        info.buffer
        for stage in pipeline.stages
        for chunks in (stage.args_recv_info, stage.grad_recv_info)
        for infos in chunks.values()
        for info in infos
        if getattr(info, "buffer", None) is not None
    ]
    live = LiveBytes([*parameters, *buffers, *received, ids])
    with live.counting():
        step()
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = MemoryParts(
        parameters=_distinct(list(parameters)),
        gradients=_distinct(list(gradients)),
        activations=live.peak - _distinct(list(gradients)),
        receive_buffers=_distinct(received),
    )
    return parts, tuple(stage.stage_index for stage in pipeline.stages)


def predict(case: Case, rank: int, stages: tuple[int, ...], schedule: str) -> MemoryParts:
    """The same by formula, with a schedule's order of actions."""
    config = case.config
    table = compute_table(
        find_schedule(schedule),
        pp_size=case.pp_size,
        n_microbatches=case.n_microbatches,
        stages_per_rank=len(stages),
    )
    return rank_memory(
        ModelShape.from_config(json.loads(config.to_json_string(use_diff=False))),
        Workload(
            microbatch_size=case.rows,
            seq_len=case.seq_len,
            dtype=case.dtype,
            attention="sdpa",
            recompute=case.recompute,
        ),
        offsets=case.offsets,
        stages=stages,
        actions=table.row(rank),
        n_microbatches=case.n_microbatches,
        keeping=Keeping(optimizer_bytes=0, outputs=case.outputs, buffers_ahead=BUFFERS_AHEAD),
    )
