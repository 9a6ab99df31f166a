"""Processes end together: after a failure, on signals, and when their parent is killed."""

import os
import signal
import time

import pytest

from hfpp.train.errors import TrainingError
from hfpp.train.processes import ended_by_signals, run_processes
from tests.train import workers
from tests.train.sessions import members, nothing_left, session, wait_for_line


def run(work, folder, on_event=lambda _: None):
    run_processes(work, workers.COUNT, name="worker", on_event=on_event, log_folder=folder)


def test_events_arrive_in_order_and_output_goes_to_logs(tmp_path):
    events = []
    run(workers.counting, tmp_path, events.append)
    for index in range(workers.COUNT):
        assert [number for who, number in events if who == index] == list(range(5))
        assert (tmp_path / f"worker-{index}.log").read_text() == f"process {index} was here\n"


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (workers.raising, "worker 1 of 3 failed with KeyError: 'a name\\\\nover lines'; the trace"),
        (workers.misconfigured, "size (3) must be even: use 4."),
        (workers.crashing, "worker 2 of 3 died (SIGKILL, as when memory runs out); what it"),
        (workers.exiting, "worker 0 of 3 died (exit code 7); what it"),
    ],
)
def test_the_first_cause_is_the_one_error(work, message, tmp_path):
    started = time.monotonic()
    with pytest.raises(TrainingError) as raised:
        run(work, tmp_path)
    assert str(raised.value).startswith(message.replace("\\\\", "\\"))
    assert "\n" not in str(raised.value)
    assert time.monotonic() - started < 30  # nobody waits for those that sleep


def test_a_traceback_is_kept(tmp_path):
    with pytest.raises(TrainingError, match=r"worker-1\.log"):
        run(workers.raising, tmp_path)
    assert 'raise KeyError("a name' in (tmp_path / "worker-1.log").read_text()


def test_an_error_while_handling_an_event_ends_the_processes(tmp_path):
    pids = []

    def on_event(event):
        pids.append(event[1])
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run(workers.sleeping, tmp_path, on_event)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


@pytest.mark.parametrize(
    ("number", "to_all", "code"),
    [
        (signal.SIGINT, True, 130),  # Ctrl-C in a terminal
        (signal.SIGINT, False, 130),
        (signal.SIGTERM, False, 128 + signal.SIGTERM),
        (signal.SIGHUP, True, 128 + signal.SIGHUP),
        (signal.SIGKILL, False, -signal.SIGKILL),
    ],
)
def test_a_signal_ends_every_process(number, to_all, code, tmp_path):
    arguments = ["-m", "tests.train.workers", "sleeping", str(tmp_path)]
    with session(arguments, tmp_path) as process:
        wait_for_line(process, "ready")
        assert len(members(process.pid)) > workers.COUNT  # the check sees them
        if to_all:
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)
        assert process.wait(timeout=20) == code
        assert nothing_left(process.pid) == {}
        assert process.stderr.read() == ""


STUCK = """
import ctypes
from hfpp.train import processes

processes._UNWINDING_S = 0.5
c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with processes.ended_by_signals():
    c.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    c.pthread_mutex_lock(mutex)  # never returns, as a communication library whose peer is gone
"""


def test_a_signal_ends_a_process_that_waits_inside_of_a_library(tmp_path):
    with session(["-c", STUCK], tmp_path) as process:
        wait_for_line(process, "ready")
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=20) == 128 + signal.SIGTERM


def test_signals_are_as_before_after_a_run():
    before = signal.getsignal(signal.SIGTERM)
    descriptor = signal.set_wakeup_fd(-1)
    with ended_by_signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(descriptor) == -1
