"""Schedule files: one row per rank, one action per column, in torch's format."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from hfpp.errors import PipelineConfigError
from hfpp.plan.actions import Action, ScheduleTable, parse_action

if TYPE_CHECKING:
    import os

__all__ = ["read_csv", "write_csv"]


def read_csv(path: str | os.PathLike[str]) -> ScheduleTable:
    """Reads a schedule file as torch writes it, with or without communication.

    Nothing but the spelling is checked here: `verify` checks the table.

    Args:
        path: the file: a row per rank, actions such as ``0F0``, blank columns for idle time.

    Raises:
        FileNotFoundError: no such file.
        PipelineConfigError: not a schedule; the message names the rank, the column and the text.
    """
    path = Path(path)
    rows: list[tuple[Action | None, ...]] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            for rank, texts in enumerate(csv.reader(file)):
                rows.append(tuple(_parse(path, rank, *item) for item in enumerate(texts)))
        except (csv.Error, UnicodeDecodeError) as error:
            raise PipelineConfigError(f"{path} is not a schedule file: {error}") from error
    while rows and not any(rows[-1]):
        rows.pop()  # empty lines at the end
    if not rows:
        raise PipelineConfigError(
            f"{path} holds no actions: a schedule file has a row per rank and actions such as 0F0"
        )
    return ScheduleTable.from_rows(str(path), tuple(rows))


def _parse(path: Path, rank: int, column: int, text: str) -> Action | None:
    try:
        return parse_action(text)
    except PipelineConfigError as error:
        raise PipelineConfigError(f"{path}: rank {rank}, column {column}: {error}") from None


def write_csv(table: ScheduleTable, path: str | os.PathLike[str]) -> None:
    """Writes a table in torch's format; `read_csv` reads it back, and so does torch."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            ["" if action is None else str(action) for action in row] for row in table.rows
        )
