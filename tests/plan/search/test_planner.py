"""The planner finds the best there is, says what it costs, and why the others lost."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfpp import PipelineConfigError
from hfpp.plan.costs import ModelCosts, UnitCost
from hfpp.plan.pipeline_plan import ParallelSizes
from hfpp.plan.prediction import MemoryParts, NetworkParts, Prediction, TimeParts
from hfpp.plan.schedules import SCHEDULES, compute_table
from hfpp.plan.schedules.simulator import simulate
from hfpp.plan.schedules.verifier import verify
from hfpp.plan.search.candidates import Candidate, candidates, ranks_of
from hfpp.plan.search.comparison import why_it_lost
from hfpp.plan.search.planner import RankedPlan, find_plans
from hfpp.plan.sizes import bytes_as_text
from tests.plan.search.small_jobs import (
    CONFIGS,
    EXPERTS,
    evaluator_of,
    small_cluster,
    small_request,
    small_shape,
)

GIB = 1 << 30


def plan_seconds(plans: list[RankedPlan]) -> list[float]:
    return [ranked.prediction.step_time for ranked in plans]


# ---- the search


@st.composite
def runs(draw) -> tuple[Candidate, ModelCosts, tuple[int, ...]]:
    """A candidate, costs of a model, and any partition of it."""
    spec = SCHEDULES[draw(st.sampled_from(sorted(SCHEDULES)))]
    pp_size = draw(st.integers(1, 5))
    per_rank = spec.stages_per_rank or draw(st.integers(2, 3))
    stages = pp_size * per_rank
    seconds = st.floats(0.01, 10)
    units = st.builds(UnitCost, forward=seconds, backward_input=seconds, backward_weight=seconds)
    layers = draw(st.lists(units, min_size=stages, max_size=stages + 8))
    costs = ModelCosts(
        embedding=draw(units),
        layers=tuple(layers),
        head=draw(units),
        boundary_bytes=0,
        source="measured",
    )
    cuts = draw(st.permutations(range(1, len(layers))))[: stages - 1]
    candidate = Candidate(
        spec=spec,
        pp_size=pp_size,
        stages_per_rank=per_rank,
        n_microbatches=2 * stages * draw(st.integers(1, 2)),
        microbatch_size=1,
        recompute="none",
        parallel=ParallelSizes(),
    )
    return candidate, costs, (0, *sorted(cuts), len(layers))


@given(runs())
@settings(deadline=None)
def test_no_partition_is_faster_than_the_bound(run):
    candidate, costs, offsets = run
    table = compute_table(
        candidate.spec,
        pp_size=candidate.pp_size,
        n_microbatches=candidate.n_microbatches,
        stages_per_rank=candidate.stages_per_rank,
    )
    seconds = simulate(table, costs.stages(offsets)).step_time
    assert candidate.least_seconds(costs) <= seconds * (1 + 1e-9)


def test_a_pipeline_of_one_rank_has_no_virtual_stages():
    found = [c for c in candidates(small_request(), gpus=8, num_layers=7) if c.pp_size == 1]
    assert found
    assert {candidate.stages_per_rank for candidate in found} == {1}
    wanted = small_request(pp_sizes=(1,), schedules=("ZBVZeroBubble",))
    assert candidates(wanted, gpus=8, num_layers=7)[0].stages_per_rank == 2  # as asked for


@pytest.mark.parametrize("memory", [80 * GIB, 3 * GIB])
def test_nothing_that_is_left_out_is_better(memory):
    shape, cluster, request = small_shape(), small_cluster(memory_bytes=memory), small_request()
    evaluator = evaluator_of(shape, cluster, request)
    possible = candidates(request, gpus=8, num_layers=7)
    everything = [evaluator.evaluate(candidate) for candidate in possible]
    fitting = sorted(found.step_time for found in everything if found.fits)
    assert (len(fitting) == len(everything)) is (memory == 80 * GIB)
    plans = find_plans(shape, cluster, replace(request, top=7))
    assert plan_seconds(plans) == pytest.approx(fitting[:7])


@pytest.mark.parametrize("is_tied", [False, True])
def test_memory_is_never_more_than_what_decided_whether_it_fits(is_tied):
    shape, request = small_shape(tie_word_embeddings=is_tied), small_request()
    evaluator = evaluator_of(shape, small_cluster(), request)
    for candidate in candidates(request, gpus=8, num_layers=7):
        found = evaluator.evaluate(candidate)
        exact = evaluator.prediction(found).memory
        assert all(
            at_most.total >= parts.total for at_most, parts in zip(found.memory, exact, strict=True)
        ), candidate
        least = evaluator.least_memory(candidate)
        assert least <= max(parts.total for parts in exact), candidate


def test_one_stage_has_a_tied_matrix_once():
    shape, request = small_shape(tie_word_embeddings=True), small_request(pp_sizes=(1,))
    memory = find_plans(shape, small_cluster(), replace(request, schedules=("1F1B",)))[0]
    assert memory.prediction.peak_memory.parameters == 2 * shape.parameters


def test_of_plans_as_fast_the_one_with_less_memory_comes_first():
    """All schedules of one rank take as long, up to the order in which times are added."""
    request = small_request(global_batch_size=8, pp_sizes=(1,), recompute=("none",), top=40)
    found = [p.prediction for p in find_plans(small_shape(), small_cluster(), request)]
    as_fast = [p for p in found if p.step_time <= found[0].step_time * (1 + 1e-9)]
    assert len(as_fast) > 2
    assert as_fast[0].peak_memory.total == min(p.peak_memory.total for p in as_fast)


def test_no_partition_of_any_schedule_is_much_faster():
    """Every cut of a model with a large head, on every schedule, by brute force."""
    shape = small_shape(vocab_size=400_000)
    cluster = small_cluster(gpus=2)
    request = small_request(global_batch_size=8, recompute=("none",), pp_sizes=(2,))
    best = find_plans(shape, cluster, request)[0]
    evaluator = evaluator_of(shape, cluster, request)
    fastest = math.inf
    for candidate in candidates(request, gpus=2, num_layers=7):
        for cuts in itertools.combinations(range(1, 7), candidate.num_stages - 1):
            fastest = min(fastest, evaluator._run(candidate, (0, *cuts, 7)).step_time)
    assert fastest <= best.prediction.step_time <= 1.03 * fastest


@pytest.mark.parametrize(("memory", "vocab"), [(2.5, 50_000), (4, 50_000), (9, 200_000)])
def test_no_partition_that_fits_into_memory_is_much_faster(memory, vocab):
    """Every cut on every schedule, where memory decides."""
    shape = small_shape(vocab_size=vocab)
    cluster = small_cluster(gpus=4, memory_bytes=round(memory * GIB))
    request = small_request(global_batch_size=16, seq_len=2048)
    evaluator = evaluator_of(shape, cluster, request)
    fastest, too_large = math.inf, 0
    for candidate in candidates(request, gpus=4, num_layers=7):
        if evaluator.least_memory(candidate) > cluster.hardware.memory_bytes:
            too_large += 1
            continue
        for cuts in itertools.combinations(range(1, 7), candidate.num_stages - 1):
            found = evaluator._run(candidate, (0, *cuts, 7))
            too_large += not found.fits
            fastest = min(fastest, found.step_time if found.fits else math.inf)
    assert too_large > 100
    best = find_plans(shape, cluster, replace(request, top=1))[0]
    assert fastest <= best.prediction.step_time <= 1.03 * fastest


@pytest.mark.parametrize(
    ("gpus", "batch", "tp", "memory"),
    [(1, 8, 1, 80), (4, 24, 2, 3), (6, 96, 1, 80), (8, 8, 1, 3), (8, 24, 2, 80), (24, 96, 2, 2)],
)
def test_figures_add_up(gpus, batch, tp, memory):
    shape, cluster = small_shape(), small_cluster(gpus=gpus, memory_bytes=memory * GIB)
    request = small_request(global_batch_size=batch, tp=tp, top=3)
    plans = find_plans(shape, cluster, request)
    for ranked in plans:
        plan, figures = ranked.plan, ranked.prediction
        assert plan.gpus == gpus
        assert plan.global_batch_size == batch
        tokens = batch * request.seq_len / figures.step_time
        assert figures.tokens_per_second == pytest.approx(tokens)
        assert max(parts.total for parts in figures.memory) <= memory * GIB
        simulation = simulate(
            plan.table(), ranked.stages, link=ranked.link, boundary_bytes=ranked.boundary_bytes
        )
        time = figures.time
        pipeline = time.total - time.reduction - time.optimizer
        assert pipeline == pytest.approx(simulation.step_time)
        parameters = sum(parts.parameters for parts in figures.memory)
        assert parameters == pytest.approx(2 * shape.parameters / tp, rel=1e-3)
        assert (time.collectives > 0) is (tp > 1)
        if plan.parallel.dp == 1:
            assert time.reduction < 1e-9 * time.total
            assert figures.network.data == 0
    times = [float(f"{seconds:.9g}") for seconds in plan_seconds(plans)]
    assert times == sorted(times)
    assert [bool(ranked.lost_by) for ranked in plans] == [False, True, True][: len(plans)]


def test_choices_are_kept():
    request = small_request(
        schedules=("interleaved", "zbv"),
        pp_sizes=(2,),
        stages_per_rank=(2,),
        microbatch_sizes=(2, 4),
        recompute=("selective",),
    )
    plans = [ranked.plan for ranked in find_plans(small_shape(), small_cluster(), request)]
    assert {plan.schedule for plan in plans} == {"Interleaved1F1B", "ZBVZeroBubble"}
    assert {plan.microbatch_size for plan in plans} == {2, 4}
    assert {(plan.pp_size, plan.stages_per_rank, plan.recompute) for plan in plans} == {
        (2, 2, "selective")
    }


def test_less_memory_moves_layers_or_plans():
    """With ever less memory the best plan needs ever less of it, and takes ever longer."""
    shape, request = small_shape(), small_request(top=1)
    needed, seconds = [], []
    memory = 80 * GIB
    while True:
        try:
            best = find_plans(shape, small_cluster(memory_bytes=memory), request)[0]
        except PipelineConfigError:
            break
        assert best.prediction.peak_memory.total <= memory
        needed.append(best.prediction.peak_memory.total)
        seconds.append(best.prediction.step_time)
        memory = int(needed[-1] * 0.9)
    assert len(needed) >= 4
    assert seconds == sorted(seconds)


def test_replicas_exchange_what_their_parameters_are():
    """Gradients are scattered and weights gathered in rings: 2 (n - 1) / n of their bytes."""
    shape = small_shape()
    request = small_request(pp_sizes=(1,), schedules=("GPipe",), recompute=("none",), top=1)
    plan = find_plans(shape, small_cluster(), request)[0]
    assert plan.prediction.network.data == round(2 * 7 / 8 * 2 * shape.parameters)
    assert plan.prediction.memory[0].optimizer == -(-shape.parameters // 8) * 12
    alone = find_plans(shape, small_cluster(), replace(request, sharding="none"))[0]
    assert alone.prediction.memory[0].optimizer == shape.parameters * 12


def test_experts_are_exchanged_by_fewer():
    shape = small_shape(**EXPERTS)
    request = small_request(ep=4, pp_sizes=(1,), schedules=("GPipe",), recompute=("none",), top=1)
    figures = find_plans(shape, small_cluster(), request)[0].prediction
    experts = 7 * 8 * 3 * 1024 * 4096
    dense = shape.parameters - experts
    assert figures.network.data == round(2 * 7 / 8 * 2 * dense + 2 * 1 / 2 * 2 * experts / 4)
    tokens = 4 * 1024  # of a device
    assert figures.network.expert == 2 * 7 * 2 * tokens * 2 * 1024 * 2 * 3 // 4


def test_what_is_computed_again_is_not_split():
    """In two steps a layer would be computed again for its inputs, and for each of its weights."""
    request = small_request(
        global_batch_size=16, pp_sizes=(4,), schedules=("zb_h2",), recompute=("full", "none")
    )
    plans = find_plans(small_shape(), small_cluster(gpus=4), request)
    late = {
        plan.plan.recompute: {unit.backward_weight > 0 for unit in plan.stages} for plan in plans
    }
    assert late == {"full": {False}, "none": {True}}
    again = next(plan for plan in plans if plan.plan.recompute == "full")
    assert all(unit.weight_bytes == 0 for unit in again.stages)


# ---- measured costs


def measured(layers: int = 7, scale: float = 1.0) -> ModelCosts:
    unit = UnitCost(forward=scale, backward_input=scale, backward_weight=scale)
    return ModelCosts(
        embedding=unit, layers=(unit,) * layers, head=unit, boundary_bytes=8, source="measured"
    )


def test_measured_costs_decide():
    """Microbatches of four cost as much as those of one: then there are no smaller ones."""
    costs = {1: measured(), 4: measured(scale=1.01)}
    plans = find_plans(small_shape(), small_cluster(), small_request(), measured=costs)
    assert plans[0].plan.microbatch_size == 4
    assert {plan.plan.microbatch_size for plan in plans} <= {1, 4}
    assert {plan.plan.recompute for plan in plans} <= {"none", "full"}
    assert plans[0].prediction.source == "measured"


@pytest.mark.parametrize(
    ("changes", "costs", "said"),
    [
        ({}, {}, "measured is empty"),
        ({}, {1: measured(layers=6)}, "are of 6 layers, but the model has 7"),
        ({"tp": 2}, {1: measured()}, "tp (2) must be 1 with measured costs"),
        ({"microbatch_sizes": (2,)}, {1: measured()}, "microbatch_size (2) was not measured"),
        ({"recompute": ("selective",)}, {1: measured()}, "use recompute=none"),
    ],
)
def test_costs_that_were_not_measured_are_refused(changes, costs, said):
    with pytest.raises(PipelineConfigError, match=re.escape(said)):
        find_plans(small_shape(), small_cluster(), small_request(**changes), measured=costs)


# ---- why a plan lost


def prediction(memory: int = 0, sent: int = 0, **parts: float) -> Prediction:
    time = TimeParts(**{"compute": 10.0, **parts})
    return Prediction(
        time=time,
        memory=(MemoryParts(parameters=GIB + memory),),
        network=NetworkParts(pipeline=GIB + sent),
        idle_share=0.0,
        tokens_per_second=1.0 / time.total,
        source="analytic",
    )


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"bubble": 1.0}, "10.0% slower: more bubble (1 s against 0 us)"),
        ({"compute": 9.0, "recompute": 3.0}, "20.0% slower: more recomputation (3 s against 0"),
        ({"compute": 9.0, "recompute": 3.0}, "though 1 s less compute"),
        ({"imbalance": 0.5}, "5.0% slower: a slowest rank with more above the mean (500 ms"),
        ({"collectives": 0.5}, "more communication within layers"),
        ({"memory": GIB}, "as fast, with 1.0 GiB more memory on the fullest rank"),
        ({"sent": GIB, "compute": 10.001}, "as fast, with 1.0 GiB more sent per rank"),
        ({}, "as fast to 0.1%"),
    ],
)
def test_the_reason_is_the_part_that_grew_most(other, said):
    assert said in why_it_lost(prediction(), prediction(**other))


# ---- what cannot be


def retried(message: str, cluster: Any, request: Any) -> list[tuple[Any, Any]]:
    """The jobs that a message advises."""
    jobs = []
    for advice in message.rpartition(": use ")[2].split(" or "):
        name, _, value = advice.partition("=")
        if name == "memory":
            size = int(value.removesuffix("MiB")) << 20
            hardware = replace(cluster.hardware, memory_bytes=size)
            jobs.append((replace(cluster, hardware=hardware), request))
        elif name == "gpus":
            jobs.append((replace(cluster, gpus=int(value)), request))
        elif name.startswith("no "):
            word = {"pp": "pp_sizes", "schedule": "schedules"}.get(name[3:], name[3:])
            word += "s" * (word == "microbatch_size")
            jobs.append((cluster, replace(request, **{word: ()})))
        elif name in ("tp", "ep", "global_batch_size"):
            jobs.append((cluster, replace(request, **{name: int(value)})))
        elif name == "pp":
            jobs.append((cluster, replace(request, pp_sizes=(int(value),))))
        else:
            kind = (value,) if name == "recompute" else value
            jobs.append((cluster, replace(request, **{name: kind})))
    return jobs


@pytest.mark.parametrize(
    ("gpus", "memory", "changes", "part", "advice"),
    [
        (4, GIB // 2, {}, "optimizer states", "gpus="),
        (8, GIB, {"sharding": "none", "pp_sizes": (1,)}, "optimizer states", "sharding=optimizer"),
        (8, GIB, {"recompute": ("none",), "microbatch_sizes": (8,)}, "activations", "no microb"),
    ],
)
def test_what_does_not_fit_is_named_and_the_advice_works(gpus, memory, changes, part, advice):
    cluster, request = small_cluster(gpus=gpus, memory_bytes=memory), small_request(**changes)
    shape = small_shape(vocab_size=2000)
    with pytest.raises(PipelineConfigError) as caught:
        find_plans(shape, cluster, request)
    message = str(caught.value)
    assert message.startswith(f"memory ({bytes_as_text(memory)} per device) does not suffice")
    assert f"most of it {part}" in message
    assert advice in message.rpartition(": use ")[2]
    for other in retried(message, cluster, request):
        assert find_plans(shape, *other)


@pytest.mark.parametrize(
    ("gpus", "changes", "said"),
    [
        (7, {"tp": 2}, "gpus (7) must be a multiple of tp (2)"),
        (8, {"pp_sizes": (3,)}, "pp (3) must divide gpus (8)"),
        (16, {"pp_sizes": (8, 16)}, "pp (8, 16) is more than the model has layers (7)"),
        (8, {"global_batch_size": 7, "pp_sizes": (1, 2)}, "global_batch_size (7) must be a mult"),
        (8, {"ep": 3}, "ep (3) must divide dp x cp"),
    ],
)
def test_sizes_that_do_not_fit_together_are_named_and_the_advice_works(gpus, changes, said):
    cluster, request = small_cluster(gpus=gpus), small_request(**changes)
    with pytest.raises(PipelineConfigError) as caught:
        find_plans(small_shape(), cluster, request)
    assert said in str(caught.value)
    for other in retried(str(caught.value), cluster, request):
        assert find_plans(small_shape(), *other)


@pytest.mark.parametrize("changes", [{}, {"global_batch_size": 1024}, {"recompute": ("none",)}])
def test_the_plan_that_needs_least_is_named(changes):
    """Of all candidates, whatever they keep: weights, activations or buffers."""
    cluster, request = small_cluster(memory_bytes=GIB // 2), small_request(**changes)
    evaluator = evaluator_of(small_shape(), cluster, request)
    everything = map(evaluator.evaluate, candidates(request, gpus=8, num_layers=7))
    least = min(everything, key=lambda found: found.peak_memory)
    with pytest.raises(PipelineConfigError) as caught:
        find_plans(small_shape(), cluster, request)
    name, pp_size = least.candidate.spec.name, least.candidate.pp_size
    assert f"needs least ({name}, pp {pp_size}, " in str(caught.value)
    assert f": use memory={-(-least.peak_memory >> 20)}MiB" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"global_batch_size": 0},
        {"seq_len": 1 << 40},
        {"tp": True},
        {"top": 0},
        {"microbatch_sizes": (0,)},
        {"recompute": ("some",)},
        {"schedules": ("2F2B",)},
        {"sharding": "some"},
    ],
)
def test_absurd_requests_are_refused(changes):
    with pytest.raises(PipelineConfigError):
        find_plans(small_shape(), small_cluster(), small_request(**changes))


def test_more_microbatches_than_can_be_run_are_refused():
    request = small_request(global_batch_size=1 << 27, microbatch_sizes=(1,), pp_sizes=(2,))
    with pytest.raises(PipelineConfigError, match="no schedule can run"):
        find_plans(small_shape(), small_cluster(gpus=2), request)


# ---- at scale

_SCRIPT = """
import json, re, sys, time
from pathlib import Path
from hfpp.cli import main
code = main(sys.argv[1:])
# the most that the program had since its start; rusage counts the process that forked it too
most = int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps([code, time.process_time(), most / 1024, sorted(
    set(sys.modules) & {"torch", "transformers", "numpy", "rich"})]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("llama-3.1-405b", ["--tp", "8"]),
        ("deepseek-v3", ["--ep", "8", "--global-batch", "10240", "--seq-len", "4096"]),
    ],
)
def test_ten_thousand_devices_take_seconds(config, options):
    path = str(CONFIGS / f"{config}.json")
    command = [sys.executable, "-c", _SCRIPT, "plan", path, "--gpus", "10240", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    code, seconds, mib, loaded = json.loads(done.stderr)
    assert (code, loaded) == (0, [])
    assert seconds < 10
    assert mib < 500
    found = json.loads(done.stdout)["plans"]
    assert len(found) == 10
    assert all(one["lost_by"] for one in found[1:])
    for one in found:
        sizes = one["plan"]["parallel"]
        assert sizes["dp"] * sizes["tp"] * sizes["cp"] * one["plan"]["pp_size"] == 10240
        assert one["peak_memory"] <= 80 * GIB


def test_ranks_share_the_stages():
    for candidate in candidates(small_request(), gpus=8, num_layers=7):
        stages = sorted(stage for own in ranks_of(candidate) for stage in own)
        assert stages == list(range(candidate.num_stages))


def test_less_memory_takes_a_lower_limit_on_activations():
    request = small_request(
        schedules=("VLimited",), pp_sizes=(8,), microbatch_sizes=(1,), recompute=("none",), top=1
    )
    shape, limits, memory, seconds = small_shape(num_hidden_layers=16), [], 80 * GIB, 0.0
    for _ in range(2):
        cluster = small_cluster(gpus=8, memory_bytes=memory)
        found = find_plans(shape, cluster, request)[0]
        limits.append(int(found.plan.schedule.removeprefix("VLimited-")))
        assert found.prediction.peak_memory.total <= memory
        assert found.prediction.step_time >= seconds
        verify(found.plan.table(), activation_limit=limits[-1])
        memory, seconds = found.prediction.peak_memory.total - 1, found.prediction.step_time
    assert limits[0] == 16  # what is of use
    assert limits[1] < 16
