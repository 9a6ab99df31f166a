"""Schedules: names, rules on microbatches, orders against torch's own, files, verification."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfpp.errors import PipelineConfigError
from hfpp.plan.placement import Placement
from hfpp.plan.schedules.actions import Action, ActionKind, ScheduleTable, parse_action
from hfpp.plan.schedules.lowering import lower
from hfpp.plan.schedules.schedule import (
    SCHEDULES,
    check_microbatches,
    compute_table,
    find_schedule,
    read_csv,
    verify,
    write_csv,
)
from tests.advice import check_advice
from tests.reference.torch_orders import TORCH_NAMES, torch_order, torch_schedule

MULTI = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")


@st.composite
def sizes(draw: Any, max_pp: int = 6, max_microbatches: int = 17) -> dict[str, Any]:
    """A schedule with sizes that it can run."""
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    pp_size = draw(st.integers(1, max_pp))
    per_rank = SCHEDULES[name].stages_per_rank or draw(st.integers(1, 4))
    if name == "1F1B":
        n = draw(st.integers(pp_size, pp_size + max_microbatches))
    elif name == "DualPipeV":
        n = draw(st.integers(2 * pp_size, 2 * pp_size + max_microbatches))
    elif name in ("Interleaved1F1B", "InterleavedZeroBubble"):
        counts = [n for n in range(1, 3 * max_pp + 1) if n % max(1, n // pp_size) == 0]
        n = draw(st.sampled_from(counts))
    else:
        n = draw(st.integers(1, max_microbatches))
    return {"name": name, "pp_size": pp_size, "stages_per_rank": per_rank, "n_microbatches": n}


def table_of(name: str, pp_size: int, stages_per_rank: int, n_microbatches: int) -> ScheduleTable:
    return compute_table(
        SCHEDULES[name],
        pp_size=pp_size,
        stages_per_rank=stages_per_rank,
        n_microbatches=n_microbatches,
    )


def texts(table: ScheduleTable) -> list[list[str]]:
    return [[str(step.action) for step in table.steps(rank)] for rank in range(table.pp_size)]


# Names


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_spelling_finds_its_schedule(name: str) -> None:
    spec = SCHEDULES[name]
    for spelling in (name, name.lower(), name.upper(), f"Schedule{name}", *spec.aliases):
        assert find_schedule(spelling) is spec


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("1f1b", "1F1B"),
        ("interleaved_1f1b", "Interleaved1F1B"),
        ("looped_bfs", "LoopedBFS"),
        ("dfs", "Interleaved1F1B"),
        ("zero_bubble", "InterleavedZeroBubble"),
        ("v_schedule", "ZBVZeroBubble"),
    ],
)
def test_aliases_that_peers_document(alias: str, name: str) -> None:
    assert find_schedule(alias).name == name


def test_aliases_do_not_collide() -> None:
    spellings = [s.lower() for spec in SCHEDULES.values() for s in (spec.name, *spec.aliases)]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize("name", ["2F2B", "", "interleaved 2F"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(PipelineConfigError) as caught:
        find_schedule(name)
    assert all(known in str(caught.value) for known in SCHEDULES)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["PipelineScheduleSingle", "pipelineschedulemulti"])
def test_an_abstract_class_is_refused(name: str) -> None:
    with pytest.raises(PipelineConfigError, match="abstract"):
        find_schedule(name)


def test_placement_and_stages_per_rank_of_each() -> None:
    v = {name for name, spec in SCHEDULES.items() if spec.placement is Placement.V}
    single = {name for name, spec in SCHEDULES.items() if spec.single_stage}
    assert v == {"ZBVZeroBubble", "DualPipeV", "VHalf", "VMin", "VLimited"}
    assert single == {"1F1B", "GPipe", "ZBH2"}
    assert {name for name, spec in SCHEDULES.items() if spec.stages_per_rank == 2} == v


# Microbatches


@given(
    name=st.sampled_from(TORCH_NAMES),
    pp_size=st.integers(1, 9),
    per_rank=st.integers(1, 3),
    n=st.integers(1, 40),
)
def test_microbatch_rule_is_torchs_rule(name: str, pp_size: int, per_rank: int, n: int) -> None:
    per_rank = SCHEDULES[name].stages_per_rank or per_rank
    try:
        torch_schedule(name, rank=0, pp_size=pp_size, stages_per_rank=per_rank, n_microbatches=n)
        torch_accepts = True
    except ValueError:
        torch_accepts = False
    try:
        check_microbatches(
            SCHEDULES[name], pp_size=pp_size, num_stages=pp_size * per_rank, n_microbatches=n
        )
        accepted = True
    except PipelineConfigError:
        accepted = False
    assert accepted == torch_accepts


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    pp_size=st.integers(1, 12),
    n=st.integers(-2, 60),
    microbatch_size=st.none() | st.integers(1, 4),
)
def test_the_advice_on_microbatches_works(
    name: str, pp_size: int, n: int, microbatch_size: int | None
) -> None:
    spec = SCHEDULES[name]

    def check(n_microbatches: int = 0, local_batch_size: int = 0) -> None:
        if microbatch_size is not None:
            n_microbatches = local_batch_size // microbatch_size
        check_microbatches(
            spec,
            pp_size=pp_size,
            num_stages=pp_size * (spec.stages_per_rank or 2),
            n_microbatches=n_microbatches,
            microbatch_size=microbatch_size,
        )

    if microbatch_size is None:
        check_advice(check, {"n_microbatches": n})
    else:
        check_advice(check, {"local_batch_size": n * microbatch_size})


@given(pp_size=st.integers(1, 12), n=st.integers(1, 99))
def test_the_nearest_counts_of_microbatches_are_advised(pp_size: int, n: int) -> None:
    def runs(count: int) -> str:
        try:
            check_microbatches(
                SCHEDULES["Interleaved1F1B"],
                pp_size=pp_size,
                num_stages=2 * pp_size,
                n_microbatches=count,
            )
        except PipelineConfigError as error:
            return str(error)
        return ""

    message = runs(n)
    below, above = n, n
    while runs(below):
        below -= 1
    while runs(above):
        above += 1
    advice = f"use n_microbatches={below} or n_microbatches={above}"
    assert message.endswith(advice) if message else below == n


def test_absurd_counts_of_microbatches_are_refused_at_once() -> None:
    with pytest.raises(PipelineConfigError, match=f"n_microbatches={2**80 + 2**40}$"):
        check_microbatches(
            SCHEDULES["Interleaved1F1B"],
            pp_size=2**40,
            num_stages=2**41,
            n_microbatches=2**80 + 1,
        )


@pytest.mark.parametrize("name", ["2F2B", "", "interleavd1f1b", "PipelineScheduleMulti", 3])
def test_the_advice_on_names_works(name: Any) -> None:
    check_advice(
        lambda pp_schedule: find_schedule(pp_schedule, argument="pp_schedule"),
        {"pp_schedule": name},
    )


def test_a_misspelt_name_gets_the_closest() -> None:
    with pytest.raises(PipelineConfigError, match="use pipeline_parallel_schedule='ZBVZeroBubble'"):
        find_schedule("ZBVZeroBuble")


@pytest.mark.parametrize(
    ("name", "sizes_", "match"),
    [
        ("GPipe", {"pp_size": 0, "n_microbatches": 1}, "pp_size"),
        ("GPipe", {"pp_size": 2, "stages_per_rank": 2, "n_microbatches": 1}, "stages_per_rank"),
        ("DualPipeV", {"pp_size": 2, "stages_per_rank": 3, "n_microbatches": 9}, "must be 2"),
        ("LoopedBFS", {"pp_size": 2, "stages_per_rank": 0, "n_microbatches": 9}, "at least 1"),
    ],
)
def test_impossible_sizes_are_errors(name: str, sizes_: dict[str, int], match: str) -> None:
    with pytest.raises(PipelineConfigError, match=match):
        compute_table(SCHEDULES[name], **sizes_)


# Orders: see test_orders.py and test_lowering.py


@given(sizes())
def test_every_order_is_verified(size: dict[str, Any]) -> None:
    table = table_of(**size)
    verify(table)
    assert table.num_stages == size["pp_size"] * size["stages_per_rank"]
    assert table.n_microbatches == size["n_microbatches"]
    assert table.stages_per_rank == size["stages_per_rank"]
    if size["pp_size"] > 1:
        assert table.placement is SCHEDULES[size["name"]].placement


@given(sizes())
def test_every_lowered_table_is_verified(size: dict[str, Any]) -> None:
    verify(lower(table_of(**size), unshard=False, reduce_grad=False))
    verify(lower(table_of(**size)))
    verify(lower(table_of(**size), wait_send=True, wait_reduce_grad=True, ordered_reshard=True))


# Files


@given(size=sizes(), lowered=st.booleans())
def test_files_read_back(size: dict[str, Any], lowered: bool, tmp_path_factory: Any) -> None:
    table = (
        lower(table_of(**size), unshard=False, reduce_grad=False) if lowered else table_of(**size)
    )
    path = tmp_path_factory.mktemp("csv") / "schedule.csv"
    write_csv(table, path)
    assert read_csv(path).rows == table.rows


@pytest.mark.parametrize("name", [*MULTI, "ZBVZeroBubble", "DualPipeV"])
@pytest.mark.parametrize("form", ["compute_only", "compute_comms"])
def test_files_that_torch_wrote(name: str, form: str, tmp_path: Path) -> None:
    sizes_ = {"pp_size": 3, "stages_per_rank": 2, "n_microbatches": 6}
    schedule = torch_schedule(name, rank=0, **sizes_)
    schedule._dump_csv(tmp_path / "torch.csv", form)
    table = read_csv(tmp_path / "torch.csv")
    verify(table)
    assert table.has_communication == (form == "compute_comms")
    compute = [[a for a in row if parse_action(a).kind.is_compute] for row in texts(table)]  # type: ignore[union-attr]
    assert compute == torch_order(name, **sizes_)


def test_a_missing_file_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_csv(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("0F0,0B0\n1F0,1X0\n", r"rank 1, column 1: '1X0' is not a schedule action"),
        ("0F0,0B\n", r"rank 0, column 1: '0B'"),
        ("0F0,0UNSHARD3\n", r"rank 0, column 1: '0UNSHARD3'"),
        ("0F0,()OVERLAP_F_B\n", r"rank 0, column 1"),
        ("0F0 and more\n", r"rank 0, column 0"),
        ("", "holds no actions"),
        ("\n\n", "holds no actions"),
        ("0UNSHARD\n", "holds no compute actions"),
    ],
)
def test_bad_files_are_named_errors(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(PipelineConfigError, match=match) as caught:
        verify(read_csv(path))
    assert "bad.csv" in str(caught.value)


def test_binary_is_no_schedule(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(PipelineConfigError, match="not a schedule"):
        read_csv(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("action", "match"),
    [
        (Action(0, ActionKind.FORWARD), "F is about one microbatch: use microbatch=0"),
        (Action(0, ActionKind.UNSHARD, 3), "UNSHARD is about a whole stage: use microbatch=None"),
        (Action(0, ActionKind.OVERLAP), "a group has parts"),
        (
            Action(
                -1,
                ActionKind.OVERLAP,
                None,
                (Action(0, ActionKind.FORWARD, 0), Action(-1, ActionKind.OVERLAP)),
            ),
            "a group has parts, of which none is a group",
        ),
        (Action(-1, ActionKind.FORWARD, 0), "numbered from 0"),
        (Action(0, ActionKind.FORWARD, 2**28), "numbered from 0 to 268435455"),
    ],
)
def test_what_is_no_action_is_no_row(action: Action, match: str) -> None:
    with pytest.raises(PipelineConfigError, match=f"planted: action .*{match}"):
        ScheduleTable.from_rows("planted", [[action]])


def test_blank_lines_at_the_end_are_no_ranks(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("0F0,,0B0\r\n\r\n")
    assert read_csv(tmp_path / "x.csv").pp_size == 1


# Verification: planted faults


def rows_of(table: ScheduleTable) -> list[list[Action]]:
    return [[step.action for step in table.steps(rank)] for rank in range(table.pp_size)]


def rejected(rows: list[list[Action]]) -> str:
    with pytest.raises(PipelineConfigError) as caught:
        verify(ScheduleTable.from_rows("planted", tuple(map(tuple, rows))))
    return str(caught.value)


@settings(max_examples=200)
@given(size=sizes(max_pp=4, max_microbatches=6), lowered=st.booleans(), seed=st.integers(0, 2**32))
def test_dropped_doubled_and_moved_actions_are_rejected(
    size: dict[str, Any], lowered: bool, seed: int
) -> None:
    chance = random.Random(seed)
    table = (
        lower(table_of(**size), unshard=False, reduce_grad=False) if lowered else table_of(**size)
    )
    rank = chance.randrange(table.pp_size)

    rows = rows_of(table)
    column = chance.randrange(len(rows[rank]))
    action = rows[rank].pop(column)
    if table.n_microbatches > 1 or action.kind is not ActionKind.FORWARD:
        message = rejected(rows)
        assert "rank" in message

    rows = rows_of(table)
    again = chance.randrange(column + 1, len(rows[rank]) + 1)
    rows[rank].insert(again, action)
    assert f"rank {rank}, column {again}, action {action}" in rejected(rows)

    if table.pp_size > 1:
        rows = rows_of(table)
        other = (rank + 1) % table.pp_size
        rows[other].insert(chance.randrange(len(rows[other]) + 1), rows[rank].pop(column))
        rejected(rows)


@settings(max_examples=200)
@given(size=sizes(max_pp=4, max_microbatches=6), seed=st.integers(0, 2**32))
def test_a_backward_before_its_forward_is_rejected(size: dict[str, Any], seed: int) -> None:
    rows = rows_of(table_of(**size))
    chance = random.Random(seed)
    rank = chance.randrange(len(rows))
    before, after = chance.choice(
        [
            (i, j)
            for i, first in enumerate(rows[rank])
            for j, second in enumerate(rows[rank])
            if i < j
            and any(
                (a.stage, a.microbatch) == (b.stage, b.microbatch)
                for a in first.leaves
                for b in second.leaves
            )
        ]
    )
    rows[rank][before], rows[rank][after] = rows[rank][after], rows[rank][before]
    message = rejected(rows)
    assert f"rank {rank}, column" in message or "deadlocks" in message
