"""Partitions in which the slowest rank is as fast as can be, under a cap on memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfpp import _core
from hfpp.errors import PipelineConfigError
from hfpp.plan.costs import total_cost
from hfpp.plan.placement import Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfpp.plan.costs import ModelCosts, UnitCost

__all__ = ["BalancedPartition", "MemoryCap", "balance_layers", "balanced_partition"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCap:
    """How much a rank may hold, and what decides how much it does.

    A stage holds ``bytes_per_parameter`` for each of its parameters, and its layers' activations
    once for each of its live microbatches.

    Attributes:
        bytes_per_rank: the cap.
        live_microbatches: per stage, the most microbatches whose activations it keeps at once; the
            schedule decides.
        bytes_per_parameter: of a parameter with its gradient and its optimizer's states, after
            sharding.
    """

    bytes_per_rank: int
    live_microbatches: Sequence[int]
    bytes_per_parameter: float = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancedPartition:
    """A partition and how good it is.

    Attributes:
        offsets: stage s has the layers ``offsets[s]`` to ``offsets[s + 1] - 1``.
        slowest: seconds of one microbatch, forward and backward, on the slowest rank: the sum over
            its stages.
        lower_bound: no partition has a faster slowest rank.
        proven_optimal: whether `slowest` is proven to be the least; `lower_bound` equals it then.
    """

    offsets: tuple[int, ...]
    slowest: float
    lower_bound: float
    proven_optimal: bool

    @property
    def gap(self) -> float:
        """By which share `slowest` is above `lower_bound`, at most: 0.01 for 1 %."""
        return self.slowest / self.lower_bound - 1 if self.lower_bound else 0.0


def balanced_partition(
    costs: ModelCosts,
    *,
    pp_size: int,
    stages_per_rank: int = 1,
    placement: Placement = Placement.LOOP,
    memory: MemoryCap | None = None,
) -> BalancedPartition:
    """Cuts a model into stages so that the slowest rank is as fast as can be.

    With one stage per rank the result is always optimal, and of the optimal partitions the one with
    the least sum of squared stage times (of several such, one with the longer stages first). With
    more stages per rank it is optimal wherever a search of bounded length proves it: always up to
    12 layers, for most models with two stages per rank, and else near `lower_bound`. The stages are
    then evened out as far as the slowest rank allows. The same costs give the same partition on
    every machine.

    Args:
        costs: Of the model; the embedding counts with the first layer and the head with the last.
        pp_size: Number of ranks.
        stages_per_rank: Stages on each rank.
        placement: Which rank has which stages.
        memory: A cap on each rank's memory; None for no cap.

    Returns:
        The partition, with its slowest rank's time and a proven bound.

    Raises:
        PipelineConfigError: If there are more stages than layers, the stages do not fit the
            placement, or no partition is known to fit the cap; the message names the smallest cap
            that works.
        OverflowError: If layers times stages are more than 16,777,216.

    Example:
        >>> from hfpp.plan.costs import ModelCosts, UnitCost
        >>> layer = UnitCost(forward=1.0, backward_input=1.0, backward_weight=1.0)
        >>> head = UnitCost(forward=2.0, backward_input=2.0, backward_weight=2.0)
        >>> costs = ModelCosts(
        ...     embedding=UnitCost(forward=0.0, backward_input=0.0, backward_weight=0.0),
        ...     layers=(layer,) * 8, head=head, boundary_bytes=0, source="measured",
        ... )
        >>> found = balanced_partition(costs, pp_size=2)
        >>> found.offsets, found.slowest, found.proven_optimal
        ((0, 5, 8), 15.0, True)
    """
    units = _with_ends(costs)
    return balance_layers(
        costs.seconds,
        pp_size=pp_size,
        num_stages=pp_size * stages_per_rank,
        placement=placement,
        memory=memory,
        parameters=[unit.parameters for unit in units],
        activation_bytes=[unit.activation_bytes for unit in units],
    )


def balance_layers(
    seconds: Sequence[float],
    *,
    pp_size: int,
    num_stages: int,
    placement: Placement = Placement.LOOP,
    memory: MemoryCap | None = None,
    parameters: Sequence[int] = (),
    activation_bytes: Sequence[int] = (),
) -> BalancedPartition:
    """As `balanced_partition`, for anything that layers cost: seconds, parameters, counts.

    Args:
        seconds: Per layer, the first with the embedding and the last with the head.
        pp_size: Number of ranks.
        num_stages: Number of stages over all ranks.
        placement: Which rank has which stages.
        memory: A cap on each rank's memory; None for no cap.
        parameters: Per layer, likewise; needed with `memory`.
        activation_bytes: Per layer and microbatch, likewise; needed with `memory`.

    Returns:
        The partition; `slowest` and `lower_bound` are in the unit of `seconds`.

    Raises:
        PipelineConfigError: As `balanced_partition`.
        OverflowError: As `balanced_partition`.

    Example:
        >>> balance_layers([1, 1, 1, 3], pp_size=2, num_stages=2).offsets
        (0, 3, 4)
    """
    if memory is None:
        found = _core.balance(pp_size, num_stages, placement.value, seconds=seconds)
    else:
        each = memory.bytes_per_parameter
        if not (math.isfinite(each) and each >= 0):
            raise PipelineConfigError(
                f"bytes_per_parameter ({each}) must be a finite number that is not negative: use "
                "bytes_per_parameter=16 for mixed precision with Adam and no sharding"
            )
        found = _core.balance(
            pp_size,
            num_stages,
            placement.value,
            seconds=seconds,
            static_bytes=[math.ceil(count * each) for count in parameters],
            activation_bytes=activation_bytes,
            live=memory.live_microbatches,
            cap=memory.bytes_per_rank,
        )
    offsets, slowest, lower_bound, proven = found
    return BalancedPartition(
        offsets=offsets.row(), slowest=slowest, lower_bound=lower_bound, proven_optimal=proven
    )


def _with_ends(costs: ModelCosts) -> list[UnitCost]:
    """The layers, the first with the embedding and the last with the head."""
    units = list(costs.layers)
    units[0] = total_cost((costs.embedding, units[0]))
    units[-1] = total_cost((units[-1], costs.head))
    return units
