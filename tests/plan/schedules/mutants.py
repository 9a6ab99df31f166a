"""Tables with one or two faults in them, most of which keep them from running."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from hfpp.plan.schedules.actions import Action, ActionKind, ScheduleTable

Rows = list[list[Action]]


def mutant(table: ScheduleTable, chance: Random) -> tuple[str, Rows]:
    """The rows of a table, changed once or twice, and how."""
    rows = [[step.action for step in table.steps(rank)] for rank in range(table.pp_size)]
    names = []
    for _ in range(chance.choice((1, 1, 1, 2))):
        name = chance.choices(list(_MUTATIONS), [3 if "move a " in n else 1 for n in _MUTATIONS])[0]
        _MUTATIONS[name](rows, chance)
        names.append(name)
    return " and ".join(names), rows


def _drop(rows: Rows, chance: Random) -> None:
    row, column = _place(rows, chance)
    del row[column]


def _double(rows: Rows, chance: Random) -> None:
    row, column = _place(rows, chance)
    row.insert(chance.randrange(len(row) + 1), row[column])


def _swap_neighbours(rows: Rows, chance: Random) -> None:
    row, column = _place(rows, chance)
    other = max(column - 1, 0)
    row[column], row[other] = row[other], row[column]


def _move_a_message(rows: Rows, chance: Random) -> None:
    row, column = _place(rows, chance, lambda a: "SEND" in a.kind or "RECV" in a.kind)
    _move(row, column, column + chance.randint(-4, 4))


def _move_a_computation(rows: Rows, chance: Random) -> None:
    row, column = _place(rows, chance, lambda a: a.kind.is_compute)
    _move(row, column, column + chance.randint(-4, 4))


def _move_a_block(rows: Rows, chance: Random) -> None:
    """A computation goes with its receive before it, or its send after it."""
    row, column = _place(rows, chance)
    length = chance.randint(2, 4)
    block = row[column : column + length]
    del row[column : column + length]
    to = max(0, column + chance.randint(-6, 6))
    row[to:to] = block


def _swap(rows: Rows, chance: Random) -> None:
    row, column = _place(rows, chance)
    other = chance.randrange(len(row))
    row[column], row[other] = row[other], row[column]


def _move_to_another_column(rows: Rows, chance: Random) -> None:
    row, column = _place(rows, chance)
    _move(row, column, chance.randrange(len(row)))


def _move_to_another_rank(rows: Rows, chance: Random) -> None:
    row, column = _place(rows, chance)
    action = row.pop(column)
    other = chance.choice(rows)
    other.insert(chance.randrange(len(other) + 1), action)


def _renumber_microbatch(rows: Rows, chance: Random) -> None:
    def change(leaf: Action) -> Action:
        if leaf.microbatch is None:
            return leaf
        return leaf._replace(microbatch=max(0, leaf.microbatch + chance.choice((-1, 1, 5))))

    _change(rows, chance, change)


def _renumber_stage(rows: Rows, chance: Random) -> None:
    step = chance.choice((-1, 1, len(rows)))
    _change(rows, chance, lambda leaf: leaf._replace(stage=max(0, leaf.stage + step)))


def _change_kind(rows: Rows, chance: Random) -> None:
    kinds = [kind for kind in ActionKind if kind is not ActionKind.OVERLAP]

    def change(leaf: Action) -> Action:
        kind = chance.choice(kinds)
        microbatch = (leaf.microbatch or 0) if kind.has_microbatch else None
        return leaf._replace(kind=kind, microbatch=microbatch)

    _change(rows, chance, change)


def _group_or_part(rows: Rows, chance: Random) -> None:
    """Two actions in a row become a group; a group becomes its parts."""
    row, column = _place(rows, chance)
    both = row[column : column + 2]
    if row[column].parts:
        row[column : column + 1] = row[column].parts
    elif len(both) == 2 and all(a.kind.is_compute and not a.parts for a in both):
        row[column : column + 2] = [Action(-1, ActionKind.OVERLAP, None, tuple(both))]


_MUTATIONS: dict[str, Callable[[Rows, Random], None]] = {
    "drop": _drop,
    "double": _double,
    "swap neighbours": _swap_neighbours,
    "move a message": _move_a_message,
    "move a computation": _move_a_computation,
    "move a block": _move_a_block,
    "swap": _swap,
    "move to another column": _move_to_another_column,
    "move to another rank": _move_to_another_rank,
    "renumber the microbatch": _renumber_microbatch,
    "renumber the stage": _renumber_stage,
    "change the kind": _change_kind,
    "group or part": _group_or_part,
}


def _place(
    rows: Rows, chance: Random, wanted: Callable[[Action], bool] = lambda action: True
) -> tuple[list[Action], int]:
    """A row and a column of it, of an action that is wanted if there is one in the row."""
    row = chance.choice([row for row in rows if row])
    columns = [column for column, action in enumerate(row) if wanted(action)]
    return row, chance.choice(columns or range(len(row)))


def _move(row: list[Action], column: int, to: int) -> None:
    row.insert(max(to, 0), row.pop(column))


def _change(rows: Rows, chance: Random, change: Callable[[Action], Action]) -> None:
    row, column = _place(rows, chance)
    action = row[column]
    if not action.parts:
        row[column] = change(action)
        return
    parts = list(action.parts)
    index = chance.randrange(len(parts))
    parts[index] = change(parts[index])
    row[column] = action._replace(parts=tuple(parts))
