"""The rank runner itself: results, deadline, guilty rank, dead rank."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks


def _sum_of_ranks(rank: int, world_size: int, scale: float) -> tuple[int, torch.Tensor]:
    value = torch.full((2,), rank * scale)
    dist.all_reduce(value)
    assert torch.get_num_threads() == 1
    return rank, value


def test_each_rank_returns_its_result() -> None:
    results = run_ranks(_sum_of_ranks, 4, args=(0.5,))
    assert [rank for rank, _ in results] == [0, 1, 2, 3]
    for _, value in results:
        assert value.tolist() == [3.0, 3.0]


def _rank_2_raises(rank: int, world_size: int) -> None:
    if rank == 2:
        raise ValueError("the planted fault")
    dist.barrier()


def test_the_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(_rank_2_raises, 4)
    message = str(caught.value)
    assert message.startswith("rank 2 of 4 failed (ranks 0, 1, 3 still running)")
    assert "_rank_2_raises" in message
    assert "ValueError: the planted fault" in message


def _rank_1_hangs(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(3600)


def test_the_deadline_ends_all_ranks_and_shows_where_they_hang() -> None:
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(_rank_1_hangs, 2, timeout_s=1.0)
    assert time.monotonic() - started < 30
    message = str(caught.value)
    assert message.startswith("rank 1 of 2 still running after 1 s (rank 0 finished)")
    assert "in _rank_1_hangs" in message


def _rank_0_dies(rank: int, world_size: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_rank_that_dies_is_named_and_not_the_peers_that_fail_for_it() -> None:
    with pytest.raises(RankError, match=r"^rank 0 of 3 died without a result.*") as caught:
        run_ranks(_rank_0_dies, 3)
    assert "SIGKILL" in str(caught.value)


def _rank_1_leaves(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)


def test_a_rank_that_exits_on_its_own_is_named_with_its_exit_code() -> None:
    with pytest.raises(RankError, match=r"(?s)^rank 1 of 2 died without a result.*exit code 7"):
        run_ranks(_rank_1_leaves, 2)


def test_a_run_after_a_failed_run_is_unharmed() -> None:
    with pytest.raises(RankError):
        run_ranks(_rank_2_raises, 3)
    assert len(run_ranks(_sum_of_ranks, 2, args=(1.0,))) == 2
