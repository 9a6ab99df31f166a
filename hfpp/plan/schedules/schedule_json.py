"""Schedules as JSON: a table of actions with its name, and what else one wants to keep with it.

The file is one object::

    {"format": "hfpp schedule", "version": 1, "name": "1F1B", "pp_size": 2, "rows": [
    ["0F0","0F1","0B0","0B1"],
    ["1F0","1B0","1F1","1B1"]
    ], "metadata": {"model": "tiny"}}

Rows are those of `hfpp.plan.schedules.schedule_csv`: a list per rank of texts such as ``3F0``,
blank for idle time. ``metadata`` is optional and any object. There are no other keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpp import _core
from hfpp.errors import PipelineConfigError
from hfpp.plan.schedules.actions import ScheduleTable
from hfpp.plan.schedules.schedule_csv import open_schedule, printable

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__all__ = ["read_json", "read_json_metadata", "write_json"]

_MOST_NAME = 4096
"""Bytes of a name that `read_json` reads."""


def read_json(path: str | os.PathLike[str]) -> ScheduleTable:
    """Reads a schedule that `write_json` wrote, or another program in its format.

    Nothing but the spelling is checked here: `verify` checks the table. The limits are those of
    `read_csv`.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: no such file.
        PipelineConfigError: no file, or not such a one; the message names the line and the
            character, both from 1, and for an action its rank and column, both from 0, and its
            text.
    """
    return ScheduleTable(_read(path)[0])


def read_json_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a schedule file has as its metadata; empty where it has none.

    Raises:
        FileNotFoundError: no such file.
        PipelineConfigError: as `read_json`.
    """
    metadata: dict[str, Any] = json.loads(_read(path)[1])
    return metadata


def _read(path: str | os.PathLike[str]) -> tuple[_core.Schedule, str]:
    path = Path(path)
    with open_schedule(path) as file:
        return _core.read_json(printable(path), file.read)


def write_json(
    table: ScheduleTable,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a table as JSON; `read_json` reads it back.

    Args:
        table: what to write.
        path: the file.
        metadata: kept in the file for `read_json_metadata`: what JSON can hold, at most 1 MiB of
            text, nested at most 32 levels deep.

    Raises:
        PipelineConfigError: the metadata is nothing of the kind, or the table's name is longer than
            a file has it.
    """
    path = Path(path)
    if (size := len(table.name.encode())) > _MOST_NAME:
        raise PipelineConfigError(
            f"name ({table.name[:60]!r}...) has {size} bytes, but {path} can have {_MOST_NAME}: "
            "use a shorter name"
        )
    tail = "" if metadata is None else f', "metadata": {_metadata_text(path, metadata)}'
    with path.open("wb") as file:
        head = f'"format": "hfpp schedule", "version": 1, "name": {json.dumps(table.name)}'
        file.write(f'{{{head}, "pp_size": {table.pp_size}, "rows": ['.encode())
        for rank in range(table.pp_size):
            file.write(b",\n" if rank else b"\n")
            file.write(_core.json_row(table.native, rank))
        file.write(f"\n]{tail}}}\n".encode())


def _metadata_text(path: Path, metadata: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PipelineConfigError(
            f"metadata for {path} is not what JSON can hold: {error}: use a mapping of strings, "
            "finite numbers, booleans, lists and mappings"
        ) from error
    _core.check_metadata("metadata", text)
    return text
