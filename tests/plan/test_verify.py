"""The verifier: every schedule passes, and of other tables it says what a slow oracle says."""

from __future__ import annotations

import re
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
from hfpp.plan.actions import Action, ActionKind, ScheduleTable, parse_action
from hfpp.plan.lowering import lower
from hfpp.plan.placement import ranks_by_stage
from hfpp.plan.schedule import SCHEDULES, check_microbatches, compute_table
from hfpp.plan.verify import peak_activations, verify
from tests.plan.mutants import mutant
from tests.reference.torch_orders import torch_schedule
from tests.reference.verify import Rows, verdict

K = ActionKind
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


def problem_of(rows: Rows, **limit: int) -> str:
    """What the verifier says; "" where the table passes."""
    try:
        verify(ScheduleTable.from_rows("table", rows), **limit)
    except PipelineConfigError as error:
        return str(error)
    return ""


PLACE = re.compile(r"rank (\d+), column (\d+), action (\(.*?\)OVERLAP_F_B|\w+)")


def assert_places_exist(message: str, rows: Rows) -> None:
    places = PLACE.findall(message)
    assert places, f"no rank, column and action in: {message}"
    for rank, column, action in places:
        assert str(rows[int(rank)][int(column)]) == action, message


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


def random_table(chance: Random) -> ScheduleTable:
    """Any order in which the computations can run, in any placement that the verifier knows."""
    size = chance.randint(1, 4)
    v = chance.random() < 0.3
    per_rank = 2 if v else chance.randint(1, 3)
    stages, n = size * per_rank, chance.randint(1, 5)
    home = ranks_by_stage(size, stages, "v" if v else "loop").row()
    split = chance.choice((0.0, 0.5, 1.0))
    eager = chance.random()  # how much rather a forward is run than a backward
    rows: list[list[Action]] = [[] for _ in range(size)]
    done: set[tuple[int, ActionKind, int]] = set()
    todo = {
        (stage, kind, m)
        for stage in range(stages)
        for m in range(n)
        for kind in (K.FORWARD, *((K.BACKWARD_INPUT, K.BACKWARD_WEIGHT) if chance.random() < split
                                  else (K.FULL_BACKWARD,)))
    }  # fmt: skip

    def ready(stage: int, kind: ActionKind, m: int) -> bool:
        if kind is K.FORWARD:
            return stage == 0 or (stage - 1, K.FORWARD, m) in done
        if kind is K.BACKWARD_WEIGHT:
            return (stage, K.BACKWARD_INPUT, m) in done
        after = {(stage + 1, K.FULL_BACKWARD, m), (stage + 1, K.BACKWARD_INPUT, m)}
        return (stage, K.FORWARD, m) in done and (stage == stages - 1 or bool(after & done))

    while todo:
        able = sorted(key for key in todo if ready(*key))
        forwards = [key for key in able if key[1] is K.FORWARD]
        others = [key for key in able if key[1] is not K.FORWARD]
        pool = forwards if not others or (forwards and chance.random() < eager) else others
        stage, kind, m = chance.choice(pool)
        parts = [Action(stage, kind, m)]
        partners = [key for key in others if home[key[0]] == home[stage]]
        if kind is K.FORWARD and partners and chance.random() < 0.2:
            parts.append(Action(*chance.choice(partners)))
        group = Action(-1, K.OVERLAP, None, tuple(parts))
        rows[home[stage]].append(group if len(parts) > 1 else parts[0])
        for part in parts:
            assert part.microbatch is not None
            key = part.stage, part.kind, part.microbatch
            todo.remove(key)
            done.add(key)
    return ScheduleTable.from_rows("random", rows)


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


# Planted faults of what the runtime does besides computing and sending


