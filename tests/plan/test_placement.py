"""Placement against the oracle, its conservation laws, and its errors."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfpp import PipelineConfigError, Placement
from hfpp.plan.placement import ranks_by_stage, stage_ids_by_rank, stage_ids_this_rank
from tests import strategies
from tests.advice import alternatives, check_advice
from tests.reference import placement as reference


def check_world(pp_size, num_stages, rows, ranks) -> None:
    """Every stage has exactly one rank, every rank as many stages, and the inverse is one."""
    assert len(rows) == pp_size
    assert sorted(stage for row in rows for stage in row) == list(range(num_stages))
    assert {len(row) for row in rows} == {num_stages // pp_size}
    assert all(list(row) == sorted(row) for row in rows)
    assert all(ranks[stage] == rank for rank, row in enumerate(rows) for stage in row)


@given(strategies.worlds())
def test_tables_equal_the_oracle(world):
    pp_size, num_stages, style = world
    table = stage_ids_by_rank(pp_size, num_stages, style)
    rows = [table.row(rank) for rank in range(pp_size)]
    ranks = ranks_by_stage(pp_size, num_stages, style).row()
    for rank in range(pp_size):
        expected = reference.stage_ids_this_rank(rank, pp_size, num_stages, style)
        assert rows[rank] == expected
        assert stage_ids_this_rank(rank, pp_size, num_stages, style) == expected
    check_world(pp_size, num_stages, rows, ranks)


@pytest.mark.parametrize(
    "rows",
    [
        [(0, 2), (1, 1)],  # stage 1 twice, stage 3 nowhere
        [(0, 1, 2), (3,)],  # ranks of different sizes
        [(0, 3), (1, 2)],  # another style: the inverse disagrees
        [(2, 0), (1, 3)],  # out of order
    ],
)
def test_check_world_trips_on_planted_faults(rows):
    check_world(2, 4, [(0, 2), (1, 3)], (0, 1, 0, 1))
    with pytest.raises(AssertionError):
        check_world(2, 4, rows, (0, 1, 0, 1))


@pytest.mark.parametrize(
    ("pp_size", "per_rank", "style"), [(9_999, 3, "loop"), (100_000, 2, "loop"), (100_000, 2, "v")]
)
def test_large_worlds_follow_the_formula(pp_size, per_rank, style):
    num_stages = pp_size * per_rank
    ids = memoryview(stage_ids_by_rank(pp_size, num_stages, style)).tolist()
    if style == "loop":
        assert ids == [[r + k * pp_size for k in range(per_rank)] for r in range(pp_size)]
    else:
        assert ids == [[r, num_stages - 1 - r] for r in range(pp_size)]
    ranks = memoryview(ranks_by_stage(pp_size, num_stages, style)).tolist()
    assert ranks == [
        reference.rank_of_stage(s, pp_size, num_stages, style) for s in range(num_stages)
    ]


def test_defaults_and_enum():
    assert stage_ids_this_rank(1, 4, 8) == (1, 5)
    assert stage_ids_this_rank(1, 4, 8, Placement.V) == (1, 6)
    assert stage_ids_by_rank(2, 4).row(1) == (1, 3)
    assert ranks_by_stage(2, 4).row() == (0, 1, 0, 1)
    assert [placement.value for placement in Placement] == ["loop", "v"]


def test_one_ranks_stages_of_a_world_too_large_for_a_table():
    assert stage_ids_this_rank(7, 1_000_000_000, 2_000_000_000) == (7, 1_000_000_007)


@pytest.mark.parametrize(
    ("arguments", "name", "message"),
    [
        (
            (0, 0, 8, "loop"),
            "pp_size",
            r"pp_size \(0\) must be at least 1: use pp_size=1 or more\.",
        ),
        ((0, -4, 8, "loop"), "pp_size", r"pp_size \(-4\)"),
        ((4, 4, 8, "loop"), "pp_rank", r"pp_rank \(4\) must be in \[0, pp_size\)"),
        ((-1, 4, 8, "v"), "pp_rank", r"pp_rank \(-1\)"),
        (
            (0, 4, 6, "loop"),
            "num_stages",
            r"num_stages \(6\) must be a positive multiple of pp_size",
        ),
        ((0, 4, 0, "loop"), "num_stages", r"num_stages \(0\) must be a positive multiple"),
        ((0, 4, -8, "loop"), "num_stages", r"num_stages \(-8\) must be a positive multiple"),
        ((0, 4, 4, "v"), "num_stages", r"num_stages \(4\) must be twice pp_size \(4\)"),
        ((0, 4, 12, "v"), "num_stages", r"use num_stages=8 or style='loop'\."),
        ((0, 4, 8, "zigzag"), "style", r"style \('zigzag'\) must be 'loop' or 'v'"),
        ((0, 4, 8, "LOOP"), "style", r"style \('LOOP'\)"),
        ((0, 4, 8, None), "style", r"style \(None\)"),
        ((True, 4, 8, "loop"), "pp_rank", r"pp_rank \(True\) must be an integer, not a bool"),
        ((0, True, 8, "loop"), "pp_size", r"pp_size \(True\) must be an integer"),
        ((0, 1, False, "loop"), "num_stages", r"num_stages \(False\) must be an integer"),
    ],
)
def test_errors_name_argument_value_rule_and_remedy(arguments, name, message):
    with pytest.raises(PipelineConfigError, match=message) as caught:
        stage_ids_this_rank(*arguments)
    assert name in str(caught.value)
    if name != "pp_rank":
        for whole_world in (stage_ids_by_rank, ranks_by_stage):
            with pytest.raises(PipelineConfigError, match=re.escape(str(caught.value))):
                whole_world(*arguments[1:])


@pytest.mark.parametrize("bad", [1.0, "4", None, [4], 4j])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_what_is_no_integer_is_a_type_error(bad, position):
    arguments: list = [0, 4, 8]
    arguments[position] = bad
    name = ("pp_rank", "pp_size", "num_stages")[position]
    with pytest.raises(TypeError, match=rf"^{name} must be an integer, not {type(bad).__name__}"):
        stage_ids_this_rank(*arguments)


def test_sizes_beyond_memory_are_errors_before_any_allocation():
    with pytest.raises(OverflowError, match=r"num_stages \(32768000000\) must be at most"):
        stage_ids_by_rank(10**6, 10**6 * 4096 * 8)
    with pytest.raises(OverflowError, match=r"num_stages: a table of 8000000000 bytes is over"):
        stage_ids_by_rank(10**6, 2 * 10**9)
    with pytest.raises(OverflowError, match=r"pp_size does not fit in 64 bits"):
        ranks_by_stage(1 << 64, 1 << 65)
    with pytest.raises(OverflowError, match="Python objects"):
        stage_ids_this_rank(0, 1, 1 << 30)


@given(
    pp_rank=st.integers(-2, 20),
    pp_size=st.integers(-2, 12),
    num_stages=st.integers(-3, 50),
    style=st.sampled_from(["loop", "v", "V", "", "zigzag"]),
)
def test_following_the_advice_removes_the_error(pp_rank, pp_size, num_stages, style):
    check_advice(
        stage_ids_this_rank,
        {"pp_rank": pp_rank, "pp_size": pp_size, "num_stages": num_stages, "style": style},
    )


def test_check_advice_trips_on_advice_that_does_not_help():
    def asks_for_what_it_refuses(size):
        raise PipelineConfigError(f"size ({size}) is wrong: use size=3 or size=4.")

    assert alternatives("size (1) is wrong: use size=3 or size=4.") == [{"size": 3}, {"size": 4}]
    with pytest.raises(AssertionError, match="circles"):
        check_advice(asks_for_what_it_refuses, {"size": 1})

    def is_silent(size):
        raise PipelineConfigError("wrong size")

    with pytest.raises(AssertionError, match="no advice"):
        check_advice(is_silent, {"size": 1})


@given(
    strategies.any_integers(),
    strategies.any_integers(),
    strategies.any_integers(),
    st.sampled_from(["loop", "v"]),
)
def test_any_integers_give_a_result_or_a_named_error(pp_rank, pp_size, num_stages, style):
    try:
        ids = stage_ids_this_rank(pp_rank, pp_size, num_stages, style)
    except (PipelineConfigError, OverflowError) as error:
        assert re.match(r"(pp_rank|pp_size|num_stages)\b", str(error))
    else:
        assert len(ids) == num_stages // pp_size
        assert ids[0] == pp_rank
