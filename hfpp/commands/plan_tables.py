"""Plans as tables in the terminal."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING

from hfpp.plan.prediction import MemoryParts
from hfpp.plan.sizes import (
    bytes_as_text,
    count_as_text,
    parameters_as_text,
    seconds_as_text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.table import Table

    from hfpp.plan.model.shape import ModelShape
    from hfpp.plan.pipeline_plan import PipelinePlan
    from hfpp.plan.search.cluster import Cluster
    from hfpp.plan.search.planner import RankedPlan

__all__ = ["print_plans"]

_WIDTH_OF_FILES = 140
_FIGURES = ("step", "bubble", "tokens/s", "memory", "sent")


def print_plans(
    plans: Sequence[RankedPlan],
    shape: ModelShape,
    cluster: Cluster,
    *,
    width: int | None = None,
) -> None:
    """Prints what the plans are, what they cost, and what fills the fullest rank of each.

    Args:
        plans: best first.
        shape: of the model.
        cluster: the devices.
        width: columns; None: those of the terminal, or 140 where there is none.
    """
    from rich.console import Console

    if width is None and not sys.stdout.isatty():
        width = _WIDTH_OF_FILES
    console = Console(width=width, highlight=False)
    hardware = cluster.hardware
    console.print(
        f"{shape.model_type or 'model'}, {parameters_as_text(shape.parameters)} parameters, "
        f"{len(shape.layers)} layers, on {cluster.gpus} x {hardware.name} with "
        f"{bytes_as_text(hardware.memory_bytes)}",
        style="bold",
        markup=False,
    )
    best = plans[0].plan
    sizes = best.parallel
    console.print(
        f"batch {best.global_batch_size} x {best.seq_len} tokens, tp {sizes.tp}, cp {sizes.cp}, "
        f"ep {sizes.ep}"
    )
    console.print(_steps(plans))
    for place, ranked in enumerate(plans[1:], start=2):
        console.print(f"{place}: {ranked.lost_by}", markup=False)
    console.print()
    console.print(_memory(plans))
    for title, parts in (
        ("step of plan 1", _shown(plans[0].prediction.time.parts(), seconds_as_text)),
        (
            "sent in it by the rank that sends most",
            _shown(plans[0].prediction.network.parts(), bytes_as_text),
        ),
        ("layers of its stages", stage_sizes(best)),
    ):
        console.print(f"{title}: {parts}", markup=False)


def _steps(plans: Sequence[RankedPlan]) -> Table:
    table = _table(
        ("", "schedule"),
        ("pp", "stages", "dp", "microbatches", "recompute", *_FIGURES),
    )
    for place, ranked in enumerate(plans, start=1):
        plan, figures = ranked.plan, ranked.prediction
        table.add_row(
            str(place),
            plan.schedule,
            str(plan.pp_size),
            str(plan.stages_per_rank),
            str(plan.parallel.dp),
            f"{plan.n_microbatches} x {plan.microbatch_size}",
            plan.recompute,
            seconds_as_text(figures.step_time),
            f"{figures.time.bubble / figures.step_time:.1%}",
            count_as_text(figures.tokens_per_second),
            bytes_as_text(figures.peak_memory.total),
            bytes_as_text(figures.network.total),
        )
    return table


def _memory(plans: Sequence[RankedPlan]) -> Table:
    names = [name.replace("_", " ") for name in MemoryParts.__dataclass_fields__]
    table = _table(("", "fullest rank"), (*names, "together"))
    for place, ranked in enumerate(plans, start=1):
        peak = ranked.prediction.peak_memory
        table.add_row(
            str(place),
            str(ranked.prediction.fullest_rank),
            *(bytes_as_text(size) for size in peak.parts().values()),
            bytes_as_text(peak.total),
        )
    return table


def _shown(parts: Mapping[str, float], as_text: Callable[[float], str]) -> str:
    return ", ".join(f"{name} {as_text(size)}" for name, size in parts.items() if size)


def stage_sizes(plan: PipelinePlan) -> str:
    """How many layers each stage has; runs of equal numbers as ``2*7``."""
    sizes = [b - a for a, b in itertools.pairwise(plan.offsets)]
    runs = [(size, len(list(run))) for size, run in itertools.groupby(sizes)]
    return ",".join(str(size) if count == 1 else f"{size}*{count}" for size, count in runs)


def _table(left: Sequence[str], right: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table
