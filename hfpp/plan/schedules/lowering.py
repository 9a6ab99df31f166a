"""From computations to all that torch runs: parameters gathered, messages, reduced gradients."""

from __future__ import annotations

from hfpp.plan.schedules.actions import ScheduleTable

__all__ = ["lower"]


def lower(
    table: ScheduleTable,
    *,
    communication: bool = True,
    unshard: bool = True,
    reduce_grad: bool = True,
    wait_send: bool = False,
    wait_reduce_grad: bool = False,
    ordered_reshard: bool = False,
) -> ScheduleTable:
    """Adds what torch's own passes add, action for action, in time proportional to the table.

    The defaults are torch 2.11 to 2.14; torch 2.15 also has the last three.

    Args:
        table: computations only; nothing but waits for sends may be added to a table that has
            more, but no waits. Idle columns are dropped.
        communication: a send after each result that another rank needs, and the receive on that
            rank. The two ranks of every pair post their messages in the same order, which is what
            NCCL needs not to deadlock.
        unshard: the parameters of the next three stages that compute are gathered, those of other
            stages given back: what FSDP needs.
        reduce_grad: gradients are reduced after a stage's last.
        wait_send: one wait for each send, after the backward that shows that the other rank has
            it, or at the end.
        wait_reduce_grad: a wait right after each reduction.
        ordered_reshard: stages give their parameters back in the order in which they got them;
            else in the order in which a Python set has their numbers, as torch did before 2.15.

    Returns:
        The table of the same name with all of that.

    Raises:
        PipelineConfigError: the table deadlocks (the message names rank, column and action), is
            incomplete, or has communication already.

    Example:
        >>> from hfpp.plan.schedules import compute_table, find_schedule
        >>> table = compute_table(find_schedule("GPipe"), pp_size=2, n_microbatches=1)
        >>> [str(action) for action in lower(table, unshard=False).row(0)]
        ['0F0', '0SEND_F0', '0RECV_B0', '0B0', '0REDUCE_GRAD']
    """
    return ScheduleTable(
        table.native.lowered(
            communication=communication,
            unshard=unshard,
            reduce_grad=reduce_grad,
            wait_send=wait_send,
            wait_reduce_grad=wait_reduce_grad,
            ordered_reshard=ordered_reshard,
        )
    )
