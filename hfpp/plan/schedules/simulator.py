"""Runs a schedule in time, in memory: when each action runs, given what the stages cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from hfpp import _core
from hfpp.errors import PipelineConfigError
from hfpp.plan.costs import UnitCost
from hfpp.plan.schedules.simulation import Bar, Idle, RankSimulation, Simulation, Transfer

if TYPE_CHECKING:
    from hfpp.plan.schedules.actions import ScheduleTable

__all__ = [
    "Bar",
    "Idle",
    "Link",
    "Links",
    "RankSimulation",
    "Simulation",
    "Transfer",
    "simulate",
    "uniform_costs",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """How long a transfer between two ranks takes: latency + bytes / bandwidth.

    Attributes:
        latency: seconds of every transfer.
        bandwidth: bytes per second; infinite where size does not matter.
    """

    latency: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        if not (self.latency >= 0 and math.isfinite(self.latency)):
            raise PipelineConfigError(
                f"latency ({self.latency}) must be a finite number that is not negative: "
                "use latency=0 where transfers start at once"
            )
        if not self.bandwidth > 0:
            raise PipelineConfigError(
                f"bandwidth ({self.bandwidth}) must be positive, in bytes per second: "
                "use bandwidth=math.inf where size does not matter"
            )

    def seconds(self, nbytes: int) -> float:
        """The time of one transfer.

        Raises:
            PipelineConfigError: longer than a float holds.
        """
        seconds = self.latency + nbytes / self.bandwidth
        if math.isinf(seconds):
            raise PipelineConfigError(
                f"bandwidth ({self.bandwidth}): {nbytes} bytes take longer than a float holds: "
                "use a larger bandwidth"
            )
        return seconds


Links = Link | Sequence[Link] | Callable[[int, int], Link]
"""One link for all, one per boundary between stages, or a function of source and target rank."""

_FREE = Link()


def uniform_costs(
    num_stages: int,
    *,
    forward: float = 1.0,
    backward: float = 2.0,
    weight: float | None = None,
    activation_bytes: int = 0,
    weight_bytes: int = 0,
) -> tuple[UnitCost, ...]:
    """The costs of stages that are all alike.

    Args:
        num_stages: number of stages of the whole pipeline.
        forward: time of one stage's forward on one microbatch, in any unit.
        backward: time of its whole backward.
        weight: the part of it that makes the weights' gradients; None: half of it.
        activation_bytes: bytes kept from the forward to the backward.
        weight_bytes: bytes kept from the inputs' to the weights' part of a split backward.

    Raises:
        PipelineConfigError: a time is negative or not finite, or weight is more than backward.

    Example:
        >>> uniform_costs(4, forward=1.0, backward=2.0)[3].backward_weight
        1.0
    """
    for name, value in (("forward", forward), ("backward", backward)):
        if not (value >= 0 and math.isfinite(value)):
            raise PipelineConfigError(
                f"{name} ({value}) must be a finite number that is not negative: use {name}=1"
            )
    weight = backward / 2 if weight is None else weight
    if not 0 <= weight <= backward:
        raise PipelineConfigError(
            f"weight ({weight}) must be from 0 to backward ({backward}), which it is a part of: "
            "use weight=None for a half of it"
        )
    cost = UnitCost(
        forward=forward,
        backward_input=backward - weight,
        backward_weight=weight,
        activation_bytes=activation_bytes,
        weight_bytes=weight_bytes,
    )
    return (cost,) * num_stages


def simulate(
    table: ScheduleTable,
    costs: Sequence[UnitCost],
    *,
    link: Links = _FREE,
    boundary_bytes: int | Sequence[int] = 0,
    overlap: bool = True,
    overlap_gain: float = 0.0,
) -> Simulation:
    """Runs a table in time: every action as soon as its rank and what it takes are ready.

    With overlap, transfers run beside the computations of both ranks, on one link per ordered pair
    of ranks, which takes one transfer at a time in the order of the sends. A transfer is ready to
    begin when its value is made; where the table spells out its communication, when both its send
    and its receive have been reached.

    Without overlap, a rank that sends or receives does nothing else for the time of the transfer.
    It sends when the value is made (or where the table has the send), without waiting for the
    receiver, and receives just before the computation that takes the value, but no sooner than the
    sender has begun. A receive in the table takes no time: it says from when on there is a buffer.

    Values between two stages of one rank are there at once. An overlapped group begins when all its
    parts can, and what its parts make leaves when the whole group ends. Sharding and gradient
    reduction take no time.

    Every time is the largest of some earlier times plus one duration: the result is exact where
    all durations are integers, and otherwise rounded once per action, in the order of each row.

    Args:
        table: the actions of all ranks, with or without communication.
        costs: one per stage; their times are those of one microbatch.
        link: between ranks: one for all, one per boundary between two stages (``num_stages - 1``),
            or a function of the source and the target rank.
        boundary_bytes: bytes of an activation, and of its gradient, that cross from stage to
            stage: for all boundaries, or one per boundary.
        overlap: whether transfers run beside computations.
        overlap_gain: what an overlapped group saves of its parts' time: this share of all but its
            longest part. 0: the parts run one after another; 1: a group takes as long as its
            longest part.

    Raises:
        PipelineConfigError: the table does not run to its end (the message says which rank waits
            for what, or which action is wrong), or the costs do not fit the table.
        OverflowError: bytes beyond 64 bits, or times whose sums are more than a float holds.

    Example:
        >>> from hfpp.plan.schedules import compute_table, find_schedule
        >>> table = compute_table(find_schedule("1F1B"), pp_size=4, n_microbatches=8)
        >>> step = simulate(table, uniform_costs(4, forward=1.0, backward=2.0))
        >>> step.step_time, step.rank(0).idle.total, step.rank(0).peak_live
        (33.0, 9.0, 4)
    """
    num_stages = table.native.num_stages
    if len(costs) != num_stages:
        raise PipelineConfigError(
            f"costs has {len(costs)} entries, but {table.name} has {num_stages} stages: give one "
            "UnitCost per stage"
        )
    boundaries = max(num_stages - 1, 0)
    nbytes = _bytes_of_boundaries(boundary_bytes, boundaries)
    forwards, backwards = _seconds_of_transfers(table, link, nbytes)
    native = _core.simulate(
        table.native,
        forward=[cost.forward for cost in costs],
        backward=[cost.backward for cost in costs],
        backward_input=[cost.backward_input for cost in costs],
        backward_weight=[cost.backward_weight + cost.split_backward for cost in costs],
        activation_bytes=[cost.activation_bytes for cost in costs],
        weight_bytes=[cost.weight_bytes for cost in costs],
        activation_seconds=forwards,
        gradient_seconds=backwards,
        boundary_bytes=nbytes,
        overlap=overlap,
        overlap_gain=overlap_gain,
    )
    return Simulation(table, native)


def _bytes_of_boundaries(boundary_bytes: int | Sequence[int], boundaries: int) -> list[int]:
    if isinstance(boundary_bytes, int):
        nbytes = [boundary_bytes] * boundaries
    else:
        nbytes = list(boundary_bytes)
    if len(nbytes) != boundaries:
        raise PipelineConfigError(
            f"boundary_bytes has {len(nbytes)} entries, but there are {boundaries} boundaries "
            "between stages: give one per boundary, or one number for all"
        )
    return nbytes


def _seconds_of_transfers(
    table: ScheduleTable, link: Links, nbytes: Sequence[int]
) -> tuple[list[float], list[float]]:
    """The time of an activation's and of a gradient's transfer over every boundary."""
    if isinstance(link, Link):
        seconds = [link.seconds(size) for size in nbytes]
        return seconds, seconds
    if not callable(link):
        if len(link) != len(nbytes):
            raise PipelineConfigError(
                f"link has {len(link)} entries, but there are {len(nbytes)} boundaries between "
                "stages: give one Link per boundary, one for all, or a function of two ranks"
            )
        seconds = [way.seconds(size) for way, size in zip(link, nbytes, strict=True)]
        return seconds, seconds
    pairs = list(pairwise(table.stage_to_rank))
    return (
        [link(a, b).seconds(size) for (a, b), size in zip(pairs, nbytes, strict=True)],
        [link(b, a).seconds(size) for (a, b), size in zip(pairs, nbytes, strict=True)],
    )
