"""Tables handed to torch's runtime: what torch itself would run, without torch's work on them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import schedules as torch_schedules

from hfpp.plan.placement import Placement
from hfpp.plan.schedules import SCHEDULES, compute_table, verify, write_csv
from hfpp.plan.schedules.actions import ScheduleTable
from hfpp.runtime.build_schedule import build_pipeline_schedule
from hfpp.runtime.lazy_rows import LazyRows
from tests.reference.torch_orders import torch_schedule

TABLED = tuple(name for name, spec in SCHEDULES.items() if not spec.single_stage)
TORCHS_OWN = tuple(name for name in TABLED if hasattr(torch_schedules, f"Schedule{name}"))


class Stage:
    """The place of a stage and a module: all that building looks at."""

    dw_builder = group = None
    device = torch.device("cpu")

    def __init__(self, index: int, num_stages: int, rank: int, pp_size: int) -> None:
        self.stage_index, self.num_stages = index, num_stages
        self.group_rank, self.group_size = rank, pp_size
        self.is_first, self.is_last = index == 0, index == num_stages - 1
        self.submod = torch.nn.Identity()
        self.stage_index_to_group_rank = {stage: stage % pp_size for stage in range(num_stages)}


def built(
    name: str, pp_size: int, n: int, per_rank: int = 2, rank: int = 0, csv: Any = None
) -> Any:
    per_rank = SCHEDULES[name].stages_per_rank or per_rank
    num_stages = pp_size * per_rank
    indices = [rank + k * pp_size for k in range(per_rank)]
    if SCHEDULES[name].placement is Placement.V:
        indices = [rank, num_stages - 1 - rank]
    stages: list[Any] = [Stage(index, num_stages, rank, pp_size) for index in indices]
    return build_pipeline_schedule(csv, None if csv else name, 1, n, stages, _loss)


def _loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).sum()


def torchs(name: str, pp_size: int, n: int, per_rank: int = 2, rank: int = 0) -> Any:
    return torch_schedule(
        name,
        rank=rank,
        pp_size=pp_size,
        stages_per_rank=SCHEDULES[name].stages_per_rank or per_rank,
        n_microbatches=n,
    )


def without_idle(rows: Any) -> dict[int, list[Any]]:
    return {rank: [action for action in rows[rank] if action is not None] for rank in rows}


SIZES = [(1, 2, 2), (2, 8, 2), (3, 6, 3), (4, 8, 2), (5, 15, 4)]


@pytest.mark.parametrize(("pp_size", "n", "per_rank"), SIZES)
@pytest.mark.parametrize("name", TORCHS_OWN)
def test_every_rank_runs_what_torch_would_run(
    name: str, pp_size: int, n: int, per_rank: int
) -> None:
    expected = torchs(name, pp_size, n, per_rank, rank=pp_size - 1)
    found = built(name, pp_size, n, per_rank, rank=pp_size - 1)
    assert dict(found.pipeline_order_with_comms) == expected.pipeline_order_with_comms
    assert dict(found.pipeline_order) == without_idle(expected.pipeline_order)
    assert found.stage_index_to_group_rank == expected.stage_index_to_group_rank
    for stage in found._stages:
        assert stage.stage_index_to_group_rank == expected.stage_index_to_group_rank


@pytest.mark.parametrize("name", [*TORCHS_OWN, "GPipe", "1F1B"])
def test_all_else_is_as_torchs_constructor_leaves_it(name: str) -> None:
    found, expected = vars(built(name, 4, 8)), vars(torchs(name, 4, 8))
    own = {"_stage", "_stages", "_loss_fn", "_has_backward", "_should_compute_loss", "scale_grads"}
    own |= {"pipeline_order", "pipeline_order_with_comms"}
    assert expected.keys() <= found.keys()
    for key in expected.keys() - own:
        assert found[key] == expected[key], key


@pytest.mark.parametrize("name", SCHEDULES)
def test_torch_computes_no_table_of_a_named_schedule(name: str, monkeypatch: Any) -> None:
    passes = ("_add_send_recv", "_add_unshard_reshard", "_add_reduce_grad", "_validate_schedule")
    for one in passes:
        monkeypatch.setattr(torch_schedules, one, _forbidden)
    with pytest.raises(AssertionError, match="torch works on a table"):
        torchs(name if name in torch_schedules_by_name() else "DualPipeV", 4, 8)
    schedule = built(name, 4, 8)
    orders = [schedule.pipeline_order, getattr(schedule, "pipeline_order_with_comms", None)]
    made = ["0 made", None] if name in ("GPipe", "1F1B") else ["0 made", "1 made"]
    for order, count in zip(orders, made, strict=True):
        assert order is None or count in repr(order)


def torch_schedules_by_name() -> set[str]:
    return {name for name in SCHEDULES if hasattr(torch_schedules, f"Schedule{name}")}


def _forbidden(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("torch works on a table")


@pytest.mark.parametrize("name", ["GPipe", "1F1B"])
def test_schedules_without_a_table_have_one_to_look_at(name: str) -> None:
    found, expected = built(name, 4, 8), torchs(name, 4, 8)
    rows = without_idle(expected.pipeline_order)
    found_rows = dict(found.pipeline_order)
    if name == "1F1B":
        # torch's picture, from which nothing runs, loses the last rank's first forward; what it
        # runs is recorded over real processes in test_build_schedule.py.
        end = [action for action in map(str, rows.pop(3)) if "REDUCE_GRAD" in action]
        computed = [f"3{kind}{m}" for m in range(8) for kind in "FB"]
        assert list(map(str, found_rows.pop(3))) == [*computed, *end]
    assert found_rows == rows


# What one does with a schedule of torch


def simulated(schedule: Any) -> Any:
    """What torch's simulator says: before 2.15 that it does not know its own schedules' actions."""
    try:
        return schedule._simulate()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", ["Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"])
def test_torchs_own_tools_take_the_schedule(name: str, tmp_path: Path) -> None:
    found, expected = built(name, 4, 8), torchs(name, 4, 8)
    for schedule, stem in ((found, "found"), (expected, "expected")):
        schedule._dump_csv(tmp_path / f"{stem}.csv", "compute_comms")
    assert (tmp_path / "found.csv").read_bytes() == (tmp_path / "expected.csv").read_bytes()
    assert simulated(found) == simulated(expected)

    text = torch_schedules._format_pipeline_order(found.pipeline_order_with_comms)
    assert text == torch_schedules._format_pipeline_order(expected.pipeline_order_with_comms)
    assert dict(found.pipeline_order_with_comms) == expected.pipeline_order_with_comms

    found._dump_csv(tmp_path / "compute.csv", "compute_only")
    other = built(name, 4, 8)
    other._load_csv(tmp_path / "compute.csv", "compute_only")
    assert dict(other.pipeline_order) == dict(found.pipeline_order)
    assert other.pipeline_order_with_comms == expected.pipeline_order_with_comms


@pytest.mark.parametrize("name", ["Interleaved1F1B", "InterleavedZeroBubble", "DualPipeV"])
@pytest.mark.parametrize("form", ["compute_only", "compute_comms"])
def test_files_of_torch_run_as_torch_runs_them(name: str, form: str, tmp_path: Path) -> None:
    theirs = torchs(name, 3, 6)
    theirs._dump_csv(tmp_path / "torch.csv", form)
    found = built(name, 3, 6, csv=tmp_path / "torch.csv")
    assert dict(found.pipeline_order_with_comms) == theirs.pipeline_order_with_comms
    assert found.stage_index_to_group_rank == theirs.stage_index_to_group_rank


@pytest.mark.parametrize("name", [name for name in TABLED if name not in TORCHS_OWN])
def test_schedules_that_torch_lacks_run_in_its_runtime(name: str, tmp_path: Path) -> None:
    n = 8
    found = built(name, 4, n)
    assert isinstance(found, torch_schedules._PipelineScheduleRuntime)
    per_rank = SCHEDULES[name].stages_per_rank
    table = compute_table(SCHEDULES[name], pp_size=4, n_microbatches=n, stages_per_rank=per_rank)
    write_csv(table, tmp_path / "own.csv")
    lowered = built(name, 4, n, csv=tmp_path / "own.csv")
    lowered._load_csv(tmp_path / "own.csv", "compute_only")  # torch's own lowering
    assert dict(found.pipeline_order_with_comms) == lowered.pipeline_order_with_comms


# Rows


def test_rows_are_made_once_and_when_looked_at() -> None:
    asked: list[int] = []

    def make(rank: int) -> list[Any]:
        asked.append(rank)
        return [rank]

    rows = LazyRows(3, make)
    rows[2] = [7]
    assert (len(rows), list(rows), asked) == (3, [0, 1, 2], [])
    assert repr(rows) == "<3 rows of actions, 1 made>"
    assert rows[1] is rows[1]
    assert asked == [1]
    assert list(rows.values()) == [[0], [1], [7]]
    copied = copy.deepcopy(rows)
    copied[0][0] = "changed"
    assert rows == {0: [0], 1: [1], 2: [7]}
    del rows[0]
    assert 0 not in rows
    with pytest.raises(KeyError):
        rows[3]


def test_a_failing_step_of_a_large_pipeline_makes_no_other_rows() -> None:
    schedule = built("Interleaved1F1B", 96, 192, rank=7)
    text = torch_schedules._format_pipeline_order(schedule.pipeline_order_with_comms, 2)
    assert "7F0" in text
    assert "8F0" not in text
    assert "1 made" in repr(schedule.pipeline_order_with_comms)


def test_a_table_of_a_file_stays_as_it_was_read(tmp_path: Path) -> None:
    """Rows that are looked at later do not read the file again."""
    path = tmp_path / "schedule.csv"
    table = compute_table(SCHEDULES["Interleaved1F1B"], pp_size=2, n_microbatches=4)
    write_csv(table, path)
    found = built("Interleaved1F1B", 2, 4, csv=path)
    path.unlink()
    verify(ScheduleTable.from_rows("read", table.rows))
    assert [str(action) for action in found.pipeline_order[1]] == list(map(str, table.rows[1]))
