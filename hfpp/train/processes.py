"""Local processes that end together: with the first failure, with Ctrl-C, with their parent."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import textwrap
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum, auto
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpp.errors import PipelineConfigError
from hfpp.train.errors import TrainingError
from hfpp.train.lifetimes import end_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.process import BaseProcess

    Report = Callable[[Any], None]
    Work = Callable[[int, Report], None]

__all__ = ["available_cores", "ended_by_signals", "run_processes"]

# Threads that spin while they wait take the cores of the other ranks: on a busy machine a step with
# two of them took six times as long.
_CHILD_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
_UNWINDING_S = 10.0  # torchrun kills after 30
_GRACE_S = 0.5  # after the first failure: for others to report, so that the cause is found


class _Kind(Enum):
    EVENT = auto()
    DONE = auto()
    FAILED = auto()


@dataclass(frozen=True, slots=True)
class _Failure:
    at: float  # monotonic clock; minus infinity for a process that died
    message: str


@dataclass(slots=True)
class _Child:
    name: str
    process: BaseProcess
    connection: Connection
    log_file: Path
    failure: _Failure | None = None


def run_processes(
    work: Work,
    count: int,
    *,
    name: str,
    on_event: Report,
    log_folder: Path,
    preload: Sequence[str] = (),
) -> None:
    """Runs `work(index, report)` in `count` new processes until all have returned.

    What they print goes to `log_folder`, one file each. Whatever ends this function, or this
    process (also SIGKILL), ends them all.

    Args:
        work: picklable; `report` sends a picklable event to this process.
        count: number of processes.
        name: what one process is called in messages and log files.
        on_event: called here with every event, in each process's order.
        log_folder: exists.
        preload: modules to import once, in the server that the processes are forked from. The
            server lives as long as this process: only the first call's are imported.

    Raises:
        TrainingError: a process failed or died. It is the first one's message; a process that died
            goes before those that failed because of that.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hfpp.train.fork_server", *preload])
    # The server is started deaf to Ctrl-C, and so are its children: this process ends them.
    with _interrupts_ignored(), _environment(_CHILD_ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()
    children: list[_Child] = []
    try:
        for index in range(count):
            receiving, sending = context.Pipe(duplex=False)
            log_file = log_folder / f"{name.replace(' ', '-')}-{index}.log"
            title = f"{name} {index} of {count}" if count > 1 else f"the {name}"
            process = context.Process(
                target=_child_main,
                args=(work, index, title, log_file, sending),
                daemon=True,
            )
            process.start()
            sending.close()  # else a process that dies would not be seen as the end of the pipe
            children.append(_Child(title, process, receiving, log_file))
        _watch(children, on_event)
    finally:
        with _interrupts_ignored():
            for child in children:
                child.process.kill()
            for child in children:
                child.process.join()
                child.connection.close()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within it, SIGTERM and SIGHUP unwind this process as `SystemExit(128 + number)`.

    Where the main thread does not come to that, as it waits inside of a communication library, the
    process ends without unwinding after some seconds.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP)

    def leave(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    def insist() -> None:
        with receiving:
            while number := receiving.recv(1):
                if number[0] in numbers and not unwound.wait(_UNWINDING_S):
                    os._exit(128 + number[0])

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    unwound = threading.Event()
    receiving, sending = socket.socketpair()
    sending.setblocking(False)
    threading.Thread(target=insist, name="end by signal", daemon=True).start()
    # The interpreter writes a signal's number there as it arrives, whatever the main thread does.
    before_fd = signal.set_wakeup_fd(sending.fileno())
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_fd)
        unwound.set()
        sending.close()


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _watch(children: list[_Child], on_event: Report) -> None:
    waiting = {child.connection: child for child in children}
    deadline: float | None = None
    while waiting:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(list(waiting), timeout=left)
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            child = waiting[connection]
            kind, value = _receive(child)
            if kind is _Kind.EVENT:
                on_event(value)
                continue
            del waiting[connection]
            if kind is _Kind.FAILED:
                child.failure = value
                deadline = deadline or time.monotonic() + _GRACE_S
    failures = [child.failure for child in children if child.failure is not None]
    if failures:
        raise TrainingError(min(failures, key=lambda failure: failure.at).message)


def _receive(child: _Child) -> tuple[_Kind, Any]:
    try:
        kind, value = child.connection.recv()
    except (EOFError, OSError):
        child.process.join(timeout=5)
        code = child.process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
            if -code == signal.SIGKILL:
                how += ", as when memory runs out"
        message = f"{child.name} died ({how}); what it printed is in {child.log_file}."
        return _Kind.FAILED, _Failure(float("-inf"), message)
    return kind, value


def _child_main(work: Work, index: int, title: str, log_file: Path, sending: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _watch_parent()
    _print_to(log_file)
    try:
        work(index, lambda event: sending.send((_Kind.EVENT, event)))
    except BaseException as error:
        failed_at = time.monotonic()
        traceback.print_exc()
        sys.stderr.flush()
        if isinstance(error, PipelineConfigError | TrainingError):
            message = str(error)
        else:
            what = textwrap.shorten(f"{type(error).__name__}: {error}", 500)
            message = f"{title} failed with {what}; the traceback is in {log_file}."
        with suppress(OSError):
            sending.send((_Kind.FAILED, _Failure(failed_at, message)))
        # Ending now would break the connections of the others and make them fail too.
        threading.Event().wait()
    sending.send((_Kind.DONE, None))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to clean up, and threads of communication libraries linger


def _watch_parent() -> None:
    """Ends this process when the one that asked for it is gone, however that ended."""
    end_with_parent()  # with the server that forked it, which ends with the one that asked
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def _print_to(log_file: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    with log_file.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


@contextmanager
def _environment(defaults: dict[str, str]) -> Iterator[None]:
    """Within it, the variables are set that the user has not set."""
    added = [name for name in defaults if name not in os.environ]
    os.environ.update({name: defaults[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
