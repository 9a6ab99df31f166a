"""Simulated steps: equal to a slow oracle on any table, to closed forms, and to torch's columns."""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules

from hfpp import _core
from hfpp.errors import PipelineConfigError
from hfpp.plan.costs import UnitCost
from hfpp.plan.schedules import SCHEDULES, compute_table
from hfpp.plan.schedules.actions import Action, ActionKind, ScheduleTable, parse_action
from hfpp.plan.schedules.lock_step import lock_step
from hfpp.plan.schedules.lowering import lower
from hfpp.plan.schedules.simulator import Link, Simulation, simulate, uniform_costs
from hfpp.plan.schedules.verifier import peak_activations, verify
from tests.advice import check_advice
from tests.plan.schedules.test_named import sizes, table_of
from tests.reference import simulate as reference

F, B = ActionKind.FORWARD, ActionKind.FULL_BACKWARD
I, W = ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT  # noqa: E741 (the field's letters)


def parse_table(*rows: str) -> ScheduleTable:
    return ScheduleTable.from_rows("x", [map(parse_action, row.split()) for row in rows])


# Any table against the oracle


def random_rows(seed: int, pp_size: int, num_stages: int, n: int) -> list[list[Action]]:
    """Rows that run to their end: stages on any ranks, whole and split backwards, in any order."""
    chance = random.Random(seed)
    rank_of = [chance.randrange(pp_size) for _ in range(num_stages)]
    whole = chance.random()
    rows: list[list[Action]] = [[] for _ in range(pp_size)]
    done: set[tuple[int, str, int]] = set()
    todo: list[Action] = []
    for stage in range(num_stages):
        for m in range(n):
            kinds = (F, B) if chance.random() < whole else (F, I, W)
            todo += [Action(stage, kind, m) for kind in kinds]

    def ready(action: Action) -> bool:
        stage, kind, m, _ = action
        assert m is not None
        if kind is F:
            return stage == 0 or (stage - 1, "F", m) in done
        if kind is W:
            return (stage, "B", m) in done
        return (stage, "F", m) in done and (stage == num_stages - 1 or (stage + 1, "B", m) in done)

    while todo:
        action = chance.choice([action for action in todo if ready(action)])
        todo.remove(action)
        assert action.microbatch is not None
        kind = "B" if action.kind is I else action.kind.value
        done.add((action.stage, kind, action.microbatch))
        rows[rank_of[action.stage]].append(action)
    return rows


def grouped(rows: list[list[Action]], chance: random.Random, share: float) -> list[list[Action]]:
    """Some neighbours as overlapped groups, which may make the table wait in a circle."""
    result = []
    for row in rows:
        actions: list[Action] = []
        for action in row:
            before = actions[-1] if actions else action
            related = (before.stage, before.microbatch) == (action.stage, action.microbatch)
            if not related and not before.parts and chance.random() < share:
                actions[-1] = Action(-1, ActionKind.OVERLAP, None, (before, action))
            else:
                actions.append(action)
        result.append(actions)
    return result


def jostled(table: ScheduleTable, chance: random.Random, share: float) -> ScheduleTable:
    """Sends later and receives earlier, which may make the table wait in a circle."""
    rows = []
    for rank in range(table.pp_size):
        row = [action for action in table.row(rank) if action is not None]
        for index, action in enumerate(row):
            if "RECV" in action.kind.value and chance.random() < share:
                row.insert(chance.randrange(index + 1), row.pop(index))
        if not any("WAIT" in action.kind.value for action in row):
            for index in reversed(range(len(row))):
                if row[index].kind.value.startswith("SEND") and chance.random() < share:
                    row.insert(chance.randrange(index, len(row)), row.pop(index))
        rows.append(row)
    return ScheduleTable.from_rows(table.name, rows)


class Case(NamedTuple):
    table: ScheduleTable
    costs: tuple[UnitCost, ...]
    link: Any
    nbytes: list[int]
    overlap_gain: float

    def seconds(self, message: reference.Message) -> float:
        """Of a transfer."""
        at, ranks = boundary(message), self.table.stage_to_rank
        link = self.link
        if callable(link):
            here, there = ranks[at], ranks[at + 1]
            link = link(there, here) if message[0] else link(here, there)
        elif not isinstance(link, Link):
            link = link[at]
        return link.latency + self.nbytes[at] / link.bandwidth


