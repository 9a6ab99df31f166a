"""From computations to all that torch runs, pass by pass as torch describes them: slow, obvious."""

from __future__ import annotations

from hfpp.errors import PipelineConfigError
from hfpp.plan.schedules.actions import Action, ActionKind, ScheduleTable

Result = tuple[int, ActionKind, int]
"""A stage's output (F) or the gradient of its inputs (B, also after I) of one microbatch."""

BACKWARD = (ActionKind.FULL_BACKWARD, ActionKind.BACKWARD_INPUT)


def needs(table: ScheduleTable, leaf: Action) -> Result | None:
    """What a computation takes from a neighbouring stage; None: nothing."""
    if leaf.microbatch is None:
        return None
    if leaf.kind is ActionKind.FORWARD and leaf.stage > 0:
        return (leaf.stage - 1, ActionKind.FORWARD, leaf.microbatch)
    if leaf.kind in BACKWARD and leaf.stage < table.num_stages - 1:
        return (leaf.stage + 1, ActionKind.FULL_BACKWARD, leaf.microbatch)
    return None


def gives(leaf: Action) -> Result | None:
    """What a computation makes that a neighbouring stage may take; None: nothing."""
    if leaf.microbatch is None:
        return None
    if leaf.kind is ActionKind.FORWARD:
        return (leaf.stage, ActionKind.FORWARD, leaf.microbatch)
    if leaf.kind in BACKWARD:
        return (leaf.stage, ActionKind.FULL_BACKWARD, leaf.microbatch)
    return None


def rows_of(table: ScheduleTable) -> list[list[Action]]:
    """The actions of all ranks, without idle columns."""
    return [[step.action for step in table.steps(rank)] for rank in range(table.pp_size)]


def add_unshard(row: list[Action], *, ordered: bool, most: int = 3) -> list[Action]:
    """Gathers the parameters of the next `most` stages before each computation.

    Stages that are not among them are given back first, in the order in which a Python set has
    them or, `ordered`, in which they came.
    """

    def ahead(actions: list[Action]) -> list[int]:
        stages: list[int] = []
        for action in actions:
            stages += dict.fromkeys(
                leaf.stage for leaf in action.leaves if leaf.stage not in stages
            )
            if len(stages) >= most:
                break
        return stages

    active: set[int] | dict[int, None] = {} if ordered else set()
    lowered = []
    for position, action in enumerate(row):
        wanted = ahead(row[position:])
        for stage in [stage for stage in active if stage not in wanted]:
            active.pop(stage) if isinstance(active, dict) else active.remove(stage)
            lowered.append(Action(stage, ActionKind.RESHARD))
        for stage in [stage for stage in wanted if stage not in active]:
            active.setdefault(stage) if isinstance(active, dict) else active.add(stage)
            lowered.append(Action(stage, ActionKind.UNSHARD))
        lowered.append(action)
    return lowered + [Action(stage, ActionKind.RESHARD) for stage in active]


def add_reduce_grad(row: list[Action], n_microbatches: int, *, wait: bool) -> list[Action]:
    """Reduces a stage's gradients after the last microbatch's, and waits for it if asked to."""
    lowered = []
    done: dict[int, int] = {}
    for action in row:
        lowered.append(action)
        for leaf in action.leaves:
            if leaf.kind in (ActionKind.FULL_BACKWARD, ActionKind.BACKWARD_WEIGHT):
                done[leaf.stage] = done.get(leaf.stage, 0) + 1
                if done[leaf.stage] == n_microbatches:
                    lowered.append(Action(leaf.stage, ActionKind.REDUCE_GRAD))
                    if wait:
                        lowered.append(Action(leaf.stage, ActionKind.WAIT_REDUCE_GRAD))
    return lowered


def add_send_waits(row: list[Action]) -> list[Action]:
    """One wait per send: after the stage's backward for a forward send, else at the end."""
    waits = {
        ActionKind.SEND_FORWARD: ActionKind.WAIT_SEND_FORWARD,
        ActionKind.SEND_BACKWARD: ActionKind.WAIT_SEND_BACKWARD,
    }
    lowered, pending = [], []
    for action in row:
        lowered.append(action)
        if action.kind in waits:
            pending.append(action)
        for leaf in action.leaves:
            sent = leaf._replace(kind=ActionKind.SEND_FORWARD)
            if leaf.kind in BACKWARD and sent in pending:
                pending.remove(sent)
                lowered.append(sent._replace(kind=ActionKind.WAIT_SEND_FORWARD))
    return lowered + [sent._replace(kind=waits[sent.kind]) for sent in pending]


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
    """All passes, as `hfpp.plan.schedules.lowering.lower` has them."""
    rows = rows_of(table)
    if unshard:
        rows = [add_unshard(row, ordered=ordered_reshard) for row in rows]
    if reduce_grad:
        rows = [add_reduce_grad(row, table.n_microbatches, wait=wait_reduce_grad) for row in rows]
    if communication:
        rows = add_communication(table, rows)
    if wait_send:
        rows = [add_send_waits(row) for row in rows]
    return ScheduleTable.from_rows(table.name, rows)


def add_communication(table: ScheduleTable, todo: list[list[Action]]) -> list[list[Action]]:
    """Adds a send after each result that another rank needs, and the receive on that rank.

    The ranks are walked together, one action each per round. A receive is placed on its rank when
    its send is placed: so the two ranks of every pair post their messages in the same order,
    which is what NCCL needs not to deadlock.

    Args:
        table: where the stages live.
        todo: the rows; only their computations take and give.

    Raises:
        PipelineConfigError: the table deadlocks.
    """
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
    return rows
