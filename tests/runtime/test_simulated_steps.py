"""Real steps over gloo, of stages that sleep for their cost, end when the simulation says so."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from hfpp import build_pipeline_schedule
from hfpp.plan.costs import UnitCost
from hfpp.plan.schedules import SCHEDULES, compute_table
from hfpp.plan.schedules.simulator import simulate
from tests.ranks import run_ranks
from tests.sleeping_model import Sleep

RANKS = 4
STEPS = 3  # measured, after one that sets up what torch sets up in the first


class SleepyStage(nn.Module):
    """Computes next to nothing, in the time that its cost says."""

    def __init__(self, cost: UnitCost) -> None:
        super().__init__()
        self.cost = cost
        self.weight = nn.Parameter(torch.ones(1))
        self.pace = 0.0

    def forward(self, hidden: Tensor) -> Tensor:
        cost, pace = self.cost, self.pace
        hidden = Sleep.apply(hidden, pace * cost.forward, pace * cost.backward_input)
        return hidden + Sleep.apply(self.weight, 0.0, pace * cost.backward_weight)


def costs_of(scales: list[float]) -> tuple[UnitCost, ...]:
    """One stage per scale; the first has no inputs that want a gradient: all is its weights'."""
    costs = []
    for stage, scale in enumerate(scales):
        forward, inputs, weight = 0.025 * scale, 0.03 * scale, 0.02 * scale
        if stage == 0:
            inputs, weight = 0.0, inputs + weight
        costs.append(UnitCost(forward=forward, backward_input=inputs, backward_weight=weight))
    return tuple(costs)


def _steps(
    rank: int, pp_size: int, name: str, stage_ids: tuple[tuple[int, ...], ...], n: int, costs: Any
) -> list[tuple[float, float]]:
    """When this rank begins and ends each step, by the machine's clock."""
    ids = torch.empty(1, 1, device="meta")
    hidden = torch.empty(1, 1, device="meta", requires_grad=True)
    stages = [
        PipelineStage(
            SleepyStage(costs[stage]),
            stage,
            len(costs),
            torch.device("cpu"),
            input_args=hidden if stage else ids,
            output_args=hidden,
        )
        for stage in stage_ids[rank]
    ]
    schedule = build_pipeline_schedule(
        None, name, 1, n, stages, lambda output, target: (output - target).sum()
    )
    first = any(stage.is_first for stage in stages)
    last = any(stage.is_last for stage in stages)
    times = []
    for _ in range(1 + STEPS):
        dist.barrier()
        begin = time.monotonic()
        schedule.step(
            *((torch.ones(n, 1),) if first else ()), target=torch.ones(n, 1) if last else None
        )
        times.append((begin, time.monotonic()))
        for stage in stages:
            stage.submod.pace = 1.0
    gradients = [stage.submod.weight.grad for stage in stages]
    assert all(gradient.item() == n * (1 + STEPS) for gradient in gradients)
    return times[1:]


@pytest.mark.parametrize(
    ("name", "n", "scales"),
    [
        ("GPipe", 4, [0.7, 0.9, 1.1, 1.3]),
        ("1F1B", 5, [1.0, 1.5, 1.0, 1.0]),
        ("Interleaved1F1B", 4, [0.7, 0.8, 0.9, 1.0, 1.0, 1.1, 1.2, 1.3]),
        ("InterleavedZeroBubble", 6, [1.0] * 4),
        ("ZBVZeroBubble", 6, [1.0, 0.5, 1.0, 1.0, 1.0, 1.5, 0.5, 1.0]),
    ],
)
def test_a_real_step_takes_the_simulated_time(name: str, n: int, scales: list[float]) -> None:
    table = compute_table(
        SCHEDULES[name], pp_size=RANKS, n_microbatches=n, stages_per_rank=len(scales) // RANKS
    )
    costs = costs_of(scales)
    predicted = simulate(table, costs).step_time
    ranks = run_ranks(_steps, RANKS, args=(name, table.stages_by_rank, n, costs))
    # The machine may have other work, which makes a step longer, never shorter.
    took = min(
        max(end for _, end in step) - min(begin for begin, _ in step)
        for step in zip(*ranks, strict=True)
    )
    assert predicted <= took <= 1.1 * predicted
