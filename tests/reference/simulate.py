"""A simulated step the slow, obvious way: a graph of everything that happens, relaxed.

What happens is a node with a duration: every column of every row, every transfer. Every node begins
when all that it comes after has begun or ended. Times rise from zero until nothing changes any
more; where they still rise after as many sweeps as there are nodes, the nodes wait in a circle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from hfpp.plan.costs import UnitCost
from hfpp.plan.schedules.actions import Action, ActionKind, ScheduleTable

F, B = ActionKind.FORWARD, ActionKind.FULL_BACKWARD
I, W = ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT  # noqa: E741 (the field's letters)
SENDS = {ActionKind.SEND_FORWARD: False, ActionKind.SEND_BACKWARD: True}
RECEIVES = {ActionKind.RECEIVE_FORWARD: False, ActionKind.RECEIVE_BACKWARD: True}
WAITS = {ActionKind.WAIT_SEND_FORWARD: False, ActionKind.WAIT_SEND_BACKWARD: True}

Message = tuple[bool, int, int]
"""Whether a gradient, the stage that makes it, the microbatch."""


class Circle(Exception):
    """The nodes wait for each other."""


@dataclass(eq=False)
class Node:
    seconds: float = 0.0
    action: Action | None = None
    message: Message | None = None
    ends: list[Node] = field(default_factory=list)  # it begins after these have ended,
    starts: list[Node] = field(default_factory=list)  # and no sooner than these begin
    start: float = 0.0

    @property
    def end(self) -> float:
        return self.start + self.seconds


@dataclass
class Step:
    """Nodes by rank in the order in which the rank runs them, and transfers by message."""

    rows: list[list[Node]]
    moves: dict[Message, Node]
    makers: dict[Message, Node]
    sends: dict[Message, Node]
    receives: dict[Message, Node]
    rank_of: Sequence[int]
    inputs: Callable[[Node], list[Message]]

    @property
    def step_time(self) -> float:
        return max(node.end for row in self.rows for node in row)


def run(
    table: ScheduleTable,
    costs: Sequence[UnitCost],
    *,
    seconds: Callable[[Message], float],
    mode: str,
    overlap_gain: float = 0.0,
) -> Step:
    """Runs a table; `mode` is "beside" (overlap) or "within" (none).

    Raises:
        Circle: it does not run to its end.
    """
    rank_of, spelled_out = table.stage_to_rank, table.has_communication
    last = len(rank_of) - 1
    moves: dict[Message, Node] = {}
    makers: dict[Message, Node] = {}
    sends: dict[Message, Node] = {}
    receives: dict[Message, Node] = {}

    def crosses(message: Message) -> bool:
        gradient, stage, _ = message
        other = stage - 1 if gradient else stage + 1
        return 0 <= other <= last and rank_of[other] != rank_of[stage]

    def needed(leaf: Action) -> Message | None:
        assert leaf.microbatch is not None
        if leaf.kind is F and leaf.stage > 0:
            return (False, leaf.stage - 1, leaf.microbatch)
        if leaf.kind in (B, I) and leaf.stage < last:
            return (True, leaf.stage + 1, leaf.microbatch)
        return None

    def made(leaf: Action) -> Message | None:
        assert leaf.microbatch is not None
        return None if leaf.kind is W else (leaf.kind is not F, leaf.stage, leaf.microbatch)

    def inputs(node: Node) -> list[Message]:
        leaves = node.action.leaves if node.action and node.action.kind.is_compute else ()
        found = (needed(leaf) for leaf in leaves)
        return [message for message in found if message is not None]

    def time_of(leaf: Action) -> float:
        cost = costs[leaf.stage]
        times = {F: cost.forward, B: cost.backward}
        return (times | {I: cost.backward_input, W: cost.backward_weight})[leaf.kind]

    def time_of_group(leaves: Sequence[Action]) -> float:
        times = [time_of(leaf) for leaf in leaves]
        total = 0.0
        for time in times:
            total += time
        return total - overlap_gain * (total - max(times))

    # Every row as a list of nodes; without overlap with nodes for sending and receiving.
    rows: list[list[Node]] = []
    for rank in range(table.pp_size):
        row: list[Node] = []
        for action in table.row(rank):
            if action is None:
                continue
            node = Node(action=action)
            if action.kind.is_compute:
                node.seconds = time_of_group(action.leaves)
                if mode == "within":
                    for message in filter(crosses, inputs(node)):
                        receiving = Node(seconds(message), message=message)
                        moves[message] = receiving
                        row.append(receiving)
                row.append(node)
                for leaf in action.leaves:
                    if (message := made(leaf)) is None:
                        continue
                    makers[message] = node
                    if crosses(message) and not spelled_out:
                        sends[message] = Node(seconds(message), message=message)
                        if mode == "beside":
                            sends[message].seconds = 0.0
                        row.append(sends[message])
                continue
            row.append(node)
            m = action.microbatch
            if action.kind in SENDS:
                assert m is not None
                node.message = (SENDS[action.kind], action.stage, m)
                sends[node.message] = node
                node.seconds = 0.0 if mode == "beside" else seconds(node.message)
            elif action.kind in RECEIVES:
                assert m is not None
                gradient = RECEIVES[action.kind]
                node.message = (gradient, action.stage + (1 if gradient else -1), m)
                receives[node.message] = node
            elif action.kind in WAITS:
                assert m is not None
                node.message = (WAITS[action.kind], action.stage, m)
        rows.append(row)

    # Transfers beside the rows: one after another on each pair of ranks.
    if mode == "beside":
        on_link: dict[tuple[int, int], list[Node]] = defaultdict(list)
        for rank, row in enumerate(rows):
            for node in row:
                if node.message is None or sends.get(node.message) is not node:
                    continue
                message = node.message
                target = rank_of[message[1] - 1 if message[0] else message[1] + 1]
                move = moves[message] = Node(seconds(message), message=message)
                move.ends.append(node)
                if spelled_out:
                    move.starts.append(receives[message])
                move.ends.extend(on_link[rank, target][-1:])
                on_link[rank, target].append(move)

    # What each node waits for.
    for row in rows:
        for before, node in pairwise(row):
            node.ends.append(before)
        for node in row:
            for message in inputs(node):
                node.ends.append(moves[message] if crosses(message) else makers[message])
            if node.message is not None and moves.get(node.message) is node:
                node.starts.append(sends[node.message])
            if node.action is not None and node.action.kind in WAITS and mode == "beside":
                assert node.message is not None
                node.ends.append(moves[node.message])

    everything = [node for row in rows for node in row]
    everything += [move for move in moves.values() if mode == "beside"]
    for _ in range(len(everything) + 1):
        changed = False
        for node in everything:
            times = [n.end for n in node.ends] + [n.start for n in node.starts]
            start = max(times, default=0.0)
            changed = changed or start != node.start
            node.start = start
        if not changed:
            _refuse_circles(everything)
            return Step(rows, moves, makers, sends, receives, rank_of, inputs)
    raise Circle


def _refuse_circles(nodes: list[Node]) -> None:
    """A circle of nodes that all take no time does not rise: it is looked for by itself."""
    waiting = {node: {*node.ends, *node.starts} for node in nodes}
    while free := [node for node, before in waiting.items() if not before & waiting.keys()]:
        for node in free:
            del waiting[node]
    if waiting:
        raise Circle


def rank_figures(
    step: Step, rank: int, costs: Sequence[UnitCost], nbytes: Callable[[Message], int], mode: str
) -> dict[str, Any]:
    """What `RankSimulation` says of one rank, counted from the nodes."""
    row = step.rows[rank]
    computes = [node for node in row if node.action and node.action.kind.is_compute]
    if not computes:
        return {"busy": 0.0, "start": step.step_time, "end": 0.0}
    idle = dict.fromkeys(("activations", "gradients", "communication"), 0.0)
    first, last = row.index(computes[0]), row.index(computes[-1])
    for before, node in zip(row[first:last], row[first + 1 : last + 1], strict=True):
        at = before.end
        if node in computes:
            late = [m for m in step.inputs(node) if m in step.moves and mode == "beside"]
            for message in late:
                if step.moves[message].end == node.start > at:
                    ready = min(max(step.sends[message].end, at), node.start)
                    idle["gradients" if message[0] else "activations"] += ready - at
                    at = ready
                    break
        elif node.message is not None and step.moves.get(node.message) is node:
            idle["gradients" if node.message[0] else "activations"] += node.start - at
            at = node.start
        idle["communication"] += node.start - at
        if node not in computes:
            idle["communication"] += node.seconds
    return {
        "busy": sum(node.seconds for node in computes),
        "start": computes[0].start,
        **idle,
        "end": step.step_time - computes[-1].end,
        "first": computes[0].start,
        "last": computes[-1].end,
        **_held(step, rank, computes, costs),
        **_buffers(step, rank, computes, nbytes, mode),
    }


def _held(step: Step, rank: int, computes: list[Node], costs: Sequence[UnitCost]) -> dict[str, int]:
    live: set[tuple[int, int | None]] = set()
    split: set[tuple[int, int | None]] = set()
    peaks = [(0, 0)]

    def note() -> None:
        held = sum(costs[s].activation_bytes for s, _ in live)
        peaks.append((len(live) + len(split), held + sum(costs[s].weight_bytes for s, _ in split)))

    for node in computes:
        assert node.action is not None
        leaves = node.action.leaves
        live |= {(leaf.stage, leaf.microbatch) for leaf in leaves if leaf.kind is F}
        note()
        for leaf in leaves:
            pair = (leaf.stage, leaf.microbatch)
            if leaf.kind in (B, I):
                live.remove(pair)
            if leaf.kind is I:
                split.add(pair)
            if leaf.kind is W:
                split.remove(pair)
            note()
    return {
        "peak_live": max(count for count, _ in peaks),
        "peak_activation_bytes": max(held for _, held in peaks),
    }


def _buffers(
    step: Step, rank: int, computes: list[Node], nbytes: Callable[[Message], int], mode: str
) -> dict[str, int]:
    row = step.rows[rank]
    mine = {
        message: node
        for node in computes
        for message in step.inputs(node)
        if step.rank_of[message[1]] != rank
    }
    sent = [m for m in step.sends if step.rank_of[m[1]] == rank]
    if mode == "beside" and not step.receives:
        spans = [(step.moves[m].start, taker.end, nbytes(m)) for m, taker in mine.items()]
        moments = [start for start, _, _ in spans]
    else:  # by the order of the row
        begins = step.receives if step.receives else step.moves
        place = {node: index for index, node in enumerate(row)}
        spans = [(place[begins[m]], place[taker], nbytes(m)) for m, taker in mine.items()]
        moments = [start for start, _, _ in spans]
    held = [[size for start, end, size in spans if start <= t < end] for t in moments]
    return {
        "peak_receive_buffers": max(map(len, held), default=0),
        "peak_receive_bytes": max(map(sum, held), default=0),
        "sent_bytes": sum(map(nbytes, sent)),
        "received_bytes": sum(map(nbytes, mine)),
    }
