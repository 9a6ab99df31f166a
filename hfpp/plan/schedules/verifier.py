"""Proof that a schedule table can run: complete, in order, free of deadlock, within memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfpp import _core

if TYPE_CHECKING:
    from hfpp.plan.schedules.actions import ScheduleTable

__all__ = ["peak_activations", "verify"]


def verify(table: ScheduleTable, *, activation_limit: int | None = None) -> None:
    """Checks that a table can run, in time linear in its actions.

    Every stage lives on one rank, in a loop or a v, as many on each rank. Every stage has for every
    microbatch one forward and one backward (or one input part and one weight part), in that order;
    the parts of an overlapped group run at the same time, so that none can need another.

    Where communication is spelled out: each value that crosses between ranks is sent once and
    received once, after it is made and before it is used, and both ranks of a pair post what goes
    one way in the same order. A stage whose UNSHARD is spelled out computes between it and its
    RESHARD only. Gradients are reduced once, after the stage's last backward. A table that waits
    for sends waits for each of them; a rank that waits for reductions waits for each, before the
    next begins.

    Run together, the rows come to their end, also where sends are not buffered. Each rank then has
    one line of messages, in the order of its row; a send and its receive end together when both are
    at the head of their lines. A rank pauses at a computation whose input has not arrived, and what
    comes after is not posted yet. That is how torch drives NCCL. What deadlocks only so would run
    over gloo, and is refused all the same; the message says which of the two it is.

    Args:
        table: the rows of all ranks.
        activation_limit: the most activations that any rank may hold at once, each of one stage and
            one microbatch, from its forward to the end of its backward or of its weight part.
            None: as many as it takes.

    Raises:
        PipelineConfigError: it cannot run, or not within the limit; the message names the rank, the
            column and the action.
    """
    _core.verify(table.native, activation_limit=activation_limit)


def peak_activations(table: ScheduleTable) -> tuple[int, ...]:
    """The most activations that each rank holds at once, as `verify` counts them.

    Raises:
        PipelineConfigError: the table cannot run.
    """
    return _core.verify(table.native).row()