def boundary(message: reference.Message) -> int:
    gradient, stage, _ = message
    return stage - 1 if gradient else stage


@st.composite
def cases(draw: Any, times: Any = None) -> Case:
    """A table with costs; times are eighths, of which every sum is exact, unless given."""
    times = st.integers(0, 40).map(lambda n: n / 8) if times is None else times
    seed = draw(st.integers(0, 2**32))
    chance = random.Random(seed)
    if draw(st.booleans()):
        table = table_of(**draw(sizes(max_pp=4, max_microbatches=5)))
    else:
        shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4)))
        rows = random_rows(seed, *shape)
        share = draw(st.sampled_from([0.0, 0.0, 0.1, 0.5]))
        table = ScheduleTable.from_rows("random", grouped(rows, chance, share))
    if draw(st.booleans()):
        try:
            wait = draw(st.booleans())
            table = lower(table, unshard=wait, reduce_grad=wait, wait_send=wait)
        except PipelineConfigError:  # a circle of groups: simulated as it is
            pass
        else:
            table = jostled(table, chance, draw(st.sampled_from([0.0, 0.1, 0.5])))
    few = st.integers(0, 5)
    costs = tuple(
        UnitCost(
            forward=draw(times),
            backward_input=draw(times),
            backward_weight=draw(times),
            activation_bytes=draw(few),
            weight_bytes=draw(few),
        )
        for _ in range(table.num_stages)
    )
    boundaries = table.num_stages - 1
    links = st.builds(Link, latency=times, bandwidth=st.sampled_from([math.inf, 2.0, 0.5]))
    form = draw(st.sampled_from(["free", "one", "boundaries", "ranks"]))
    link: Any = Link() if form == "free" else draw(links)
    if form == "boundaries":
        link = [draw(links) for _ in range(boundaries)]
    if form == "ranks":
        ranks = range(table.pp_size)
        pairs = {(source, target): draw(links) for source in ranks for target in ranks}
        link = lambda source, target: pairs[source, target]  # noqa: E731
    gain = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return Case(table, costs, link, [draw(few) for _ in range(boundaries)], gain)


def run(case: Case, mode: str) -> Simulation:
    return simulate(
        case.table,
        case.costs,
        link=case.link,
        boundary_bytes=case.nbytes,
        overlap=mode == "beside",
        overlap_gain=case.overlap_gain,
    )


def oracle(case: Case, mode: str) -> reference.Step:
    return reference.run(
        case.table,
        case.costs,
        seconds=case.seconds,
        mode=mode,
        overlap_gain=case.overlap_gain,
    )


MODES = ("beside", "within")


def check_times(case: Case, mode: str) -> tuple[Simulation, reference.Step] | None:
    """All times are the oracle's, to the last bit; None where the table waits in a circle."""
    try:
        expected = oracle(case, mode)
    except reference.Circle:
        with pytest.raises(PipelineConfigError, match=r"deadlocks|does not run to its end"):
            run(case, mode)
        return None
    found = run(case, mode)
    assert found.step_time == expected.step_time
    for rank, row in enumerate(expected.rows):
        spans = [
            (group or leaf, start)
            for leaf, start, _, group in found.times(rank)
            if group is None or leaf == group.parts[0]
        ]
        ends = [
            end for leaf, _, end, group in found.times(rank) if not group or leaf == group.parts[-1]
        ]
        nodes = [node for node in row if node.action is not None]
        assert spans == [(n.action, n.start) for n in nodes]
        assert ends == [node.end for node in nodes]
        transfers = {}
        for message, move in expected.moves.items():
            if expected.rank_of[message[1]] == rank:
                sent = expected.sends[message].start
                transfers[message] = (move.start if mode == "beside" else sent, move.end)
        assert transfers == {
            (t.action.kind is ActionKind.SEND_BACKWARD, t.action.stage, t.action.microbatch): (
                t.start,
                t.end,
            )
            for t in found.transfers(rank)
        }
    return found, expected


