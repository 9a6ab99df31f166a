"""Making a schedule object: hfpp, which hands torch native tables, against torch itself."""

import gc
import logging
import sys
import tracemalloc
from functools import partial
from typing import Any, NamedTuple

import measure
import torch
from forks import Cost, in_a_fork, least_to_most
from measure import Target, ratio
from torch.distributed.pipelining import schedules as torch_schedules

from hfpp.plan.placement import Placement
from hfpp.plan.schedules import SCHEDULES, compute_table
from hfpp.plan.schedules.lowering import lower
from hfpp.runtime.build_schedule import build_pipeline_schedule

STAGES_PER_RANK = 2
MB = 1e6
NAMES = tuple(
    name
    for name, spec in SCHEDULES.items()
    if not spec.single_stage and hasattr(torch_schedules, f"Schedule{name}")
)


class Size(NamedTuple):
    """A pipeline, how often torch's constructor is run for it, and what was promised."""

    pp_size: int
    n_microbatches: int
    rounds: int
    promised: int

    def __str__(self) -> str:
        return f"{self.pp_size} ranks x {self.n_microbatches} microbatches"


SIZES = (Size(16, 64, 5, 1), Size(64, 256, 3, 20), Size(128, 512, 1, 100))
OUR_ROUNDS = 5
ALONE = (1_024, 2_048)  # ranks and microbatches of a pipeline that torch is not asked for
NOTE = f"""\
CPU time of one thread: medians, and in brackets the least and the most. Every call runs in a fork
of its own, of a process that has imported torch and hfpp. hfpp's side is all of
`build_pipeline_schedule`, torch's the constructor of its class alone, both over {STAGES_PER_RANK}
stages that hold nothing but their place. Whether both run the same actions is a test
(`tests/runtime/test_hand_over.py`). `peak` is the largest growth of the process's memory during
the call, `Python` the largest that `tracemalloc` saw in another one (which slows torch down too
much for the largest size), with the bytes of the native tables added on hfpp's side."""


class Stage:
    """The place of a stage: all that both sides look at."""

    dw_builder = group = None
    device = torch.device("cpu")

    def __init__(self, index: int, num_stages: int, pp_size: int) -> None:
        self.stage_index, self.num_stages = index, num_stages
        self.group_rank, self.group_size = 0, pp_size
        self.is_first, self.is_last = index == 0, index == num_stages - 1
        self.submod = torch.nn.Identity()
        self.stage_index_to_group_rank = {stage: stage % pp_size for stage in range(num_stages)}


def stages_of(name: str, pp_size: int) -> list[Any]:
    num_stages = pp_size * STAGES_PER_RANK
    v = SCHEDULES[name].placement is Placement.V
    return [Stage(index, num_stages, pp_size) for index in (0, num_stages - 1 if v else pp_size)]


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).sum()


def ours(name: str, n: int, stages: list[Any]) -> Any:
    return build_pipeline_schedule(None, name, 1, n, stages, loss)


def torchs(name: str, n: int, stages: list[Any]) -> Any:
    return torch_schedules.get_schedule_class(name)(stages, n, loss_fn=loss)


def traced(build: Any, name: str, n: int, stages: list[Any]) -> int:
    """The most bytes of Python objects during the call."""
    gc.collect()
    tracemalloc.start()
    build(name, n, stages)
    return tracemalloc.get_traced_memory()[1]


def native_bytes(name: str, size: Size) -> int:
    """Of the tables that building makes: the computations, and with all that torch runs besides."""
    table = compute_table(
        SCHEDULES[name],
        pp_size=size.pp_size,
        n_microbatches=size.n_microbatches,
        stages_per_rank=STAGES_PER_RANK,
    )
    return table.native.nbytes + lower(table).native.nbytes


def traced_by(name: str, size: Size) -> tuple[float, float]:
    """The most bytes of hfpp and of torch: Python objects, and native tables."""
    made = partial(stages_of, name, size.pp_size)
    mine, theirs = (
        in_a_fork(made, partial(traced, build, name, size.n_microbatches)).facts
        for build in (ours, torchs)
    )
    return mine + native_bytes(name, size), theirs


def cost_of(build: Any, name: str, size: Size, rounds: int) -> list[Cost]:
    made = partial(stages_of, name, size.pp_size)
    return [
        in_a_fork(made, lambda stages: bool(build(name, size.n_microbatches, stages)))
        for _ in range(rounds)
    ]


def row_of(name: str, size: Size, targets: list[Target]) -> tuple[str, ...]:
    mine = cost_of(ours, name, size, OUR_ROUNDS)
    theirs = cost_of(torchs, name, size, size.rounds)
    times = [least_to_most([cost.cpu for cost in costs]) for costs in (mine, theirs)]
    peaks = [least_to_most([cost.extra for cost in costs]).median for costs in (mine, theirs)]
    python = traced_by(name, size) if size.rounds > 1 else None
    faster = ratio(times[1], times[0])
    if size.promised > 1:
        promised = f"{size.promised} times torch's speed"
        met = faster >= size.promised
        targets.append(Target(f"{name}, {size}", promised, f"{faster:,.0f} times", met))
        less = peaks[0] <= peaks[1] and (python is None or python[0] <= python[1])
        amount = f"{peaks[0] / MB:.1f} of {peaks[1] / MB:.0f} MB"
        targets.append(Target(f"{name}, {size}", "no more memory than torch", amount, less))
    return (
        f"{name}, {size}",
        str(times[0]),
        str(times[1]),
        f"{faster:,.0f}x",
        f"{peaks[0] / MB:.1f} / {peaks[1] / MB:.0f} MB",
        f"{python[0] / MB:.1f} / {python[1] / MB:.0f} MB" if python else "",
    )


def alone_row(name: str) -> tuple[str, ...]:
    size = Size(*ALONE, rounds=0, promised=0)
    costs = cost_of(ours, name, size, 3)
    time = least_to_most([cost.cpu for cost in costs])
    peak = least_to_most([cost.extra for cost in costs]).median
    return (f"{name}, {size}", str(time), f"{peak / MB:.0f} MB")


def main() -> int:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    targets: list[Target] = []
    header = ("schedule", "hfpp", "torch", "faster", "peak, hfpp / torch", "Python, hfpp / torch")
    rows = []
    for size in SIZES:
        for name in NAMES:
            rows.append(row_of(name, size, targets))
            print(f"{rows[-1][0]}: {rows[-1][3]}", file=sys.stderr)
    alone = [alone_row(name) for name in NAMES]
    sections = [
        "# Schedule objects, measured",
        measure.provenance(["hfpp", "torch"]),
        NOTE,
        measure.targets_table(targets),
        "## One rank's schedule object\n\n" + measure.table(header, rows),
        "## hfpp alone\n\n" + measure.table(("schedule", "hfpp", "peak"), alone),
    ]
    return measure.report("constructor", "\n\n".join(sections), targets)


if __name__ == "__main__":
    sys.exit(main())
