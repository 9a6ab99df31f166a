"""Jobs in processes forked from this one, a few at a time and each with a deadline."""

from __future__ import annotations

import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any


@dataclass(slots=True)
class Outcome:
    """How a job ended: with a ``value``, or with what went wrong."""

    job: Any
    seconds: float
    value: Any = None
    error: str = ""


@dataclass(slots=True)
class _Child:
    job: Any
    pid: int
    started: float


def run_forked(
    function: Callable[[Any], Any], jobs: Sequence[Any], *, at_once: int, timeout_s: float
) -> Iterator[Outcome]:
    """Yield the outcome of ``function(job)`` for every job, in the order in which they end.

    A fork costs nothing where a new process would import torch and transformers first, and what one
    job leaves behind (caches, patches, memory) never reaches another.

    Args:
        function: must return what can be pickled.
        jobs: its arguments.
        at_once: how many run together.
        timeout_s: a job that takes longer is killed, and that is its outcome.
    """
    waiting, running = list(reversed(jobs)), dict[Connection, _Child]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                _start(function, waiting.pop(), running)
            now = time.monotonic()
            first = min(child.started for child in running.values())
            ready = wait(list(running), max(0.0, first + timeout_s - now))
            for connection in ready:
                assert isinstance(connection, Connection)
                yield _collect(connection, running.pop(connection))
            now = time.monotonic()
            for connection, child in list(running.items()):
                if now - child.started > timeout_s:
                    del running[connection]
                    _kill(child.pid)
                    connection.close()
                    yield Outcome(
                        child.job, now - child.started, error=f"still running after {timeout_s:g} s"
                    )
    finally:
        for child in running.values():
            _kill(child.pid)


def _start(function: Callable[[Any], Any], job: Any, running: dict[Connection, _Child]) -> None:
    receiver, sender = Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            receiver.close()
            try:
                answer = (True, function(job))
            except BaseException:
                answer = (False, traceback.format_exc())
            sender.send_bytes(pickle.dumps(answer))
            sender.close()
        finally:
            os._exit(0)  # nothing of the parent's, such as pytest, may run again here
    sender.close()
    running[receiver] = _Child(job, pid, time.monotonic())


def _collect(connection: Connection, child: _Child) -> Outcome:
    try:
        ok, value = pickle.loads(connection.recv_bytes())
    except EOFError:
        ok, value = False, None
    connection.close()
    _, status = os.waitpid(child.pid, 0)
    seconds = time.monotonic() - child.started
    if ok:
        return Outcome(child.job, seconds, value)
    return Outcome(child.job, seconds, error=value or f"died with wait status {status}")


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
