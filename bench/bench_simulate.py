"""The simulator against torch's own, and at sizes that torch's does not reach."""

import sys

import measure
from measure import Target, ratio, seconds, take_turns
from torch.distributed.pipelining import schedules

from hfpp.plan.schedules import SCHEDULES, compute_table
from hfpp.plan.schedules.actions import ScheduleTable
from hfpp.plan.schedules.lock_step import lock_step
from hfpp.plan.schedules.lowering import lower
from hfpp.plan.schedules.simulator import Link, simulate, uniform_costs

NOTE = """\
Medians, and in brackets the 10th and 90th percentiles. The competitors of a row take turns in one
process; their results are compared before they are timed. torch's simulator (private, used by its
tests) goes step by step, every action one step: the lock step is the same, action for action. The
simulation in time knows costs, links and memory, which torch's does not."""

STAGES_PER_RANK = 2


def table_of(name: str, pp_size: int, n: int) -> ScheduleTable:
    per_rank = SCHEDULES[name].stages_per_rank or STAGES_PER_RANK
    return compute_table(
        SCHEDULES[name], pp_size=pp_size, n_microbatches=n, stages_per_rank=per_rank
    )


def torch_rows(targets: list[Target]) -> str:
    rows = []
    for name, pp_size, n in (
        ("Interleaved1F1B", 16, 64),
        ("ZBVZeroBubble", 16, 64),
        ("Interleaved1F1B", 64, 256),
    ):
        table = table_of(name, pp_size, n)
        costs = uniform_costs(table.num_stages)
        lowered = lower(table, unshard=False, reduce_grad=False)
        actions = {
            rank: [schedules._Action.from_str(str(action)) for action in lowered.row(rank)]
            for rank in range(pp_size)
        }
        ranks = table.stage_to_rank

        def torch_steps(actions=actions, ranks=ranks):
            return schedules._simulate_comms_compute(actions, ranks.__getitem__, len(ranks))

        expected, found = torch_steps(), lock_step(lowered)
        for rank in range(pp_size):
            placed = {str(a): column for column, a in enumerate(expected[rank]) if a is not None}
            assert placed == {str(a): step for a, step in found.row(rank)}
        del expected, found
        times = take_turns(
            {
                "lock": lambda t=lowered: lock_step(t),
                "time": lambda t=table, c=costs: simulate(t, c, link=Link(latency=0.1)),
                "torch": torch_steps,
            }
        )
        faster = ratio(times["torch"], times["lock"])
        in_time = ratio(times["torch"], times["time"])
        per_rank = table.num_stages // pp_size
        what = f"{name}, {pp_size} x {n} x {per_rank}"
        rows.append(
            (
                what,
                f"{lowered.native.num_actions:,}",
                str(times["lock"]),
                str(times["time"]),
                str(times["torch"]),
                f"{faster:,.0f}x",
                f"{in_time:,.0f}x",
            )
        )
        if pp_size == 64:
            promised = "1,000 times torch's speed"
            targets.append(
                Target(f"lock step, {what}", promised, f"{faster:,.0f} times", faster >= 1000)
            )
            met = in_time >= 1000
            targets.append(Target(f"in time, {what}", promised, f"{in_time:,.0f} times", met))
    header = (
        "ranks x microbatches x stages",
        "actions",
        "lock step",
        "in time",
        "torch",
        "torch / lock step",
        "torch / in time",
    )
    return measure.table(header, rows)


def large_rows(targets: list[Target]) -> str:
    rows = []
    for name, pp_size, n in (
        ("1F1B", 256, 1024),
        ("Interleaved1F1B", 256, 1024),
        ("GPipe", 10_000, 64),
        ("Interleaved1F1B", 10_000, 64),
    ):
        table = table_of(name, pp_size, n)
        costs = uniform_costs(table.num_stages)
        times = take_turns(
            {
                "beside": lambda t=table, c=costs: simulate(t, c, link=Link(latency=0.1)),
                "within": lambda t=table, c=costs: simulate(
                    t, c, link=Link(latency=0.1), overlap=False
                ),
            },
            budget=2.0,
        )
        what = f"{name}, {pp_size:,} x {n} x {table.num_stages // pp_size}"
        actions = table.native.num_actions
        rows.append(
            (
                what,
                f"{actions:,}",
                str(times["beside"]),
                str(times["within"]),
                seconds(times["beside"].median / actions),
            )
        )
        if pp_size == 10_000:
            median = times["beside"].median
            targets.append(Target(what, "under 2 s", seconds(median), median < 2))
    header = ("ranks x microbatches x stages", "actions", "overlap", "no overlap", "per action")
    return measure.table(header, rows)


def main() -> int:
    bytearray(1 << 24)  # from the first large block that is freed, glibc keeps memory of that size
    targets: list[Target] = []
    groups = [
        ("Against torch's simulator", torch_rows(targets)),
        ("Large pipelines", large_rows(targets)),
    ]
    sections = [
        "# The simulator, measured",
        measure.provenance(["hfpp", "torch", "pybind11"]),
        NOTE,
        measure.targets_table(targets),
        *(f"## {title}\n\n{body}" for title, body in groups),
    ]
    return measure.report("simulate", "\n\n".join(sections), targets)


if __name__ == "__main__":
    sys.exit(main())
