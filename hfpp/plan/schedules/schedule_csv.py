"""Schedule files: one row per rank, one action per column, in torch's format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hfpp import _core
from hfpp.errors import PipelineConfigError
from hfpp.plan.schedules.actions import ScheduleTable

if TYPE_CHECKING:
    import os

__all__ = ["open_schedule", "printable", "read_csv", "write_csv"]


def read_csv(path: str | os.PathLike[str]) -> ScheduleTable:
    """Reads a schedule file as torch writes it, with or without communication.

    Nothing but the spelling is checked here: `verify` checks the table. A file has at most 2**26
    actions for at most 2**20 ranks, and takes 8 bytes of memory for each action.

    Args:
        path: the file: a row per rank, actions such as ``0F0``, blank columns for idle time.

    Raises:
        FileNotFoundError: no such file.
        PipelineConfigError: no file, or not a schedule; the message names the line and the
            character, both from 1, and for an action its rank and column, both from 0, and its
            text.
    """
    path = Path(path)
    with open_schedule(path) as file:
        return ScheduleTable(_core.read_csv(printable(path), file.read))


def write_csv(table: ScheduleTable, path: str | os.PathLike[str]) -> None:
    """Writes a table in torch's format; `read_csv` reads it back, and so does torch.

    Ranks at the end that have no actions are blank lines, which are no ranks to a reader.
    """
    with Path(path).open("wb") as file:
        for rank in range(table.pp_size):
            file.write(_core.csv_line(table.native, rank))


def open_schedule(path: Path) -> BinaryIO:
    """A schedule file, to read.

    Raises:
        FileNotFoundError: no such file.
        PipelineConfigError: it cannot be read.
    """
    name, remedy = printable(path), "give the path of a schedule file"
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such file: {remedy}") from None
    except OSError as error:  # such as a folder
        raise PipelineConfigError(f"{name} cannot be read ({error.strerror}): {remedy}") from None


def printable(path: Path) -> str:
    """A path for messages; bytes that are no text are question marks."""
    return str(path).encode("utf-8", "replace").decode("utf-8")
