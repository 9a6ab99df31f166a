"""Planted faults: each is named, with the rank, the column and the action."""

from __future__ import annotations

import re

import pytest

from hfpp.errors import PipelineConfigError
from hfpp.plan.schedules import SCHEDULES, compute_table
from hfpp.plan.schedules.actions import Action, ActionKind, ScheduleTable
from hfpp.plan.schedules.lowering import lower
from hfpp.plan.schedules.verifier import verify
from tests.plan.schedules.tables import assert_places_exist, parse_rows, problem_of
from tests.reference.verify import verdict

K = ActionKind

# Order and completeness, without communication and with it


def rejected(rows: list[list[Action]]) -> str:
    with pytest.raises(PipelineConfigError) as caught:
        verify(ScheduleTable.from_rows("planted", rows))
    assert_places_exist(str(caught.value), rows)
    return str(caught.value)


def test_a_deadlock_names_the_circle() -> None:
    rows = parse_rows("0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0")
    message = rejected(rows)
    assert "deadlocks" in message
    assert "rank 0, column 1, action 0B0 waits for 1B0 of rank 1" in message
    assert "rank 1, column 0, action 1F1 waits for 0F1 of rank 0" in message


def test_a_group_that_needs_itself_is_a_deadlock() -> None:
    rows = parse_rows("0F0 (1F0;0B0)OVERLAP_F_B 1B0")
    assert "waits for 1B0 of rank 0" in rejected(rows)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (("0UNSHARD",), "holds no compute actions"),
        (("0F0 0B0", "1F0"), "rank 1: action 1B0 .or I and W. is missing"),
        (("0F0 0B0", "1F0 1I0"), "rank 1: action 1W0 is missing"),
        (("0F0 0B0", "1F0 1B0 1I0 1W0"), "rank 1, column 2, action 1I0: 1I0 doubles 1B0"),
        (("0F0 0B0", "1F0 1W0 1I0"), "rank 1, column 1, action 1W0: 1W0 comes without 1I0"),
        (("0F0 0B0", "1B0 1F0"), "rank 1, column 0, action 1B0: 1B0 comes without 1F0"),
        (("0F0 0F0 0B0", "1F0 1B0"), "rank 0, column 1, action 0F0: 0F0 already ran at column 0"),
        (("0F0 0B0 1F0", "1F0 1B0"), "rank 1, column 0, action 1F0: stage 1 also runs on rank 0"),
        (("0F0 0B0", "2F0 2B0"), "no rank runs stage 1"),
        (("1F0 1B0", "0F0 0B0"), "stage 0 runs on rank 1, where a loop"),
        (("0F0 0B0 1F0 1B0", "2F0 2B0"), "stage 1 runs on rank 0, where a loop"),
        (("0F0 0B0", "1F0 1B0 1F1 1B1"), "rank 0: action 0F1 is missing"),
        (("0F0 0REDUCE_GRAD 0B0",), "rank 0, column 1, action 0REDUCE_GRAD: it comes after 0 of 1"),
    ],
)
def test_faults_are_named(rows: tuple[str, ...], match: str) -> None:
    with pytest.raises(PipelineConfigError, match=match):
        verify(ScheduleTable.from_rows("planted", tuple(map(tuple, parse_rows(*rows)))))


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (  # nothing received
            ("0F0 0SEND_F0 0B0", "1F0 1B0"),
            "rank 0, column 2, action 0B0: 0B0 comes without 0RECV_B0",
        ),
        (  # received, never sent
            ("0F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"),
            "rank 1, column 0, action 1RECV_F0: rank 0 has no counterpart for the activation",
        ),
        (  # sent before it is made
            ("0SEND_F0 0F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"),
            "rank 0, column 0, action 0SEND_F0: 0SEND_F0 comes without 0F0",
        ),
        (
            ("0F0 0SEND_F0 0RECV_B0 0B0", "1RECV_F0 1F0 1SEND_B0 1B0"),
            "rank 1, column 2, action 1SEND_B0: 1SEND_B0 comes without a backward",
        ),
        (  # two messages that cross: gloo and NCCL would hand out the wrong one
            (
                "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
                "1RECV_F1 1RECV_F0 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
            ),
            "rank 0, column 1, action 0SEND_F0: ranks 0 and 1 post their messages in different",
        ),
        (("0F0 0SEND_F0 1RECV_F0 1F0 1B0 0B0",), "live on the same rank"),
        (("0F0 0SEND_B0 0B0",), "without a backward"),
        (("0RECV_F0 0F0 0B0",), "no stage at the other end"),
    ],
)
def test_faults_of_communication_are_named(rows: tuple[str, ...], match: str) -> None:
    with pytest.raises(PipelineConfigError, match=match):
        verify(ScheduleTable.from_rows("planted", tuple(map(tuple, parse_rows(*rows)))))


def test_sending_out_of_step_is_a_deadlock_of_messages() -> None:
    # Each rank computes before it sends what the other needs to go on: the order of messages is the
    # same at both ends, and still nobody moves.
    rows = parse_rows(
        "0F0 0RECV_B0 0B0 0SEND_F0",
        "1RECV_F0 1F0 1B0 1SEND_B0",
    )
    message = rejected(rows)
    assert "different orders" in message or "deadlocks" in message


