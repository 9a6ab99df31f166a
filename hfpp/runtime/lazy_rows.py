"""The actions of all ranks as torch wants them: rows that are made when someone looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from copy import copy
from typing import Any

__all__ = ["LazyRows"]

Row = list[Any]
_PRINTED = 64  # ranks of which torch prints all actions


class LazyRows(MutableMapping[int, Row]):
    """A dict of every rank's row that makes a row on the first look at it.

    A rank runs its own row only; those of the others are there for whoever prints, writes or
    simulates the schedule.
    """

    def __init__(self, size: int, make: Callable[[int], Row]) -> None:
        """Rows of the ranks 0 to ``size - 1``.

        Args:
            size: the number of ranks.
            make: gives a rank's row.
        """
        self._rows: dict[int, Row | None] = dict.fromkeys(range(size))
        self._make = make

    def __getitem__(self, rank: int) -> Row:
        row = self._rows[rank]
        if row is None:
            row = self._rows[rank] = self._make(rank)
        return row

    def __setitem__(self, rank: int, row: Row) -> None:
        self._rows[rank] = row

    def __delitem__(self, rank: int) -> None:
        del self._rows[rank]

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        made = sum(row is not None for row in self._rows.values())
        return f"<{len(self)} rows of actions, {made} made>"

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[int, Row]:
        """Plain rows: torch copies them to print them all when a step fails.

        Of a large pipeline, whose table nobody reads, only rows that were made have actions: else
        the ranks of a failing step would fill their memory with those of all others.
        """
        small = len(self) <= _PRINTED
        return {
            rank: [] if row is None and not small else copy(self[rank])
            for rank, row in self._rows.items()
        }