@settings(max_examples=200)
@given(cases())
def test_every_table_equals_the_oracle(case: Case) -> None:
    for mode in MODES:
        if (both := check_times(case, mode)) is None:
            continue
        found, expected = both
        idle = 0.0
        for rank, report in enumerate(found.ranks):
            figures = {
                "busy": report.busy,
                "start": report.idle.start,
                "activations": report.idle.activations,
                "gradients": report.idle.gradients,
                "communication": report.idle.communication,
                "end": report.idle.end,
                "first": report.first,
                "last": report.last,
                "peak_live": report.peak_live,
                "peak_activation_bytes": report.peak_activation_bytes,
                "peak_receive_buffers": report.peak_receive_buffers,
                "peak_receive_bytes": report.peak_receive_bytes,
                "sent_bytes": report.sent_bytes,
                "received_bytes": report.received_bytes,
            }
            costs = case.costs
            nbytes = {m: case.nbytes[boundary(m)] for m in expected.sends}
            wanted = reference.rank_figures(expected, rank, costs, nbytes.__getitem__, mode)
            assert {name: figures[name] for name in wanted} == wanted
            assert report.busy + report.idle.total == found.step_time
            idle += report.idle.total
        whole = found.step_time * found.table.pp_size
        assert found.idle_share == (idle / whole if whole else 0)


@settings(max_examples=60)
@given(cases(times=st.floats(0, 1e3, allow_subnormal=False)))
def test_floats_are_the_oracles_to_the_last_bit(case: Case) -> None:
    for mode in MODES:
        check_times(case, mode)


def test_the_oracle_sees_circles() -> None:
    """Also those of nodes that take no time."""
    table = parse_table("0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0")
    for costs in (uniform_costs(2), uniform_costs(2, forward=0, backward=0)):
        with pytest.raises(reference.Circle):
            reference.run(table, costs, seconds=lambda _: 0.0, mode="beside")


@settings(max_examples=200)
@given(size=sizes(max_pp=4, max_microbatches=4), seed=st.integers(0, 2**32), lowered=st.booleans())
def test_what_the_verifier_accepts_runs_and_nothing_crashes(
    size: dict[str, Any], seed: int, lowered: bool
) -> None:
    chance = random.Random(seed)
    table = lower(table_of(**size)) if lowered else table_of(**size)
    rows = [list(table.row(rank)) for rank in range(table.pp_size)]
    for _ in range(chance.randrange(3)):
        row, other = chance.choice(rows), chance.choice(rows)
        if row:
            action = row.pop(chance.randrange(len(row)))
            other.insert(chance.randrange(len(other) + 1), action)
            if chance.random() < 0.2:
                other.insert(chance.randrange(len(other) + 1), action)
    mutant = ScheduleTable.from_rows("mutant", rows)
    try:
        verify(mutant)
        accepted = True
    except PipelineConfigError:
        accepted = False
    for overlap in (True, False):
        try:
            step = simulate(mutant, uniform_costs(mutant.native.num_stages), overlap=overlap)
        except PipelineConfigError as error:
            assert not accepted, error
        else:
            if accepted:
                assert tuple(rank.peak_live for rank in step.ranks) == peak_activations(mutant)


# Closed forms: equal stages, free communication, integers. All sums are exact.

INTEGER_COSTS = [
    (float(f), float(b), float(w)) for f in (1, 2, 3) for b in (1, 2, 3, 4, 6) for w in range(b + 1)
]


def uniform_step(
    name: str,
    p: int,
    n: int,
    v: int | None = None,
    *,
    costs: tuple[float, float, float],
    overlap_gain: float = 0.0,
) -> Simulation:
    table = compute_table(SCHEDULES[name], pp_size=p, n_microbatches=n, stages_per_rank=v)
    forward, backward, weight = costs
    stages = uniform_costs(table.num_stages, forward=forward, backward=backward, weight=weight)
    return simulate(table, stages, overlap_gain=overlap_gain)


def idle_times(step: Simulation) -> set[float]:
    """The ranks' idle times between the step's start and end."""
    return {rank.idle.total for rank in step.ranks}


@pytest.mark.parametrize("name", ["GPipe", "1F1B"])
def test_bubble_of_gpipe_and_1f1b(name: str) -> None:
    """(p - 1)(F + B): every microbatch count that the schedule takes, all times."""
    for p in (1, 2, 3, 5, 8):
        for n in range(p if name == "1F1B" else 1, 2 * p + 3):
            for f, b, w in INTEGER_COSTS:
                step = uniform_step(name, p, n, costs=(f, b, w))
                assert idle_times(step) == {(p - 1) * (f + b)}
                assert step.step_time == (n + p - 1) * (f + b)


