"""Plans: what constructs, what each rank gets of it, and JSON files in and out."""

from __future__ import annotations

import copy
import json
import re
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfpp import PipelineConfigError
from hfpp.plan.partition import uniform_offsets
from hfpp.plan.pipeline_plan import ParallelSizes, PipelinePlan
from hfpp.plan.plan_file import plan_as_json, read_plan, write_plan
from hfpp.plan.schedules import ScheduleTable, compute_table, find_schedule, parse_action
from tests.plan.plans import MODEL, plan_of, plans


def error_of(make: Any) -> str:
    with pytest.raises(PipelineConfigError) as caught:
        make()
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"offsets": (0, 5)}, "offsets"),
        ({"offsets": (0, 0, 5)}, "offsets"),
        ({"offsets": (0, 4, 6)}, "offsets"),
        ({"offsets": (1, 3, 5)}, "offsets"),
        ({"offsets": (0, 4, 3, 5)}, "offsets"),
        ({"schedule": "2F2B"}, "schedule"),
        ({"schedule": "ZBVZeroBubble"}, "stages_per_rank"),
        ({"n_microbatches": 1}, "n_microbatches"),
        ({"n_microbatches": True}, "n_microbatches"),
        ({"microbatch_size": 0}, "microbatch_size"),
        ({"seq_len": 1.0}, "seq_len"),
        ({"pp_size": 0}, "pp_size"),
        ({"pp_size": 1 << 40}, "pp_size"),
        ({"recompute": "some"}, "recompute"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_name(changes, named):
    assert named in error_of(lambda: plan_of(**changes)).partition(":")[0]


def test_experts_lie_over_ranks_that_there_are():
    assert "ep (3) must divide" in error_of(lambda: ParallelSizes(dp=4, ep=3))


@given(plans())
def test_ranks_share_all_stages_and_layers(plan: PipelinePlan):
    ranks = [plan.of_rank(rank) for rank in range(plan.pp_size)]
    stages = sorted(stage for rank in ranks for stage in rank.stages)
    assert stages == list(range(plan.num_stages))
    layers = sorted(layer for rank in ranks for span in rank.layers for layer in span)
    assert layers == list(range(plan.model.num_layers))
    assert [rank.rank for rank in ranks if rank.has_first_stage] == [plan.table().stage_to_rank[0]]
    assert [r.rank for r in ranks if r.has_last_stage] == [plan.table().stage_to_rank[-1]]
    assert plan.global_batch_size == plan.local_batch_size * plan.parallel.dp


@given(rank=st.sampled_from([-1, 2, 1 << 70]))
def test_there_is_no_such_rank(rank):
    with pytest.raises((PipelineConfigError, OverflowError)):
        plan_of().of_rank(rank)


@given(plan=plans())
def test_files_give_back_the_same_plan(tmp_path_factory, plan: PipelinePlan):
    path = tmp_path_factory.getbasetemp() / "plan.json"
    write_plan(plan, path)
    assert read_plan(path) == plan


def own_table() -> ScheduleTable:
    """1F1B of two ranks and four microbatches, with an idle column."""
    rows = compute_table(find_schedule("1F1B"), pp_size=2, n_microbatches=4).rows
    return ScheduleTable.from_rows("mine", (rows[0], (None, *rows[1])))


def test_files_hold_tables_of_ones_own(tmp_path):
    plan = plan_of(schedule="mine", own_table=own_table())
    write_plan(plan, tmp_path / "plan.json")
    again = read_plan(tmp_path / "plan.json")
    assert again == plan
    assert again.table().rows == own_table().rows
    assert again.placement == "loop"


def test_a_table_must_be_that_of_the_plan():
    message = error_of(lambda: plan_of(schedule="mine", n_microbatches=8, own_table=own_table()))
    assert "n_microbatches (8) must be that of the table mine (4)" in message
    broken = ScheduleTable.from_rows("mine", ((parse_action("0F0"),), ()))
    with pytest.raises(PipelineConfigError):
        plan_of(schedule="mine", own_table=broken)


def test_a_table_that_is_too_large_for_a_file_is_refused(tmp_path, monkeypatch):
    plan = plan_of(schedule="mine", own_table=own_table())
    monkeypatch.setattr("hfpp.plan.plan_file._LARGEST_FILE", 500)
    assert "as a CSV file" in error_of(lambda: write_plan(plan, tmp_path / "plan.json"))


# ---- files that are wrong


def changed(path: str, value: Any) -> str:
    """The file of a good plan with one member set, or taken out."""
    document = copy.deepcopy(plan_as_json(plan_of()))
    *parents, last = path.split(".")
    owner: Any = document
    for name in parents:
        owner = owner[name]
    if value is ...:
        del owner[last]
    else:
        owner[last] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("format", "zip", "$.format must be"),
        ("version", 2, "$.version (2) must be 1"),
        ("version", True, "$.version (true) must be 1"),
        ("schedule.name", 7, "$.schedule.name (7) must be a string"),
        ("schedule.name", "1F1C", "use schedule='1F1B'"),
        ("schedule.placement", "v", "$.schedule.placement (\"v\") must be 'loop'"),
        ("schedule.rows", ["0F0,0Q0"], "$.schedule.rows[0], action 1: '0Q0' is not"),
        ("schedule.rows", [["0F0"]], "$.schedule.rows[0] (an array) must be a string"),
        ("schedule.name", ..., "$.schedule has no member 'name'"),
        ("offsets", [0, "3", 5], '$.offsets[1] ("3") must be an integer'),
        ("offsets", [0, 6, 5], "offsets ([0, 6, 5]) must be 3 numbers"),
        ("offsets", {"0": 1}, "$.offsets (an object) must be an array"),
        ("offsets", ..., "$ has no member 'offsets'"),
        ("partition", [3, 2], '$ has a member "partition" that is not known'),
        ("pp_size", 10**40, "$.pp_size (an integer of more than 30 digits) must be an integer"),
        ("n_microbatches", 1.5, "$.n_microbatches (1.5) must be an integer"),
        ("n_microbatches", 3e9, "$.n_microbatches"),
        ("model.is_tied", "no", '$.model.is_tied ("no") must be true or false'),
        ("parallel.ep", 3, "ep (3) must divide"),
        ("recompute", "all", '$.recompute ("all") must be one of none, selective, full'),
        ("prediction", {}, "$.prediction has no member 'time'"),
        ("hfpp_version", "x" * 10_000, "$.hfpp_version"),
    ],
)
def test_a_wrong_member_is_named_with_its_path(tmp_path, path, value, said):
    file = tmp_path / "plan.json"
    file.write_text(changed(path, value))
    message = error_of(lambda: read_plan(file))
    assert re.match(rf"{re.escape(str(file))}, line 1, column \d+: \$", message)
    assert said in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "line 1, column 1: not JSON"),
        (b'{\n "format": "hfpp plan"\n "version": 1}', "line 3, column 2: not JSON"),
        (changed("seq_len", 128).encode()[:-40], "not JSON"),
        (b'{"format": 1, "format": 2}', 'the member "format" stands twice'),
        (b'{"format": NaN}', "NaN is no JSON number"),
        (b'{\n"format": "\xff"}', "line 2, column 12: not UTF-8"),
        (b"\x00\x01\x02", "line 1, column 1: not JSON"),
        (b"[" * 1_000_000, "nested too deep"),
        (b"9" * 100_000, "digits"),
        (b"[]", "$ (an array) must be an object"),
        (b"null", "$ (null) must be an object"),
        (b"{}", "$.format must be"),
        (b" " * (5 << 20), "is larger than 4 MiB"),
        (b"{" + b",".join(b'"%d":0' % i for i in range(200_000)) + b"}", "$.format must be"),
    ],
)
def test_what_is_no_plan_file_is_an_error_with_its_place(tmp_path, content, said):
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    message = error_of(lambda: read_plan(file))
    assert message.startswith(str(file))
    assert said in message
    assert len(message) < 400


