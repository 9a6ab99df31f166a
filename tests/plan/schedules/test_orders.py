"""Orders: identical to torch's and to the slow oracle; what the schedules beyond torch promise."""

from __future__ import annotations

import time
import tracemalloc
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfpp import _core
from hfpp.errors import PipelineConfigError
from hfpp.plan.schedules import (
    SCHEDULES,
    check_microbatches,
    compute_table,
    forward_table,
    rank_actions,
)
from hfpp.plan.schedules.actions import ScheduleTable
from tests.plan.schedules.test_named import sizes, table_of, texts
from tests.reference import orders, unit_time
from tests.reference.torch_orders import TORCH_NAMES, torch_order


def shapes(names: tuple[str, ...] = TORCH_NAMES, most: int = 150) -> list[dict[str, Any]]:
    """Shapes of all schedules that one rank runs in at most `most` forwards or so."""
    found = []
    for name, pp_size in product(names, (1, 2, 3, 4, 5, 7, 8, 12)):
        fixed = SCHEDULES[name].stages_per_rank
        for per_rank, n in product(
            (fixed,) if fixed else (1, 2, 3, 5), (1, 2, 3, 4, 8, 10, 12, 15, 16, 24, 32)
        ):
            try:
                check_microbatches(
                    SCHEDULES[name],
                    pp_size=pp_size,
                    num_stages=pp_size * per_rank,
                    n_microbatches=n,
                )
            except PipelineConfigError:
                continue
            size = {"pp_size": pp_size, "stages_per_rank": per_rank, "n_microbatches": n}
            if pp_size * per_rank * n <= most:
                found.append({"name": name, **size})
    return found


def oracle_table(
    name: str, pp_size: int, stages_per_rank: int, n_microbatches: int
) -> ScheduleTable:
    rows = (
        orders.rank_actions(
            name,
            rank=rank,
            pp_size=pp_size,
            stages_per_rank=stages_per_rank,
            n_microbatches=n_microbatches,
        )
        for rank in range(pp_size)
    )
    return ScheduleTable.from_rows(name, rows)


def torch_runs(**size: Any) -> list[list[str]]:
    """What torch runs, as far as it shows it."""
    theirs = torch_order(**size)
    if size["name"] == "1F1B":
        # torch's picture of 1F1B (nothing runs from it) loses the last rank's first forward. What
        # torch runs is recorded over real processes in tests/runtime/test_build_schedule.py.
        last, n = size["pp_size"] - 1, size["n_microbatches"]
        theirs[-1] = [f"{last}{kind}{m}" for m in range(n) for kind in "FB"]
    return theirs


def test_orders_are_torchs_over_the_grid() -> None:
    grid = shapes()
    assert len(grid) >= 200
    assert {size["name"] for size in grid} == set(TORCH_NAMES)
    assert [size for size in grid if texts(table_of(**size)) != torch_runs(**size)] == []


@given(sizes(max_pp=12, max_microbatches=40).filter(lambda size: size["name"] != "VLimited"))
def test_orders_are_the_oracles(size: dict[str, Any]) -> None:
    assert table_of(**size) == oracle_table(**size)


@given(size=sizes(max_pp=12, max_microbatches=40), data=st.data())
def test_one_rank_alone_has_its_row(size: dict[str, Any], data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, size["pp_size"] - 1))
    name = size.pop("name")
    assert rank_actions(SCHEDULES[name], rank, **size) == table_of(name, **size).row(rank)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_rank_among_ten_thousand_costs_its_own_actions(name: str) -> None:
    n = {"1F1B": 10_000, "DualPipeV": 20_000}.get(name, 4)
    per_rank = SCHEDULES[name].stages_per_rank or 2
    sizes_ = {"pp_size": 10_000, "stages_per_rank": per_rank, "n_microbatches": n}
    started = time.perf_counter()
    for rank in (0, 4_999, 9_999):
        codes = _core.Schedule.codes_of_order(name=name, rank=rank, **sizes_)
        assert 2 * n * per_rank <= len(codes) <= 3 * n * per_rank
    assert time.perf_counter() - started < 1  # some ms: all ranks are 10,000 times as much


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_out_of_range_is_an_error(rank: int) -> None:
    with pytest.raises(PipelineConfigError, match=rf"rank \({rank}\)"):
        rank_actions(SCHEDULES["GPipe"], rank, pp_size=4, n_microbatches=4)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize(
    ("pp_size", "n"),
    [(2**20, 2**21), (2**27, 2**28 - 1), (1, 2**62), (2**62, 2**63 - 1), (2**28, 2**70)],
)
def test_absurd_sizes_are_errors_before_memory_is_taken(name: str, pp_size: int, n: int) -> None:
    n -= n % max(1, pp_size)  # whole rounds
    tracemalloc.start()
    with pytest.raises((PipelineConfigError, OverflowError)):
        compute_table(SCHEDULES[name], pp_size=pp_size, n_microbatches=max(n, 1))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


