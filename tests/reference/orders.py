"""The order of actions of each schedule, rank by rank: slow, obvious.

Every function gives one rank's compute actions, the same and in the same order as torch runs them;
idle time is left out, as it follows from the order and the costs.
"""

from __future__ import annotations

from collections import Counter, deque
from itertools import permutations
from typing import TYPE_CHECKING

from hfpp.plan.schedules.actions import Action, ActionKind

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "dual_pipe_v",
    "forward_only",
    "gpipe",
    "interleaved_1f1b",
    "interleaved_zero_bubble",
    "looped_bfs",
    "one_f_one_b",
    "building_block",
    "rank_actions",
    "zbv_zero_bubble",
]

F, B = ActionKind.FORWARD, ActionKind.FULL_BACKWARD
I, W = ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT  # noqa: E741 (the field's letters)


def forward_only(stages: Sequence[int], n_microbatches: int) -> list[Action]:
    """Forwards only, breadth first: for a rank that holds `stages`, in any placement.

    Sorted by stage, then microbatch: an order of which all ranks see their part cannot deadlock.
    """
    return [
        Action(stage, F, microbatch)
        for stage in sorted(stages)
        for microbatch in range(n_microbatches)
    ]


def gpipe(rank: int, n_microbatches: int) -> list[Action]:
    """All forwards, then all backwards, both in the order of microbatches."""
    return [Action(rank, kind, m) for kind in (F, B) for m in range(n_microbatches)]


def one_f_one_b(rank: int, pp_size: int, n_microbatches: int) -> list[Action]:
    """Warm up by one forward per stage from here to the end, then one backward per forward."""
    warmup = min(n_microbatches, pp_size - rank)
    actions = [Action(rank, F, m) for m in range(warmup)]
    for m in range(n_microbatches):
        actions.append(Action(rank, B, m))
        if m + warmup < n_microbatches:
            actions.append(Action(rank, F, m + warmup))
    return actions


def looped_bfs(rank: int, pp_size: int, stages_per_rank: int, n_microbatches: int) -> list[Action]:
    """Breadth first: all microbatches of a stage before the rank's next stage."""
    stages = range(rank, pp_size * stages_per_rank, pp_size)
    backwards = [Action(s, B, m) for s in stages[::-1] for m in range(n_microbatches)[::-1]]
    return forward_only(stages, n_microbatches) + backwards


def interleaved_1f1b(
    rank: int, pp_size: int, stages_per_rank: int, n_microbatches: int
) -> list[Action]:
    """Depth first in rounds of about `pp_size` microbatches, then one forward, one backward."""
    return _interleaved(rank, pp_size, stages_per_rank, n_microbatches, split_backward=False)


def interleaved_zero_bubble(
    rank: int, pp_size: int, stages_per_rank: int, n_microbatches: int
) -> list[Action]:
    """Interleaved 1F1B with the weights' gradients put off to fill the end of the step (ZB1P)."""
    return _interleaved(rank, pp_size, stages_per_rank, n_microbatches, split_backward=True)


def _interleaved(
    rank: int, pp_size: int, stages_per_rank: int, n_microbatches: int, *, split_backward: bool
) -> list[Action]:
    per_round = n_microbatches // max(1, n_microbatches // pp_size)
    total = stages_per_rank * n_microbatches
    hops = pp_size - 1 - rank
    warmup = (stages_per_rank - 1) * per_round + (1 if split_backward else 2) * hops
    warmup = min(warmup, total)
    put_off = rank  # how many of the weights' gradients a split backward holds back

    forwards = iter(_rounds(rank, pp_size, stages_per_rank, total, per_round, ascending=True))
    backwards = _rounds(rank, pp_size, stages_per_rank, total, per_round, ascending=False)
    actions = [Action(stage, F, m) for stage, m in (next(forwards) for _ in range(warmup))]
    weights = iter(backwards)
    for done, (stage, m) in enumerate(backwards):
        if (following := next(forwards, None)) is not None:
            actions.append(Action(following[0], F, following[1]))
        actions.append(Action(stage, I if split_backward else B, m))
        if split_backward and done >= put_off:
            weight_stage, weight_m = next(weights)
            actions.append(Action(weight_stage, W, weight_m))
    if split_backward:
        actions.extend(Action(stage, W, m) for stage, m in weights)
    return actions