def test_bubble_of_interleaved_1f1b() -> None:
    """(p - 1)(F + B) of virtual stages, arXiv 2104.04473, from p microbatches on; not below."""
    for p in (1, 2, 3, 5):
        for n in (n for n in range(1, 3 * p + 1) if n % max(1, n // p) == 0):
            for v in (1, 2, 3):
                for f, b, w in ((1.0, 2.0, 1.0), (3.0, 2.0, 1.0), (2.0, 8.0, 3.0)):
                    step = uniform_step("Interleaved1F1B", p, n, v, costs=(f, b, w))
                    holds = n >= p or v == 1
                    assert (idle_times(step) == {(p - 1) * (f + b)}) == holds


def test_bubble_of_zb1p() -> None:
    """(p - 1)(F + B - 2W), arXiv 2401.10241, where a W fits beside F and I; not elsewhere."""
    for p in (2, 3, 5):
        for n in (n for n in range(1, 3 * p + 1) if n % max(1, n // p) == 0):
            for f, b, w in INTEGER_COSTS:
                step = uniform_step("InterleavedZeroBubble", p, n, 1, costs=(f, b, w))
                holds = n >= p and w <= min(f, b - w)
                if holds or n >= p:
                    assert (idle_times(step) == {(p - 1) * (f + b - 2 * w)}) == holds


def test_bubble_of_zbh2() -> None:
    """(p - 1)(F + B - 3W) from a rank's first action to its last, of the rank that idles most.

    From arXiv 2401.10241, where a W fits beside F and I and there are 2p - 1 microbatches, of which
    the first rank holds the activations.
    """
    for p in (2, 3, 5):
        for n in (2 * p - 1, 2 * p, 4 * p):
            for f, b, w in INTEGER_COSTS:
                if w > min(f, b - w):
                    continue
                step = uniform_step("ZBH2", p, n, costs=(f, b, w))
                form = (p - 1) * (f + b - 3 * w)
                assert max(rank.idle.between for rank in step.ranks) == form
                assert max(rank.peak_live for rank in step.ranks) == 2 * p - 1


def test_zbv_has_no_bubble() -> None:
    """None from a rank's first action to its last where F = I = W, from 2p - 1 microbatches on."""
    for p in (1, 2, 3, 5, 8):
        for n in range(1, 3 * p + 2):
            for f in (1.0, 3.0):
                step = uniform_step("ZBVZeroBubble", p, n, costs=(f, 2 * f, f))
                holds = n >= 2 * p - 1 or p == 1
                assert all(rank.idle.between == 0 for rank in step.ranks) == holds
    for costs in ((2.0, 3.0, 1.0), (1.0, 3.0, 1.0), (2.0, 2.0, 1.0)):
        between = [
            rank.idle.between for rank in uniform_step("ZBVZeroBubble", 4, 9, costs=costs).ranks
        ]
        assert max(between) > 0


def test_bubble_of_dual_pipe_v() -> None:
    """(p - 1)(F&B + B - 3W), the table in DualPipe's README, where F = I.

    Where a pair saves time, the form is that of the last two ranks: the others have fewer pairs,
    are busier by what those do not save, and idle less.
    """
    for p in (1, 2, 3, 5):
        for n in (2 * p, 2 * p + 1, 3 * p, 5 * p):
            for f, w in ((2.0, 2.0), (4.0, 2.0), (4.0, 1.0), (4.0, 4.0)):
                for gain in (0.0, 0.5, 1.0):
                    b = f + w
                    step = uniform_step("DualPipeV", p, n, costs=(f, b, w), overlap_gain=gain)
                    form = (p - 1) * (f + b - gain * f + b - 3 * w)
                    found = [rank.idle.total for rank in step.ranks]
                    if gain == 0 or p < 3:
                        assert found == [form] * p
                    else:
                        assert found[-2:] == [form] * 2
                        assert all(a < b for a, b in pairwise(found[:-1]))
    assert idle_times(uniform_step("DualPipeV", 4, 8, costs=(1.0, 3.0, 1.0))) != {3 * (4 + 3 - 3)}


def test_peak_activations() -> None:
    """n for GPipe, p - r for 1F1B, Megatron's warm-up for interleaved, 2p at most for ZB-V."""
    costs = (1.0, 2.0, 1.0)
    for p in (1, 2, 3, 5):
        for n in (p, 2 * p, 4 * p):
            ranks = range(p)

            def peaks(name: str, v: int | None = None, p: int = p, n: int = n) -> list[int]:
                return [rank.peak_live for rank in uniform_step(name, p, n, v, costs=costs).ranks]

            assert peaks("GPipe") == [n] * p
            assert peaks("1F1B") == [min(n, p - r) for r in ranks]
            for v in (2, 3):
                warmup = [2 * (p - r - 1) + (v - 1) * p for r in ranks]
                assert peaks("Interleaved1F1B", v) == [min(n * v, w + 1) for w in warmup]
                assert peaks("LoopedBFS", v) == [n * v] * p
            assert max(peaks("ZBVZeroBubble")) == min(2 * n, 2 * p)


# torch's own simulator


def torch_columns(table: ScheduleTable) -> list[dict[str, int]]:
    """The column of every action as torch's simulator places it."""
    actions = {
        rank: [schedules._Action.from_str(str(action)) for action in table.row(rank)]
        for rank in range(table.pp_size)
    }
    ranks = table.stage_to_rank
    found = schedules._simulate_comms_compute(actions, lambda stage: ranks[stage], len(ranks))
    return [
        {str(action): column for column, action in enumerate(found[rank]) if action is not None}
        for rank in range(table.pp_size)
    ]


def check_columns(table: ScheduleTable) -> None:
    try:
        step = lock_step(table)
    except PipelineConfigError:
        # torch prints what it has, and stumbles over that where no rank did anything.
        with pytest.raises((ValueError, IndexError), match=r"not progressing|index out of"):
            torch_columns(table)
        return
    expected = torch_columns(table)
    for rank, columns in enumerate(expected):
        assert {str(action): place for action, place in step.row(rank)} == columns
    assert step.steps == 1 + max(column for row in expected for column in row.values())


@pytest.mark.torch
@given(sizes(max_pp=5, max_microbatches=9).filter(lambda size: size["name"] != "DualPipeV"))
def test_steps_of_schedules_are_torchs(size: dict[str, Any]) -> None:
    check_columns(lower(table_of(**size), unshard=False, reduce_grad=False))


@pytest.mark.torch
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 6), st.integers(1, 4))
def test_steps_of_any_table_are_torchs(seed: int, pp_size: int, num_stages: int, n: int) -> None:
    rows = random_rows(seed, pp_size, num_stages, n)
    table = lower(ScheduleTable.from_rows("random", rows), unshard=False, reduce_grad=False)
    check_columns(table)
    check_columns(jostled(table, random.Random(seed), 0.3))


def test_what_torch_does_not_run_takes_no_step_or_one() -> None:
    """Waits, sharding and reduction take none; groups, which its simulator refuses, take one."""
    table = parse_table("0UNSHARD 0F0 (0F1;0B0)OVERLAP_F_B 0B1 0RESHARD 0REDUCE_GRAD")
    assert [step for _, step in lock_step(table).row(0)] == [0, 0, 1, 2, 3, 3]
    assert lock_step(table).native.row() == (0, 0, 1, 1, 2, 3, 3)
    assert lock_step(table).steps == 3
    table = parse_table("0F0 0SEND_F0 0WAIT_SEND_F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0")
    assert [[step for _, step in lock_step(table).row(rank)] for rank in (0, 1)] == [
        [0, 1, 2, 4, 5],
        [1, 2, 3, 4],
    ]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (("0F0 0B0", "1F0 1B0"), "rank 0, column 1, action 0B0: 0B0 comes without 0RECV_B0 before"),
        (("0F0 1F0 0B0 1B0",), "0B0 comes without 1B0 before it"),
        (("0F0 0RECV_B0 0B0", "1F0 1B0"), "1F0 comes without 1RECV_F0"),
        (("0F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0"), "waits for 1SEND_B0, which never comes"),
        (("0SEND_F0 0F0 0B0", "1F0 1B0"), "it comes before what it sends"),
        (("1SEND_F0 0F0 0B0", "1F0 1B0"), "no stage at the other end"),
        (("7SEND_F0 0F0 0B0", "1F0 1B0"), "no stage at the other end"),
        (("1RECV_F0 0F0 0B0", "1F0 1B0"), "stage 1 lives on another rank"),
        (("0F0 0B0 0F4000",), "4001 microbatches"),
        (("0UNSHARD",), "no computations"),
    ],
)
def test_what_has_no_step_is_named(rows: tuple[str, ...], match: str) -> None:
    with pytest.raises(PipelineConfigError, match=re.escape(match)):
        lock_step(parse_table(*rows))


