"""Options are checked before anything starts; errors name the option, and their advice works."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfpp import PipelineConfigError
from hfpp.plan.costs import ModelCosts, UnitCost
from hfpp.plan.costs_file import costs_as_json
from hfpp.plan.schedules import SCHEDULES
from hfpp.train.errors import OptionError
from hfpp.train.options import RunDtype, TrainOptions
from hfpp.train.torchrun import TorchrunRank
from tests.advice import alternatives


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_the_defaults_fit_every_schedule(schedule, pp):
    options = TrainOptions(schedule=schedule, pp=pp)
    options.check_layers(8)
    assert options.n_microbatches(replicas=1) == 8


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pp": 0}, "--pp (0)"),
        ({"pp": True}, "--pp (True)"),
        ({"microbatch_size": 0}, "--microbatch-size (0)"),
        ({"batch_size": -8}, "--batch-size (-8)"),
        ({"seq_len": 1}, "--seq-len (1)"),
        ({"steps": 0}, "--steps (0)"),
        ({"steps": 2.5}, "--steps (2.5)"),
        ({"warmup_steps": -1}, "--warmup-steps (-1)"),
        ({"seed": -1}, "--seed (-1)"),
        ({"seed": 2**63}, f"--seed ({2**63})"),
        ({"lr": 0.0}, "--lr (0.0)"),
        ({"lr": float("nan")}, "--lr (nan)"),
        ({"max_grad_norm": -1.0}, "--max-grad-norm (-1.0)"),
        ({"max_grad_norm": float("inf")}, "--max-grad-norm (inf)"),
        ({"schedule": "1F2B"}, "--schedule '1F2B' is unknown"),
        ({"verify": True, "dtype": RunDtype.BFLOAT16}, "--verify"),
        ({"partition": "7,x"}, "--partition ('7,x'), column 3: 'x' is no count"),
        ({"partition": "4,4"}, "--partition (4,4) has 2 stages, but --schedule Interleaved1F1B"),
        ({"partition": "3,3,2"}, "--partition (3,3,2) has 3 stages"),
        ({"partition": "2,2,2,2", "schedule": "1F1B"}, "--partition (2,2,2,2) has 4 stages"),
    ],
)
def test_errors_name_the_option(changes, named):
    with pytest.raises(OptionError) as raised:
        TrainOptions(**changes)
    assert str(raised.value).startswith(named)
    assert isinstance(raised.value, PipelineConfigError)


def test_a_partition_says_how_many_stages_there_are(tmp_path):
    options = TrainOptions(partition="1,2,1,2,1,1")
    assert (options.stages_per_rank, options.num_stages) == (3, 6)
    options.check_layers(8)
    with pytest.raises(OptionError, match=r"gives its 6 stages 8 layers, but the model has 9"):
        options.check_layers(9)
    unit = UnitCost(forward=1.0, backward_input=1.0, backward_weight=1.0)
    costs = ModelCosts(
        embedding=unit, layers=(unit,) * 7, head=unit, boundary_bytes=0, source="measured"
    )
    file = tmp_path / "costs.json"
    file.write_text(costs_as_json(costs))
    TrainOptions(costs=file).check_layers(7)
    with pytest.raises(OptionError, match=r"--costs .* are of 7 layers, but the model has 8"):
        TrainOptions(costs=file).check_layers(8)
    with pytest.raises(OptionError, match=r"--costs: .*none.json: no such file"):
        TrainOptions(costs=tmp_path / "none.json").check_layers(7)


def test_an_unknown_schedule_lists_the_known_ones():
    with pytest.raises(OptionError, match=r"GPipe, 1F1B, .*DualPipeV"):
        TrainOptions(schedule="nonsense")


@pytest.mark.parametrize(("batch_size", "microbatch_size"), [(16, 3), (7, 2), (1, 4)])
def test_following_the_advice_on_batch_sizes_works(batch_size, microbatch_size):
    sizes = {"pp": 1, "schedule": "GPipe", "batch_size": batch_size}
    with pytest.raises(OptionError, match="must be divisible by --microbatch-size") as raised:
        TrainOptions(**sizes, microbatch_size=microbatch_size)
    advised = int(re.search(r"use --batch-size (\d+)", str(raised.value))[1])
    TrainOptions(**{**sizes, "batch_size": advised}, microbatch_size=microbatch_size)
    TrainOptions(**sizes, microbatch_size=1)


def advised_batch_sizes(message):
    """What the advice names as it stands; no name may be one that the command does not have."""
    assert "n_microbatches" not in message
    assert "pipeline_parallel_schedule" not in message
    return [
        int(size) for size in re.findall(r"--batch-size (\d+)", message.rpartition(": use ")[2])
    ]


@pytest.mark.parametrize(
    ("schedule", "pp", "batch_size", "advised"),
    [
        ("1F1B", 4, 4, [8]),
        ("DualPipeV", 4, 14, [16]),
        ("Interleaved1F1B", 4, 18, [16, 20]),
        ("interleaved", 3, 26, [24, 30]),
        ("zero_bubble", 2, 10, [8, 12]),
    ],
)
def test_batches_that_a_schedule_cannot_run(schedule, pp, batch_size, advised):
    sizes = {"pp": pp, "schedule": schedule, "microbatch_size": 2}
    made = rf"--schedule {schedule} with --pp {pp} cannot run the {batch_size // 2} microbatches"
    with pytest.raises(OptionError, match=made) as raised:
        TrainOptions(**sizes, batch_size=batch_size)
    assert advised_batch_sizes(str(raised.value)) == advised
    for size in advised:
        TrainOptions(**sizes, batch_size=size)


@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    pp=st.integers(1, 12),
    microbatches=st.integers(1, 60),
    microbatch_size=st.integers(1, 3),
    replicas=st.integers(1, 3),
)
def test_advice_on_batches_always_works(schedule, pp, microbatches, microbatch_size, replicas):
    share = microbatch_size * replicas
    sizes = {"pp": pp, "schedule": schedule, "microbatch_size": microbatch_size}
    options = TrainOptions(**{**sizes, "schedule": "GPipe"}, batch_size=microbatches * share)
    object.__setattr__(options, "schedule", schedule)
    try:
        options.check_schedule(replicas=replicas)
    except OptionError as error:
        advised = advised_batch_sizes(str(error))
        assert advised
        for size in advised:
            object.__setattr__(options, "batch_size", size)
            options.check_schedule(replicas=replicas)


def test_an_absurd_number_of_ranks_is_refused_at_once():
    with pytest.raises(OptionError, match=f"use --batch-size {10**12}"):
        TrainOptions(pp=10**12, schedule="1F1B", microbatch_size=1)


def test_a_misspelt_schedule_is_corrected_by_its_option():
    with pytest.raises(OptionError, match="use --schedule='ZBVZeroBubble'") as raised:
        TrainOptions(schedule="zbvzerobuble")
    (change,) = alternatives(str(raised.value))
    TrainOptions(**change)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"pp": 4, "schedule": "GPipe"}, {"pp": 3}),
        ({"pp": 2, "schedule": "dualpipev"}, {"pp": 1}),
        ({"pp": 4}, {"pp": 1}),
    ],
)
def test_more_stages_than_layers(options, advice):
    with pytest.raises(OptionError, match=rf"3 layers.*use --pp {advice['pp']} or less"):
        TrainOptions(**options).check_layers(3)
    replace(TrainOptions(**options), **advice).check_layers(3)


def test_a_model_of_one_layer_needs_a_schedule_with_one_stage_per_rank():
    options = TrainOptions(pp=2, schedule="ZBVZeroBubble")
    with pytest.raises(OptionError, match="use --pp 1 --schedule 1F1B"):
        options.check_layers(1)
    replace(options, pp=1, schedule="1F1B").check_layers(1)


@pytest.mark.parametrize("layers", [0, -1])
def test_a_model_without_layers_is_not_advised_another_schedule(layers):
    with pytest.raises(OptionError, match="give a configuration with layers") as raised:
        TrainOptions(pp=1, schedule="1F1B").check_layers(layers)
    assert "use --" not in str(raised.value)


def rank_of(world_size):
    return TorchrunRank(rank=0, world_size=world_size, local_rank=0, local_world_size=world_size)


@pytest.mark.parametrize(("world_size", "pp"), [(3, 2), (6, 4), (2, 4), (1, 2), (9, 6)])
def test_a_world_that_is_no_multiple_of_pp(world_size, pp):
    options = TrainOptions(pp=pp, schedule="GPipe", microbatch_size=1, batch_size=72)
    with pytest.raises(OptionError, match=rf"{world_size} ranks must be a multiple") as raised:
        rank_of(world_size).check(options)
    ranks, other_pp = map(
        int, re.findall(r"start (\d+) ranks, or use --pp (\d+)", str(raised.value))[0]
    )
    rank_of(ranks).check(options)
    rank_of(world_size).check(replace(options, pp=other_pp))


def test_a_batch_that_does_not_feed_every_replica():
    options = TrainOptions(pp=2, schedule="GPipe", batch_size=16, microbatch_size=8)
    rank_of(4).check(options)
    with pytest.raises(OptionError, match=r"the 3 data-parallel pipelines: use --batch-size 24"):
        rank_of(6).check(options)
    rank_of(6).check(replace(options, batch_size=24))


def test_torchruns_variables_are_read(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert TorchrunRank.from_environment() is None
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert TorchrunRank.from_environment() == TorchrunRank(
        rank=5, world_size=8, local_rank=1, local_world_size=4
    )


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": ""},
        {"RANK": "zero", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "x"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
    ],
)
def test_variables_that_are_no_place_in_a_job(variables, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        OptionError, match=r"in the environment must be an integer.*: start the job"
    ):
        TorchrunRank.from_environment()
