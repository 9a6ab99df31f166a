"""Recording real steps: every computation and message, on one clock, and nothing left behind."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hfpp.plan.render.recorded import RankRecord, recorded_timeline
from hfpp.plan.schedules import SCHEDULES, compute_table
from hfpp.plan.schedules.lowering import lower
from hfpp.runtime.clocks import clock_offset
from hfpp.runtime.recording import StepRecorder
from tests.ranks import run_ranks
from tests.runtime.real_pipelines import (
    MICROBATCHES,
    batches,
    build,
    data_and_pipeline_mesh,
    step,
    tiny_llama,
)

RECORDED = ("1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV")
CPU = torch.device("cpu")


def gradients(pipeline: Any) -> list[torch.Tensor]:
    return [p.grad for part in pipeline.model_parts for p in part.parameters()]


def recorded_steps(rank: int, world_size: int, schedules: tuple[str, ...]) -> Any:
    """By schedule: the gathered records of two steps, and what this rank saw around them."""
    torch.manual_seed(0)
    model, (ids, more) = tiny_llama(), batches(2)
    mesh = data_and_pipeline_mesh(world_size, world_size)
    found = {}
    for schedule in schedules:
        plain, pipeline = (build(model, mesh, schedule) for _ in range(2))
        recorder = StepRecorder(pipeline.schedule, CPU)
        before = [set(stage.__dict__) for stage in pipeline.stages]
        steps = []
        for batch in (ids, more):
            step(pipeline, mesh, batch)
            steps.append(recorder.gather())
            step(plain, mesh, batch)
        alike = all(map(torch.equal, gradients(pipeline), gradients(plain)))
        wrapped = [
            name
            for stage, names in zip(pipeline.stages, before, strict=True)
            for name in set(stage.__dict__) - names
            if "one_chunk" in name or "send_ops" in name
        ]
        found[schedule] = (steps, alike, wrapped)
    return found


@pytest.fixture(scope="module")
def runs() -> list[Any]:
    return run_ranks(recorded_steps, 2, args=(RECORDED,), timeout_s=120)


def actions(record: RankRecord) -> list[str]:
    return [str(computed.action) for computed in record.computed]


@pytest.mark.parametrize("name", RECORDED)
def test_what_is_recorded_is_the_schedule(name: str, runs: list[Any]) -> None:
    table = compute_table(SCHEDULES[name], pp_size=2, n_microbatches=MICROBATCHES)
    lowered = lower(table)
    for steps, alike, wrapped in (run[name] for run in runs):
        assert alike  # with and without a recorder
        assert wrapped == []
        assert len(steps) == 2
        for ranks in steps:
            for rank, record in enumerate(ranks):
                planned = [leaf for s in table.steps(rank) for leaf in s.action.leaves]
                assert actions(record) == list(map(str, planned))
                sends = {s.action for s in lowered.steps(rank) if "SEND" in s.action.kind.value}
                assert {sent.action for sent in record.sent} == sends
                assert all(sent.target == 1 - rank and sent.size > 0 for sent in record.sent)
                times = [t for c in record.computed for t in (c.start, c.end)]
                assert times == sorted(times)
    assert runs[0][name][0] == runs[1][name][0]  # gathered alike on both


@pytest.mark.parametrize("name", RECORDED)
def test_ranks_have_one_clock(name: str, runs: list[Any]) -> None:
    """Nothing starts before what it takes was made, on whichever rank that was."""
    for ranks in runs[0][name][0]:
        line = recorded_timeline(name, ranks)
        ends = {str(bar.action): bar.end for row in line.bars for bar in row}
        last = line.num_stages - 1
        for bar in (bar for row in line.bars for bar in row):
            stage, kind, microbatch, _ = bar.action
            if kind.value == "F" and stage > 0:
                assert ends[f"{stage - 1}F{microbatch}"] <= bar.start
            if kind.value in "BI" and stage < last:
                made = [ends.get(f"{stage + 1}{k}{microbatch}") for k in "BI"]
                assert min(end for end in made if end is not None) <= bar.start
        assert all(t.start <= t.end for t in line.transfers)
        assert 0 < line.end < 60


def sleeping_step(rank: int, world_size: int) -> Any:
    """A step whose loss sleeps; and the later, unrecorded step of another schedule."""
    torch.manual_seed(0)
    model, (ids,) = tiny_llama(), batches()
    mesh = data_and_pipeline_mesh(world_size, world_size)

    def slow_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return logits.float().mean()

    pipeline = build(model, mesh, "1F1B", loss_fn=slow_loss)
    recorder = StepRecorder(pipeline.schedule, CPU)
    step(pipeline, mesh, ids)
    pipeline.schedule.eval(
        *((ids,) if pipeline.has_first_stage else ()),
        target=ids if pipeline.has_last_stage else None,
    )
    return recorder.record()


def test_the_loss_counts_to_its_forward_and_eval_is_not_recorded() -> None:
    first, last = run_ranks(sleeping_step, 2)
    assert len(first.computed) == len(last.computed) == 2 * MICROBATCHES
    forwards = [c.end - c.start for c in last.computed if c.action.kind.value == "F"]
    assert min(forwards) >= 0.05


def offsets(rank: int, world_size: int, ahead: tuple[float, ...]) -> tuple[float, float]:
    """What is found of clocks that are ahead, and of clocks that are one."""

    def now() -> float:
        return time.perf_counter() + ahead[rank]

    found = clock_offset(dist.group.WORLD, CPU, now=now)
    return found, clock_offset(dist.group.WORLD, CPU, now=time.perf_counter)


def test_clocks_that_differ_are_seen_and_clocks_of_one_machine_are_one() -> None:
    ahead = (10.0, -3.0, 1e5)
    found = run_ranks(offsets, 3, args=(ahead,))
    for (offset, same), mine in zip(found, ahead, strict=True):
        assert offset == pytest.approx(ahead[0] - mine, abs=0.05)
        assert same == 0