# Beyond torch: F, I and W take one unit each, of a whole stage (ZBH2) or of one of the rank's two


def one_f_one_b(pp_size: int, n: int) -> unit_time.Run:
    return unit_time.run(compute_table(SCHEDULES["1F1B"], pp_size=pp_size, n_microbatches=n))


@pytest.mark.parametrize("pp_size", range(1, 9))
def test_zb_h2_has_no_bubble_within_a_rank_and_the_activations_of_two_ways(pp_size: int) -> None:
    for n in (1, 2, pp_size, 2 * pp_size - 1, 2 * pp_size, 5 * pp_size + 1):
        table = compute_table(SCHEDULES["ZBH2"], pp_size=pp_size, n_microbatches=n)
        run = unit_time.run(table)
        assert run.peak == [min(n, 2 * pp_size - 1)] * pp_size
        if n >= 2 * pp_size - 1:
            assert run.own_idle == [0] * pp_size
            assert run.idle == [pp_size - 1] * pp_size  # the way of the first forward
            assert one_f_one_b(pp_size, n).idle == [3 * (pp_size - 1)] * pp_size
            assert max(one_f_one_b(pp_size, n).peak) == pp_size


@pytest.mark.parametrize("pp_size", range(2, 10))
@pytest.mark.parametrize("name", ["VHalf", "VMin"])
def test_v_schedules_hold_half_and_a_third_of_the_activations(name: str, pp_size: int) -> None:
    # Two of these stages make one of 1F1B's: so do their activations and their times.
    most = {"VHalf": pp_size // 2 + 1, "VMin": -(-(pp_size + 2) // 3)}[name]
    idle = {"VHalf": 7 * pp_size // 2 - 4, "VMin": 4 * pp_size - 5 + (pp_size % 3 == 0)}[name]
    for n in (1, 2, 3, pp_size, 2 * pp_size, 5 * pp_size + 1):
        run = unit_time.run(compute_table(SCHEDULES[name], pp_size=pp_size, n_microbatches=n))
        assert max(run.peak) == 2 * min(n, most)
        assert max(run.idle) <= 6 * (pp_size - 1)
        if n >= pp_size or name == "VMin":
            assert run.idle == [idle] * pp_size
        if n >= pp_size:
            reference = one_f_one_b(pp_size, n)
            assert max(reference.peak) == pp_size
            assert [2 * units for units in reference.idle] == [6 * (pp_size - 1)] * pp_size


@pytest.mark.parametrize("name", ["VHalf", "VMin"])
def test_no_other_waits_at_the_turns_hold_fewer_activations(name: str) -> None:
    for pp_size in range(2, 7):
        hops, chosen = orders.HOPS[name](pp_size)
        peaks = {}
        for waits in product(range(6), repeat=3):
            block = orders.building_block(pp_size, hops, waits)
            if block is not None:
                rows = [orders.repeated(block, rank, 3 * pp_size) for rank in range(pp_size)]
                peaks[waits] = max(map(unit_time.peak_live, rows))
        assert peaks[chosen] == min(peaks.values())
        assert len(set(peaks.values())) > 1


# Forwards only


@given(pp_size=st.integers(1, 5), rounds=st.integers(1, 3), v=st.booleans(), n=st.integers(1, 5))
def test_forward_tables_are_the_oracles(pp_size: int, rounds: int, v: bool, n: int) -> None:
    ranks = [*range(pp_size), *reversed(range(pp_size))] if v else [*range(pp_size)] * rounds
    rows = [
        orders.forward_only([stage for stage, owner in enumerate(ranks) if owner == rank], n)
        for rank in range(pp_size)
    ]
    assert forward_table(ranks, n) == ScheduleTable.from_rows("forward only", rows)


@pytest.mark.parametrize(
    ("ranks", "n", "match"),
    [
        ([], 1, "num_stages"),
        ([0, 1], 0, "n_microbatches"),
        ([0, -1], 1, "rank"),
        ([3], 1, "rank"),
        ([2**63 - 1], 1, "rank"),
    ],
)
def test_impossible_forward_tables_are_errors(ranks: list[int], n: int, match: str) -> None:
    with pytest.raises(PipelineConfigError, match=match):
        forward_table(ranks, n)
