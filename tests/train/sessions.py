"""Commands in a session of their own, and which of their processes are left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
}


@contextmanager
def session(arguments: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Starts Python in a new session; nothing of it is left afterwards, temporary files neither."""
    # Not in `folder`, whose long path leaves no room for the names of sockets.
    with tempfile.TemporaryDirectory(prefix="hfpp-", ignore_cleanup_errors=True) as temporary:
        yield from _session(arguments, folder, {**ENVIRONMENT, "TMPDIR": temporary})


def _session(
    arguments: Sequence[str], folder: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()


def members(session_id: int) -> dict[int, str]:
    """The living processes of a session, with their command lines."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            # After the name, which may hold anything: state, parent, group, session.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session_id and fields[0] != "Z":
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = command.decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_for_line(process: subprocess.Popen[str], text: str) -> str:
    """Reads the output up to a line with `text`, and returns all of it."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    assert process.stderr is not None
    raise AssertionError(f"no {text!r} in:\n{seen}\n{process.stderr.read()}")


def nothing_left(session_id: int, within_s: float = 5.0) -> dict[int, str]:
    """What still runs of a session after some seconds; empty as soon as nothing does."""
    deadline = time.monotonic() + within_s
    while (left := members(session_id)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left