def _rounds(
    rank: int, pp_size: int, stages_per_rank: int, total: int, per_round: int, *, ascending: bool
) -> list[tuple[int, int]]:
    """(stage, microbatch) in rounds: `per_round` microbatches through every local stage in turn."""
    seen: Counter[int] = Counter()
    order = []
    for step in range(total):
        local = (step // per_round) % stages_per_rank
        if not ascending:
            local = stages_per_rank - 1 - local
        order.append((local * pp_size + rank, seen[local]))
        seen[local] += 1
    return order


class _Writer:
    """Appends actions of the two stages of a v, counting microbatches per stage and kind."""

    def __init__(self, rank: int, pp_size: int) -> None:
        self.actions: list[Action] = []
        self.stages = (rank, 2 * pp_size - 1 - rank)
        self.counts: Counter[tuple[int, ActionKind]] = Counter()
        self.put_off: deque[Action] = deque()  # weights' gradients whose input part is done

    def next(self, chunk: int, kind: ActionKind) -> Action:
        """The next action of a kind; a full backward counts with the input backwards."""
        counted = I if kind is B else kind
        microbatch = self.counts[chunk, counted]
        self.counts[chunk, counted] += 1
        return Action(self.stages[chunk], kind, microbatch)

    def add(self, chunk: int, kind: ActionKind) -> None:
        action = self.next(chunk, kind)
        self.actions.append(action)
        if kind is I:
            self.put_off.append(action._replace(kind=W))

    def add_overlap(self, forward_chunk: int, backward_chunk: int) -> None:
        parts = (self.next(forward_chunk, F), self.next(backward_chunk, B))
        self.actions.append(Action(-1, ActionKind.OVERLAP, None, parts))

    def add_put_off_weight(self) -> None:
        if self.put_off:
            self.actions.append(self.put_off.popleft())

    def done(self, chunk: int, kind: ActionKind) -> int:
        return self.counts[chunk, kind]


def zbv_zero_bubble(rank: int, pp_size: int, n_microbatches: int) -> list[Action]:
    """ZB-V: two stages per rank in a v, every backward split (arXiv 2401.10241, section 6).

    Laid out for at least `2 * pp_size - 1` microbatches; what is too many is left out.
    """
    planned = max(2 * pp_size - 1, n_microbatches)
    w = _Writer(rank, pp_size)

    def backward(chunk: int) -> None:
        w.add(chunk, I)
        w.add(chunk, W)

    for _ in range(2 * (pp_size - rank) - 1):
        w.add(0, F)
    for _ in range(rank):
        w.add(1, F)
        w.add(0, F)
    for _ in range(pp_size - rank):
        w.add(1, F)
        backward(1)
    while w.done(1, F) < w.done(0, F) or w.done(0, F) < planned:
        if w.done(0, F) < planned:
            w.add(0, F)
        backward(0)
        w.add(1, F)
        backward(1)
    for _ in range(rank):
        w.add(0, I)
        w.add(1, I)
    for _ in range(pp_size - rank):
        backward(0)
    for chunk in (1, 0):
        while w.done(chunk, W) < w.done(chunk, I):
            w.add(chunk, W)
    return [a for a in w.actions if a.microbatch is not None and a.microbatch < n_microbatches]


def dual_pipe_v(rank: int, pp_size: int, n_microbatches: int) -> list[Action]:
    """DualPipeV: two stages per rank in a v, forwards overlapped with backwards of the other."""
    w = _Writer(rank, pp_size)
    hops, here = pp_size - 1 - rank, rank + 1

    for _ in range(2 * hops):
        w.add(0, F)
    for _ in range(here):
        w.add(0, F)
        w.add(1, F)
    for _ in range(hops):
        w.add(1, I)
        w.add_put_off_weight()
        w.add(1, F)
    for i in range(n_microbatches - 2 * pp_size + here):
        if i == 0 and hops == 0:  # apart, for a smaller bubble
            w.add(0, F)
            w.add(1, B)
        else:
            w.add_overlap(0, 1)
        w.add_overlap(1, 0)
    for _ in range(hops):
        w.add(1, B)
        w.add_overlap(1, 0)
    split = False  # from the middle of this phase on, backwards are split
    for i in range(here):
        middle = i == here // 2
        split = split or (middle and rank % 2 == 1)
        w.add(1, I if split else B)
        split = split or (middle and rank % 2 == 0)
        w.add(0, I if split else B)
    for _ in range(hops):
        w.add_put_off_weight()
        w.add(0, I if split else B)
    while w.put_off:
        w.add_put_off_weight()
    return w.actions


def zb_h2(rank: int, pp_size: int, n_microbatches: int) -> list[Action]:
    """ZB-H2 (arXiv 2401.10241, section 2.2), as a rank that looks at what it has decides.

    It runs a weights' part when more than ``2 * rank`` wait, else a forward while fewer than
    ``2 * (pp_size - rank) - 1`` microbatches are between forward and input part, else an input
    part, and what weights' parts are left in the end.
    """
    done = dict.fromkeys((F, I, W), 0)
    actions = []
    while done[W] < n_microbatches:
        if done[I] - done[W] > 2 * rank:
            kind = W
        elif done[F] < n_microbatches and done[F] - done[I] < 2 * (pp_size - rank) - 1:
            kind = F
        else:
            kind = I if done[I] < n_microbatches else W
        actions.append(Action(rank, kind, done[kind]))
        done[kind] += 1
    return actions


HOPS = {
    "VHalf": lambda pp_size: ((1, 2), (1, 0, 0) if pp_size % 2 else (3, 0, 4)),
    "VMin": lambda pp_size: ((1, 1), (0, 0, 0) if pp_size % 3 else (2, 0, 2)),
}
"""Of a v schedule: the units from rank to rank, down and up, and those to wait at each turn."""


def building_block(
    pp_size: int, hops: tuple[int, int], waits: tuple[int, int, int]
) -> list[dict[tuple[int, ActionKind], int]] | None:
    """When each rank computes what of microbatch 0 (arXiv 2405.15362), walking the v twice.

    Microbatch m does the same 6 * m units later. Forward, input part and weights' part take a unit.

    Args:
        pp_size: number of ranks.
        hops: units from a stage to the next rank's, on the way down and on the way up.
        waits: units to wait where the way turns: at the last rank before the forward up, at the
            first before the backward down, at the last before the backward up.

    Returns:
        By rank: start by chunk and kind; None where two computations would meet on a rank.
    """
    ranks = range(pp_size)
    starts: list[dict[tuple[int, ActionKind], int]] = [{} for _ in ranks]
    now = 0
    for chunk, kind, way, hop, wait in (
        (0, F, ranks, hops[0], 0),
        (1, F, ranks[::-1], hops[1], waits[0]),
        (1, I, ranks, hops[0], waits[1]),
        (0, I, ranks[::-1], hops[1], waits[2]),
    ):
        now += wait
        for rank in way:
            starts[rank][chunk, kind] = now
            now += hop if rank != way[-1] else 1
    for times in starts:
        free = set(range(6)) - {start % 6 for start in times.values()}
        if len(free) != 2:
            return None
        delays = (
            tuple((unit - times[chunk, I]) % 6 for chunk, unit in ((1, first), (0, second)))
            for first, second in permutations(sorted(free))
        )
        best = min(delays, key=lambda delay: (sum(delay), abs(delay[0] - delay[1]), delay))
        times[1, W], times[0, W] = times[1, I] + best[0], times[0, I] + best[1]
    return starts


def repeated(
    block: list[dict[tuple[int, ActionKind], int]], rank: int, n_microbatches: int
) -> list[Action]:
    """One rank's computations of all microbatches in the order of their starts."""
    stages = (rank, 2 * len(block) - 1 - rank)
    starts = sorted(
        (start + 6 * m, stages[chunk], kind, m)
        for (chunk, kind), start in block[rank].items()
        for m in range(n_microbatches)
    )
    return [Action(stage, kind, m) for _, stage, kind, m in starts]


def _v_schedule(name: str, rank: int, pp_size: int, n_microbatches: int) -> list[Action]:
    block = building_block(pp_size, *HOPS[name](pp_size))
    assert block is not None
    return repeated(block, rank, n_microbatches)


def rank_actions(
    name: str, *, rank: int, pp_size: int, stages_per_rank: int, n_microbatches: int
) -> list[Action]:
    """One rank's compute actions of the schedule that torch calls `name`."""
    match name:
        case "GPipe":
            return gpipe(rank, n_microbatches)
        case "1F1B":
            return one_f_one_b(rank, pp_size, n_microbatches)
        case "Interleaved1F1B":
            return interleaved_1f1b(rank, pp_size, stages_per_rank, n_microbatches)
        case "LoopedBFS":
            return looped_bfs(rank, pp_size, stages_per_rank, n_microbatches)
        case "InterleavedZeroBubble":
            return interleaved_zero_bubble(rank, pp_size, stages_per_rank, n_microbatches)
        case "ZBVZeroBubble":
            return zbv_zero_bubble(rank, pp_size, n_microbatches)
        case "DualPipeV":
            return dual_pipe_v(rank, pp_size, n_microbatches)
        case "ZBH2":
            return zb_h2(rank, pp_size, n_microbatches)
        case "VHalf" | "VMin":
            return _v_schedule(name, rank, pp_size, n_microbatches)
        case _:
            raise KeyError(name)
