"""Run a function on several gloo ranks, with a deadline, and name the rank that is to blame.

    def job(rank: int, world_size: int, scale: float) -> float:
        x = torch.full((), rank * scale)
        dist.all_reduce(x)
        return x.item()

    assert run_ranks(job, 4, args=(0.5,)) == [3.0] * 4

The ranks are forked from a server that has torch imported already: a 4-rank test costs a few
tenths of a second after the first one. They meet through a file, so there is no port to collide.
"""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Imported once, in the server. Those that cannot be imported are left out silently.
_PRELOADED = (
    "pytest",
    "torch",
    "torch.distributed",
    "torch.distributed.pipelining",
    "torch.distributed.fsdp",
    "torch.distributed.device_mesh",
    "torch.nn.parallel",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "peft",
    "hfpp.runtime.build_schedule",
    "hfpp.runtime.stage_shapes",
    "hfpp.runtime.pipeline",
)
_RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
if sys.platform == "linux":
    _RANK_ENVIRONMENT["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo asks what the host's name means
_GRACE_S = 0.5  # after the first failure: time for others to report, so that the cause is found


class RankError(RuntimeError):
    """A rank raised, died, or was still running at the deadline; the message names it."""


@dataclass(slots=True)
class _Rank:
    index: int
    process: BaseProcess
    connection: Connection
    stack_file: Path
    state: str = "still running"
    value: Any = None
    failed_at: float | None = None  # monotonic, of the rank's own clock; -inf: died


def run_ranks(
    job: Callable[..., Any],
    world_size: int,
    *,
    args: Sequence[Any] = (),
    timeout_s: float = 60.0,
) -> list[Any]:
    """Runs `job(rank, world_size, *args)` on `world_size` gloo processes.

    Args:
        job: a function at module level (the ranks import it by name).
        world_size: number of processes.
        args: further arguments, the same for every rank; pickled, so tensors arrive as copies.
        timeout_s: seconds for all ranks together, after the processes have started.

    Returns:
        What each rank returned, by rank; pickled, so tensors arrive as copies.

    Raises:
        RankError: a rank raised (its traceback is in the message), died without a result, or was
            still running at the deadline (its stack is in the message). All ranks are ended.
    """
    payload = pickle.dumps((job, tuple(args)))
    context = _context()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks: list[_Rank] = []
        try:
            for index in range(world_size):
                receiving, sending = context.Pipe(duplex=False)
                stack_file = Path(folder, f"stack-{index}")
                process = context.Process(
                    target=_rank_main,
                    args=(index, world_size, folder, payload, timeout_s, sending),
                    name=f"rank {index} of {world_size}",
                    daemon=True,
                )
                process.start()
                sending.close()  # else a rank that dies would not be seen as the end of the pipe
                ranks.append(_Rank(index, process, receiving, stack_file))
            _collect(ranks, timeout_s)
            return [rank.value for rank in ranks]
        finally:
            for rank in ranks:
                rank.process.kill()
            for rank in ranks:
                rank.process.join()
                rank.connection.close()


def _context() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    before = {name: os.environ.get(name) for name in _RANK_ENVIRONMENT}
    os.environ.update(_RANK_ENVIRONMENT)  # the server, and every rank it forks, inherits it
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _collect(ranks: list[_Rank], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    failing = False
    waiting = {rank.connection: rank for rank in ranks}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            _receive(rank)
            if rank.failed_at is not None and not failing:
                failing, deadline = True, min(deadline, time.monotonic() + _GRACE_S)
    failures = [rank for rank in ranks if rank.failed_at is not None]
    if failures:
        # A rank that died takes its peers' connections with it: their errors follow from it.
        guilty = min(failures, key=lambda rank: (rank.failed_at, rank.index))
        raise RankError(f"{_headline(guilty, ranks)}\n{guilty.value}")
    if waiting:
        running = list(waiting.values())
        raise RankError(
            f"{_names(running)} of {len(ranks)} still running after {timeout_s:g} s"
            f"{_others(running, ranks)}\n{_stacks(running)}"
        )


def _receive(rank: _Rank) -> None:
    try:
        state, failed_at, value = pickle.loads(rank.connection.recv_bytes())
    except EOFError:
        rank.process.join(timeout=5)
        code = rank.process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
        rank.state, rank.failed_at, rank.value = "died", float("-inf"), f"({how})"
    else:
        rank.state, rank.failed_at, rank.value = state, failed_at, value


def _headline(guilty: _Rank, ranks: list[_Rank]) -> str:
    how = "died without a result" if guilty.state == "died" else "failed"
    return f"rank {guilty.index} of {len(ranks)} {how}{_others([guilty], ranks)}"


def _others(named: list[_Rank], ranks: list[_Rank]) -> str:
    by_state: dict[str, list[_Rank]] = {}
    for rank in ranks:
        if rank not in named:
            by_state.setdefault(rank.state, []).append(rank)
    parts = [f"{_names(group)} {state}" for state, group in by_state.items()]
    return f" ({'; '.join(parts)})" if parts else ""


def _names(ranks: list[_Rank]) -> str:
    numbers = ", ".join(str(rank.index) for rank in ranks)
    return f"rank {numbers}" if len(ranks) == 1 else f"ranks {numbers}"


def _stacks(ranks: list[_Rank]) -> str:
    """The Python stacks of running ranks, which each writes when it is told to."""
    for rank in ranks:
        with suppress(ProcessLookupError):
            assert rank.process.pid is not None
            os.kill(rank.process.pid, signal.SIGUSR1)
    time.sleep(0.2)
    return "\n".join(
        f"rank {rank.index}:\n{rank.stack_file.read_text() if rank.stack_file.exists() else ''}"
        for rank in ranks
    )


def _rank_main(
    rank: int, world_size: int, folder: str, payload: bytes, timeout_s: float, sending: Connection
) -> None:
    stack_file = Path(folder, f"stack-{rank}").open("w")  # noqa: SIM115 (open as long as we live)
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        job, args = pickle.loads(payload)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s + 30),  # the parent's deadline comes first
        )
        report = pickle.dumps(("finished", None, job(rank, world_size, *args)))
    except BaseException:
        report = pickle.dumps(("failed", time.monotonic(), traceback.format_exc()))
    sending.send_bytes(report)
    # Stay until the parent ends us: leaving would break what peers still have to receive.
    threading.Event().wait()


def _end_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
