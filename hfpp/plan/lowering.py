"""From compute actions to a table with sends and receives."""

from __future__ import annotations

from hfpp.errors import PipelineConfigError
from hfpp.plan.actions import Action, ActionKind, ScheduleTable

__all__ = ["add_communication"]

_F, _B, _I = ActionKind.FORWARD, ActionKind.FULL_BACKWARD, ActionKind.BACKWARD_INPUT


def add_communication(table: ScheduleTable) -> ScheduleTable:
    """Adds a send after each result that another rank needs, and the receive on that rank.

    The ranks are walked together, one action each per round. A receive is placed on its rank when
    its send is placed: so the two ranks of every pair post their messages in the same order,
    which is what NCCL needs not to deadlock.

    Args:
        table: compute actions only; idle columns are dropped.

    Raises:
        PipelineConfigError: the table deadlocks or already has communication.
    """
    if table.has_communication:
        raise PipelineConfigError(f"{table.name}: the table has communication already")
    last = table.num_stages - 1
    todo = [[step.action for step in table.steps(rank)] for rank in range(table.pp_size)]
    position = [0] * table.pp_size
    rows: list[list[Action]] = [[] for _ in todo]
    at_hand: list[set[tuple[int, ActionKind, int | None]]] = [set() for _ in todo]

    def ready(rank: int, leaf: Action) -> bool:
        if leaf.kind is _F and leaf.stage > 0:
            return (leaf.stage - 1, _F, leaf.microbatch) in at_hand[rank]
        if leaf.kind in (_B, _I) and leaf.stage < last:
            return (leaf.stage + 1, _B, leaf.microbatch) in at_hand[rank]
        return True

    def place(rank: int, leaf: Action) -> None:
        """Hands the leaf's result to the neighbouring stage, on this rank or by a message."""
        if leaf.kind is _F:
            kind, target = _F, leaf.stage + 1
            send, receive = ActionKind.SEND_FORWARD, ActionKind.RECEIVE_FORWARD
        elif leaf.kind in (_B, _I):
            kind, target = _B, leaf.stage - 1
            send, receive = ActionKind.SEND_BACKWARD, ActionKind.RECEIVE_BACKWARD
        else:
            return
        if not 0 <= target <= last:
            return
        peer = table.stage_to_rank[target]
        if peer != rank:
            rows[rank].append(Action(leaf.stage, send, leaf.microbatch))
            rows[peer].append(Action(target, receive, leaf.microbatch))
        at_hand[peer].add((leaf.stage, kind, leaf.microbatch))

    moving = True
    while moving:
        moving = False
        for rank, actions in enumerate(todo):
            if position[rank] == len(actions):
                continue
            action = actions[position[rank]]
            if not all(ready(rank, leaf) for leaf in action.leaves):
                continue
            rows[rank].append(action)
            for leaf in action.leaves:
                place(rank, leaf)
            position[rank] += 1
            moving = True
    for rank, actions in enumerate(todo):
        if position[rank] < len(actions):
            raise PipelineConfigError(
                f"{table.name}: the schedule deadlocks: rank {rank} never gets the input of "
                f"{actions[position[rank]]}"
            )
    return ScheduleTable(table.name, tuple(map(tuple, rows)))
