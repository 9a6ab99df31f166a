"""Tables by hand and by chance, and what the verifier says of them."""

from __future__ import annotations

import re
from random import Random

from hfpp.errors import PipelineConfigError
from hfpp.plan.placement import ranks_by_stage
from hfpp.plan.schedules.actions import Action, ActionKind, ScheduleTable, parse_action
from hfpp.plan.schedules.verifier import verify
from tests.reference.verify import Rows

K = ActionKind
PLACE = re.compile(r"rank (\d+), column (\d+), action (\(.*?\)OVERLAP_F_B|\w+)")


def parse_rows(*rows: str) -> list[list[Action]]:
    """Rows of actions with blanks between them."""
    return [[a for text in row.split() if (a := parse_action(text))] for row in rows]


def problem_of(rows: Rows, **limit: int) -> str:
    """What the verifier says; "" where the table passes."""
    try:
        verify(ScheduleTable.from_rows("table", rows), **limit)
    except PipelineConfigError as error:
        return str(error)
    return ""


def assert_places_exist(message: str, rows: Rows) -> None:
    places = PLACE.findall(message)
    assert places, f"no rank, column and action in: {message}"
    for rank, column, action in places:
        assert str(rows[int(rank)][int(column)]) == action, message


def random_table(chance: Random) -> ScheduleTable:
    """Any order in which the computations can run, in any placement that the verifier knows."""
    size = chance.randint(1, 4)
    v = chance.random() < 0.3
    per_rank = 2 if v else chance.randint(1, 3)
    stages, n = size * per_rank, chance.randint(1, 5)
    home = ranks_by_stage(size, stages, "v" if v else "loop").row()
    split = chance.choice((0.0, 0.5, 1.0))
    eager = chance.random()  # how much rather a forward is run than a backward
    rows: list[list[Action]] = [[] for _ in range(size)]
    done: set[tuple[int, ActionKind, int]] = set()
    todo = {
        (stage, kind, m)
        for stage in range(stages)
        for m in range(n)
        for kind in (K.FORWARD, *((K.BACKWARD_INPUT, K.BACKWARD_WEIGHT) if chance.random() < split
                                  else (K.FULL_BACKWARD,)))
    }  # fmt: skip

    def ready(stage: int, kind: ActionKind, m: int) -> bool:
        if kind is K.FORWARD:
            return stage == 0 or (stage - 1, K.FORWARD, m) in done
        if kind is K.BACKWARD_WEIGHT:
            return (stage, K.BACKWARD_INPUT, m) in done
        after = {(stage + 1, K.FULL_BACKWARD, m), (stage + 1, K.BACKWARD_INPUT, m)}
        return (stage, K.FORWARD, m) in done and (stage == stages - 1 or bool(after & done))

    while todo:
        able = sorted(key for key in todo if ready(*key))
        forwards = [key for key in able if key[1] is K.FORWARD]
        others = [key for key in able if key[1] is not K.FORWARD]
        pool = forwards if not others or (forwards and chance.random() < eager) else others
        stage, kind, m = chance.choice(pool)
        parts = [Action(stage, kind, m)]
        partners = [key for key in others if home[key[0]] == home[stage]]
        if kind is K.FORWARD and partners and chance.random() < 0.2:
            parts.append(Action(*chance.choice(partners)))
            chance.shuffle(parts)
        group = Action(-1, K.OVERLAP, None, tuple(parts))
        rows[home[stage]].append(group if len(parts) > 1 else parts[0])
        for part in parts:
            assert part.microbatch is not None
            key = part.stage, part.kind, part.microbatch
            todo.remove(key)
            done.add(key)
    return ScheduleTable.from_rows("random", rows)
