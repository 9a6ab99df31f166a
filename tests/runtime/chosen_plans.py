"""All plans of a small job, run for real, beside the one that the planner chooses."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from hfpp import PipelineConfigError, causal_lm_loss, pipeline_model
from hfpp.plan.costs import ModelCosts
from hfpp.plan.estimates.hardware import Hardware
from hfpp.plan.model.shape import ModelShape
from hfpp.plan.pipeline_plan import PipelinePlan
from hfpp.plan.schedules import SCHEDULES, check_microbatches, find_schedule
from hfpp.plan.search.candidates import PlanRequest
from hfpp.plan.search.cluster import Cluster
from hfpp.plan.search.planner import find_plans, fingerprint_of
from hfpp.profile.measure import profile_model
from hfpp.runtime.pipeline import Pipeline
from tests.sleeping_model import Sleep

PP = 2
# What gloo does between two processes of one machine, roughly.
GLOO = Hardware(
    name="a core",
    flops=5e10,
    memory_bandwidth=1e10,
    memory_bytes=1 << 40,
    node_bandwidth=2e9,
    network_bandwidth=2e9,
    latency=3e-4,
)


class Sleeper(nn.Linear):
    """A linear layer with a given time: forward, for the inputs' gradient, for the weights'.

    A sleeping process takes as long whatever else the machine does.
    """

    def __init__(self, linear: nn.Linear, seconds: float, per_row: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.seconds = seconds
        self.per_row = per_row

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seconds = self.seconds + self.per_row * x.shape[0]
        weight = Sleep.apply(self.weight, 0.0, seconds)
        return nn.functional.linear(Sleep.apply(x, seconds, seconds), weight)


class Job(NamedTuple):
    """A model, a batch, and what may be chosen.

    Attributes:
        config: of a Llama.
        seq_len: tokens of a sequence.
        batch: sequences of a step.
        schedules: names.
        sizes: sequences of a microbatch.
        sleeps: seconds that each of its layers sleeps, and more per sequence; the head sleeps twice
            as long. None: it computes.
    """

    config: dict[str, Any]
    seq_len: int
    batch: int
    # Two ranks leave no limits on activations to choose from.
    schedules: tuple[str, ...] = tuple(name for name in SCHEDULES if name != "VLimited")
    sizes: tuple[int, ...] = (1, 2, 4)
    sleeps: tuple[float, float] | None = None

    def model(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**self.config))
        if self.sleeps is not None:
            base, row = self.sleeps
            for layer in model.model.layers:
                layer.mlp.down_proj = Sleeper(layer.mlp.down_proj, base, row)
            model.lm_head = Sleeper(model.lm_head, 2 * base, 2 * row)
        return model

    def shape(self) -> ModelShape:
        return ModelShape.from_config({"model_type": "llama", "dtype": "float32", **self.config})


def every_plan(job: Job) -> list[PipelinePlan]:
    """Schedules x microbatch sizes that they can run x all partitions into stages with layers."""
    shape, plans = job.shape(), []
    layers = len(shape.layers)
    for name, size in itertools.product(job.schedules, job.sizes):
        spec = find_schedule(name)
        stages, count = PP * (spec.stages_per_rank or 2), job.batch // size
        try:
            check_microbatches(spec, pp_size=PP, num_stages=stages, n_microbatches=count)
        except PipelineConfigError:
            continue
        for cuts in itertools.combinations(range(1, layers), stages - 1):
            plans.append(
                PipelinePlan(
                    model=fingerprint_of(shape),
                    pp_size=PP,
                    schedule=name,
                    stages_per_rank=stages // PP,
                    n_microbatches=count,
                    microbatch_size=size,
                    seq_len=job.seq_len,
                    offsets=(0, *cuts, layers),
                )
            )
    return plans


def measured_costs(_rank: int, _world_size: int, job: Job) -> dict[int, ModelCosts]:
    """The costs of each size of microbatch, while the other rank computes too."""
    torch.set_num_threads(1)
    model = job.model()
    dist.barrier()
    return {
        size: profile_model(model, microbatch_size=size, seq_len=job.seq_len) for size in job.sizes
    }


def chosen_plan(job: Job, costs: dict[int, ModelCosts]) -> PipelinePlan:
    request = PlanRequest(
        global_batch_size=job.batch,
        seq_len=job.seq_len,
        pp_sizes=(PP,),
        schedules=job.schedules,
        stages_per_rank=(1, 2),
        microbatch_sizes=job.sizes,
        recompute=("none",),
        top=1,
    )
    cluster = Cluster(gpus=PP, hardware=GLOO)
    return find_plans(job.shape(), cluster, request, measured=costs)[0].plan


def is_same(one: PipelinePlan, other: PipelinePlan) -> bool:
    """Whether both run the same, whatever they predict."""
    return replace(one, prediction=None) == replace(other, prediction=None)


class Rounds(NamedTuple):
    """How often plans are run.

    Attributes:
        all: of every plan, after one to warm up.
        last: at most, of the fastest and of the chosen.
        finalists: how many are the fastest.
    """

    all: int
    last: int
    finalists: int


def seconds_of_plans(
    rank: int,
    world_size: int,
    job: Job,
    plans: Sequence[PipelinePlan],
    chosen: int,
    rounds: Rounds,
    enough: float,
) -> tuple[list[float], list[float]]:
    """Seconds of a step of each plan: the least of the first rounds, and of all.

    Plans that do not come to the last rounds have infinity there.

    The plans take turns in every round, so that whatever else the machine does meets all of them
    alike, and can only slow them down. Rounds end early when the chosen plan is known to take no
    more than ``enough`` times as long as the fastest.
    """
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("pp",))
    model = job.model()
    ids = torch.randint(job.config["vocab_size"], (job.batch, job.seq_len))
    pipelines = [_built(model, mesh, plan) for plan in plans]
    seconds = [float("inf")] * len(plans)
    everything = list(range(len(plans)))
    _take_turns(pipelines, everything, ids, list(seconds))  # the first step warms up
    for _ in range(rounds.all):
        _take_turns(pipelines, everything, ids, seconds)
    first = list(seconds)
    fastest = sorted(everything, key=seconds.__getitem__)[: rounds.finalists]
    last = sorted({*fastest, chosen})
    for index in set(everything) - set(last):
        seconds[index] = float("inf")
    for number in range(rounds.last):
        if number >= 3 and seconds[chosen] <= enough * min(seconds):
            break
        _take_turns(pipelines, last, ids, seconds)
    return first, seconds


def _built(model: LlamaForCausalLM, mesh: Any, plan: PipelinePlan) -> Pipeline:
    return pipeline_model(
        model,
        mesh,
        None,
        pp_axis_name="pp",
        dp_axis_names=(),
        layers_per_stage=None,
        pipeline_parallel_schedule_csv=None,
        pipeline_parallel_schedule=None,
        microbatch_size=None,
        local_batch_size=None,
        device=torch.device("cpu"),
        loss_fn=causal_lm_loss,
        plan=plan,
    )


def _take_turns(
    pipelines: Sequence[Pipeline], taking: Sequence[int], ids: torch.Tensor, least: list[float]
) -> None:
    """A step of each; a step ends when all ranks have ended."""
    slowest = torch.zeros(1, dtype=torch.float64)
    for index in taking:
        pipeline = pipelines[index]
        for part in pipeline.model_parts:
            part.zero_grad(set_to_none=True)
        dist.barrier()
        start = time.perf_counter()
        pipeline.schedule.step(
            *((ids,) if pipeline.has_first_stage else ()),
            target=ids if pipeline.has_last_stage else None,
            return_outputs=False,
        )
        slowest[0] = time.perf_counter() - start
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        least[index] = min(least[index], slowest.item())
