"""The verifier: every schedule passes, and of other tables it says what a slow oracle says."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from hfpp.errors import PipelineConfigError
from hfpp.plan.schedules import SCHEDULES, check_microbatches, compute_table
from hfpp.plan.schedules.actions import ScheduleTable, parse_action
from hfpp.plan.schedules.lowering import lower
from hfpp.plan.schedules.verifier import peak_activations, verify
from tests.plan.schedules.mutants import mutant
from tests.plan.schedules.tables import assert_places_exist, parse_rows, problem_of, random_table
from tests.reference.torch_orders import torch_schedule
from tests.reference.verify import verdict

FORMS: tuple[dict[str, bool] | None, ...] = (
    None,  # computations only
    {"unshard": False, "reduce_grad": False},
    {},
    {"wait_send": True, "wait_reduce_grad": True, "ordered_reshard": True},
)


def shapes(most_ranks: int, counts: Sequence[int]) -> Iterator[tuple[str, int, int, int]]:
    """Every schedule in every size that it can have."""
    for name, spec in sorted(SCHEDULES.items()):
        for pp_size in range(1, most_ranks + 1):
            for per_rank in (spec.stages_per_rank,) if spec.stages_per_rank else (2, 3):
                for n in counts:
                    try:
                        check_microbatches(
                            spec, pp_size=pp_size, num_stages=pp_size * per_rank, n_microbatches=n
                        )
                    except PipelineConfigError:
                        continue
                    yield name, pp_size, per_rank, n


@cache
def table_of(name: str, pp_size: int, per_rank: int, n: int, form: int) -> ScheduleTable:
    table = compute_table(
        SCHEDULES[name], pp_size=pp_size, stages_per_rank=per_rank, n_microbatches=n
    )
    wanted = FORMS[form]
    return table if wanted is None else lower(table, **wanted)


# What passes


def test_every_schedule_of_a_grid_passes() -> None:
    grid = list(shapes(5, (1, 2, 3, 4, 5, 6, 8, 10, 12)))
    assert len(grid) >= 200
    assert {name for name, *_ in grid} == set(SCHEDULES)
    for shape in grid:
        for form in range(len(FORMS)):
            verify(table_of(*shape, form))


def test_what_torch_makes_of_its_schedules_passes() -> None:
    count = 0
    for name, pp_size, per_rank, n in shapes(4, (2, 4, 6, 8)):
        if SCHEDULES[name].single_stage or not hasattr(torch_schedules, f"Schedule{name}"):
            continue
        schedule = torch_schedule(
            name, rank=0, pp_size=pp_size, stages_per_rank=per_rank, n_microbatches=n
        )
        for rows in (schedule.pipeline_order, schedule.pipeline_order_with_comms):
            texts = [[str(a or "") for a in rows[rank]] for rank in range(pp_size)]
            assert problem_of([list(map(parse_action, row)) for row in texts]) == ""
            count += 1
    assert count >= 50


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_the_most_activations_are_known(form: int) -> None:
    p, n = 4, 8
    assert peak_activations(table_of("GPipe", p, 1, n, form)) == (n,) * p
    assert peak_activations(table_of("1F1B", p, 1, n, form)) == (4, 3, 2, 1)


def test_what_a_group_frees_is_held_until_the_group_ends() -> None:
    rows = parse_rows("0F0 1F0 (1B0;0F1)OVERLAP_F_B 0B0 1F1 1B1 0B1")
    assert peak_activations(ScheduleTable.from_rows("table", rows)) == verdict(rows).peaks == (3,)
    message = problem_of(rows, activation_limit=2)
    assert "column 2, action (1B0;0F1)OVERLAP_F_B: the rank then holds 3 activations" in message


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), limit=st.integers(1, 12))
def test_a_limit_of_activations_is_kept(seed: int, limit: int) -> None:
    rows = random_table(Random(seed)).rows
    peaks = verdict(rows).peaks
    message = problem_of(rows, activation_limit=limit)
    assert (message == "") == (max(peaks) <= limit)
    if message:
        assert f"activation_limit ({limit})" in message
        assert_places_exist(message, rows)
        assert problem_of(rows, activation_limit=max(peaks)) == ""
        assert f"activation_limit={max(peaks)}" in message
        assert problem_of(rows, activation_limit=max(peaks) - 1) != ""


def test_ten_thousand_ranks_are_no_matter() -> None:
    """An order of magnitude: bench/bench_verify.py has the figures."""
    table = table_of("GPipe", 10_000, 1, 64, 2)
    started = time.perf_counter()
    verify(table)
    assert time.perf_counter() - started < 10


def test_numbers_at_the_edge_of_what_an_action_holds_are_refused_at_once() -> None:
    most = 2**28 - 1
    assert "action 0F0 is missing" in problem_of(parse_rows(f"0F{most} 0B{most}"))
    assert "no rank runs stage 0" in problem_of(parse_rows(f"{most}F0 {most}B0"))
    assert "does not live on this rank" in problem_of(parse_rows(f"0F0 0B0 {most}UNSHARD"))


@pytest.mark.parametrize("limit", [0, -1])
def test_an_impossible_limit_is_refused(limit: int) -> None:
    with pytest.raises(PipelineConfigError, match=r"activation_limit \(.*\) must be at least 1"):
        verify(table_of("GPipe", 2, 1, 2, 0), activation_limit=limit)


# Against the oracle


def mutants_match(base: ScheduleTable, chance: Random, found: Counter[str]) -> None:
    how, rows = mutant(base, chance)
    message, expected = problem_of(rows), verdict(rows)
    texts = [" ".join(map(str, row)) for row in rows]
    assert bool(message) == bool(expected.problem), f"{how}: {message!r}, {expected}: {texts}"
    found[expected.problem or "valid"] += 1
    if not message:
        assert peak_activations(ScheduleTable.from_rows("table", rows)) == expected.peaks
        found["changed but valid"] += rows != [[a for a in row if a] for row in base.rows]
        return
    assert_places_exist(message, rows)
    said = "deadlock" if "deadlocks: " in message else ""
    said = "rendezvous" if "deadlocks where sends wait" in message else said
    assert said == (expected.problem if expected.problem in ("deadlock", "rendezvous") else "")
    if expected.problem == "messages":
        assert "different orders" in message or "no counterpart" in message


def test_mutants_are_judged_as_the_oracle_judges_them() -> None:
    bases = [
        table_of(*shape, form)
        for shape in shapes(4, (1, 3, 4, 6, 8))
        for form in range(len(FORMS))
        if 2 <= shape[1] * shape[2] <= 8
    ]
    found: Counter[str] = Counter()

    @settings(max_examples=1000)
    @given(base=st.sampled_from(bases), seed=st.integers(0, 2**32))
    def judge(base: ScheduleTable, seed: int) -> None:
        mutants_match(base, Random(seed), found)

    judge()
    assert sum(found.values()) - found["valid"] - found["changed but valid"] >= 300, found
    assert found["changed but valid"] >= 100, found
    kinds = ("placement", "rows", "messages", "deadlock", "rendezvous")
    assert min(found[kind] for kind in kinds) >= 10, found


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_any_order_that_can_run_passes_and_so_does_what_is_made_of_it(seed: int) -> None:
    table = random_table(Random(seed))
    for rows in (table.rows, *(lower(table, **form).rows for form in FORMS if form is not None)):
        assert problem_of(rows) == ""
        assert verdict(rows).problem == ""


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_mutants_of_random_tables_are_judged_as_the_oracle_judges_them(seed: int) -> None:
    chance = Random(seed)
    table = random_table(chance)
    form = chance.choice(FORMS)
    mutants_match(table if form is None else lower(table, **form), chance, Counter())
