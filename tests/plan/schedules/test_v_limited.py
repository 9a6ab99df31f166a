"""V schedules under a limit on activations: kept, of less idle time the higher it is."""

from __future__ import annotations

import re
from functools import cache

import pytest

from hfpp import _core
from hfpp.errors import PipelineConfigError
from hfpp.plan.schedules import (
    compute_table,
    find_schedule,
    least_activation_limit,
    rank_actions,
)
from hfpp.plan.schedules.actions import ScheduleTable
from hfpp.plan.schedules.lowering import lower
from hfpp.plan.schedules.simulator import simulate, uniform_costs
from hfpp.plan.schedules.verifier import peak_activations, verify
from tests.reference import v_limited

SIZES = [(pp, n) for pp in range(2, 17) for n in sorted({1, pp // 2, pp, 2 * pp + 1, 4 * pp})]


@cache
def table_of(name: str, pp_size: int, n: int) -> ScheduleTable:
    return compute_table(find_schedule(name), pp_size=pp_size, n_microbatches=n)


def idle(name: str, pp_size: int, n: int) -> float:
    """Units that every rank idles where F = I = W is one."""
    run = simulate(table_of(name, pp_size, n), uniform_costs(2 * pp_size))
    return run.step_time - 6 * n


def limits(pp_size: int, n: int) -> range:
    return range(least_activation_limit(pp_size=pp_size, n_microbatches=n), 2 * pp_size + 1)


@pytest.mark.parametrize(("pp_size", "n"), SIZES)
def test_every_limit_is_kept_and_a_higher_one_idles_no_more(pp_size: int, n: int) -> None:
    times = []
    for limit in limits(pp_size, n):
        table = table_of(f"VLimited-{limit}", pp_size, n)
        verify(table, activation_limit=limit)
        if limit % 3 == 0:
            verify(lower(table))
        assert table.name == f"VLimited-{limit}"
        times.append(idle(table.name, pp_size, n))
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(("pp_size", "n"), SIZES)
def test_none_idles_more_than_the_schedules_of_fixed_memory(pp_size: int, n: int) -> None:
    for name in ("VMin", "VHalf", "ZBVZeroBubble"):
        limit = max(peak_activations(table_of(name, pp_size, n)))
        assert idle(f"VLimited-{limit}", pp_size, n) <= idle(name, pp_size, n)
    most = idle(f"VLimited-{2 * pp_size}", pp_size, n)
    if n >= pp_size:
        assert most == pp_size - 1  # no order idles less: the way of the first forward
    assert idle("VLimited", pp_size, n) == most
    assert idle(f"VLimited-{2 * pp_size + 9}", pp_size, n) == most


@pytest.mark.parametrize("pp_size", [8, 12, 16])
def test_at_half_the_memory_a_fifth_less_idles_than_in_v_half(pp_size: int) -> None:
    n = 4 * pp_size
    limit = max(peak_activations(table_of("VHalf", pp_size, n)))
    assert limit == pp_size + 2
    assert idle(f"VLimited-{limit}", pp_size, n) <= 0.8 * idle("VHalf", pp_size, n)
    # Between the papers' limits every few activations buy less idle time.
    steps = [idle(f"VLimited-{more}", pp_size, n) for more in range(limit, 2 * pp_size + 1, 2)]
    assert steps == sorted(set(steps), reverse=True)


@pytest.mark.parametrize(("pp_size", "n"), [(1, 2), (2, 3), (3, 1), (3, 4), (4, 5)])
def test_tables_are_the_oracles(pp_size: int, n: int) -> None:
    for limit in limits(pp_size, n):
        rows = v_limited.search(pp_size, n, limit)
        name = f"VLimited-{limit}"
        assert table_of(name, pp_size, n) == ScheduleTable.from_rows(name, rows)


def test_one_rank_alone_has_its_row() -> None:
    spec = find_schedule("VLimited-7")
    for rank in range(5):
        row = rank_actions(spec, rank, pp_size=5, n_microbatches=9)
        assert row == table_of("VLimited-7", 5, 9).row(rank)


@pytest.mark.parametrize(
    ("limit", "fixed"), [(88, "VMin"), (131, "VMin"), (132, "VHalf"), (260, "ZBVZeroBubble")]
)
def test_what_is_too_large_to_search_is_the_schedule_of_the_most_memory(
    limit: int, fixed: str
) -> None:
    found = table_of(f"VLimited-{limit}", 130, 100)
    verify(found, activation_limit=limit)
    expected = table_of(fixed, 130, 100)
    for rank in (0, 1, 64, 129):
        assert found.row(rank) == expected.row(rank)


# Names


@pytest.mark.parametrize("spelling", ["VLimited-12", "vlimited12", "v_limited_12", "VLIMITED 12"])
def test_the_limit_is_part_of_the_name(spelling: str) -> None:
    spec = find_schedule(spelling)
    assert (spec.name, spec.activation_limit) == ("VLimited-12", 12)
    assert find_schedule(spec.name) == spec


@pytest.mark.parametrize(("pp_size", "n"), [(1, 1), (4, 8), (8, 16), (9, 2), (500, 400)])
def test_too_low_a_limit_names_the_lowest_that_works(pp_size: int, n: int) -> None:
    sizes = {"pp_size": pp_size, "n_microbatches": n}
    least = least_activation_limit(**sizes)
    for limit in (0, least - 1):
        with pytest.raises(PipelineConfigError, match=rf"VLimited-{limit} may hold") as caught:
            compute_table(find_schedule(f"VLimited-{limit}"), **sizes)
        remedy = re.search(r"use '(.*)'$", str(caught.value))
        assert remedy is not None
        assert remedy[1] == f"VLimited-{least}"
        verify(compute_table(find_schedule(remedy[1]), **sizes), activation_limit=least)
        with pytest.raises(PipelineConfigError, match=rf"activation_limit={least}"):
            _core.Schedule.of_order(
                name="VLimited", stages_per_rank=2, activation_limit=limit, **sizes
            )


def test_other_orders_take_no_limit() -> None:
    with pytest.raises(PipelineConfigError, match=r"activation_limit \(8\) is for VLimited"):
        _core.Schedule.of_order(
            name="VHalf", pp_size=4, stages_per_rank=2, n_microbatches=4, activation_limit=8
        )
