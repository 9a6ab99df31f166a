"""The messages between ranks that a table spells out, and whether both ends agree on them."""

from __future__ import annotations

from typing import NamedTuple

from hfpp.plan.actions import Action, ActionKind, ScheduleTable, Step
from hfpp.plan.dataflow import Result, needs, step_error

__all__ = ["Message", "Messages", "RECEIVES", "SENDS"]

_F, _B = ActionKind.FORWARD, ActionKind.FULL_BACKWARD
SENDS = {ActionKind.SEND_FORWARD: _F, ActionKind.SEND_BACKWARD: _B}
RECEIVES = {ActionKind.RECEIVE_FORWARD: _F, ActionKind.RECEIVE_BACKWARD: _B}


class Message(NamedTuple):
    """What crosses from one rank to another."""

    source: int
    target: int
    kind: ActionKind  # F: an activation to the next stage; B: a gradient to the one before
    stage: int  # of the sender
    microbatch: int

    def __str__(self) -> str:
        what = "activation" if self.kind is _F else "gradient"
        return f"the {what} of stage {self.stage}, microbatch {self.microbatch}"


class Messages:
    """The messages of a table that spells them out; checked to be posted alike on both ends."""

    def __init__(self, table: ScheduleTable) -> None:
        self.table = table
        self._sent: dict[Action, Message] = {}
        posts: dict[tuple[int, int], list[tuple[Message, Step]]] = {}
        received: dict[int, set[Result]] = {}
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

    def sent_by(self, leaf: Action) -> Message | None:
        """The message that an action sends; None for all other actions."""
        return self._sent.get(leaf)

    def of(self, leaf: Action, step: Step) -> Message | None:
        """The message that a send or receive is about; None for all other actions."""
        if leaf.kind in SENDS:
            kind, stage = SENDS[leaf.kind], leaf.stage
        elif leaf.kind in RECEIVES:
            kind = RECEIVES[leaf.kind]
            stage = leaf.stage - 1 if kind is _F else leaf.stage + 1
        else:
            return None
        target = stage + 1 if kind is _F else stage - 1
        last = self.table.num_stages - 1
        if not (0 <= stage <= last and 0 <= target <= last):
            raise step_error(self.table, step, f"{leaf} has no stage at the other end")
        source_rank = self.table.stage_to_rank[stage]
        target_rank = self.table.stage_to_rank[target]
        if source_rank == target_rank:
            raise step_error(
                self.table,
                step,
                f"stages {stage} and {target} live on the same rank, which hands values over "
                f"without {leaf.kind.value}",
            )
        assert leaf.microbatch is not None
        return Message(source_rank, target_rank, kind, stage, leaf.microbatch)

    def _check_received(self, step: Step, leaf: Action, have: set[Result]) -> None:
        need = needs(self.table, leaf)
        if need is None or self.table.stage_to_rank[need[0]] == step.rank or need in have:
            return
        kind = "RECV_F" if need[1] is _F else "RECV_B"
        raise step_error(
            self.table,
            step,
            f"{leaf} comes without {leaf.stage}{kind}{leaf.microbatch} before it on this rank",
        )

    def _check_mirrored(
        self,
        rank: int,
        peer: int,
        mine: list[tuple[Message, Step]],
        theirs: list[tuple[Message, Step]],
    ) -> None:
        """Both ranks of a pair see the same messages in the same order (else NCCL deadlocks)."""
        for (message, step), (other, other_step) in zip(mine, theirs, strict=False):
            if message != other:
                raise step_error(
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
            raise step_error(self.table, step, f"rank {absent} has no counterpart for {message}")
