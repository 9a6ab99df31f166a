"""Pipelines of a plan over gloo: what the plan says runs, and what it is not for is refused."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from hfpp import PipelineConfigError
from hfpp.plan.pipeline_plan import ModelFingerprint, ParallelSizes, PipelinePlan
from hfpp.plan.plan_file import write_plan
from hfpp.plan.prediction import MemoryParts, NetworkParts, Prediction, TimeParts
from hfpp.plan.schedules import compute_table, find_schedule
from hfpp.runtime.find_anatomy import find_anatomy
from hfpp.runtime.planned import fingerprint_of
from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.runtime.real_pipelines import (
    ROWS,
    SEQ,
    batches,
    build,
    data_and_pipeline_mesh,
    step,
    unsplit_gradients,
    wrong_gradients,
)

LAYERS = 5
GPIPE = compute_table(find_schedule("GPipe"), pp_size=2, n_microbatches=4)
UNGIVEN = {
    "pipeline_parallel_schedule": None,
    "microbatch_size": None,
    "local_batch_size": None,
    "seq_len": None,
}


def model_of(**changes: Any) -> Any:
    return tiny_model("llama", **{"num_hidden_layers": LAYERS, **changes})


def plan_for(model: Any, **changes: Any) -> PipelinePlan:
    usual: dict[str, Any] = {
        "model": fingerprint_of(model, find_anatomy(model).num_layers),
        "pp_size": 2,
        "schedule": "1F1B",
        "n_microbatches": 4,
        "microbatch_size": 2,
        "seq_len": SEQ,
        "offsets": (0, 4, 5),
    }
    return PipelinePlan(**{**usual, **changes})


def train(_rank: int, world_size: int, plan: Any, steps: int = 1) -> tuple[list[str], list[int]]:
    """Wrong gradients, and the layers of this rank's parts."""
    model, mesh = model_of(), data_and_pipeline_mesh(world_size)
    ids = batches(steps)
    expected = unsplit_gradients(model, ids)
    pipeline = build(model, mesh, None, **{**UNGIVEN, "plan": plan})
    for batch in ids:
        step(pipeline, mesh, batch)
    layers = [
        int(name.split(".")[2])
        for part in pipeline.model_parts
        for name, _ in part.named_parameters()
        if name.endswith("input_layernorm.weight")
    ]
    return wrong_gradients(pipeline.model_parts, expected), layers


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, [[0, 1, 2, 3], [4]]),
        (
            {
                "schedule": "ZBVZeroBubble",
                "stages_per_rank": 2,
                "offsets": (0, 2, 3, 4, 5),
            },
            [[0, 1, 4], [2, 3]],
        ),
        ({"schedule": "mine", "own_table": GPIPE, "offsets": (0, 2, 5)}, [[0, 1], [2, 3, 4]]),
    ],
)
def test_a_plan_runs_as_it_says_and_trains_right(tmp_path, changes, layers):
    plan: Any = plan_for(model_of(), **changes)
    if layers[0] == [0, 1, 2, 3]:
        write_plan(plan, tmp_path / "plan.json")
        plan = tmp_path / "plan.json"
    results = run_ranks(train, 2, args=(plan,))
    assert [wrong for wrong, _ in results] == [[], []]
    assert [found for _, found in results] == layers


def refusals(_rank: int, world_size: int, cases: list[tuple[Any, dict[str, Any]]]) -> list[str]:
    """What each way of building says; empty where it says nothing."""
    said = []
    mesh = data_and_pipeline_mesh(world_size)
    for shape, settings in cases:
        model = model_of(**shape)
        try:
            build(model, mesh, None, copy_model=False, **{**UNGIVEN, **settings})
            said.append("")
        except (PipelineConfigError, FileNotFoundError) as error:
            said.append(str(error))
    return said