# Communication, worked out by hand


def spans(step: Simulation, rank: int) -> list[tuple[float, float]]:
    return [(bar.start, bar.end) for bar in step.bars(rank)]


def test_a_link_takes_one_transfer_at_a_time() -> None:
    table = parse_table("0F0 0F1 0F2 0B0 0B1 0B2", "1F0 1F1 1F2 1B0 1B1 1B2")
    costs = uniform_costs(2, forward=1.0, backward=2.0)
    step = simulate(table, costs, link=Link(latency=1.0, bandwidth=5.0), boundary_bytes=10)
    assert [(t.start, t.end) for t in step.transfers(0)] == [(1, 4), (4, 7), (7, 10)]
    assert spans(step, 1)[:3] == [(4, 5), (7, 8), (10, 11)]
    assert [(t.start, t.end) for t in step.transfers(1)] == [(13, 16), (16, 19), (19, 22)]
    assert spans(step, 0)[3:] == [(16, 18), (19, 21), (22, 24)]
    first, second = step.ranks
    # 0F2 ends at 3; 1B0, which makes what rank 0 waits for, at 13.
    assert (first.idle.gradients, first.idle.communication) == (10, 3 + 1 + 1)
    assert (second.idle.start, second.idle.communication, second.idle.end) == (4, 2 + 2, 24 - 17)
    assert (first.sent_bytes, first.received_bytes) == (30, 30)
    assert str(step.transfers(1)[2].action) == "1SEND_B2"


