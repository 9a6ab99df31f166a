"""Uneven partitions of live models: where they cut, that they train, and what is refused where."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch

from hfpp import PipelineConfigError
from hfpp.plan.costs import ModelCosts, UnitCost
from hfpp.plan.partitioning.grammar import parse_partition
from hfpp.plan.placement import Placement
from hfpp.runtime.find_anatomy import find_anatomy
from hfpp.runtime.live_partition import LivePartition, live_costs
from hfpp.runtime.stage_boundary import boundary_of
from tests.models import tiny_model
from tests.ranks import RankError, run_ranks
from tests.runtime.real_pipelines import (
    batches,
    build,
    data_and_pipeline_mesh,
    step,
    tiny_llama,
    unsplit_gradients,
    wrong_gradients,
)

LAYERS = 8
CPU = torch.device("cpu")


def llama(**changes):
    return tiny_llama(num_hidden_layers=LAYERS, **changes)


def _costs(layers, head):
    free = UnitCost(forward=0.0, backward_input=0.0, backward_weight=0.0)
    units = [UnitCost(forward=s, backward_input=0.0, backward_weight=0.0) for s in (*layers, head)]
    return ModelCosts(
        embedding=free,
        layers=tuple(units[:-1]),
        head=units[-1],
        boundary_bytes=0,
        source="measured",
    )


HEAVY_HEAD = _costs([1.0] * LAYERS, 3.0)
NAMES = [
    ["model.embed_tokens", *(f"model.layers.{i}" for i in range(6)), "model.rotary_emb"],
    ["model.layers.6", "model.layers.7", "model.norm", "lm_head", "model.rotary_emb"],
]
CASES = [
    ("1F1B", "5,3", None, [5, 3]),
    ("GPipe", "Et*6|t*2L", None, [6, 2]),
    ("1F1B", "balanced", HEAVY_HEAD, [6, 2]),
    ("1F1B", NAMES, None, [6, 2]),
    ("Interleaved1F1B", "3,2,1,2", None, [3, 2, 1, 2]),
    ("Interleaved1F1B", "1,1,2,1,1,2", None, [1, 1, 2, 1, 1, 2]),
    ("ZBVZeroBubble", "first=3,last=1", None, [3, 2, 2, 1]),
    ("ZBVZeroBubble", "balanced", HEAVY_HEAD, None),
    ("DualPipeV", "type:llama", None, None),
]


def trained(rank, world_size):
    """What is wrong with each pipeline's gradients, and its layers by stage."""
    mesh = data_and_pipeline_mesh(world_size)
    model, found = llama(), []
    expected = unsplit_gradients(model, batches())
    for schedule, partition, costs, _ in CASES:
        pipeline = build(model, mesh, schedule, partition=partition, costs=costs)
        step(pipeline, mesh, batches()[0])
        layers = {
            stage.stage_index: len(boundary_of(stage.submod).layers) for stage in pipeline.stages
        }
        found.append((layers, wrong_gradients(pipeline.model_parts, expected)))
    return found


def test_every_kind_of_partition_trains_like_the_unsplit_model():
    by_rank = run_ranks(trained, 2)
    for case, *ranks in zip(CASES, *by_rank, strict=True):
        schedule, _, costs, counts = case
        layers = {stage: count for mine, _ in ranks for stage, count in mine.items()}
        assert [wrong for _, wrong in ranks] == [[], []], case[:2]
        sizes = [layers[stage] for stage in sorted(layers)]
        assert counts in (None, sizes)
        assert sum(sizes) == LAYERS
        if costs is not None and schedule == "ZBVZeroBubble":
            offsets = (0, *itertools.accumulate(sizes))
            times = [unit.seconds for unit in costs.stages(offsets)]
            assert max(times[0] + times[3], times[1] + times[2]) == 6  # of 11 in all


def refused(rank, world_size, cases):
    """What each rank is told."""
    mesh = data_and_pipeline_mesh(world_size)
    model, told = llama(), []
    for schedule, arguments, only_rank in cases:
        if only_rank is not None and rank != only_rank:
            arguments = {}
        try:
            build(model, mesh, schedule, **arguments)
        except PipelineConfigError as error:
            told.append(str(error))
        else:
            told.append(None)
    return told


