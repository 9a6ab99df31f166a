"""What the verifier says of a table is what happens when real ranks run it over gloo."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from random import Random
from typing import Any

import pytest

from hfpp.errors import PipelineConfigError
from hfpp.plan.schedules import SCHEDULES, compute_table
from hfpp.plan.schedules.actions import ScheduleTable, parse_action
from hfpp.plan.schedules.lowering import lower
from hfpp.plan.schedules.verifier import verify
from hfpp.runtime import torch_compat as compat
from tests.plan.schedules.mutants import mutant
from tests.ranks import RankError, run_ranks
from tests.runtime.plain_stages import (
    SEQ,
    assert_gradients,
    batch,
    local_stages,
    mean_loss,
    reference,
)

MICROBATCH = 2
DEADLINE_S = 6.0
ACCEPTED, DEADLOCKED = 10, 6
Texts = list[list[str]]  # of the actions of all ranks

CROSSED: Texts = [
    ["0F0", "0SEND_F0", "0F1", "0SEND_F1", "0RECV_B0", "0B0", "0RECV_B1", "0B1"],
    ["1RECV_F0", "1F0", "1B0", "1SEND_B0", "1RECV_F1", "1F1", "1B1", "1SEND_B1"],
]
"""Each rank's second message goes out before it takes the other's in: buffers save it."""


def table_of(texts: Texts) -> ScheduleTable:
    return ScheduleTable.from_rows("table", [list(map(parse_action, row)) for row in texts])


def run_tables(rank: int, world_size: int, tables: list[Texts]) -> int:
    """Runs each table once, unverified, and compares the gradients; how many there were."""
    count = 0
    for texts in tables:
        table = table_of(texts)
        n = table.n_microbatches
        ids, target, shift = batch(n * MICROBATCH, seed=n)
        stages = local_stages(
            list(table.stages_by_rank[rank]), table.num_stages, static=(MICROBATCH, SEQ)
        )
        schedule: Any = compat.runtime_class()(stages, n, loss_fn=mean_loss, scale_grads=False)  # type: ignore[call-arg]
        compat.load_table(schedule, table, partial(table_of, texts))
        has_first, has_last = stages[0].is_first, stages[-1].is_last
        schedule.step(
            *([ids] if has_first else []), target=target if has_last else None, shift=shift
        )
        expected = reference([(ids, target, shift)], n).gradients
        count += assert_gradients(stages, expected)
    return count


@cache
def bases() -> list[ScheduleTable]:
    sizes = [(2, 3), (3, 4), (4, 5), (2, 4)]
    tables = [
        compute_table(SCHEDULES[name], pp_size=pp_size, n_microbatches=n)
        for pp_size, n in sizes
        for name in ("GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble")
        if pp_size * (SCHEDULES[name].stages_per_rank or 2) <= 8
        if "Interleaved" not in name or n % max(1, n // pp_size) == 0
    ]
    return [lower(table, unshard=unshard) for table in tables for unshard in (False, True)]


def problem_of(table: ScheduleTable) -> str:
    try:
        verify(table)
    except PipelineConfigError as error:
        return str(error)
    return ""


def mutants(wanted: Callable[[str], bool], count: int) -> list[tuple[int, Texts]]:
    """Ranks and rows of changed tables of which the verifier says what is wanted."""
    found: list[tuple[int, Texts]] = []
    for seed, base in enumerate(bases() * 500):
        _, rows = mutant(base, Random(seed))
        table = ScheduleTable.from_rows("table", rows)
        if table.rows != base.rows and wanted(problem_of(table)):
            found.append((table.pp_size, [list(map(str, row)) for row in rows]))
            if len(found) == count:
                return found
    raise AssertionError(f"only {len(found)} of {count}")


def test_accepted_mutants_run_to_their_end_with_the_right_gradients() -> None:
    found = mutants(lambda problem: problem == "", ACCEPTED)
    for size in sorted({size for size, _ in found}):
        counts = run_ranks(run_tables, size, args=([texts for s, texts in found if s == size],))
        assert all(counts)


def test_deadlocks_hang_until_the_deadline() -> None:
    found = mutants(lambda problem: "deadlocks: " in problem, DEADLOCKED)

    def hang(job: tuple[int, Texts]) -> None:
        size, texts = job
        with pytest.raises(RankError, match=f"still running after {DEADLINE_S:g} s") as caught:
            run_ranks(run_tables, size, args=([texts],), timeout_s=DEADLINE_S)
        stacks = re.findall(r'first\):\n +File "(.+)", line (\d+)', str(caught.value))
        assert any(".wait(" in linecache.getline(file, int(line)) for file, line in stacks)

    with ThreadPoolExecutor(DEADLOCKED) as together:
        list(together.map(hang, found))


def test_messages_in_another_order_bring_wrong_values() -> None:
    texts = [list(row) for row in CROSSED]
    texts[1] = ["1RECV_F1", "1RECV_F0", "1F0", "1B0", "1SEND_B0", "1F1", "1B1", "1SEND_B1"]
    assert "ranks 0 and 1 post their messages in different orders" in problem_of(table_of(texts))
    with pytest.raises(RankError, match="is off by"):
        run_ranks(run_tables, 2, args=([texts],))


def test_a_deadlock_that_only_unbuffered_sends_have_runs_over_gloo() -> None:
    assert "deadlocks where sends wait for their receives" in problem_of(table_of(CROSSED))
    assert all(run_ranks(run_tables, 2, args=([CROSSED],)))