def test_without_overlap_both_ranks_spend_the_time() -> None:
    table = parse_table("0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1")
    costs = uniform_costs(2, forward=1.0, backward=2.0)
    step = simulate(table, costs, link=Link(latency=1.0), overlap=False)
    assert spans(step, 0)[:2] == [(0, 1), (2, 3)]
    assert spans(step, 1) == [(2, 3), (4, 5), (5, 7), (8, 10)]
    assert spans(step, 0)[2:] == [(8, 10), (11, 13)]
    first = step.rank(0)
    assert (first.idle.gradients, first.idle.communication) == (7 - 4, 1 + 1 + 1 + 1)
    # What the table spells out changes nothing: sends stand right after what they send.
    lowered = simulate(lower(table), costs, link=Link(latency=1.0), overlap=False)
    assert [spans(lowered, rank) for rank in (0, 1)] == [spans(step, rank) for rank in (0, 1)]


def test_a_late_receive_delays_the_transfer() -> None:
    rows = "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0RECV_B1 0B0 0B1"
    early = parse_table(rows, "1RECV_F0 1RECV_F1 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1")
    late = parse_table(rows, "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1")
    costs, link = uniform_costs(2, forward=1.0, backward=2.0), Link(latency=1.0)
    for table, start, buffers in ((early, 5, 2), (late, 6, 1)):
        step = simulate(table, costs, link=link, boundary_bytes=7)
        assert spans(step, 1)[2] == (start, start + 1)
        assert step.rank(1).peak_receive_buffers == buffers
        assert step.rank(1).peak_receive_bytes == 7 * buffers


def test_links_differ_by_boundary_and_by_rank() -> None:
    table = compute_table(SCHEDULES["1F1B"], pp_size=3, n_microbatches=3)
    costs = uniform_costs(3)
    near, far = Link(latency=0.5), Link(latency=4.0)
    by_boundary = simulate(table, costs, link=[near, far])
    by_ranks = simulate(table, costs, link=lambda a, b: near if {a, b} == {0, 1} else far)
    assert [spans(by_boundary, r) for r in range(3)] == [spans(by_ranks, r) for r in range(3)]
    assert spans(by_boundary, 1)[0][0] == 1.5
    assert spans(by_boundary, 2)[0][0] == 1.5 + 1 + 4
    one_way = simulate(table, costs, link=lambda a, b: far if a > b else Link())
    assert spans(one_way, 2)[0][0] == 2
    assert spans(one_way, 1)[-1][0] == spans(one_way, 2)[-1][1] + 4


def test_a_pair_may_save_time() -> None:
    table = parse_table("0F0 (0F1;0B0)OVERLAP_F_B 0B1")
    step = simulate(table, uniform_costs(1, forward=2.0, backward=4.0), overlap_gain=0.5)
    assert step.step_time == 2 + (4 + 0.5 * 2) + 4
    assert [bar.end for bar in step.bars(0)][2] == 2 + 5
    assert [bar.group is not None for bar in step.bars(0)] == [False, True, True, False]
    assert step.rank(0).peak_live == 2


