"""CPU time and memory of one call, in a fork of its own that starts from the same state."""

import ctypes
import gc
import multiprocessing as mp
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from measure import Timing


class Cost(NamedTuple):
    """What one call took in a process of its own."""

    cpu: float  # seconds
    extra: float  # bytes, the peak above the process with the model alone
    peak: float  # bytes, of the process
    facts: Any  # what the call returned about its result


def in_a_fork(make: Callable[[], Any], call: Callable[[Any], Any]) -> Cost:
    """Runs ``call(make())`` in a fork and measures the call."""
    receiving, sending = mp.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sending.send(_measured(make, call))
            code = 0
        finally:
            os._exit(code)
    sending.close()
    try:
        cost: Cost = receiving.recv()
    except EOFError:
        raise RuntimeError("the measuring process died: is there enough memory?") from None
    finally:
        os.waitpid(child, 0)
        receiving.close()
    return cost


def _measured(make: Callable[[], Any], call: Callable[[Any], Any]) -> Cost:
    made = make()
    give_back_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at the present size
    before, start = _memory("VmRSS"), time.process_time()
    facts = call(made)
    cpu, peak = time.process_time() - start, _memory("VmHWM")
    return Cost(cpu, peak - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1e3, facts)


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def give_back_memory() -> None:
    """Frees what earlier calls left, to the system too: a copy is made in a fresh process."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def least_to_most(values: list[float]) -> Timing:
    """The median with the whole spread: too few values for percentiles."""
    return Timing(statistics.median(values), min(values), max(values), len(values))
