"""The v schedule of least idle time that a search finds under a limit: slow, obvious."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from hfpp.plan.schedules.actions import Action, ActionKind, ScheduleTable
from tests.reference import orders, unit_time

if TYPE_CHECKING:
    from collections.abc import Iterator

F = ActionKind.FORWARD
I, W = ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT  # noqa: E741 (the field's letters)


class Rule(NamedTuple):
    """What a rank computes first.

    Attributes:
        precedence: (kind, whether it is of the stage on the way back), the first first.
        weights_for_memory: weights' parts come first where a forward lacks nothing but memory.
        spare: of the limit, what forwards of the stage on the way there leave free.
        share: what they leave free besides, for each rank before: numerator and denominator.
    """

    precedence: tuple[tuple[ActionKind, bool], ...]
    weights_for_memory: bool
    spare: int
    share: tuple[int, int]


THERE, BACK = False, True
PRECEDENCES = (
    ((I, THERE), (F, BACK), (F, THERE), (I, BACK)),
    ((F, BACK), (F, THERE), (I, THERE), (I, BACK)),
    ((I, BACK), (F, BACK), (F, THERE), (I, THERE)),
)
RULES = [
    Rule(*parts)
    for parts in product(PRECEDENCES, (True, False), (2, 1), ((1, 3), (2, 5), (1, 2), (2, 3)))
]


def search(pp_size: int, n: int, limit: int) -> list[list[Action]]:
    """The first of the orders that idle least: fixed ones, then by limit and rule."""

    def found() -> Iterator[list[list[Action]]]:
        for name in ("ZBVZeroBubble", "VHalf", "VMin"):
            rows = [
                orders.rank_actions(
                    name, rank=rank, pp_size=pp_size, stages_per_rank=2, n_microbatches=n
                )
                for rank in range(pp_size)
            ]
            if max(map(unit_time.peak_live, rows)) <= limit:
                yield rows
        for lower in range(limit, 1, -1):
            for rule in RULES:
                if scheduled := by_rule(pp_size, n, lower, rule):
                    yield scheduled

    return min(found(), key=_time)


def _time(rows: list[list[Action]]) -> int:
    return unit_time.run(ScheduleTable.from_rows("found", rows)).time


def by_rule(pp_size: int, n: int, limit: int, rule: Rule) -> list[list[Action]] | None:
    """Rows of all ranks, unit of time by unit of time; None where no rank can go on."""
    rows: list[list[Action]] = [[] for _ in range(pp_size)]
    done: Counter[tuple[int, ActionKind]] = Counter()  # microbatches by stage and kind
    while done.total() < 6 * n * pp_size:
        chosen = [_choice(rank, pp_size, n, limit, rule, done) for rank in range(pp_size)]
        if not any(chosen):
            return None
        for row, action in zip(rows, chosen, strict=True):
            if action is not None:
                row.append(action)
                done[action.stage, action.kind] += 1
    return rows


def _choice(
    rank: int,
    pp_size: int,
    n: int,
    limit: int,
    rule: Rule,
    done: Counter[tuple[int, ActionKind]],
) -> Action | None:
    stages = {THERE: rank, BACK: 2 * pp_size - 1 - rank}

    def following(kind: ActionKind, way: bool) -> Action | None:
        """The next microbatch's action, where its input is there."""
        stage = stages[way]
        m = done[stage, kind]
        ready = m < n and all(done[one] > m for one in _inputs(stage, kind, pp_size))
        return Action(stage, kind, m) if ready else None

    def live(way: bool) -> int:
        return done[stages[way], F] - done[stages[way], W]

    held = live(THERE) + live(BACK)
    above, below = rule.share
    most_there = max(1, limit - rule.spare - rank * above // below)
    lacks_memory = False
    found = None
    for kind, way in rule.precedence:
        action = following(kind, way)
        if action is None:
            continue
        if kind is F and (held == limit or (way == THERE and live(THERE) >= most_there)):
            lacks_memory = True
            continue
        found = action
        break
    if found is None or (lacks_memory and rule.weights_for_memory):
        weights = [w for w in (following(W, BACK), following(W, THERE)) if w is not None]
        if weights:  # the stage that has done fewer
            return min(weights, key=lambda w: w.microbatch or 0)
    return found


def _inputs(stage: int, kind: ActionKind, pp_size: int) -> list[tuple[int, ActionKind]]:
    """What must have been done for the same microbatch: stage and kind."""
    if kind is F:
        return [(stage - 1, F)] if stage > 0 else []
    if kind is W:
        return [(stage, I)]
    return [(stage, F)] + ([(stage + 1, I)] if stage < 2 * pp_size - 1 else [])