def test_split_backwards_keep_what_the_weights_need() -> None:
    table = parse_table("0F0 0F1 0I0 0I1 0W0 0W1")
    costs = uniform_costs(1, activation_bytes=10, weight_bytes=4)
    assert simulate(table, costs).rank(0).peak_activation_bytes == 20
    costs = uniform_costs(1, activation_bytes=10, weight_bytes=12)
    assert simulate(table, costs).rank(0).peak_activation_bytes == 24


# Sizes and mistakes


@pytest.mark.parametrize("name", ["GPipe", "Interleaved1F1B"])
def test_ten_thousand_ranks(name: str) -> None:
    table = compute_table(SCHEDULES[name], pp_size=10_000, n_microbatches=64)
    step = simulate(table, uniform_costs(table.num_stages))
    if name == "GPipe":
        assert step.step_time == (64 + 9_999) * 3
        assert idle_times(step) == {9_999 * 3.0}
    assert len(step.ranks) == 10_000
    assert len(step.bars(5_000)) == 2 * 64 * (table.num_stages // 10_000)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (("0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0"), "deadlocks: rank 0, column 1, action 0B0 waits"),
        (("0F0 (1F0;0B0)OVERLAP_F_B 1B0",), "waits for 1B0 of rank 0"),
        (("0F0 0B0", "1F0"), "does not run to its end: rank 0, column 1, action 0B0 waits for 1B0"),
        (("0F0 0B0", "1F0 1F0 1B0"), "rank 1, column 1, action 1F0: 1F0 comes after it ran"),
        (("0F0 0B0 0I0",), "rank 0, column 2, action 0I0: 0I0 comes after it ran"),
        (("(0F0;0F0)OVERLAP_F_B 0B0",), "rank 0, column 0, action (0F0;0F0)OVERLAP_F_B: 0F0 comes"),
        (("0F0 (0B0;0I0)OVERLAP_F_B",), "0I0 comes after it ran already, whole or in part"),
        (("0B0 0F0",), "0B0 comes without 0F0 before it"),
        (("0F0 0W0",), "0W0 comes without 0I0 before it"),
        (("0F0 0B0", "2F0 2B0"), "no rank runs stage 1"),
        (("0F0", "0B0"), "stage 0 also runs on rank 0"),
        (("0UNSHARD",), "no computations"),
        ((), "no computations"),
        (("0F0 0B0 0F4000",), "4001 microbatches"),
        (("0F0 0SEND_F0", "1F0 1B0"), "1F0 comes without 1RECV_F0 before it"),
        (("0SEND_F0 0F0 0B0", "1RECV_F0 1F0 1B0"), "0SEND_F0 comes without 0F0 before it"),
        (("1SEND_F0 0F0 0B0", "1F0 1B0"), "1SEND_F0 has no stage at the other end"),
        (("0RECV_F0 0F0 0B0",), "0RECV_F0 has no stage at the other end"),
        (("1RECV_F0 0F0 0B0", "1F0 1B0"), "stage 1 lives on rank 1"),
        (("0F0 0SEND_F0 1F0 1B0 0B0",), "live on the same rank"),
        (("0F0 0SEND_F0 0SEND_F0 0B0", "1F0 1B0"), "0SEND_F0 ran already"),
        (("0F0 0WAIT_SEND_F0 0B0", "1F0 1B0"), "comes without its send"),
    ],
)
def test_what_cannot_run_is_named(rows: tuple[str, ...], match: str) -> None:
    table = parse_table(*rows)
    costs = uniform_costs(table.native.num_stages)
    for overlap in (True, False):
        with pytest.raises(PipelineConfigError, match=re.escape(match)):
            simulate(table, costs, overlap=overlap)


