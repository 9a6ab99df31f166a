"""Lowering: identical to torch's passes and to the slow oracle; tables that cannot be lowered."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfpp.errors import PipelineConfigError
from hfpp.plan.schedules import SCHEDULES, compute_table, forward_table
from hfpp.plan.schedules.actions import Action, ActionKind, ScheduleTable, parse_action
from hfpp.plan.schedules.lowering import lower
from tests.plan.schedules.test_named import sizes, table_of, texts
from tests.plan.schedules.test_orders import shapes
from tests.reference import lowering as reference
from tests.reference.torch_orders import (
    LOWERING,
    TORCH_NAMES,
    torch_lowered,
    torch_messages,
    torch_unshard,
)


def test_lowered_tables_are_torchs_over_the_grid() -> None:
    names = tuple(name for name in TORCH_NAMES if not SCHEDULES[name].single_stage)
    grid = shapes(names, most=100)
    assert len(grid) >= 200
    assert {size["name"] for size in grid} == set(names)
    different = [
        size for size in grid if texts(lower(table_of(**size), **LOWERING)) != torch_lowered(**size)
    ]
    assert different == []


options = st.fixed_dictionaries(
    {
        name: st.booleans()
        for name in (
            "communication",
            "unshard",
            "reduce_grad",
            "wait_send",
            "wait_reduce_grad",
            "ordered_reshard",
        )
    }
)


@given(size=sizes(max_pp=5, max_microbatches=8), options=options)
def test_every_combination_of_passes_is_the_oracles(
    size: dict[str, Any], options: dict[str, bool]
) -> None:
    table = table_of(**size)
    assert lower(table, **options) == reference.lower(table, **options)


@given(pp_size=st.integers(1, 5), rounds=st.integers(1, 3), n=st.integers(1, 4), options=options)
def test_forward_tables_lower_as_the_oracle(
    pp_size: int, rounds: int, n: int, options: dict[str, bool]
) -> None:
    table = forward_table([*range(pp_size)] * rounds, n)
    assert lower(table, **options) == reference.lower(table, **options)


@st.composite
def any_tables(draw: Any) -> ScheduleTable:
    """Tables in no known order, stages in any placement, which run to their end."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    pp_size, n = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    ranks = [*range(pp_size), *(chance.randrange(pp_size) for _ in range(draw(st.integers(0, 5))))]
    chance.shuffle(ranks)
    last = len(ranks) - 1
    rows: list[list[Action]] = [[] for _ in range(pp_size)]
    able = [Action(0, ActionKind.FORWARD, m) for m in range(n)]
    while able:
        action = able.pop(chance.randrange(len(able)))
        stage, kind, m, _ = action
        rows[ranks[stage]].append(action)
        if kind is ActionKind.BACKWARD_WEIGHT:
            continue
        if kind is ActionKind.FORWARD and stage < last:
            able.append(Action(stage + 1, kind, m))
            continue
        backward = stage if kind is ActionKind.FORWARD else stage - 1
        if kind is ActionKind.BACKWARD_INPUT:
            able.append(Action(stage, ActionKind.BACKWARD_WEIGHT, m))
        if backward >= 0:
            split = chance.random() < 0.5
            kind = ActionKind.BACKWARD_INPUT if split else ActionKind.FULL_BACKWARD
            able.append(Action(backward, kind, m))
    return ScheduleTable.from_rows("any", rows)


@given(table=any_tables(), options=options)
def test_tables_in_any_order_lower_as_the_oracle_and_torch(
    table: ScheduleTable, options: dict[str, bool]
) -> None:
    assert lower(table, **options) == reference.lower(table, **options)
    only_messages = lower(table, unshard=False, reduce_grad=False)
    assert texts(only_messages) == torch_messages(
        texts(table), table.stage_to_rank, table.num_stages
    )


