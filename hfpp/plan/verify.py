"""Proof that a schedule table can run: complete, in order, and free of deadlock."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from hfpp.errors import PipelineConfigError
from hfpp.plan.actions import Action, ActionKind, ScheduleTable, Step

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["verify"]

_F, _B = ActionKind.FORWARD, ActionKind.FULL_BACKWARD
_I, _W = ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT
_SENDS = {ActionKind.SEND_FORWARD: _F, ActionKind.SEND_BACKWARD: _B}
_RECEIVES = {ActionKind.RECEIVE_FORWARD: _F, ActionKind.RECEIVE_BACKWARD: _B}
_WAITS = {
    ActionKind.WAIT_SEND_FORWARD: ActionKind.SEND_FORWARD,
    ActionKind.WAIT_SEND_BACKWARD: ActionKind.SEND_BACKWARD,
    ActionKind.WAIT_REDUCE_GRAD: ActionKind.REDUCE_GRAD,
}

_NEEDED = {_B: _F, _I: _F, _W: _I, ActionKind.SEND_FORWARD: _F} | _WAITS
"""What comes before an action on its own rank."""

_Done = tuple[int, ActionKind, int]
"""A stage's forward (F) or the gradient of its inputs (B, also after I) of one microbatch."""


class _Message(NamedTuple):
    """What crosses from one rank to another."""

    source: int
    target: int
    kind: ActionKind  # F: an activation to the next stage; B: a gradient to the one before
    stage: int  # of the sender
    microbatch: int

    def __str__(self) -> str:
        what = "activation" if self.kind is _F else "gradient"
        return f"the {what} of stage {self.stage}, microbatch {self.microbatch}"


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
    messages = _Messages(table) if table.has_communication else None
    _run(table, messages)


def _check_row(table: ScheduleTable, rank: int) -> None:
    """One rank's actions: complete, once each, in order."""
    seen: dict[Action, Step] = {}
    for step in table.steps(rank):
        for leaf in step.action.leaves:
            if leaf.kind.is_compute or leaf.kind in (*_SENDS, *_RECEIVES, *_WAITS):
                _check_leaf(table, step, leaf, seen)
            seen[leaf] = step
        if ActionKind.REDUCE_GRAD is step.action.kind:
            _check_reduction(table, step, seen)
    for stage in table.stages_by_rank[rank]:
        for microbatch in range(table.n_microbatches):
            _check_complete(table, rank, stage, microbatch, seen)


