"""`hfpp plan`: its table, its files, and what it says of wrong options."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest

from hfpp import cli
from hfpp.plan.costs_file import costs_as_json
from hfpp.plan.plan_file import read_plan
from hfpp.plan.schedules import read_csv, verify
from tests.plan.search.small_jobs import EXPERTS, SMALL
from tests.plan.search.test_planner import measured
from tests.test_import import loaded_by

JOB = ["--gpus", "8", "--global-batch", "32", "--seq-len", "1024"]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert cli.main(["plan", *arguments]) == code
    out, err = capsys.readouterr()
    return err if code else out


def plans_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[Any]:
    return json.loads(printed(capsys, *arguments, "--json"))["plans"]


def test_the_table_has_what_was_found(capsys, config):
    text = printed(capsys, config, *JOB, "--top", "3", "--width", "150")
    found = plans_of(capsys, config, *JOB, "--top", "3")
    lines = text.splitlines()
    assert lines[0].startswith("llama, 208.8M parameters, 7 layers, on 8 x H100 with 80.0 GiB")
    for place, one in enumerate(found, start=1):
        plan = one["plan"]
        row = next(line.split() for line in lines if re.match(rf" {place}  +[A-Z1]", line))
        assert row[1:5] == [
            plan["schedule"]["name"],
            str(plan["pp_size"]),
            str(plan["schedule"]["stages_per_rank"]),
            str(plan["parallel"]["dp"]),
        ]
        assert f"{100 * one['bubble']:.1f}%" in row
        if place > 1:
            assert f"{place}: {one['lost_by']}" in lines
    for part in ("parameters", "gradients", "optimizer", "activations", "receive buffers"):
        assert part in text
    assert "step of plan 1: compute " in text
    assert "layers of its stages: " in text


def test_the_files_are_those_of_the_best(capsys, config, tmp_path):
    paths = {name: tmp_path / f"best.{name}" for name in ("json", "csv", "html")}
    options = [
        "--out",
        str(paths["json"]),
        "--csv",
        str(paths["csv"]),
        "--html",
        str(paths["html"]),
    ]
    best = plans_of(capsys, config, *JOB, "--pp", "4", *options)[0]["plan"]
    plan = read_plan(paths["json"])
    assert plan.pp_size == 4
    assert json.loads(paths["json"].read_text()) == best
    table = read_csv(paths["csv"])
    verify(table)
    assert table.rows == plan.table().rows
    assert table.stage_to_rank == plan.table().stage_to_rank


class Page(html.parser.HTMLParser):
    """What a page holds, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "br", "path", "rect", "line", "image"):
            self.open.append(tag)
        self.loads += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href", "data") and not value.startswith("data:")
        ]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag in ("path", "rect", "line", "image"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_holds_all_and_loads_nothing(capsys, config, tmp_path):
    path = tmp_path / "plans.html"
    found = plans_of(capsys, config, *JOB, "--pp", "2,4", "--top", "4", "--html", str(path))
    text = path.read_text()
    page = Page(text)
    assert (page.open, page.loads) == ([], [])
    assert "<script" not in text
    assert "url(" not in text
    words = " ".join(page.words)
    for one in found:
        assert one["plan"]["schedule"]["name"] in words
        assert one["lost_by"] in words
    assert page.tags.count("svg") == 5  # time, memory, ranks, partition, schedule
    assert "head + " in words or " + head" in words
    for rank in range(found[0]["plan"]["pp_size"]):
        assert f"rank {rank}" in page.words


def test_a_models_name_cannot_break_the_page(capsys, tmp_path):
    config, path = tmp_path / "config.json", tmp_path / "plans.html"
    config.write_text(json.dumps({**SMALL, "model_type": "<script>alert(1)</script>"}))
    printed(capsys, str(config), *JOB, "--html", str(path))
    assert "<script" not in path.read_text()


def test_options_reach_the_search(capsys, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(EXPERTS))
    options = [
        "--schedule",
        "1f1b,zbv",
        "--pp",
        "2",
        "--microbatch-size",
        "2",
        "--recompute",
        "full",
    ]
    options += ["--tp", "2", "--ep", "2", "--sharding", "none", "--dtype", "float32", "--top", "2"]
    options += [
        "--gpus-per-node",
        "4",
        "--memory",
        "40GiB",
        "--flops",
        "1e14",
        "--hardware",
        "A100",
    ]
    options += ["--node-bandwidth", "100GB/s", "--network-bandwidth", "10GB/s"]
    document = json.loads(printed(capsys, str(config), *JOB, *options, "--json"))
    assert document["cluster"]["hardware"] == {
        **document["cluster"]["hardware"],
        "name": "A100",
        "flops": 1e14,
        "memory_bytes": 40 * 2**30,
        "gpus_per_node": 4,
        "node_bandwidth": 100e9,
        "network_bandwidth": 10e9,
    }
    assert document["request"] == {
        "global_batch_size": 32,
        "seq_len": 1024,
        "tp": 2,
        "cp": 1,
        "ep": 2,
        "schedules": ["1f1b", "zbv"],
        "pp_sizes": [2],
        "stages_per_rank": [],
        "microbatch_sizes": [2],
        "recompute": ["full"],
        "sharding": "none",
        "dtype": "float32",
        "attention": "flash",
        "top": 2,
    }
    names = {one["plan"]["schedule"]["name"] for one in document["plans"]}
    assert names == {"1F1B", "ZBVZeroBubble"}


def test_measured_costs_are_read_from_files(capsys, config, tmp_path):
    files = []
    for size, scale in ((1, 1.0), (4, 1.01)):
        files.append(str(tmp_path / f"costs{size}.json"))
        text = costs_as_json(measured(scale=scale), microbatch_size=size, seq_len=1024)
        Path(files[-1]).write_text(text)
    found = plans_of(capsys, config, *JOB, "--costs", ",".join(files))
    assert found[0]["plan"]["microbatch_size"] == 4
    assert found[0]["plan"]["prediction"]["source"] == "measured"
    message = printed(capsys, config, "--gpus", "8", "--costs", files[0], code=2)
    assert "and not for sequences of --seq-len (8192)" in message


def test_memory_is_that_of_the_dtype_whose_times_were_measured(capsys, config, tmp_path):
    """A config without a dtype is profiled in float32, but planned for in bfloat16."""
    files = {}
    for size, dtype in ((1, "float32"), (2, "float32"), (4, "bfloat16")):
        files[size] = str(tmp_path / f"costs{size}.json")
        text = costs_as_json(measured(), microbatch_size=size, seq_len=1024, dtype=dtype)
        Path(files[size]).write_text(text)
    options = ["--top", "1", "--pp", "2", "--schedule", "1F1B", "--recompute", "none"]
    held = {
        size: plans_of(capsys, config, *JOB, *options, "--costs", files[size])[0]["plan"][
            "prediction"
        ]["memory"][0]["parameters"]
        for size in (1, 4)
    }
    assert held[1] == 2 * held[4]
    assert plans_of(capsys, config, *JOB, *options, "--costs", f"{files[1]},{files[2]}")
    for wrong in (["--costs", f"{files[1]},{files[4]}"], ["--costs", files[4]]):
        more = ["--dtype", "float32"] if len(wrong[1].split(",")) == 1 else []
        message = printed(capsys, config, *JOB, *wrong, *more, code=2)
        assert "were measured in bfloat16, and not in float32" in message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "0"], "--gpus (0) must be an integer from 1"),
        (["--gpus", "7", "--tp", "2"], "--gpus (7) must be a multiple of --tp (2)"),
        (["--gpus", "8", "--global-batch", "7", "--pp", "1"], "--global-batch (7) must be a mult"),
        (["--gpus", "8", "--pp", "5"], "--pp (5) must divide --gpus (8)"),
        (["--gpus", "8", "--memory", "lots"], "--memory ('lots') must be a number"),
        (["--gpus", "8", "--memory", "1MiB"], "--memory (1.0 MiB per device) does not suffice"),
        (["--gpus", "8", "--flops", "-1"], "--flops ('-1') must be a number"),
        (["--gpus", "8", "--hardware", "Z1"], "--hardware ('Z1') must be one of A100"),
        (["--gpus", "8", "--schedule", "best"], "--schedule 'best' is unknown"),
        (["--gpus", "8", "--recompute", "all"], "--recompute ('all') must be one of none"),
        (["--gpus", "8", "--microbatch-size", "0"], "must be an integer from 1"),
        (["--gpus", "8", "--tp", "3"], "--gpus (8) must be a multiple of --tp (3)"),
        (["--gpus", "9", "--tp", "3"], "must divide the number of attention heads (16)"),
        (["--gpus", "8", "--dtype", "int8"], "--dtype ('int8') must be one of"),
        (["--gpus", "8", "--seq-len", "0"], "--seq-len (0) must be"),
        (["--gpus", "99999999999"], "--gpus (99999999999) must be"),
        (["--gpus", "8", "--global-batch", "99999999999"], "--global-batch (99999999999) must"),
        (["--gpus", "8", "--gpus-per-node", "0"], "--gpus-per-node (0) must be positive"),
        (["--gpus", "8", "--costs", "none.json"], "--costs: none.json: no such file"),
        (["--gpus", "8", "--dtype", ""], "--dtype ('') must be one of"),
        (["--gpus", "8", "--microbatch-size", "3"], "--microbatch-size (3) must divide the batch"),
        (["--gpus", "8", "--stages-per-rank", "9"], "--stages-per-rank (9) must be 1, 2, 3"),
        (["--gpus", "8", "--pp", "4", "--schedule", "zbv"], "--schedule (ZBVZeroBubble) needs 2"),
    ],
)
def test_wrong_options_are_named_as_they_were_given(capsys, config, arguments, said):
    message = printed(capsys, config, *arguments, code=2)
    assert message.startswith("hfpp plan: error: ")
    assert said in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--microbatch-size", "3"],
        ["--stages-per-rank", "9"],
        ["--stages-per-rank", "9", "--pp", "4"],
        ["--pp", "4", "--schedule", "zbv"],
        ["--pp", "4", "--schedule", "zbv", "--stages-per-rank", "2"],
        ["--dtype", ""],
    ],
)
def test_following_the_advice_helps(capsys, config, arguments):
    message = printed(capsys, config, *JOB, *arguments, code=2)
    option, value = re.search(r"use (--[a-z-]+)=(\S+)$", message).groups()
    assert printed(capsys, config, *JOB, *arguments, option, value)


