"""The timeline of a schedule that has not run: simulated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfpp.errors import PipelineConfigError
from hfpp.plan.render.timeline import LEAST_TIME, Bar, Kept, Timeline, Transfer
from hfpp.plan.schedules.actions import ActionKind
from hfpp.plan.schedules.simulator import Link, simulate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfpp.plan.costs import UnitCost
    from hfpp.plan.schedules.actions import ScheduleTable
    from hfpp.plan.schedules.simulation import Simulation
    from hfpp.plan.schedules.simulator import Links

__all__ = ["planned", "simulated_timeline"]

_MOST_RANKS = 128  # rows of a picture
_FREE = Link()


def planned(
    table: ScheduleTable,
    costs: Sequence[UnitCost],
    *,
    link: Links = _FREE,
    boundary_bytes: int | Sequence[int] = 0,
    overlap: bool = True,
    unit: str = "s",
) -> Timeline:
    """Simulates a schedule, for a picture of it.

    Args:
        table: the actions of all ranks.
        costs: by stage.
        link: as for `simulate`, and so are the next two.
        boundary_bytes: see there.
        overlap: see there.
        unit: of all times: "s", or nothing where they have none.

    Raises:
        PipelineConfigError: the table does not run to its end, the costs do not fit it, or nothing
            takes any time.
        OverflowError: as `simulate`.
    """
    step = simulate(table, costs, link=link, boundary_bytes=boundary_bytes, overlap=overlap)
    return simulated_timeline(step, costs, boundary_bytes=boundary_bytes, unit=unit)


def simulated_timeline(
    step: Simulation,
    costs: Sequence[UnitCost],
    *,
    boundary_bytes: int | Sequence[int] = 0,
    unit: str = "s",
) -> Timeline:
    """The timeline of a simulated step; of a tall pipeline with some of its ranks only.

    Args:
        step: the simulation.
        costs: by stage, for the bytes that they keep.
        boundary_bytes: of what crosses after each stage, for the sizes of messages.
        unit: of all times: "s", or nothing where they have none.

    Raises:
        PipelineConfigError: nothing takes any time.
    """
    if step.step_time < LEAST_TIME:
        raise PipelineConfigError(
            f"{step.table.name}: the costs are 0 for every action, or as good as 0: a picture "
            "needs some that is more, such as forward=1"
        )
    size = step.table.pp_size
    shown = min(size, _MOST_RANKS)
    ranks = tuple(row * (size - 1) // max(1, shown - 1) for row in range(shown))
    known = set(ranks)
    messages = [
        Transfer(*transfer, _size(boundary_bytes, *transfer.action[:2]))
        for rank in ranks
        for transfer in step.transfers(rank)
        if transfer.target in known
    ]
    return Timeline(
        name=step.table.name,
        bars=tuple(tuple(Bar(*bar) for bar in step.bars(rank)) for rank in ranks),
        end=step.step_time,
        ranks=ranks,
        pp_size=size,
        num_stages=step.table.num_stages,
        n_microbatches=step.table.n_microbatches,
        idle_share=step.idle_share,
        transfers=tuple(messages),
        unit=unit,
        kept=tuple(Kept(cost.activation_bytes, cost.weight_bytes) for cost in costs),
    )


def _size(boundary_bytes: int | Sequence[int], stage: int, kind: ActionKind) -> int:
    """Bytes of what a stage sends."""
    if isinstance(boundary_bytes, int):
        return boundary_bytes
    return boundary_bytes[stage if kind is ActionKind.SEND_FORWARD else stage - 1]