def parse_rows(*rows: str) -> list[list[Action]]:
    return [[a for text in row.split() if (a := parse_action(text))] for row in rows]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ("0F0 0UNSHARD 0B0 0RESHARD", "column 0, action 0F0: stage 0 computes before it is unsha"),
        ("0UNSHARD 0F0 0RESHARD 0B0", "column 3, action 0B0: stage 0 is not unsharded"),
        ("0UNSHARD 0F0 0UNSHARD 0B0 0RESHARD", "column 2, action 0UNSHARD: .* since column 0"),
        ("0UNSHARD 0RESHARD 0UNSHARD 0F0 0B0 0RESHARD", "column 1, action 0RESHARD: .* not comp"),
        ("0F0 0B0 0RESHARD", "column 2, action 0RESHARD: 0RESHARD comes without 0UNSHARD"),
        ("0UNSHARD 0F0 0B0", "column 0, action 0UNSHARD: stage 0 is never resharded"),
        ("0F0 0B0 0REDUCE_GRAD 0REDUCE_GRAD", "column 3, action 0REDUCE_GRAD: .* at column 2"),
        ("0F0 0F1 0B0 0REDUCE_GRAD 0B1", "column 3, action 0REDUCE_GRAD: it comes after 1 of 2"),
        ("0F0 0I0 0REDUCE_GRAD 0W0", "column 2, action 0REDUCE_GRAD: it comes after 0 of 1"),
        ("0F0 0B0 0WAIT_REDUCE_GRAD", "column 2, .*: 0WAIT_REDUCE_GRAD comes without 0REDUCE_GR"),
        (
            "0F0 1F0 1B0 0B0 1REDUCE_GRAD 0REDUCE_GRAD 1WAIT_REDUCE_GRAD 0WAIT_REDUCE_GRAD",
            "column 5, action 0REDUCE_GRAD: another reduction is pending",
        ),
        (
            "0F0 1F0 1B0 0B0 1REDUCE_GRAD 1WAIT_REDUCE_GRAD 0REDUCE_GRAD",
            "column 6, action 0REDUCE_GRAD: no 0WAIT_REDUCE_GRAD follows",
        ),
        ("0F0 0B0 0WAIT_SEND_F0", "column 2, action 0WAIT_SEND_F0: .* comes without 0SEND_F0"),
        ("0F0 0B0 1UNSHARD", "column 2, action 1UNSHARD: stage 1 does not live on this rank"),
        ("(0F0;0B0)OVERLAP_F_B", "column 0, .*: 0B0 needs 0F0, which runs at the same time"),
        ("0F0 (0I0;0W0)OVERLAP_F_B", "column 1, .*: 0W0 needs 0I0, which runs at the same time"),
        ("(0F0;0F0)OVERLAP_F_B 0B0", "column 0, .*: 0F0 already ran at column 0"),
        ("(0F0;1F0)OVERLAP_F_B 1B0 0B0", "waits for 0F0 of rank 0 .column 0."),
    ],
)
def test_faults_on_one_rank_are_named(rows: str, match: str) -> None:
    table = parse_rows(rows)
    message = problem_of(table)
    assert re.search(match, message), message
    assert_places_exist(message, table)
    assert verdict(table).problem != ""


def test_a_group_of_other_things_than_computations_is_refused() -> None:
    unshard = Action(0, K.UNSHARD)
    group = Action(-1, K.OVERLAP, None, (Action(0, K.FORWARD, 0), unshard))
    assert "only computations can be overlapped" in problem_of([[group, Action(0, K.FORWARD, 0)]])


def test_a_table_waits_for_every_send_or_for_none() -> None:
    rows = parse_rows(
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0WAIT_SEND_F0 0RECV_B1 0B1",
        "1RECV_F0 1F0 1RECV_F1 1F1 1B0 1SEND_B0 1B1 1SEND_B1",
    )
    message = problem_of(rows)
    assert "rank 0, column 3, action 0SEND_F1: no 0WAIT_SEND_F1 follows" in message
    del rows[0][6]
    assert problem_of(rows) == ""


# Planted deadlocks

CROSSED = parse_rows(  # each sends first, and then receives
    "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
    "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1",
)


def test_what_only_buffers_save_is_told_from_what_nothing_saves() -> None:
    message = problem_of(CROSSED)
    assert "deadlocks where sends wait for their receives, as NCCL's do" in message
    assert "rank 0, column 3, action 0SEND_F1 waits for 1RECV_F1 of rank 1 (column 4)" in message
    assert "rank 1, column 3, action 1SEND_B0 waits for 0RECV_B0 of rank 0 (column 4)" in message
    assert verdict(CROSSED).problem == "rendezvous"


def test_three_ranks_may_deadlock_although_every_two_agree() -> None:
    """Rank 0 receives late: each rank sends to the next before it receives from the one before."""
    table = table_of("LoopedBFS", 3, 2, 3, 1)
    rows = [[step.action for step in table.steps(rank)] for rank in range(3)]
    for m in range(3):
        rows[0].remove(receive := Action(3, K.RECEIVE_FORWARD, m))
        rows[0].insert(rows[0].index(Action(3, K.FORWARD, m)), receive)
    message = problem_of(rows)
    assert "as NCCL's do" in message
    assert "waits for 1RECV_F2 of rank 1" in message
    assert "waits for 2RECV_F1 of rank 2" in message
    assert "waits for 3RECV_F0 of rank 0" in message
    assert_places_exist(message, rows)
    assert verdict(rows).problem == "rendezvous"


def test_a_wait_for_a_send_may_close_a_circle() -> None:
    """Rank 0 waits for its send before it computes what rank 1 needs to come to the receive."""
    rows = parse_rows(
        "0F0 0SEND_F0 0F1 0SEND_F1 0WAIT_SEND_F0 0WAIT_SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
        "1RECV_F0 1F0 1B0 1SEND_B0 1WAIT_SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1 1WAIT_SEND_B1",
    )
    assert verdict(rows).problem == "rendezvous"
    assert "as NCCL's do" in problem_of(rows)


def test_a_circle_of_thousands_is_told_in_few_words() -> None:
    size = 5000
    rows = parse_rows(*(f"{r}F0 {r + size}F0 {r + size}B0 {r}B0" for r in range(size)))
    assert problem_of(rows) == ""
    rows[0][:2] = rows[0][1::-1]
    message = problem_of(rows)
    assert "rank 0, column 0, action 5000F0 waits for 4999F0 of rank 4999 (column 0)" in message
    assert "; and 4992 more ranks of the circle" in message
    assert len(message) < 1000
    assert_places_exist(message, rows)
