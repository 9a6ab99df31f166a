"""Proof that a schedule table can run: complete, in order, and free of deadlock."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from hfpp.errors import PipelineConfigError
from hfpp.plan.actions import Action, ActionKind, ScheduleTable, Step
from hfpp.plan.dataflow import Result, gives, needs, step_error
from hfpp.plan.messages import RECEIVES, SENDS, Message, Messages

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["verify"]

_F, _B = ActionKind.FORWARD, ActionKind.FULL_BACKWARD
_I, _W = ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT
_WAITS = {
    ActionKind.WAIT_SEND_FORWARD: ActionKind.SEND_FORWARD,
    ActionKind.WAIT_SEND_BACKWARD: ActionKind.SEND_BACKWARD,
    ActionKind.WAIT_REDUCE_GRAD: ActionKind.REDUCE_GRAD,
}

_NEEDED = {_B: _F, _I: _F, _W: _I, ActionKind.SEND_FORWARD: _F} | _WAITS
"""What comes before an action on its own rank."""


def verify(table: ScheduleTable) -> None:
    """Checks that a table can run.

    Every stage lives on one rank, in a loop or a v, as many on each rank. Every stage has for every
    microbatch one forward and one backward (or one input part and one weight part), in that order.
    Where communication is spelled out: each value that crosses between ranks is sent once and
    received once, after it is made and before it is used, and both ranks of a pair post their
    messages in the same order. Run together, the rows come to their end.

    Args:
        table: the rows of all ranks.

    Raises:
        PipelineConfigError: it cannot run; the message names the rank, the column and the action.
    """
    if table.num_stages == 0:
        raise PipelineConfigError(f"{table.name}: the table holds no compute actions")
    _ = table.placement  # raises where the stages lie neither as a loop nor as a v
    for rank in range(table.pp_size):
        _check_row(table, rank)
    messages = Messages(table) if table.has_communication else None
    _run(table, messages)


def _check_row(table: ScheduleTable, rank: int) -> None:
    """One rank's actions: complete, once each, in order."""
    seen: dict[Action, Step] = {}
    for step in table.steps(rank):
        for leaf in step.action.leaves:
            if leaf.kind.is_compute or leaf.kind in (*SENDS, *RECEIVES, *_WAITS):
                _check_leaf(table, step, leaf, seen)
            seen[leaf] = step
        if ActionKind.REDUCE_GRAD is step.action.kind:
            _check_reduction(table, step, seen)
    for stage in table.stages_by_rank[rank]:
        for microbatch in range(table.n_microbatches):
            _check_complete(table, rank, stage, microbatch, seen)


def _check_leaf(table: ScheduleTable, step: Step, leaf: Action, seen: dict[Action, Step]) -> None:
    if (first := seen.get(leaf)) is not None:
        raise step_error(table, step, f"{leaf} already ran at column {first.column}; it runs once")
    if leaf.stage not in table.stages_by_rank[step.rank]:
        raise step_error(table, step, f"stage {leaf.stage} does not live on this rank")
    before = leaf._replace(kind=_NEEDED[leaf.kind]) if leaf.kind in _NEEDED else None
    if before is not None and before not in seen:
        raise step_error(table, step, f"{leaf} comes without {before} before it on this rank")
    if leaf.kind is ActionKind.SEND_BACKWARD and not any(
        leaf._replace(kind=kind) in seen for kind in (_B, _I)
    ):
        raise step_error(table, step, f"{leaf} comes without a backward of it before on this rank")
    for kind, other in ((_B, _I), (_I, _B), (_W, _B)):
        if leaf.kind is kind and (clash := seen.get(leaf._replace(kind=other))) is not None:
            raise step_error(
                table,
                step,
                f"{leaf} doubles {leaf._replace(kind=other)} at column {clash.column}: a backward "
                "is either one B or one I and one W",
            )


