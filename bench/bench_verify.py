"""The verifier: tables of 10,000 ranks, and the same proof in Python and torch's own check."""

import sys
from collections.abc import Callable
from pathlib import Path

import measure
from measure import Target, ratio, take_turns
from torch.distributed.pipelining import schedules as torch_schedules

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hfpp.errors import PipelineConfigError
from hfpp.plan.schedules import SCHEDULES, compute_table
from hfpp.plan.schedules.actions import ScheduleTable
from hfpp.plan.schedules.lowering import lower
from hfpp.plan.schedules.verifier import verify
from tests.reference.verify import verdict

LARGE = (  # schedule, ranks, stages per rank, microbatches
    ("GPipe", 10_000, 1, 64),
    ("Interleaved1F1B", 10_000, 2, 64),
    ("ZBVZeroBubble", 10_000, 2, 64),
    ("1F1B", 512, 1, 4096),
    ("DualPipeV", 64, 2, 4096),
)
SMALL = (("Interleaved1F1B", 8, 2, 32), ("Interleaved1F1B", 32, 2, 64))

NOTE = """\
Tables are lowered as torch 2.13 runs them: computations, sends and receives, parameters gathered \
and given back, gradients reduced. Making and lowering them is not in the times.

The verifier proves order, completeness, messages, deadlock under rendezvous and memory. The \
Python oracle proves the same by the definitions (tests/reference/verify.py). torch's \
`_validate_schedule` looks at the computations alone, for completeness and their order on a stage; \
`_simulate_comms_compute` finds deadlocks of buffered sends."""


def size_of(name: str, ranks: int, per_rank: int, n: int) -> str:
    stages = "" if per_rank == 1 else f" x {per_rank} stages"
    return f"{name}, {ranks:,} ranks{stages} x {n:,} microbatches"


def refused(table: ScheduleTable) -> str:
    """What the verifier says of a table that cannot run."""
    try:
        verify(table)
    except PipelineConfigError as error:
        return str(error)
    raise AssertionError("the table passes")


def with_a_deadlock(table: ScheduleTable) -> ScheduleTable:
    """The first rank receives its first gradient before it sends its last activation."""
    rows = [list(memoryview(table.native.codes(rank))) for rank in range(table.pp_size)]
    texts = [str(action) for action in table.row(0)]
    send = texts.index(f"0SEND_F{table.n_microbatches - 1}")
    receive = next(i for i, text in enumerate(texts) if text.startswith("0RECV_B"))
    first, last = sorted((send, receive))
    rows[0][first : last + 1] = [rows[0][last], *rows[0][first + 1 : last], rows[0][first]]
    return ScheduleTable(type(table.native).of_codes(table.name, rows))


def large_rows(targets: list[Target]) -> str:
    rows = []
    for shape in LARGE:
        name, ranks, per_rank, n = shape
        compute = compute_table(
            SCHEDULES[name], pp_size=ranks, stages_per_rank=per_rank, n_microbatches=n
        )
        table = lower(compute)
        times = take_turns(
            {
                "lowered": lambda t=table: verify(t),
                "computations": lambda t=compute: verify(t),
            },
            budget=3.0,
        )
        actions = table.native.num_actions
        rows.append(
            (
                size_of(*shape),
                f"{actions:,}",
                str(times["lowered"]),
                f"{times['lowered'].median / actions * 1e9:.0f} ns",
                str(times["computations"]),
            )
        )
        if ranks == 10_000:
            what, measured = f"verify {size_of(*shape)}", measure.seconds(times["lowered"].median)
            targets.append(Target(what, "under 2 s", measured, times["lowered"].median < 2))
    return measure.table(("table", "actions", "lowered", "per action", "computations only"), rows)


def deadlock_rows() -> str:
    name, ranks, per_rank, n = LARGE[0]
    compute = compute_table(SCHEDULES[name], pp_size=ranks, n_microbatches=n)
    table = with_a_deadlock(lower(compute))
    message = refused(table)
    assert "deadlocks" in message, message
    times = take_turns({"refused": lambda: refused(table)}, budget=2.0)
    rows = [(size_of(name, ranks, per_rank, n), str(times["refused"]), message)]
    return measure.table(("table with one fault", "refused in", "message"), rows)


def torch_rows(table: ScheduleTable) -> dict[int, list[torch_schedules._Action]]:
    return {
        rank: [torch_schedules._Action.from_str(str(action)) for action in row]
        for rank, row in enumerate(table.rows)
    }


def small_rows(targets: list[Target]) -> str:
    rows = []
    for shape in SMALL:
        name, ranks, per_rank, n = shape
        compute = compute_table(
            SCHEDULES[name], pp_size=ranks, stages_per_rank=per_rank, n_microbatches=n
        )
        table = lower(compute)
        messages = torch_rows(lower(compute, unshard=False, reduce_grad=False))
        computations, home = torch_rows(compute), dict(enumerate(table.stage_to_rank))
        assert torch_schedules._validate_schedule(computations, ranks, len(home), n) == home
        assert verdict(table.rows).problem == ""
        competitors: dict[str, Callable[[], object]] = {
            "native": lambda t=table: verify(t),
            "oracle": lambda t=table: verdict(t.rows),
            "validate": lambda c=computations, r=ranks, h=home, m=n: (
                torch_schedules._validate_schedule(c, r, len(h), m)
            ),
            "simulate": lambda m=messages, h=home: torch_schedules._simulate_comms_compute(
                m, h.__getitem__, len(h)
            ),
        }
        times = take_turns(competitors, budget=1.0)
        faster = {other: ratio(times[other], times["native"]) for other in competitors}
        rows.append(
            (
                size_of(*shape),
                *map(str, times.values()),
                f"{faster['oracle']:,.0f}x",
                f"{faster['validate']:,.0f}x",
                f"{faster['simulate']:,.0f}x",
            )
        )
        if shape == SMALL[-1]:
            both = times["validate"].median + times["simulate"].median
            measured = f"{both / times['native'].median:,.0f} times"
            what = f"both checks of torch, {size_of(*shape)}"
            met = both >= 100 * times["native"].median
            targets.append(Target(what, "100 times torch's speed", measured, met))
    header = ("table", "native", "Python oracle", "torch validates", "torch simulates")
    return measure.table((*header, "oracle / native", "validates", "simulates"), rows)


def main() -> int:
    targets: list[Target] = []
    groups = [
        ("Large tables", large_rows(targets)),
        ("A table that deadlocks", deadlock_rows()),
        ("The same proof in Python, and torch's checks", small_rows(targets)),
    ]
    sections = [
        "# The verifier, measured",
        measure.provenance(["hfpp", "torch"]),
        NOTE,
        measure.targets_table(targets),
        *(f"## {title}\n\n{body}" for title, body in groups),
    ]
    return measure.report("verify", "\n\n".join(sections), targets)


if __name__ == "__main__":
    sys.exit(main())