REFUSALS = [
    ("1F1B", {"partition": "5,2"}, None, r"gives its 2 stages 7 layers, but the model has 8"),
    ("1F1B", {"partition": "3,3,2"}, None, r"3 stages cannot be dealt to pp_size \(2\)"),
    ("1F1B", {"partition": "5,x"}, None, r"partition \('5,x'\), column 3: 'x' is no count"),
    (
        "1F1B",
        {"partition": "uniform", "module_fqns_per_model_part": NAMES},
        None,
        r"partition \('uniform'\) and module_fqns_per_model_part both say where to cut",
    ),
    ("1F1B", {"partition": "5,3"}, 1, r"disagree on partition"),
    (
        "1F1B",
        {"partition": "balanced", "costs": _costs([1.0] * 3, 1.0)},
        None,
        r"asked for 8 layers, but the costs are of 3",
    ),
    ("Interleaved1F1B", {"partition": "5,3", "layers_per_stage": 2}, None, r"2 stages cannot"),
    ("1F1B", {"partition": [NAMES[0], NAMES[1][1:]]}, None, r"partition\[1\].*model.layers.6"),
]


def test_refused_on_every_rank():
    for told in run_ranks(refused, 2, args=([case[:3] for case in REFUSALS],)):
        assert len(told) == len(REFUSALS)
        for (*_, message), words in zip(REFUSALS, told, strict=True):
            assert words is not None, message
            assert re.search(message, words), words


def _offsets(model, text, num_stages, **more):
    anatomy = find_anatomy(model)
    live = LivePartition(spec=parse_partition(text), device=CPU, **more)
    return live.offsets(
        model, anatomy, num_stages=num_stages, pp_size=num_stages, placement=Placement.LOOP
    )


def test_costs_of_a_live_model_follow_its_config():
    model = llama(vocab_size=4096)
    anatomy = find_anatomy(model)
    costs = live_costs(model, anatomy, device=CPU, microbatch_size=2, seq_len=64)
    layer = costs.layers[0].seconds
    assert costs.head.seconds > 3 * layer  # a large vocabulary for so narrow layers
    offsets = _offsets(model, "balanced", 2, microbatch_size=2, seq_len=64)
    assert offsets[1] > LAYERS // 2
    heavy = sum(u.seconds for u in costs.layers[offsets[1] :]) + costs.head.seconds
    light = sum(u.seconds for u in costs.layers[: offsets[1]]) + costs.embedding.seconds
    assert abs(heavy - light) <= max(layer, costs.head.seconds - (LAYERS - 2) * layer)


def test_costs_of_a_model_of_its_own_follow_its_parameters():
    model = llama(vocab_size=4096)
    named = find_anatomy(model)
    head = model.lm_head.weight.numel()
    layer = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim > 1)
    model.config = SimpleNamespace(model_type="of its own")
    costs = live_costs(model, named, device=CPU)
    assert costs.head.seconds / costs.layers[0].seconds == pytest.approx(head / layer)
    assert costs.embedding.seconds == 0


def test_parameters_count_the_embedding_and_the_head():
    model = llama(vocab_size=4096)
    embedding = model.model.embed_tokens.weight.numel()
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert embedding > LAYERS * layer
    assert _offsets(model, "parameters", 4) == (0, 1, 4, 7, 8)


def test_types_are_the_classes_of_the_layers():
    model = tiny_model("llama", num_hidden_layers=4)
    assert _offsets(model, "type:DecoderLayer$", 2) == (0, 2, 4)
    with pytest.raises(PipelineConfigError, match=r"one of these classes: LlamaDecoderLayer\."):
        _offsets(model, "type:mamba", 2)


def test_the_refusals_are_not_the_test_harness():
    with pytest.raises(RankError):
        run_ranks(refused, 2, args=([("1F1B", {"unknown": 1}, None)],))