def _check_complete(
    table: ScheduleTable, rank: int, stage: int, microbatch: int, seen: dict[Action, Step]
) -> None:
    def has(kind: ActionKind) -> bool:
        return Action(stage, kind, microbatch) in seen

    if has(_F) and (has(_B) or (has(_I) and has(_W))):
        return
    if not has(_F):
        missing = f"{Action(stage, _F, microbatch)}"
    elif has(_I):
        missing = f"{Action(stage, _W, microbatch)}"
    else:
        missing = f"{Action(stage, _B, microbatch)} (or I and W)"
    raise PipelineConfigError(
        f"{table.name}: rank {rank}: action {missing} is missing in its "
        f"{len(table.rows[rank])} columns: every stage has a forward and a backward for each of "
        f"the {table.n_microbatches} microbatches"
    )


def _check_reduction(table: ScheduleTable, step: Step, seen: dict[Action, Step]) -> None:
    stage = step.action.stage
    if stage not in table.stages_by_rank[step.rank]:
        raise step_error(table, step, f"stage {stage} does not live on this rank")
    done = sum(1 for action in seen if action.stage == stage and action.kind in (_B, _W))
    if done != table.n_microbatches:
        raise step_error(
            table,
            step,
            f"it comes after {done} of {table.n_microbatches} backwards of stage {stage}: "
            "gradients are reduced after the last one",
        )


def _run(table: ScheduleTable, messages: Messages | None) -> None:
    """Runs all rows together; an error where they get stuck."""
    rows = [list(table.steps(rank)) for rank in range(table.pp_size)]
    position = [0] * table.pp_size
    done: set[Result] = set()
    posted: set[Message] = set()  # by their senders
    waiting: dict[Result | Message, list[int]] = {}
    ready = deque(range(table.pp_size))

    def missing(step: Step) -> Iterator[Result | Message]:
        """What the step waits for: a neighbour's result, or the message that brings it."""
        for leaf in step.action.leaves:
            need = needs(table, leaf) if leaf.kind.is_compute else None
            if need is None:
                continue
            source = table.stage_to_rank[need[0]]
            if messages is None or source == step.rank:
                if need not in done:
                    yield need
            elif (sent := Message(source, step.rank, need[1], need[0], need[2])) not in posted:
                yield sent

    def wake(key: Result | Message) -> None:
        ready.extend(waiting.pop(key, ()))

    while ready:
        rank = ready.popleft()
        while position[rank] < len(rows[rank]):
            step = rows[rank][position[rank]]
            blocked_by = next(missing(step), None)
            if blocked_by is not None:
                waiting.setdefault(blocked_by, []).append(rank)
                break
            for leaf in step.action.leaves:
                if leaf.kind.is_compute:
                    if (result := gives(leaf)) is not None:
                        done.add(result)
                        wake(result)
                elif messages is not None:
                    message = messages.sent_by(leaf)
                    if message is not None:
                        posted.add(message)
                        wake(message)
            position[rank] += 1

    if any(position[rank] < len(rows[rank]) for rank in range(table.pp_size)):
        _raise_deadlock(table, rows, position, waiting)


def _raise_deadlock(
    table: ScheduleTable,
    rows: list[list[Step]],
    position: list[int],
    waiting: dict[Result | Message, list[int]],
) -> None:
    """Names the circle: who waits for whom, from the lowest rank in it."""
    needs: dict[int, Result] = {}
    for key, ranks in waiting.items():
        need = (key.stage, key.kind, key.microbatch) if isinstance(key, Message) else key
        needs.update((rank, need) for rank in ranks)
    follows = {rank: table.stage_to_rank[need[0]] for rank, need in needs.items()}
    rank = min(follows)
    visited: list[int] = []
    while rank not in visited:
        visited.append(rank)
        rank = follows[rank]
    circle = visited[visited.index(rank) :]
    start = circle.index(min(circle))
    circle = circle[start:] + circle[:start]
    lines = [
        f"{rows[r][position[r]]} waits for {Action(*needs[r])} of rank {follows[r]}" for r in circle
    ]
    raise PipelineConfigError(f"{table.name}: the schedule deadlocks: {'; '.join(lines)}")