def _check_leaf(table: ScheduleTable, step: Step, leaf: Action, seen: dict[Action, Step]) -> None:
    if (first := seen.get(leaf)) is not None:
        raise _error(table, step, f"{leaf} already ran at column {first.column}; it runs once")
    if leaf.stage not in table.stages_by_rank[step.rank]:
        raise _error(table, step, f"stage {leaf.stage} does not live on this rank")
    before = leaf._replace(kind=_NEEDED[leaf.kind]) if leaf.kind in _NEEDED else None
    if before is not None and before not in seen:
        raise _error(table, step, f"{leaf} comes without {before} before it on this rank")
    if leaf.kind is ActionKind.SEND_BACKWARD and not any(
        leaf._replace(kind=kind) in seen for kind in (_B, _I)
    ):
        raise _error(table, step, f"{leaf} comes without a backward of it before on this rank")
    for kind, other in ((_B, _I), (_I, _B), (_W, _B)):
        if leaf.kind is kind and (clash := seen.get(leaf._replace(kind=other))) is not None:
            raise _error(
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
        raise _error(table, step, f"stage {stage} does not live on this rank")
    done = sum(1 for action in seen if action.stage == stage and action.kind in (_B, _W))
    if done != table.n_microbatches:
        raise _error(
            table,
            step,
            f"it comes after {done} of {table.n_microbatches} backwards of stage {stage}: "
            "gradients are reduced after the last one",
        )


def _error(table: ScheduleTable, step: Step, problem: str) -> PipelineConfigError:
    return PipelineConfigError(f"{table.name}: {step}: {problem}")


def _needs(table: ScheduleTable, leaf: Action) -> _Done | None:
    """What a computation takes from a neighbouring stage."""
    assert leaf.microbatch is not None
    if leaf.kind is _F and leaf.stage > 0:
        return (leaf.stage - 1, _F, leaf.microbatch)
    if leaf.kind in (_B, _I) and leaf.stage < table.num_stages - 1:
        return (leaf.stage + 1, _B, leaf.microbatch)
    return None


def _gives(leaf: Action) -> _Done | None:
    assert leaf.microbatch is not None
    if leaf.kind in (_F, _B, _I):
        return (leaf.stage, _F if leaf.kind is _F else _B, leaf.microbatch)
    return None


class _Messages:
    """The messages of a table that spells them out; checked to be posted alike on both ends."""

    def __init__(self, table: ScheduleTable) -> None:
        self.table = table
        self._sent: dict[Action, _Message] = {}
        posts: dict[tuple[int, int], list[tuple[_Message, Step]]] = {}
        received: dict[int, set[_Done]] = {}
        for rank in range(table.pp_size):
            have = received.setdefault(rank, set())
            for step in table.steps(rank):
                for leaf in step.action.leaves:
                    if (message := self.of(leaf, step)) is not None:
                        peer = message.target if message.source == rank else message.source
                        posts.setdefault((rank, peer), []).append((message, step))
                        if message.source == rank:
                            self._sent[leaf] = message
                        if message.target == rank:
                            have.add((message.stage, message.kind, message.microbatch))
                    elif leaf.kind.is_compute:
                        self._check_received(step, leaf, have)
        for (rank, peer), mine in posts.items():
            if rank < peer or (peer, rank) not in posts:
                self._check_mirrored(rank, peer, mine, posts.get((peer, rank), []))

    def sent_by(self, leaf: Action) -> _Message | None:
        """The message that an action sends; None for all other actions."""
        return self._sent.get(leaf)

    def of(self, leaf: Action, step: Step) -> _Message | None:
        """The message that a send or receive is about; None for all other actions."""
        if leaf.kind in _SENDS:
            kind, stage = _SENDS[leaf.kind], leaf.stage
        elif leaf.kind in _RECEIVES:
            kind = _RECEIVES[leaf.kind]
            stage = leaf.stage - 1 if kind is _F else leaf.stage + 1
        else:
            return None
        target = stage + 1 if kind is _F else stage - 1
        last = self.table.num_stages - 1
        if not (0 <= stage <= last and 0 <= target <= last):
            raise _error(self.table, step, f"{leaf} has no stage at the other end")
        source_rank = self.table.stage_to_rank[stage]
        target_rank = self.table.stage_to_rank[target]
        if source_rank == target_rank:
            raise _error(
                self.table,
                step,
                f"stages {stage} and {target} live on the same rank, which hands values over "
                f"without {leaf.kind.value}",
            )
        assert leaf.microbatch is not None
        return _Message(source_rank, target_rank, kind, stage, leaf.microbatch)

    def _check_received(self, step: Step, leaf: Action, have: set[_Done]) -> None:
        need = _needs(self.table, leaf)
        if need is None or self.table.stage_to_rank[need[0]] == step.rank or need in have:
            return
        kind = "RECV_F" if need[1] is _F else "RECV_B"
        raise _error(
            self.table,
            step,
            f"{leaf} comes without {leaf.stage}{kind}{leaf.microbatch} before it on this rank",
        )

    def _check_mirrored(
        self,
        rank: int,
        peer: int,
        mine: list[tuple[_Message, Step]],
        theirs: list[tuple[_Message, Step]],
    ) -> None:
        """Both ranks of a pair see the same messages in the same order (else NCCL deadlocks)."""
        for (message, step), (other, other_step) in zip(mine, theirs, strict=False):
            if message != other:
                raise _error(
                    self.table,
                    step,
                    f"ranks {rank} and {peer} post their messages in different orders: here "
                    f"{message}, there {other} ({other_step})",
                )
        if len(mine) != len(theirs):
            message, step = (mine if len(mine) > len(theirs) else theirs)[
                min(len(mine), len(theirs))
            ]
            absent = peer if step.rank == rank else rank
            raise _error(self.table, step, f"rank {absent} has no counterpart for {message}")


def _run(table: ScheduleTable, messages: _Messages | None) -> None:
    """Runs all rows together; an error where they get stuck."""
    rows = [list(table.steps(rank)) for rank in range(table.pp_size)]
    position = [0] * table.pp_size
    done: set[_Done] = set()
    posted: set[_Message] = set()  # by their senders
    waiting: dict[_Done | _Message, list[int]] = {}
    ready = deque(range(table.pp_size))

    def missing(step: Step) -> Iterator[_Done | _Message]:
        """What the step waits for: a neighbour's result, or the message that brings it."""
        for leaf in step.action.leaves:
            need = _needs(table, leaf) if leaf.kind.is_compute else None
            if need is None:
                continue
            source = table.stage_to_rank[need[0]]
            if messages is None or source == step.rank:
                if need not in done:
                    yield need
            elif (sent := _Message(source, step.rank, need[1], need[0], need[2])) not in posted:
                yield sent

    def wake(key: _Done | _Message) -> None:
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
                    if (result := _gives(leaf)) is not None:
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
    waiting: dict[_Done | _Message, list[int]],
) -> None:
    """Names the circle: who waits for whom, from the lowest rank in it."""
    needs: dict[int, _Done] = {}
    for key, ranks in waiting.items():
        need = (key.stage, key.kind, key.microbatch) if isinstance(key, _Message) else key
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
