"""Partitions and module names against the oracle, and counts of virtual stages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfpp import PipelineConfigError
from hfpp.plan import partition
from hfpp.plan.partition import (
    calculate_virtual_stages,
    generate_hf_model_fqn_of_stage,
    generate_hf_model_fqn_per_model_part,
    layers_of_stage,
    uniform_offsets,
)
from tests import strategies
from tests.advice import check_advice
from tests.reference import partition as reference


def check_partition(num_layers, stages) -> None:
    """Each layer on one stage, in order; sizes differ by at most one, longer ones first."""
    assert [layer for layers in stages for layer in layers] == list(range(num_layers))
    sizes = [len(layers) for layers in stages]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(strategies.partitions())
def test_uniform_partition(layers):
    num_stages, num_layers = layers
    offsets = uniform_offsets(num_stages, num_layers).row()
    stages = [list(range(*offsets[s : s + 2])) for s in range(num_stages)]
    check_partition(num_layers, stages)
    assert stages == reference.uniform_partition(num_stages, num_layers)
    for stage in range(num_stages):
        assert list(layers_of_stage(stage, num_stages, num_layers)) == stages[stage]


@pytest.mark.parametrize(
    "stages",
    [
        [[0, 1], [1, 2]],  # a layer twice
        [[0, 1], [3]],  # a layer missing
        [[1, 0], [2]],  # out of order
        [[0, 1, 2], []],  # uneven
        [[0], [1, 2]],  # the longer stage last
    ],
)
def test_check_partition_trips_on_planted_faults(stages):
    check_partition(3, [[0, 1], [2]])
    with pytest.raises(AssertionError):
        check_partition(3, stages)


@given(strategies.partitions(max_stages=12, max_more_layers=40), strategies.fqn_options())
def test_names_equal_the_oracle(layers, options):
    num_stages, num_layers = layers
    lists = generate_hf_model_fqn_per_model_part(num_stages, num_layers, **options)
    assert lists == reference.fqn_lists(num_stages, num_layers, **options)
    for stage in range(num_stages):
        one = generate_hf_model_fqn_of_stage(stage, num_stages, num_layers, **options)
        assert one == lists[stage]


def test_names_of_a_small_model_in_full():
    assert generate_hf_model_fqn_per_model_part(2, 3, extra_module_fqns=["extra.module"]) == [
        [
            "model.embed_tokens",
            "model.vision_tower",
            "model.visual",
            "model.vision_model",
            "model.image_encoder",
            "model.vision_encoder",
            "model.embed_vision",
            "model.audio_tower",
            "model.audio_encoder",
            "model.audio_model",
            "model.mm_projector",
            "model.multi_modal_projector",
            "model.multimodal_projector",
            "model.vision_projector",
            "model.vit_large_projector",
            "model.audio_projector",
            "extra.module",
            "model.layers.0",
            "model.layers.1",
            "model.rotary_emb",
        ],
        ["model.layers.2", "model.norm", "lm_head", "model.rotary_emb"],
    ]
    assert generate_hf_model_fqn_per_model_part(
        1,
        1,
        include_embeddings=False,
        include_lm_head=False,
        include_rotary_emb=False,
        include_multimodal_encoders=False,
        fqn_prefix="",
    ) == [["layers.0", "norm"]]


def test_lists_do_not_share_state():
    lists = generate_hf_model_fqn_per_model_part(2, 2)
    lists[0].clear()
    assert generate_hf_model_fqn_per_model_part(2, 2)[0]


@pytest.mark.parametrize("make", [uniform_offsets, generate_hf_model_fqn_per_model_part])
@pytest.mark.parametrize(
    ("num_stages", "num_layers", "message"),
    [
        (0, 4, r"num_stages \(0\) must be at least 1: use num_stages=1"),
        (-2, 4, r"num_stages \(-2\)"),
        (
            5,
            4,
            r"num_stages \(5\) must not be larger than num_layers \(4\).*use num_stages=4 or less",
        ),
        (1, 0, r"num_layers \(0\) must be at least 1"),
        (True, 4, r"num_stages \(True\)"),
    ],
)
def test_partition_errors(make, num_stages, num_layers, message):
    with pytest.raises(PipelineConfigError, match=message):
        make(num_stages, num_layers)
    check_advice(make, {"num_stages": num_stages, "num_layers": num_layers})


def test_one_stage_errors():
    for one_stage in (layers_of_stage, generate_hf_model_fqn_of_stage):
        for stage in (-1, 2):
            with pytest.raises(PipelineConfigError, match=rf"stage_index \({stage}\) must be in"):
                one_stage(stage, 2, 4)
        with pytest.raises(TypeError, match="stage_index must be an integer, not float"):
            one_stage(1.0, 2, 4)


def _names_of_stage_1(*args, **kwargs):
    return generate_hf_model_fqn_of_stage(1, *args, **kwargs)


def test_one_string_is_no_list_of_names():
    with pytest.raises(TypeError, match=r"extra_module_fqns=\['model.extra'\]"):
        generate_hf_model_fqn_per_model_part(2, 4, extra_module_fqns="model.extra")


@pytest.mark.parametrize("make", [generate_hf_model_fqn_per_model_part, _names_of_stage_1])
@pytest.mark.parametrize(
    ("argument", "value"), [("fqn_prefix", 3), ("lm_head_fqn", None), ("extra_module_fqns", [4])]
)
def test_names_must_be_strings(make, argument, value):
    with pytest.raises(TypeError, match=rf"^{argument} must (be a string|hold strings), not"):
        make(2, 4, include_multimodal_encoders=False, **{argument: value})


def test_lists_beyond_memory_are_errors_before_any_allocation():
    with pytest.raises(OverflowError, match="num_layers"):
        generate_hf_model_fqn_per_model_part(10**9, 10**12)
    with pytest.raises(OverflowError, match="num_stages"):
        uniform_offsets(10**9, 10**12)
    with pytest.raises(OverflowError, match="num_layers / num_stages"):
        generate_hf_model_fqn_of_stage(0, 2, 10**12)
    last = generate_hf_model_fqn_of_stage(10**12 - 1, 10**12, 10**12, include_lm_head=False)
    assert last == ["model.layers.999999999999", "model.norm", "model.rotary_emb"]


# ---- virtual stages


@given(
    num_layers=st.integers(1, 100),
    layers_per_stage=st.none() | st.integers(1, 40),
    pp_size=st.integers(1, 12),
    single=st.booleans(),
    rounding=st.sampled_from([None, "up", "down"]),
)
def test_virtual_stages_equal_the_oracle(num_layers, layers_per_stage, pp_size, single, rounding):
    arguments = (num_layers, layers_per_stage, pp_size, single, rounding)
    expected = reference.virtual_stages(*arguments)
    try:
        stages, per_rank = calculate_virtual_stages(*arguments)
    except PipelineConfigError:
        assert expected is None
        return
    assert (stages, per_rank) == expected
    assert stages == per_rank * pp_size
    assert stages <= num_layers
    assert per_rank == 1 if single else per_rank >= 2
    if layers_per_stage is not None:
        exact = -(-num_layers // layers_per_stage)
        nearest = {None: exact == stages, "up": 0 <= stages - exact < pp_size}
        assert nearest.get(rounding, 0 <= exact - stages < pp_size)


def test_the_oracle_of_virtual_stages_can_disagree(monkeypatch):
    """A core that rounded the wrong way would be found out."""
    assert calculate_virtual_stages(10, 2, 4, False, "up") == (8, 2)
    assert reference.virtual_stages(10, 2, 4, False, "up") == (8, 2)
    rounded_up = partition._virtual_stages
    monkeypatch.setattr(partition, "_virtual_stages", lambda *a: rounded_up(*a[:-1], "down"))
    with pytest.raises(PipelineConfigError):
        calculate_virtual_stages(10, 2, 4, False, "up")


@given(
    num_layers=st.integers(-1, 70),
    layers_per_stage=st.none() | st.integers(-1, 75),
    pp_size=st.integers(-1, 12),
    single=st.booleans(),
    rounding=st.sampled_from([None, "up", "down", "nearest"]),
)
def test_following_the_advice_removes_the_error(
    num_layers, layers_per_stage, pp_size, single, rounding
):
    check_advice(
        calculate_virtual_stages,
        {
            "num_layers": num_layers,
            "layers_per_stage": layers_per_stage,
            "pp_size": pp_size,
            "is_single_stage_schedule": single,
            "round_to_pp_multiple": rounding,
        },
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((32, None, 4, True), (4, 1)),
        ((32, None, 4, False), (8, 2)),
        ((32, 8, 4, True), (4, 1)),
        ((32, 4, 4, False), (8, 2)),
        ((30, 4, 4, False), (8, 2)),
        ((36, 4, 4, False, "up"), (12, 3)),
        ((36, 4, 4, False, "down"), (8, 2)),
        ((1, 1, 1, True), (1, 1)),
        ((7, 100, 1, True), (1, 1)),
    ],
)
def test_virtual_stages(arguments, expected):
    result = calculate_virtual_stages(*arguments)
    assert result == expected
    assert (result.num_virtual_stages, result.stages_per_rank) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((36, 4, 4, False), r"9 virtual stages .* must be divisible by pp_size"),
        ((32, 4, 4, True), r"^Single stage schedule requires exactly 1 stage per rank.*: 2: use "),
        (
            (32, 8, 4, False),
            r"^Multi-stage schedule requires at least 2 stages per rank.*: 1: use ",
        ),
        ((32, 4, 4, False, "nearest"), r"round_to_pp_multiple \('nearest'\) must be 'up', 'down'"),
        ((32, None, 4, False, ""), r"round_to_pp_multiple \(''\)"),
        ((32, 0, 4, False), r"layers_per_stage \(0\) must be at least 1: use layers_per_stage=1"),
        ((32, -3, 4, False), r"layers_per_stage \(-3\)"),
        ((32, True, 4, False), r"layers_per_stage \(True\)"),
        ((3, 1, 4, True, "down"), r"0 virtual stages .* after rounding down"),
        ((5, 1, 4, False, "up"), r"8 virtual stages .* more than num_layers \(5\)"),
        ((4, None, 4, False), r"8 virtual stages .* more than num_layers \(4\).*pp_size=2\.$"),
        ((0, None, 4, False), r"num_layers \(0\)"),
        ((32, None, 0, False), r"pp_size \(0\)"),
    ],
)
def test_virtual_stages_errors(arguments, message):
    with pytest.raises(PipelineConfigError, match=message):
        calculate_virtual_stages(*arguments)


def test_virtual_stages_with_wrong_types_and_huge_sizes():
    with pytest.raises(TypeError, match="layers_per_stage must be an integer, not float"):
        calculate_virtual_stages(32, 4.0, 4, False)
    with pytest.raises(OverflowError, match="num_layers does not fit"):
        calculate_virtual_stages(1 << 70, None, 4, False)
    with pytest.raises(PipelineConfigError, match="must be divisible by"):
        calculate_virtual_stages((1 << 62) + 1, 1, 1 << 20, False)
