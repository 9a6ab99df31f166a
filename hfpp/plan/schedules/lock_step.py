"""A table run step by step: every action takes one, as in torch's own simulator."""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from hfpp import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfpp.plan.schedules.actions import Action, ScheduleTable

__all__ = ["LockStep", "lock_step"]


class LockStep:
    """The step of every action of a table."""

    def __init__(self, table: ScheduleTable) -> None:
        self.table = table
        self.native, self.steps = _core.lock_step(table.native)
        """int32 [actions], row after row, the parts of a group each; the number of steps."""

    def row(self, rank: int) -> Iterator[tuple[Action, int]]:
        """The actions of one rank, with the step of each; idle columns are left out."""
        place = self._offsets[rank]
        for action in self.table.row(rank):
            if action is not None:
                yield action, self.native[place]
            place += 1 if action is None else len(action.leaves)

    @cached_property
    def _offsets(self) -> list[int]:
        native = self.table.native
        return list(accumulate((len(native.codes(r)) for r in range(native.pp_size)), initial=0))


def lock_step(table: ScheduleTable) -> LockStep:
    """Runs a table step by step, as torch's own simulator does.

    Every computation, overlapped group, send and receive takes one step; a receive may take the
    same step as its send. What torch's simulator refuses takes no step: sharding, reduction and
    waits have the step of what comes after them.

    Args:
        table: the actions of all ranks; what crosses between ranks is sent and received.

    Raises:
        PipelineConfigError: the table does not run to its end, or leaves out its communication.

    Example:
        >>> from hfpp.plan.schedules.lowering import lower
        >>> from hfpp.plan.schedules import compute_table, find_schedule
        >>> table = compute_table(find_schedule("GPipe"), pp_size=2, n_microbatches=1)
        >>> found = lock_step(lower(table, unshard=False, reduce_grad=False))
        >>> [f"{action} {step}" for action, step in found.row(1)], found.steps
        (['1RECV_F0 1', '1F0 2', '1B0 3', '1SEND_B0 4'], 6)
    """
    return LockStep(table)
