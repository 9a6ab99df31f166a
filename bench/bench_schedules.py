"""Schedules: native tables against torch's own construction and against plain Python."""

import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import measure
from measure import Target, Timing, ratio, seconds, take_turns

sys.path.insert(0, str(measure.ROOT))  # the slow oracle and torch's side live with the tests

from torch.distributed.pipelining import schedules as torch_schedules

from hfpp import _core
from hfpp.plan.schedules import SCHEDULES, compute_table
from hfpp.plan.schedules.lowering import lower
from tests.reference import lowering as slow_lowering
from tests.reference import orders as slow_orders
from tests.reference.torch_orders import LOWERING, torch_schedule

NAMES = ("Interleaved1F1B", "InterleavedZeroBubble")
CASES = (  # schedule, ranks, microbatches, rounds: torch's side takes up to minutes
    (NAMES[0], 16, 64, 5),
    (NAMES[0], 64, 256, 3),
    (NAMES[1], 64, 256, 3),
    (NAMES[0], 128, 512, 2),
)
RANKS = 10_000

NOTE = """\
Medians of a few rounds, and in brackets the least and the most; for one rank and for all 10,000
the 10th and 90th percentiles of many. Native: the computations of all ranks and all that torch adds
to them (parameters gathered and freed, reductions, messages, waits where this version of torch has
them). torch: the constructor of its schedule, which also validates the table, over stages that hold
nothing. Python: the oracle of the tests, whose lowering, slower than torch's, is timed at the
smallest size only. Native calls and slow ones take turns; their results are compared first."""


def rounds_of(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Times calls of seconds or minutes in turns, a few times each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {
        name: Timing(statistics.median(values), min(values), max(values), rounds)
        for name, values in times.items()
    }


def slow_rows(name: str, sizes: dict[str, int]) -> list[list[object]]:
    return [slow_orders.rank_actions(name, rank=rank, **sizes) for rank in range(sizes["pp_size"])]


def competitors(
    name: str, sizes: dict[str, int], with_slow_lowering: bool
) -> dict[str, Callable[[], object]]:
    spec = SCHEDULES[name]
    table = compute_table(spec, **sizes)
    calls = {
        "native": lambda: lower(compute_table(spec, **sizes), **LOWERING),
        "order": lambda: compute_table(spec, **sizes),
        "torch": lambda: torch_schedule(name, rank=0, **sizes),
        "python": lambda: slow_rows(name, sizes),
    }
    if with_slow_lowering:
        calls["lowering"] = lambda: slow_lowering.lower(table, **LOWERING)
    return calls


def whole_rows(targets: list[Target]) -> str:
    rows = []
    for name, ranks, microbatches, rounds in CASES:
        sizes = {"pp_size": ranks, "stages_per_rank": 2, "n_microbatches": microbatches}
        table = compute_table(SCHEDULES[name], **sizes)
        lowered = lower(table, **LOWERING)
        theirs = torch_schedule(name, rank=0, **sizes).pipeline_order_with_comms
        assert all(
            list(map(str, theirs[rank])) == list(map(str, lowered.row(rank)))
            for rank in (0, ranks // 2, ranks - 1)
        )
        assert list(table.row(ranks - 1)) == slow_rows(name, sizes)[-1]
        del theirs
        small = ranks == 16
        times = rounds_of(competitors(name, sizes, small), rounds)
        faster = ratio(times["torch"], times["native"])
        rows.append(
            (
                f"{name}, {ranks} x {microbatches} x 2",
                f"{lowered.native.num_actions:,}",
                str(times["order"]),
                str(times["native"]),
                str(times["torch"]),
                f"{faster:,.0f}x",
                str(times["python"]),
                f"{ratio(times['python'], times['order']):,.0f}x",
                str(times["lowering"]) if small else "",
            )
        )
        if not small:
            least = 20 if ranks == 64 else 100
            targets.append(
                Target(
                    f"{name}, {ranks} x {microbatches} x 2, lowered",
                    f"{least} times torch's speed",
                    f"{faster:,.0f} times",
                    faster >= least,
                )
            )
    header = (
        "schedule",
        "actions",
        "native order",
        "native order and lowering",
        "torch's constructor",
        "faster",
        "Python order",
        "native order faster",
        "Python lowering",
    )
    return measure.table(header, rows)


def one_rank_rows(targets: list[Target]) -> str:
    rows = []
    sizes = {"pp_size": RANKS, "stages_per_rank": 2, "n_microbatches": 64}
    rank = RANKS // 2
    stand_in = SimpleNamespace(
        n_local_stages=2, microbatches_per_round=64, pp_group_size=RANKS, _n_microbatches=64
    )
    for name in NAMES:
        calculate = torch_schedules.get_schedule_class(name)._calculate_single_rank_operations
        ours = _core.Schedule.codes_of_order(name=name, rank=rank, **sizes)
        assert len(ours) == sum(a is not None for a in calculate(stand_in, rank))
        times = take_turns(
            {
                "one": lambda n=name: _core.Schedule.codes_of_order(name=n, rank=rank, **sizes),
                "torch": lambda c=calculate: c(stand_in, rank),
                "python": lambda n=name: slow_orders.rank_actions(n, rank=rank, **sizes),
            }
        )
        every = take_turns(
            {
                "all": lambda n=name: compute_table(SCHEDULES[n], **sizes),
                "lowered": lambda n=name: lower(compute_table(SCHEDULES[n], **sizes), **LOWERING),
            }
        )
        rows.append(
            (
                name,
                str(times["one"]),
                str(times["torch"]),
                f"{ratio(times['torch'], times['one']):,.0f}x",
                str(times["python"]),
                f"{ratio(times['python'], times['one']):,.0f}x",
                str(every["all"]),
                str(every["lowered"]),
            )
        )
        targets.append(
            Target(
                f"{name}, all {RANKS:,} ranks, 64 microbatches, 2 stages each, lowered",
                "under 1 s",
                seconds(every["lowered"].median),
                every["lowered"].median < 1,
            )
        )
    header = (
        f"of {RANKS:,} ranks",
        "one rank, native",
        "torch",
        "faster",
        "Python",
        "faster",
        "all ranks, native",
        "all ranks, lowered",
    )
    return measure.table(header, rows)


def main() -> int:
    targets: list[Target] = []
    groups = [
        ("All ranks", whole_rows(targets)),
        (f"One rank of {RANKS:,}, and all of them", one_rank_rows(targets)),
    ]
    sections = [
        "# Schedules, measured",
        measure.provenance(["hfpp", "torch"]),
        NOTE,
        measure.targets_table(targets),
        *(f"## {title}\n\n{body}" for title, body in groups),
    ]
    return measure.report("schedules", "\n\n".join(sections), targets)


if __name__ == "__main__":
    sys.exit(main())
