"""From compute actions to a table with sends and receives."""

from __future__ import annotations

from hfpp.errors import PipelineConfigError
from hfpp.plan.actions import Action, ActionKind, ScheduleTable
from hfpp.plan.dataflow import Result, gives, needs

__all__ = ["add_communication"]


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
    todo = [[step.action for step in table.steps(rank)] for rank in range(table.pp_size)]
    position = [0] * table.pp_size
    rows: list[list[Action]] = [[] for _ in todo]
    at_hand: list[set[Result]] = [set() for _ in todo]

    def ready(rank: int, leaf: Action) -> bool:
        need = needs(table, leaf)
        return need is None or need in at_hand[rank]

    def hand_on(rank: int, leaf: Action) -> None:
        """Brings the leaf's result to the neighbouring stage, on this rank or by a message."""
        if (result := gives(leaf)) is None:
            return
        forward = leaf.kind is ActionKind.FORWARD
        target = leaf.stage + 1 if forward else leaf.stage - 1
        if not 0 <= target < table.num_stages:
            return
        peer = table.stage_to_rank[target]
        if peer != rank:
            send = ActionKind.SEND_FORWARD if forward else ActionKind.SEND_BACKWARD
            receive = ActionKind.RECEIVE_FORWARD if forward else ActionKind.RECEIVE_BACKWARD
            rows[rank].append(Action(leaf.stage, send, leaf.microbatch))
            rows[peer].append(Action(target, receive, leaf.microbatch))
        at_hand[peer].add(result)

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
                hand_on(rank, leaf)
            position[rank] += 1
            moving = True
    for rank, actions in enumerate(todo):
        if position[rank] < len(actions):
            raise PipelineConfigError(
                f"{table.name}: the schedule deadlocks: rank {rank} never gets the input of "
                f"{actions[position[rank]]}"
            )
    return ScheduleTable.from_rows(table.name, tuple(map(tuple, rows)))