def test_another_model_mesh_or_batch_is_refused_on_every_rank(tmp_path):
    plan = plan_for(model_of())
    cut = tmp_path / "cut.json"
    write_plan(plan, cut)
    cut.write_text(cut.read_text()[:-30])
    of_table = plan_for(model_of(), schedule="mine", own_table=GPIPE)
    of_three = plan_for(model_of(), pp_size=3, offsets=(0, 2, 4, 5))
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"num_hidden_layers": 6}, {"plan": plan}, "6 layers instead of 5"),
        ({"vocab_size": 64}, {"plan": plan}, "vocab_size 64 instead of"),
        ({"tie_word_embeddings": True}, {"plan": plan}, "tied embedding and head instead of"),
        ({"intermediate_size": 96}, {"plan": plan}, "parameters instead of"),
        ({}, {"plan": plan_for(model_of(), parallel=ParallelSizes(tp=2))}, "tp size 1 instead of"),
        ({}, {"plan": of_three}, "pp size 2 instead of 3"),
        ({}, {"plan": plan, "microbatch_size": 1}, "microbatch_size (1) is 2 in the plan"),
        ({}, {"plan": plan, "local_batch_size": 4}, "local_batch_size (4) is 8 in the plan"),
        ({}, {"plan": plan, "seq_len": 5}, "seq_len (5) is 11 in the plan"),
        (
            {},
            {"plan": plan, "pipeline_parallel_schedule": "GPipe"},
            "use pipeline_parallel_schedule='1F1B'",
        ),
        (
            {},
            {"plan": of_table, "pipeline_parallel_schedule": "GPipe"},
            "is set by the plan: use pipeline_parallel_schedule=None",
        ),
        ({}, {"plan": plan, "layers_per_stage": 2}, "use layers_per_stage=None"),
        ({}, {"plan": plan, "pipeline_parallel_schedule_csv": "x.csv"}, "use pipeline_parallel_"),
        ({}, {"plan": tmp_path / "none.json"}, "no such file"),
        ({}, {"plan": cut}, "not JSON"),
        ({}, {"plan": replace(plan, recompute="full")}, "_checkpointing_enable"),
        ({}, {"plan": replace(plan, recompute="selective")}, "parallelize_fn"),
        ({}, {"microbatch_size": 2, "pipeline_parallel_schedule": "1F1B"}, "local_batch_size is N"),
        ({}, {"pipeline_parallel_schedule": "1F1B"}, "microbatch_size is None"),
        ({}, {"plan": plan, "pipeline_parallel_schedule": "one_f_one_b"}, ""),
        ({}, {"plan": plan, "microbatch_size": 2, "local_batch_size": ROWS}, ""),
    ]
    for said in run_ranks(refusals, 2, args=([(shape, given) for shape, given, _ in cases],)):
        for message, (_, _, expected) in zip(said, cases, strict=True):
            assert expected in message if expected else not message, message


def other_plan(rank: int, world_size: int) -> str:
    plan = plan_for(model_of(), offsets=(0, 3 + rank, 5))
    return refusals(rank, world_size, [({}, {"plan": plan})])[0]


def test_ranks_with_other_plans_are_told():
    assert all("the ranks disagree on plan" in said for said in run_ranks(other_plan, 2))


def said_of_replicas(_rank: int, world_size: int, cases: list[Any]) -> list[list[str]]:
    """The warnings with each plan, and the names of its axes of replicas."""
    found: list[list[str]] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found[-1].append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hfpp.runtime.planned").addHandler(handler)
    mesh = data_and_pipeline_mesh(world_size)
    for plan, names in cases:
        found.append([])
        build(model_of(), mesh, None, **{**UNGIVEN, "plan": plan, "dp_axis_names": names})
    return found


def test_other_replicas_than_planned_are_a_warning_where_the_plan_predicts():
    costs = Prediction(
        time=TimeParts(compute=1.0), memory=(MemoryParts(),) * 2, network=NetworkParts(),
        idle_share=0.0, tokens_per_second=1.0, source="analytic",
    )  # fmt: skip
    alone = plan_for(model_of(), prediction=costs)
    many = replace(alone, parallel=ParallelSizes(dp=64))
    cases = [
        (many, ("dp",)),
        (alone, ("dp",)),
        (many, ("flattened",)),  # the mesh does not say how many these are
        (many, ()),
        (replace(many, prediction=None), ("dp",)),  # nothing is promised
    ]
    first, *others = run_ranks(said_of_replicas, 2, args=(cases,))
    assert others == [[[]] * 5]
    assert first[1:] == [[]] * 4
    assert first[0] == [
        "the plan counts on dp 64, but world_mesh has dp size 1 (dp): a step has 8 sequences "
        "instead of 512, and where replicas divide the optimizer's states, a rank holds 64 times "
        "what was predicted. Plan with --gpus 2 for predictions that hold here."
    ]


def recomputing(_rank: int, world_size: int, advice: str) -> str:
    model = model_of()
    if advice:
        word = re.search(r"call (model\.\w+_enable\(.*\))", advice)
        assert word is not None
        eval(word[1], {"model": model})  # the advice as it is written
    mesh = data_and_pipeline_mesh(world_size)
    said = ""
    for recompute in ("full", "none"):
        plan = replace(plan_for(model_of()), recompute=recompute)
        try:
            build(model, mesh, None, copy_model=False, **{**UNGIVEN, "plan": plan})
        except PipelineConfigError as error:
            said += f"{recompute}: {error}"
    return said


def test_following_the_advice_on_recomputation_helps():
    (said, _) = run_ranks(recomputing, 2, args=("",))
    assert said.startswith("full")
    for after in run_ranks(recomputing, 2, args=(said,)):
        assert after.startswith("none")
        assert "_checkpointing_disable()" in after


def test_fingerprints_of_live_models():
    model = model_of()
    assert fingerprint_of(model, 5) == ModelFingerprint(
        model_type="llama",
        num_layers=5,
        hidden_size=model.config.hidden_size,
        vocab_size=model.config.vocab_size,
        parameters=sum(p.numel() for p in model.parameters()),
        is_tied=False,
    )
    assert fingerprint_of(model_of(tie_word_embeddings=True), 5).is_tied is True
    bare = fingerprint_of(torch.nn.Linear(2, 3), 1)
    assert (bare.model_type, bare.hidden_size, bare.is_tied, bare.parameters) == ("", None, None, 9)
