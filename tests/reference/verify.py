"""Whether a table can run, written from the definition: slow, and by other means than the core.

Order is looked up in columns, weights and reductions are matched as words, deadlock under buffered
sends is found by running the rows with queues between them, and under rendezvous by looking for a
circle in the graph of what waits for what.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from hfpp.plan.schedules.actions import Action, ActionKind

K = ActionKind
Rows = Sequence[Sequence[Action | None]]

BEFORE = {
    K.FULL_BACKWARD: (K.FORWARD,),
    K.BACKWARD_INPUT: (K.FORWARD,),
    K.BACKWARD_WEIGHT: (K.BACKWARD_INPUT,),
    K.SEND_FORWARD: (K.FORWARD,),
    K.SEND_BACKWARD: (K.FULL_BACKWARD, K.BACKWARD_INPUT),
    K.WAIT_SEND_FORWARD: (K.SEND_FORWARD,),
    K.WAIT_SEND_BACKWARD: (K.SEND_BACKWARD,),
}
"""One of these comes in an earlier column, of the same stage and microbatch."""
BACKWARDS = (K.FULL_BACKWARD, K.BACKWARD_INPUT)
SENDS = {K.SEND_FORWARD: (1, K.RECEIVE_FORWARD), K.SEND_BACKWARD: (-1, K.RECEIVE_BACKWARD)}
RECEIVES = {K.RECEIVE_FORWARD: (-1, K.SEND_FORWARD), K.RECEIVE_BACKWARD: (1, K.SEND_BACKWARD)}
WAITS = {K.WAIT_SEND_FORWARD: K.SEND_FORWARD, K.WAIT_SEND_BACKWARD: K.SEND_BACKWARD}


class Verdict(NamedTuple):
    """What is wrong, "" if nothing: placement, rows, messages, deadlock or rendezvous.

    "deadlock": also with buffered sends; "rendezvous": only without.
    """

    problem: str
    peaks: tuple[int, ...] = ()  # of live activations, by rank


def verdict(rows: Rows) -> Verdict:
    """What the verifier should find."""
    table = _Table(rows)
    if not table.placed():
        return Verdict("placement")
    if not table.rows_are_right():
        return Verdict("rows")
    if not table.messages_match():
        return Verdict("messages")
    if not table.runs_with_queues():
        assert not table.runs_by_rendezvous()
        return Verdict("deadlock")
    if not table.runs_by_rendezvous():
        return Verdict("rendezvous")
    return Verdict("", tuple(map(table.peak, rows)))


class _Table:
    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.places: dict[Action, list[tuple[int, int]]] = defaultdict(list)
        for rank, row in enumerate(rows):
            for column, action in enumerate(row):
                for leaf in action.leaves if action else ():
                    self.places[leaf].append((rank, column))
        kinds = {leaf.kind for leaf in self.places}
        self.communicates = any(not kind.is_compute for kind in kinds)
        self.n = max(leaf.microbatch + 1 for leaf in self.places if leaf.microbatch is not None)
        homes: dict[int, set[int]] = defaultdict(set)
        for leaf, places in self.places.items():
            if leaf.kind.is_compute:
                homes[leaf.stage] |= {rank for rank, _ in places}
        self.homes = homes

    # Placement

    def placed(self) -> bool:
        size, count = len(self.rows), len(self.homes)
        if sorted(self.homes) != list(range(count)) or any(len(h) > 1 for h in self.homes.values()):
            return False
        self.home = [min(self.homes[stage]) for stage in range(count)]
        ranks = list(range(size))
        loop = ranks * (count // size)
        return self.home in (loop, ranks + ranks[::-1])

    # Rows

    def rows_are_right(self) -> bool:
        return (
            all(
                action is None or not action.parts or all(p.kind.is_compute for p in action.parts)
                for row in self.rows
                for action in row
            )
            and all(map(self.leaf_is_right, self.places))
            and self.is_complete()
            and all(map(self.weights_are_there, range(len(self.home))))
            and all(map(self.reductions_are_in_turn, range(len(self.rows))))
            and self.waits_for_all_sends_or_none()
        )

    def leaf_is_right(self, leaf: Action) -> bool:
        places = self.places[leaf]
        if leaf.stage >= len(self.home) or any(rank != self.home[leaf.stage] for rank, _ in places):
            return False
        if leaf.kind in (K.UNSHARD, K.RESHARD):
            return True
        if len(places) > 1:
            return False
        if leaf.kind in BEFORE and not any(
            self.is_before(leaf._replace(kind=kind), leaf) for kind in BEFORE[leaf.kind]
        ):
            return False
        if leaf.kind in SENDS and not self.crosses(leaf.stage, leaf.stage + SENDS[leaf.kind][0]):
            return False
        if leaf.kind in RECEIVES:
            return self.crosses(leaf.stage, leaf.stage + RECEIVES[leaf.kind][0])
        if not self.communicates:
            return True
        if leaf.kind is K.FORWARD and self.crosses(leaf.stage, leaf.stage - 1):
            return self.is_before(leaf._replace(kind=K.RECEIVE_FORWARD), leaf)
        if leaf.kind in BACKWARDS and self.crosses(leaf.stage, leaf.stage + 1):
            return self.is_before(leaf._replace(kind=K.RECEIVE_BACKWARD), leaf)
        return True

    def is_before(self, first: Action, second: Action) -> bool:
        return first in self.places and self.places[first][0][1] < self.places[second][0][1]

    def crosses(self, stage: int, other: int) -> bool:
        return 0 <= other < len(self.home) and self.home[stage] != self.home[other]

    def is_complete(self) -> bool:
        ways = (
            {K.FORWARD, K.FULL_BACKWARD},
            {K.FORWARD, K.BACKWARD_INPUT, K.BACKWARD_WEIGHT},
        )
        cells = [(stage, m) for stage in range(len(self.home)) for m in range(self.n)]
        return all(
            {kind for kind in set.union(*ways) if Action(stage, kind, m) in self.places} in ways
            for stage, m in cells
        )

    def events(self, rank: int) -> Iterator[Action]:
        for action in self.rows[rank]:
            yield from action.leaves if action else ()

    def weights_are_there(self, stage: int) -> bool:
        """One letter per action of the stage: gathered, used, given back, any number of times."""
        letters = {K.UNSHARD: "u", K.RESHARD: "r"}
        word = "".join(
            letters.get(leaf.kind, "c")
            for leaf in self.events(self.home[stage])
            if leaf.stage == stage and (leaf.kind.is_compute or leaf.kind in letters)
        )
        return re.fullmatch(r"c+|(uc+r)+", word) is not None

    def reductions_are_in_turn(self, rank: int) -> bool:
        events = list(self.events(rank))
        for i, leaf in enumerate(events):
            if leaf.kind is K.REDUCE_GRAD and any(
                later.kind in (K.FULL_BACKWARD, K.BACKWARD_WEIGHT) and later.stage == leaf.stage
                for later in events[i:]
            ):
                return False
        kinds = (K.REDUCE_GRAD, K.WAIT_REDUCE_GRAD)
        turns = [leaf for leaf in events if leaf.kind in kinds]
        if K.WAIT_REDUCE_GRAD not in {leaf.kind for leaf in turns}:
            return True
        pairs = [leaf._replace(kind=kind) for leaf in turns[::2] for kind in kinds]
        return turns == pairs

    def waits_for_all_sends_or_none(self) -> bool:
        waited = {
            leaf._replace(kind=WAITS[leaf.kind]) for leaf in self.places if leaf.kind in WAITS
        }
        return not waited or waited == {leaf for leaf in self.places if leaf.kind in SENDS}

    # Messages

    def peer(self, message: Action) -> Action:
        step, kind = (SENDS | RECEIVES)[message.kind]
        return message._replace(stage=message.stage + step, kind=kind)

    def messages_match(self) -> bool:
        sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
        received: dict[tuple[int, int], list[Action]] = defaultdict(list)
        for rank in range(len(self.rows)):
            for leaf in self.events(rank):
                if leaf.kind in SENDS:
                    sent[rank, self.home[self.peer(leaf).stage]].append(leaf)
                elif leaf.kind in RECEIVES:
                    other = self.peer(leaf)
                    received[self.home[other.stage], rank].append(other)
        return sent == received

    # Deadlock

    def needs(self, leaf: Action) -> tuple[int, bool, int] | None:
        """The result that a computation takes: of a stage, forward or not, of a microbatch."""
        assert leaf.microbatch is not None
        if leaf.kind is K.FORWARD and leaf.stage > 0:
            return leaf.stage - 1, True, leaf.microbatch
        if leaf.kind in BACKWARDS and leaf.stage + 1 < len(self.home):
            return leaf.stage + 1, False, leaf.microbatch
        return None

    def runs_with_queues(self) -> bool:
        """Every rank in turn does as much as it can; sends put values into queues."""
        todo = [deque(action for action in row if action) for row in self.rows]
        have: list[set[tuple[int, bool, int]]] = [set() for _ in self.rows]
        channels: dict[tuple[int, int], deque[tuple[int, bool, int]]] = defaultdict(deque)
        posted: dict[tuple[int, int], deque[tuple[int, bool, int]]] = defaultdict(deque)

        def step(rank: int, action: Action) -> bool:
            for pair, wanted in posted.items():
                while pair[1] == rank and wanted and channels[pair]:
                    value = channels[pair].popleft()
                    assert value == wanted.popleft(), "the order of messages was checked"
                    have[rank].add(value)
            leaves = [leaf for leaf in action.leaves if leaf.kind.is_compute]
            if not all(need is None or need in have[rank] for need in map(self.needs, leaves)):
                return False
            for leaf in action.leaves:
                assert leaf.microbatch is not None or not leaf.kind.has_microbatch
                if leaf.kind in SENDS or leaf.kind in RECEIVES:
                    other = self.home[self.peer(leaf).stage]
                    send = leaf if leaf.kind in SENDS else self.peer(leaf)
                    value = (send.stage, send.kind is K.SEND_FORWARD, send.microbatch or 0)
                    if leaf.kind in SENDS:
                        channels[rank, other].append(value)
                    else:
                        posted[other, rank].append(value)
                elif leaf.kind is K.FORWARD or leaf.kind in BACKWARDS:
                    value = (leaf.stage, leaf.kind is K.FORWARD, leaf.microbatch or 0)
                    for takers in have if not self.communicates else [have[rank]]:
                        takers.add(value)
            return True

        moved = True
        while moved:
            moved = False
            for rank, actions in enumerate(todo):
                while actions and step(rank, actions[0]):
                    actions.popleft()
                    moved = True
        return not any(todo)

    def runs_by_rendezvous(self) -> bool:
        """Whether nothing waits for itself in the end.

        Nodes are a rank's columns, when the rank passes them, and messages, when they are over. A
        message is over when both its ends are posted and, on both ranks, the one before it is over.
        """
        graph: TopologicalSorter[object] = TopologicalSorter()
        made = {
            (leaf.stage, leaf.kind is K.FORWARD, leaf.microbatch): places[0]
            for leaf, places in self.places.items()
            if leaf.kind is K.FORWARD or leaf.kind in BACKWARDS
        }
        for rank, row in enumerate(self.rows):
            message_before: Action | None = None
            for column, action in enumerate(row):
                passed = (rank, column)
                graph.add(passed)
                if column:
                    graph.add(passed, (rank, column - 1))
                for leaf in action.leaves if action else ():
                    if leaf.kind in SENDS or leaf.kind in RECEIVES:
                        message = leaf if leaf.kind in SENDS else self.peer(leaf)
                        graph.add(message, passed)
                        if message_before is not None:
                            graph.add(message, message_before)
                        message_before = message
                    elif leaf.kind in WAITS:
                        graph.add(passed, leaf._replace(kind=WAITS[leaf.kind]))
                    elif leaf.kind.is_compute and (need := self.needs(leaf)) is not None:
                        if self.communicates and self.home[need[0]] != rank:
                            kind = K.SEND_FORWARD if need[1] else K.SEND_BACKWARD
                            graph.add(passed, Action(need[0], kind, need[2]))
                        else:
                            graph.add(passed, made[need])
        try:
            graph.prepare()
        except CycleError:
            return False
        return True

    # Memory

    @staticmethod
    def peak(row: Sequence[Action | None]) -> int:
        live: set[tuple[int, int | None]] = set()
        most = 0
        for action in row:
            leaves = action.leaves if action else ()
            live |= {(a.stage, a.microbatch) for a in leaves if a.kind is K.FORWARD}
            most = max(most, len(live))
            ended = (K.FULL_BACKWARD, K.BACKWARD_WEIGHT)
            live -= {(a.stage, a.microbatch) for a in leaves if a.kind in ended}
        return most
