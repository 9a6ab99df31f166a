"""Schedules: names, rules on microbatches, sizes, and what can be in a row."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfpp.errors import PipelineConfigError
from hfpp.plan.placement import Placement
from hfpp.plan.schedules import (
    SCHEDULES,
    check_microbatches,
    compute_table,
    find_schedule,
    verify,
)
from hfpp.plan.schedules.actions import Action, ActionKind, ScheduleTable
from hfpp.plan.schedules.lowering import lower
from tests.advice import check_advice
from tests.reference.torch_orders import TORCH_NAMES, torch_schedule


@st.composite
def sizes(draw: Any, max_pp: int = 6, max_microbatches: int = 17) -> dict[str, Any]:
    """A schedule with sizes that it can run."""
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    pp_size = draw(st.integers(1, max_pp))
    per_rank = SCHEDULES[name].stages_per_rank or draw(st.integers(1, 4))
    if name == "1F1B":
        n = draw(st.integers(pp_size, pp_size + max_microbatches))
    elif name == "DualPipeV":
        n = draw(st.integers(2 * pp_size, 2 * pp_size + max_microbatches))
    elif name in ("Interleaved1F1B", "InterleavedZeroBubble"):
        counts = [n for n in range(1, 3 * max_pp + 1) if n % max(1, n // pp_size) == 0]
        n = draw(st.sampled_from(counts))
    else:
        n = draw(st.integers(1, max_microbatches))
    return {"name": name, "pp_size": pp_size, "stages_per_rank": per_rank, "n_microbatches": n}


def table_of(name: str, pp_size: int, stages_per_rank: int, n_microbatches: int) -> ScheduleTable:
    return compute_table(
        SCHEDULES[name],
        pp_size=pp_size,
        stages_per_rank=stages_per_rank,
        n_microbatches=n_microbatches,
    )


def texts(table: ScheduleTable) -> list[list[str]]:
    return [[str(step.action) for step in table.steps(rank)] for rank in range(table.pp_size)]


# Names


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_spelling_finds_its_schedule(name: str) -> None:
    spec = SCHEDULES[name]
    for spelling in (name, name.lower(), name.upper(), f"Schedule{name}", *spec.aliases):
        assert find_schedule(spelling) is spec


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("1f1b", "1F1B"),
        ("interleaved_1f1b", "Interleaved1F1B"),
        ("looped_bfs", "LoopedBFS"),
        ("dfs", "Interleaved1F1B"),
        ("zero_bubble", "InterleavedZeroBubble"),
        ("v_schedule", "ZBVZeroBubble"),
    ],
)
def test_aliases_that_peers_document(alias: str, name: str) -> None:
    assert find_schedule(alias).name == name


def test_aliases_do_not_collide() -> None:
    spellings = [s.lower() for spec in SCHEDULES.values() for s in (spec.name, *spec.aliases)]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize("name", ["2F2B", "", "interleaved 2F"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(PipelineConfigError) as caught:
        find_schedule(name)
    assert all(known in str(caught.value) for known in SCHEDULES)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["PipelineScheduleSingle", "pipelineschedulemulti"])
def test_an_abstract_class_is_refused(name: str) -> None:
    with pytest.raises(PipelineConfigError, match="abstract"):
        find_schedule(name)


def test_placement_and_stages_per_rank_of_each() -> None:
    v = {name for name, spec in SCHEDULES.items() if spec.placement is Placement.V}
    single = {name for name, spec in SCHEDULES.items() if spec.single_stage}
    assert v == {"ZBVZeroBubble", "DualPipeV", "VHalf", "VMin", "VLimited"}
    assert single == {"1F1B", "GPipe", "ZBH2"}
    assert {name for name, spec in SCHEDULES.items() if spec.stages_per_rank == 2} == v


# Microbatches


@given(
    name=st.sampled_from(TORCH_NAMES),
    pp_size=st.integers(1, 9),
    per_rank=st.integers(1, 3),
    n=st.integers(1, 40),
)
def test_microbatch_rule_is_torchs_rule(name: str, pp_size: int, per_rank: int, n: int) -> None:
    per_rank = SCHEDULES[name].stages_per_rank or per_rank
    try:
        torch_schedule(name, rank=0, pp_size=pp_size, stages_per_rank=per_rank, n_microbatches=n)
        torch_accepts = True
    except ValueError:
        torch_accepts = False
    try:
        check_microbatches(
            SCHEDULES[name], pp_size=pp_size, num_stages=pp_size * per_rank, n_microbatches=n
        )
        accepted = True
    except PipelineConfigError:
        accepted = False
    assert accepted == torch_accepts


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    pp_size=st.integers(1, 12),
    n=st.integers(-2, 60),
    microbatch_size=st.none() | st.integers(1, 4),
)
def test_the_advice_on_microbatches_works(
    name: str, pp_size: int, n: int, microbatch_size: int | None
) -> None:
    spec = SCHEDULES[name]

    def check(n_microbatches: int = 0, local_batch_size: int = 0) -> None:
        if microbatch_size is not None:
            n_microbatches = local_batch_size // microbatch_size
        check_microbatches(
            spec,
            pp_size=pp_size,
            num_stages=pp_size * (spec.stages_per_rank or 2),
            n_microbatches=n_microbatches,
            microbatch_size=microbatch_size,
        )

    if microbatch_size is None:
        check_advice(check, {"n_microbatches": n})
    else:
        check_advice(check, {"local_batch_size": n * microbatch_size})


@given(pp_size=st.integers(1, 12), n=st.integers(1, 99))
def test_the_nearest_counts_of_microbatches_are_advised(pp_size: int, n: int) -> None:
    def runs(count: int) -> str:
        try:
            check_microbatches(
                SCHEDULES["Interleaved1F1B"],
                pp_size=pp_size,
                num_stages=2 * pp_size,
                n_microbatches=count,
            )
        except PipelineConfigError as error:
            return str(error)
        return ""

    message = runs(n)
    below, above = n, n
    while runs(below):
        below -= 1
    while runs(above):
        above += 1
    advice = f"use n_microbatches={below} or n_microbatches={above}"
    assert message.endswith(advice) if message else below == n


def test_absurd_counts_of_microbatches_are_refused_at_once() -> None:
    with pytest.raises(PipelineConfigError, match=f"n_microbatches={2**80 + 2**40}$"):
        check_microbatches(
            SCHEDULES["Interleaved1F1B"],
            pp_size=2**40,
            num_stages=2**41,
            n_microbatches=2**80 + 1,
        )


@pytest.mark.parametrize("name", ["2F2B", "", "interleavd1f1b", "PipelineScheduleMulti", 3])
def test_the_advice_on_names_works(name: Any) -> None:
    check_advice(
        lambda pp_schedule: find_schedule(pp_schedule, argument="pp_schedule"),
        {"pp_schedule": name},
    )


def test_a_misspelt_name_gets_the_closest() -> None:
    with pytest.raises(PipelineConfigError, match="use pipeline_parallel_schedule='ZBVZeroBubble'"):
        find_schedule("ZBVZeroBuble")


@pytest.mark.parametrize(
    ("name", "sizes_", "match"),
    [
        ("GPipe", {"pp_size": 0, "n_microbatches": 1}, "pp_size"),
        ("GPipe", {"pp_size": 2, "stages_per_rank": 2, "n_microbatches": 1}, "stages_per_rank"),
        ("DualPipeV", {"pp_size": 2, "stages_per_rank": 3, "n_microbatches": 9}, "must be 2"),
        ("LoopedBFS", {"pp_size": 2, "stages_per_rank": 0, "n_microbatches": 9}, "at least 1"),
    ],
)
def test_impossible_sizes_are_errors(name: str, sizes_: dict[str, int], match: str) -> None:
    with pytest.raises(PipelineConfigError, match=match):
        compute_table(SCHEDULES[name], **sizes_)


# Orders: see test_orders.py and test_lowering.py


@given(sizes())
def test_every_order_is_verified(size: dict[str, Any]) -> None:
    table = table_of(**size)
    verify(table)
    assert table.num_stages == size["pp_size"] * size["stages_per_rank"]
    assert table.n_microbatches == size["n_microbatches"]
    assert table.stages_per_rank == size["stages_per_rank"]
    if size["pp_size"] > 1:
        assert table.placement is SCHEDULES[size["name"]].placement


@given(sizes())
def test_every_lowered_table_is_verified(size: dict[str, Any]) -> None:
    verify(lower(table_of(**size), unshard=False, reduce_grad=False))
    verify(lower(table_of(**size)))
    verify(lower(table_of(**size), wait_send=True, wait_reduce_grad=True, ordered_reshard=True))


# Rows of actions


@pytest.mark.parametrize(
    ("action", "match"),
    [
        (Action(0, ActionKind.FORWARD), "F is about one microbatch: use microbatch=0"),
        (Action(0, ActionKind.UNSHARD, 3), "UNSHARD is about a whole stage: use microbatch=None"),
        (Action(0, ActionKind.OVERLAP), "a group has parts"),
        (
            Action(
                -1,
                ActionKind.OVERLAP,
                None,
                (Action(0, ActionKind.FORWARD, 0), Action(-1, ActionKind.OVERLAP)),
            ),
            "a group has parts, of which none is a group",
        ),
        (Action(-1, ActionKind.FORWARD, 0), "numbered from 0"),
        (Action(0, ActionKind.FORWARD, 2**28), "numbered from 0 to 268435455"),
    ],
)
def test_what_is_no_action_is_no_row(action: Action, match: str) -> None:
    with pytest.raises(PipelineConfigError, match=f"planted: action .*{match}"):
        ScheduleTable.from_rows("planted", [[action]])
