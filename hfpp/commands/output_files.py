"""The files that a command is asked to write, looked at before it does the work."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hfpp.errors import PipelineConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["check_outputs", "writing"]


def check_outputs(outputs: Mapping[str, Path | None], *, inputs: Iterable[str | Path] = ()) -> None:
    """Checks that every file can be written and that none takes another's place; writes nothing.

    Args:
        outputs: by option; None where it is not given.
        inputs: files that are read, which stay as they are.

    Raises:
        PipelineConfigError: a file cannot be written, or is one that is read or that another
            option writes.
    """
    read = {Path(path).resolve() for path in inputs}
    written: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        _check_writable(option, path)
        place = path.resolve()
        if place in read and place.is_file():
            raise PipelineConfigError(
                f"{option} ({path}) is a file that is read, and would be lost: give another path"
            )
        other = written.setdefault(place, option)
        if other != option and (place.is_file() or not place.exists()):  # but for devices
            raise PipelineConfigError(
                f"{option} ({path}) is also the file of {other}: give each a path of its own"
            )


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Names the option where a file cannot be written after all, such as on a full disk.

    Raises:
        OSError: with the option, the file and the reason.
    """
    try:
        yield
    except OSError as error:
        reason = f"{option} ({path}) could not be written: {error.strerror}"
        raise OSError(f"{reason}: make room, or give another path") from None


def _check_writable(option: str, path: Path) -> None:
    folder = path.parent
    try:
        path.stat()
    except NotADirectoryError:
        raise PipelineConfigError(
            f"{option} ({path}) lies in {folder}, which is no folder: give a path in a folder"
        ) from None
    except FileNotFoundError:
        if not folder.exists():
            raise PipelineConfigError(
                f"{option} ({path}) lies in a folder that does not exist: make it with mkdir -p "
                f"{folder}, or give another path"
            ) from None
        may = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:  # such as a name that is too long
        raise PipelineConfigError(
            f"{option} ({path}) cannot be written ({error.strerror}): give another path"
        ) from None
    else:
        if path.is_dir():
            raise PipelineConfigError(
                f"{option} ({path}) is a folder: give the path of a file, such as {path / 'result'}"
            )
        may = os.access(path, os.W_OK)
    if not may:
        raise PipelineConfigError(
            f"{option} ({path}) cannot be written, for want of the right to: give another path"
        )
