"""Work for `run_processes` to watch: `python -m tests.train.workers WORK FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from hfpp import PipelineConfigError
from hfpp.train import launcher
from hfpp.train.errors import TrainingError
from hfpp.train.processes import ended_by_signals, run_processes
from hfpp.train.reference import ReferenceRun

COUNT = 3


def sleeping(index, report):
    report((index, os.getpid()))
    time.sleep(600)


def counting(index, report):
    sys.stdout.write(f"process {index} was here\n")
    for number in range(5):
        report((index, number))


def raising(index, report):
    if index == 1:
        report("about to fail")
        raise KeyError("a name\nover lines")
    time.sleep(600)


def misconfigured(index, report):
    raise PipelineConfigError("size (3) must be even: use 4.")


def crashing(index, report):
    """Rank 2 is killed; the others notice and fail because of it, a little earlier or later."""
    if index == 2:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05 if index == 0 else 0.15)
    raise ConnectionError("a peer is gone")


def exiting(index, report):
    if index == 0:
        os._exit(7)
    time.sleep(600)


def loaded(folder):
    """Prints what a process has imported that trains a plain model as a run has it trained."""
    run_processes(
        Loaded(), 1, name="w", on_event=sys.stdout.write, log_folder=folder,
        preload=launcher._PRELOADED,
    )  # fmt: skip


class Loaded(ReferenceRun):
    """Comes and goes as the plain model does; and tells instead of training."""

    __slots__ = ()

    def __init__(self):
        """Without a run."""

    def __reduce__(self):
        return Loaded, ()

    def __call__(self, _index, report):
        report("\n".join(sorted(sys.modules)))


def main(work, folder):
    if work == "loaded":
        loaded(Path(folder))
        return
    ready = set()

    def on_event(event):
        ready.add(event)
        if len(ready) == COUNT:
            sys.stdout.write("ready\n")
            sys.stdout.flush()

    try:
        with ended_by_signals():
            run_processes(
                globals()[work], COUNT, name="worker", on_event=on_event, log_folder=Path(folder)
            )
    except TrainingError as error:
        sys.exit(f"failed: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(*sys.argv[1:])
