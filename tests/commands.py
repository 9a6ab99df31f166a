"""Shell commands as a reader of the documentation would type them, with a deadline."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_GRACE_S = 10.0  # for torchrun to end its ranks


class CommandError(AssertionError):
    """A command ended with another exit code than 0, or not in time; the message has its output."""


def run_command(command: str, folder: Path, *, timeout_s: float = 120.0) -> str:
    """Runs lines of bash in a folder and returns what they printed, errors included.

    The commands of the environment that runs the tests come first, hfpp comes from this tree, and
    torchrun takes a free port, so that two jobs on one machine do not meet.
    """
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise CommandError(
            f"still running after {timeout_s:g} s:\n{command}\n{_end(process)}"
        ) from None
    if process.returncode:
        raise CommandError(f"exit code {process.returncode}:\n{command}\n{output}")
    return output


def _environment() -> dict[str, str]:
    job = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    paths = (str(ROOT), os.environ.get("PYTHONPATH"))
    return {
        **{name: value for name, value in os.environ.items() if name not in job},
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PET_STANDALONE": "1",  # torchrun's own name for --standalone
    }


def _end(process: subprocess.Popen[str]) -> str:
    """Ends the command, and so what it started: torchrun ends its ranks before itself."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            return process.communicate(timeout=_GRACE_S)[0]
        except subprocess.TimeoutExpired:
            continue
    return "(its output cannot be read)"