def test_thousands_of_waiting_ranks_are_told_in_few_words() -> None:
    size = 5000
    rows = [f"{r}F0 {r + size}F0 {r + size}B0 {r}B0".split() for r in range(size)]
    rows[0][:2] = rows[0][1::-1]
    with pytest.raises(PipelineConfigError) as caught:
        simulate(parse_table(*map(" ".join, rows)), uniform_costs(2 * size))
    message = str(caught.value)
    assert "deadlocks: rank 0, column 0, action 5000F0 waits for 4999F0 of rank 4999; " in message
    assert message.endswith("; and 4992 more ranks of the circle")
    assert len(message) < 1000

    rows = [f"{r}F0 {r}B0".split() for r in range(size)]
    del rows[-1][1]
    with pytest.raises(PipelineConfigError) as caught:
        simulate(parse_table(*map(" ".join, rows)), uniform_costs(size))
    message = str(caught.value)
    assert "to its end: 4991 more ranks wait in a line for rank 4991; rank 4991, column" in message
    assert message.endswith("waits for 4999B0 of rank 4999; rank 4999 comes to its end without it")
    assert len(message) < 1000


def test_parts_of_a_group_compute() -> None:
    joined = 1 << 62
    send = parse_table("0F0 0SEND_F0 0B0", "1F0 1B0").native.codes(0)[1]
    rows = [[_code("0F0"), send | joined, _code("0B0")], [_code("1F0"), _code("1B0")]]
    table = ScheduleTable(_core.Schedule.of_codes("x", rows))
    with pytest.raises(PipelineConfigError, match="holds computations only"):
        simulate(table, uniform_costs(2))


def _code(action: str) -> int:
    return parse_table(action).native.codes(0)[0]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"costs": uniform_costs(3)}, "costs has 3 entries, but 1F1B has 2 stages"),
        ({"link": [Link()] * 2}, "link has 2 entries, but there are 1 boundaries"),
        ({"boundary_bytes": [1, 2]}, "boundary_bytes has 2 entries"),
        ({"boundary_bytes": -1}, "boundary_bytes (-1) must be"),
        ({"boundary_bytes": -1, "link": Link(bandwidth=1.0)}, "boundary_bytes (-1) must be"),
        ({"boundary_bytes": 1, "link": Link(bandwidth=1e-320)}, "bandwidth (1e-320): 1 bytes take"),
        ({"overlap_gain": -1e-9}, "overlap_gain (-1e-09) must be"),
        ({"overlap_gain": 1.5}, "overlap_gain (1.5"),
        ({"overlap_gain": math.nan}, "overlap_gain (nan"),
    ],
)
def test_costs_fit_the_table(changes: dict[str, Any], match: str) -> None:
    table = compute_table(SCHEDULES["1F1B"], pp_size=2, n_microbatches=2)
    with pytest.raises(PipelineConfigError, match=re.escape(match)):
        simulate(**{"table": table, "costs": uniform_costs(2), **changes})


def test_bytes_beyond_64_bits_are_an_error() -> None:
    table = compute_table(SCHEDULES["GPipe"], pp_size=2, n_microbatches=4)
    with pytest.raises(OverflowError, match="activations"):
        simulate(table, uniform_costs(2, activation_bytes=1 << 62))
    with pytest.raises(OverflowError, match="bytes sent"):
        simulate(table, uniform_costs(2), boundary_bytes=1 << 62)


@pytest.mark.parametrize("overlap", [True, False])
def test_times_beyond_a_float_are_an_error(overlap: bool) -> None:
    """Infinite times would have differences that are no numbers, and ranks that seem to wait."""
    table = parse_table("0F0 0F1 0B0 0B1", "1F0 (1F1;1B0)OVERLAP_F_B 1B1")
    costs = uniform_costs(2, forward=1e308)
    with pytest.raises(OverflowError, match=r"seconds \(1e\+308\) times actions \(8\)"):
        simulate(table, costs, overlap=overlap)
    with pytest.raises(OverflowError, match="than a float holds"):
        simulate(table, uniform_costs(2), link=Link(latency=1e308), overlap=overlap)
    step = simulate(table, uniform_costs(2, forward=1e300, backward=1e300), overlap=overlap)
    assert step.step_time < math.inf
    assert 0 < step.idle_share < 1


def test_the_advice_works() -> None:
    check_advice(Link, {"latency": -1.0, "bandwidth": 1.0})
    check_advice(lambda **given: uniform_costs(2, **given), {"backward": 2.0, "weight": 3.0})
    table = compute_table(SCHEDULES["1F1B"], pp_size=2, n_microbatches=2)
    check_advice(lambda **given: simulate(table, uniform_costs(2), **given), {"overlap_gain": -1})
    for bandwidth in (0.0, -1.0, math.nan):
        with pytest.raises(PipelineConfigError, match="bandwidth"):
            Link(bandwidth=bandwidth)
