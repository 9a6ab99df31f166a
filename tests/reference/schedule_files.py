"""Schedule files read the slow and obvious way, with Python's csv and json."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

from hfpp.plan.schedules.actions import Action, ActionKind

MOST = (1 << 28) - 1
KINDS = {kind.value: kind for kind in ActionKind if kind is not ActionKind.OVERLAP}
SINGLE = re.compile(rf"([0-9]+)({'|'.join(sorted(KINDS, key=len, reverse=True))})([0-9]*)")
GROUP = re.compile(r"\(([^()]*)\)OVERLAP_F_B")
KEYS = {"format", "version", "name", "pp_size", "rows"}

Row = tuple[Action | None, ...]


def parse_action(text: str) -> Action | None:
    """ValueError where the text is no action."""
    text = text.strip(" \t")
    if text in ("", "None"):
        return None
    if group := GROUP.fullmatch(text):
        parts = tuple(_single(part.strip(" \t")) for part in group[1].split(";"))
        if not all(part.kind.is_compute for part in parts):
            raise ValueError(text)
        return parts[0] if len(parts) == 1 else Action(-1, ActionKind.OVERLAP, None, parts)
    return _single(text)


def _single(text: str) -> Action:
    match = SINGLE.fullmatch(text)
    if match is None:
        raise ValueError(text)
    kind = KINDS[match[2]]
    numbers = [int(number) for number in (match[1], match[3]) if number]
    if bool(match[3]) is not kind.has_microbatch or max(numbers) > MOST:
        raise ValueError(text)
    return Action(numbers[0], kind, numbers[1] if match[3] else None)


def read_csv(data: bytes) -> tuple[Row, ...]:
    """The rows of a file; ValueError where it is no schedule."""
    text = data.decode("utf-8-sig").encode("ascii").decode()
    if re.search(r"[^\t\r\n -~]", text):
        raise ValueError("not text")
    try:
        cells = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(str(error)) from error
    rows = [tuple(map(parse_action, row)) for row in cells]
    while rows and not any(rows[-1]):
        rows.pop()
    if not rows:
        raise ValueError("no actions")
    return tuple(rows)


def csv_of(rows: tuple[Row, ...]) -> bytes:
    """What Python's own writer makes of the rows."""
    file = io.StringIO(newline="")
    csv.writer(file).writerows(
        ["" if action is None else str(action) for action in row] for row in rows
    )
    return file.getvalue().encode()


def read_json(data: bytes) -> tuple[str, tuple[Row, ...], dict[str, Any]]:
    """Name, rows and metadata of a file; ValueError where it is no schedule."""
    pairs: list[tuple[str, Any]] = json.loads(data.decode("utf-8-sig"), object_pairs_hook=list)
    keys = [key for key, _ in pairs]
    found = dict(pairs)
    if len(keys) != len(found) or set(found) - {"metadata"} != KEYS:
        raise ValueError(f"keys {keys}")
    rows = tuple(tuple(map(parse_action, row)) for row in found["rows"])
    right = (
        found["format"] == "hfpp schedule"
        and found["version"] == 1
        and isinstance(found["name"], str)
        and found["pp_size"] == len(rows)
        and any(any(row) for row in rows)
    )
    if not right:
        raise ValueError("values")
    return found["name"], rows, dict(found.get("metadata", []))