# Planted faults of what the runtime does besides computing and sending


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ("0F0 0UNSHARD 0B0 0RESHARD", "column 0, action 0F0: stage 0 computes before it is unsha"),
        ("0UNSHARD 0F0 0RESHARD 0B0", "column 3, action 0B0: stage 0 is not unsharded"),
        ("0UNSHARD 0F0 0UNSHARD 0B0 0RESHARD", "column 2, action 0UNSHARD: .* since column 0"),
        ("0UNSHARD 0RESHARD 0UNSHARD 0F0 0B0 0RESHARD", "column 1, action 0RESHARD: .* not comp"),
        ("0F0 0B0 0RESHARD", "column 2, action 0RESHARD: 0RESHARD comes without 0UNSHARD"),
        ("0UNSHARD 0F0 0B0", "column 0, action 0UNSHARD: stage 0 is never resharded"),
        ("0F0 0B0 0REDUCE_GRAD 0REDUCE_GRAD", "column 3, action 0REDUCE_GRAD: .* at column 2"),
        ("0F0 0F1 0B0 0REDUCE_GRAD 0B1", "column 3, action 0REDUCE_GRAD: it comes after 1 of 2"),
        ("0F0 0I0 0REDUCE_GRAD 0W0", "column 2, action 0REDUCE_GRAD: it comes after 0 of 1"),
        ("0F0 0B0 0WAIT_REDUCE_GRAD", "column 2, .*: 0WAIT_REDUCE_GRAD comes without 0REDUCE_GR"),
        (
            "0F0 1F0 1B0 0B0 1REDUCE_GRAD 0REDUCE_GRAD 1WAIT_REDUCE_GRAD 0WAIT_REDUCE_GRAD",
            "column 5, action 0REDUCE_GRAD: another reduction is pending",
        ),
        (
            "0F0 1F0 1B0 0B0 1REDUCE_GRAD 1WAIT_REDUCE_GRAD 0REDUCE_GRAD",
            "column 6, action 0REDUCE_GRAD: no 0WAIT_REDUCE_GRAD follows",
        ),
        ("0F0 0B0 0WAIT_SEND_F0", "column 2, action 0WAIT_SEND_F0: .* comes without 0SEND_F0"),
        ("0F0 0B0 1UNSHARD", "column 2, action 1UNSHARD: stage 1 does not live on this rank"),
        ("(0F0;0B0)OVERLAP_F_B", "column 0, .*: 0B0 needs 0F0, which runs at the same time"),
        ("0F0 (0I0;0W0)OVERLAP_F_B", "column 1, .*: 0W0 needs 0I0, which runs at the same time"),
        ("(0F0;0F0)OVERLAP_F_B 0B0", "column 0, .*: 0F0 already ran at column 0"),
        ("(0F0;1F0)OVERLAP_F_B 1B0 0B0", "waits for 0F0 of rank 0 .column 0."),
    ],
)
def test_faults_on_one_rank_are_named(rows: str, match: str) -> None:
    table = parse_rows(rows)
    message = problem_of(table)
    assert re.search(match, message), message
    assert_places_exist(message, table)
    assert verdict(table).problem != ""


def test_a_group_of_other_things_than_computations_is_refused() -> None:
    unshard = Action(0, K.UNSHARD)
    group = Action(-1, K.OVERLAP, None, (Action(0, K.FORWARD, 0), unshard))
    assert "only computations can be overlapped" in problem_of([[group, Action(0, K.FORWARD, 0)]])


def test_a_table_waits_for_every_send_or_for_none() -> None:
    rows = parse_rows(
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0WAIT_SEND_F0 0RECV_B1 0B1",
        "1RECV_F0 1F0 1RECV_F1 1F1 1B0 1SEND_B0 1B1 1SEND_B1",
    )
    message = problem_of(rows)
    assert "rank 0, column 3, action 0SEND_F1: no 0WAIT_SEND_F1 follows" in message
    del rows[0][6]
    assert problem_of(rows) == ""


# Planted deadlocks

CROSSED = parse_rows(  # each sends first, and then receives
    "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
    "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1",
)


def test_what_only_buffers_save_is_told_from_what_nothing_saves() -> None:
    message = problem_of(CROSSED)
    assert "deadlocks where sends wait for their receives, as NCCL's do" in message
    assert "rank 0, column 3, action 0SEND_F1 waits for 1RECV_F1 of rank 1 (column 4)" in message
    assert "rank 1, column 3, action 1SEND_B0 waits for 0RECV_B0 of rank 0 (column 4)" in message
    assert verdict(CROSSED).problem == "rendezvous"


def test_three_ranks_may_deadlock_although_every_two_agree() -> None:
    """Rank 0 receives late: each rank sends to the next before it receives from the one before."""
    compute = compute_table(SCHEDULES["LoopedBFS"], pp_size=3, stages_per_rank=2, n_microbatches=3)
    table = lower(compute, unshard=False, reduce_grad=False)
    rows = [[step.action for step in table.steps(rank)] for rank in range(3)]
    for m in range(3):
        rows[0].remove(receive := Action(3, K.RECEIVE_FORWARD, m))
        rows[0].insert(rows[0].index(Action(3, K.FORWARD, m)), receive)
    message = problem_of(rows)
    assert "as NCCL's do" in message
    assert "waits for 1RECV_F2 of rank 1" in message
    assert "waits for 2RECV_F1 of rank 2" in message
    assert "waits for 3RECV_F0 of rank 0" in message
    assert_places_exist(message, rows)
    assert verdict(rows).problem == "rendezvous"


def test_a_circle_of_thousands_is_told_in_few_words() -> None:
    size = 5000
    rows = parse_rows(*(f"{r}F0 {r + size}F0 {r + size}B0 {r}B0" for r in range(size)))
    assert problem_of(rows) == ""
    rows[0][:2] = rows[0][1::-1]
    message = problem_of(rows)
    assert "rank 0, column 0, action 5000F0 waits for 4999F0 of rank 4999 (column 0)" in message
    assert "; and 4992 more ranks of the circle" in message
    assert len(message) < 1000
    assert_places_exist(message, rows)