def test_a_malicious_file_takes_little_memory(tmp_path):
    file = tmp_path / "plan.json"
    file.write_bytes(b"[" + b",".join([b"{}"] * 1_390_000) + b"]")
    assert file.stat().st_size < 4 << 20
    tracemalloc.start()
    error_of(lambda: read_plan(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 << 20


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_plan(tmp_path / "plan.json")
    assert "no regular file" in error_of(lambda: read_plan(tmp_path))


@given(st.binary(max_size=200), st.integers(0, 600), st.integers(0, 30))
def test_any_damage_is_an_error_or_another_plan(tmp_path_factory, piece, start, length):
    good = json.dumps(plan_as_json(plan_of())).encode()
    file = tmp_path_factory.getbasetemp() / "damaged.json"
    file.write_bytes(good[:start] + piece + good[start + length :])
    try:
        read_plan(file)
    except PipelineConfigError as error:
        assert str(error).startswith(str(file))


# ---- the live model


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 6}, ["6 layers instead of 5"]),
        ({"hidden_size": 65}, ["hidden_size 65 instead of 64"]),
        ({"vocab_size": None}, []),
        ({"model_type": ""}, []),
        ({"model_type": "qwen2"}, ["model_type qwen2 instead of llama"]),
        ({"is_tied": True}, ["tied embedding and head instead of separate ones"]),
        ({"parameters": 1, "vocab_size": 2}, ["vocab_size 2 inst", "1 parameters instead of 123"]),
    ],
)
def test_fingerprints_say_what_differs(changes, said):
    found = MODEL.differences(replace(MODEL, **changes))
    assert len(found) == len(said)
    assert all(words.startswith(start) for words, start in zip(found, said, strict=True))


def test_uniform_offsets_make_a_plan_of_any_size():
    plan = plan_of(
        pp_size=5,
        schedule="interleaved",
        stages_per_rank=3,
        n_microbatches=5,
        model=replace(MODEL, num_layers=40),
        offsets=uniform_offsets(15, 40).row(),
    )
    assert plan.of_rank(4).stages == (4, 9, 14)
    assert plan.gpus == 5