def test_what_argparse_refuses_is_told_in_words(capsys, config):
    for option, text, said in (
        ("--pp", "a", "'a' must be integers between commas, such as 2,4"),
        ("--pp", "2,", "'2,' must be integers between commas, such as 2,4"),
        ("--gpus", "8x", "'8x' must be an integer, such as 4"),
        ("--gpus", "9" * 10_000, "9...' must be an integer, such as 4"),
        ("--width", "39", "'39' must be columns from 40 to 2000"),
        ("--width", "1000000000", "'1000000000' must be columns from 40 to 2000"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["plan", config, *JOB, option, text])
        assert ended.value.code == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith(f"hfpp plan: error: argument {option}: ")
        assert said in message
        assert len(message) < 200


def test_a_choice_named_twice_is_one_choice(capsys, config):
    once = plans_of(capsys, config, *JOB, "--pp", "4", "--recompute", "full")
    assert plans_of(capsys, config, *JOB, "--pp", "4,4", "--recompute", "full,full") == once


def test_two_files_of_costs_of_one_size_are_refused(capsys, config, tmp_path):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        file.write_text(costs_as_json(measured(), microbatch_size=1, seq_len=1024))
    message = printed(capsys, config, *JOB, "--costs", ",".join(map(str, files)), code=2)
    assert f"{files[0]} and {files[1]} are both of --microbatch-size 1" in message


def test_an_unknown_dtype_of_the_config_is_refused_unless_another_is_given(capsys, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**SMALL, "torch_dtype": "float8_e4m3fn"}, indent=1))
    message = printed(capsys, str(config), *JOB, code=2)
    assert 'config.json, line 10, column 2: torch_dtype is "float8_e4m3fn"' in message
    asked = json.loads(printed(capsys, str(config), *JOB, "--dtype", "bfloat16", "--json"))
    config.write_text(json.dumps(SMALL))
    same = json.loads(printed(capsys, str(config), *JOB, "--dtype", "bfloat16", "--json"))
    assert asked == same


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "line 1, column 2"),
        (b"\xff\xfe", "UTF-8"),
        (b"[]", "must hold one JSON object"),
        (b'{"model_type": "llama"}', "has none of the keys"),
        (json.dumps({**SMALL, "num_hidden_layers": 10**9}).encode(), "num_hidden_layers"),
        (json.dumps({**SMALL, "hidden_size": "big"}).encode(), "hidden_size is"),
        (b"[" * 200_000, "line 1, column 257: nested too deep"),
        (b'{"vocab_size": 9,\n "vocab_size": 8}', 'line 2, column 2: the member "vocab_size"'),
        (json.dumps({**SMALL, "head_dim": float("nan")}).encode(), "NaN is no JSON number"),
    ],
)
def test_configs_that_are_none_are_an_error_with_their_place(capsys, tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    message = printed(capsys, str(path), *JOB, code=2)
    assert str(path) in message
    assert said in message


def test_planning_loads_nothing_heavy(config):
    arguments = ["plan", config, *JOB, "--json"]
    code = (
        "import contextlib, io\nfrom hfpp.cli import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()): assert main({arguments}) == 0"
    )
    assert loaded_by(code) == set()