@st.composite
def rows_of_many_stages(draw: Any) -> list[Action]:
    """Computations and overlapped groups of stages with numbers that crowd a set's slots."""
    stages = draw(
        st.lists(st.integers(0, 6) | st.integers(0, 100_000), min_size=1, max_size=9, unique=True)
    )
    one = st.sampled_from(stages).map(lambda stage: Action(stage, ActionKind.FORWARD, 0))
    group = st.lists(one, min_size=2, max_size=3).map(
        lambda parts: Action(-1, ActionKind.OVERLAP, None, tuple(parts))
    )
    return draw(st.lists(one | group, max_size=60))


@given(row=rows_of_many_stages(), ordered=st.booleans())
def test_parameters_are_gathered_as_by_the_oracle_and_torch(
    row: list[Action], ordered: bool
) -> None:
    table = ScheduleTable.from_rows("row", [row])
    passes = {"communication": False, "reduce_grad": False}
    ours = lower(table, ordered_reshard=ordered, **passes)
    assert list(ours.row(0)) == reference.add_unshard(row, ordered=ordered)
    if ordered == LOWERING["ordered_reshard"]:
        assert texts(ours) == [torch_unshard(texts(table)[0])]


def test_idle_columns_are_dropped() -> None:
    rows = [[None, *map(parse_action, ("0F0", "0B0")), None], [None]]
    assert texts(lower(ScheduleTable.from_rows("idle", rows))) == [
        ["0UNSHARD", "0F0", "0B0", "0REDUCE_GRAD", "0RESHARD"],
        [],
    ]


# Tables that cannot be lowered


def table_of_rows(*rows: str) -> ScheduleTable:
    return ScheduleTable.from_rows("planted", [list(map(parse_action, r.split())) for r in rows])


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (("0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0"), r"deadlocks: rank 0, column 1, action 0B0 never"),
        (("(0F0;1F0)OVERLAP_F_B 1B0 0B0",), r"rank 0, column 0, action \(0F0;1F0\)OVERLAP_F_B"),
        (("0F0 0F0 0B0", "1F0 1B0"), "rank 0, column 1, action 0F0: its result is there already"),
        (("0F0 0SEND_F0 0B0", "1F0 1B0"), "has communication already"),
        (("0F0 0B7",), "2 actions are fewer than its 1 stages . 8 microbatches"),
        (("0F0 2F0", "0F1"), "stage 0 also runs on rank 0"),
        (("0F0 2F0",), "no rank runs stage 1"),
        (("0F0 (0F1;1F0;2F0;3F0)OVERLAP_F_B",), "rank 0, column 1.*more than 3 stages at once"),
    ],
)
def test_tables_that_cannot_be_lowered_are_named_errors(rows: tuple[str, ...], match: str) -> None:
    with pytest.raises(PipelineConfigError, match=match) as caught:
        lower(table_of_rows(*rows))
    assert str(caught.value).startswith("planted: ")


def test_absurd_numbers_of_stages_and_microbatches_take_no_memory() -> None:
    for text in ("0F268435455", "268435455F0", "268435455F268435455"):
        with pytest.raises(PipelineConfigError):
            lower(table_of_rows(f"0F0 {text}"))


def test_waits_are_added_to_a_table_that_has_messages() -> None:
    table = compute_table(SCHEDULES["ZBVZeroBubble"], pp_size=3, n_microbatches=6)
    lowered = lower(table)
    waits = {"communication": False, "unshard": False, "reduce_grad": False, "wait_send": True}
    assert lower(lowered, **waits) == lower(table, wait_send=True)
    with pytest.raises(PipelineConfigError, match="sends"):
        lower(lower(table_of_rows("0F0 0SEND_F0 0SEND_F0 0B0", "1F0 1B0"), **waits), **waits)


def test_waits_are_not_added_twice() -> None:
    table = compute_table(SCHEDULES["GPipe"], pp_size=2, n_microbatches=1)
    only_waits = {"communication": False, "unshard": False, "reduce_grad": False, "wait_send": True}
    lowered = lower(lower(table), **only_waits)
    assert lowered == lower(table, wait_send=True)
    with pytest.raises(PipelineConfigError, match="has waits for sends already"):
        lower(lowered, **only_waits)
