"""`hfpp show`, as it is typed: names, files of every kind, pictures, traces, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hfpp import cli
from hfpp.plan.costs import ModelCosts, UnitCost
from hfpp.plan.costs_file import costs_as_json
from hfpp.plan.pipeline_plan import ModelFingerprint, PipelinePlan
from hfpp.plan.plan_file import write_plan
from hfpp.plan.render.chrome_trace import chrome_trace
from hfpp.plan.render.planned import planned
from hfpp.plan.render.recorded import Computed, RankRecord, recorded_takes
from hfpp.plan.schedules import SCHEDULES, compute_table, write_csv
from hfpp.plan.schedules.schedule_json import write_json
from hfpp.plan.schedules.simulator import uniform_costs
from tests.commands import run_command
from tests.plan.plans import plan_of


def show(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    code = cli.main(["show", *map(str, arguments), "--width", "100"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def refused(*arguments: object, capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    assert cli.main(["show", *map(str, arguments)]) == code
    message = capsys.readouterr().err
    assert message.startswith("hfpp show: error: ")
    assert message.count("\n") == 1
    return message


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two steps of a run of 1F1B whose second stage is the slower one."""
    table = compute_table(SCHEDULES["1F1B"], pp_size=2, n_microbatches=4)
    line = planned(table, uniform_costs(2), unit="s")
    steps = []
    for step, slower in ((11, 1.5), (12, 1.6)):
        ranks = [
            RankRecord(tuple(Computed(b.action, slower * b.start, slower * b.end) for b in row), ())
            for row in line.bars
        ]
        steps.append((step, ranks))
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(chrome_trace(recorded_takes("1F1B", steps))), encoding="utf-8")
    return path


def test_a_schedule_by_name_has_sizes_of_its_own_or_given_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "4 ranks · 8 stages · 8 microbatches · 15.8 % idle" in show("dfs", capsys=capsys)
    printed = show("1f1b", "--pp", 2, "--microbatches", 3, capsys=capsys)
    assert "2 ranks · 2 stages · 3 microbatches · 25.0 % idle" in printed
    printed = show("LoopedBFS", "--pp", 2, "--stages-per-rank", 3, capsys=capsys)
    assert "2 ranks · 6 stages" in printed


def test_costs_and_messages_change_the_drawing(capsys: pytest.CaptureFixture[str]) -> None:
    base = show("1F1B", capsys=capsys)
    assert "27.3 % idle" in base
    assert show("1F1B", "--forward", 2, capsys=capsys).count("27.3 %") == 5  # backward follows
    assert "27.3 %" in show("1F1B", "--forward", 3, "--backward", 1, capsys=capsys)
    printed = show("1F1B", "--latency", 0.5, capsys=capsys)
    assert "→ idle, message on its way" in printed
    size = ("--boundary-bytes", 100, "--bandwidth", 200)
    assert show("1F1B", *size, capsys=capsys) == printed  # 0.5 each
    blocking = show("1F1B", "--latency", 0.5, "--no-overlap", capsys=capsys)
    assert blocking != printed
    weights = show("zbv", "--weight", 0.5, capsys=capsys)
    assert weights != show("zbv", capsys=capsys)


def test_files_of_every_kind_are_drawn_as_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = compute_table(SCHEDULES["ZBVZeroBubble"], pp_size=2, n_microbatches=6)
    write_csv(table, tmp_path / "mine.csv")
    write_json(table, tmp_path / "mine.json")
    plan = PipelinePlan(
        model=ModelFingerprint(
            model_type="llama", num_layers=9, hidden_size=8, vocab_size=9, parameters=None,
            is_tied=None,
        ),
        pp_size=2, schedule="ZBVZeroBubble", stages_per_rank=2, n_microbatches=6,
        microbatch_size=1, seq_len=8, offsets=(0, 2, 4, 6, 9),
    )  # fmt: skip
    write_plan(plan, tmp_path / "plan.json")
    by_name = show("zbv", "--pp", 2, "--microbatches", 6, capsys=capsys).splitlines()[1:]
    for name in ("mine.csv", "mine.json", "plan.json"):
        assert show(tmp_path / name, capsys=capsys).splitlines()[1:] == by_name, name


def test_costs_of_a_plan_are_those_of_its_microbatches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what the plan computes again costs time.

    Stages of 3 and 2 layers: the first waits 3 ms for the other, and then for nothing; that is
    39 = 4 x 9 + 3, or with a backward of three parts instead of two 53 = 4 x 12 + 5.
    """
    unit = UnitCost(forward=1e-3, backward_input=1e-3, backward_weight=1e-3)
    nothing = UnitCost(forward=0, backward_input=0, backward_weight=0)
    model = ModelCosts(
        embedding=nothing, layers=(unit,) * 5, head=nothing, boundary_bytes=8, source="measured"
    )
    costs, path = tmp_path / "costs.json", tmp_path / "plan.json"
    seconds = {}
    for recompute in ("none", "full"):
        write_plan(plan_of(recompute=recompute), path)
        costs.write_text(costs_as_json(model, microbatch_size=2, seq_len=128), encoding="utf-8")
        drawn = show(path, "--costs", costs, capsys=capsys)
        seconds[recompute] = float(drawn.splitlines()[1].rpartition("· ")[2].split()[0])
        costs.write_text(costs_as_json(model, microbatch_size=1, seq_len=128), encoding="utf-8")
        said = refused(path, "--costs", costs, capsys=capsys)
        assert "microbatch_size 1, but the plan has 2: measure with hfpp profile" in said
    assert seconds == {"none": 39.0, "full": 53.0}  # ms
    write_plan(plan_of(recompute="selective"), path)
    costs.write_text(costs_as_json(model), encoding="utf-8")
    assert "nothing was measured" in refused(path, "--costs", costs, capsys=capsys)


def test_costs_of_a_model_give_seconds_and_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight layers of 1 ms and a head of three: no stage can have less than four, the last's."""
    layer = UnitCost(
        forward=1e-3, backward_input=1e-3, backward_weight=1e-3, activation_bytes=1 << 20
    )
    nothing = UnitCost(forward=0, backward_input=0, backward_weight=0)
    head = UnitCost(forward=3e-3, backward_input=3e-3, backward_weight=3e-3)
    model = ModelCosts(
        embedding=nothing, layers=(layer,) * 8, head=head, boundary_bytes=1000, source="measured"
    )
    path = tmp_path / "costs.json"
    path.write_text(costs_as_json(model), encoding="utf-8")
    sizes = ("--pp", 4, "--microbatches", 4, "--costs", path)
    svg = tmp_path / "out.svg"
    found = {}
    for partition, counts in (
        ("uniform", (2, 2, 2, 2)),
        ("balanced", (3, 2, 2, 1)),
        ("2,2,2,2", (2, 2, 2, 2)),
    ):
        given = () if partition == "balanced" else ("--partition", partition)
        found[partition] = show("GPipe", *sizes, *given, "--svg", svg, capsys=capsys)
        bars = [e for e in ElementTree.parse(svg).getroot().iter() if "data-action" in e.attrib]
        wide = {e.attrib["data-action"]: float(e.attrib["width"]) + 1 for e in bars}
        forwards = [wide[f"{stage}F0"] for stage in range(4)]
        seconds = [*counts[:3], counts[3] + 3]
        assert [f / forwards[0] for f in forwards] == pytest.approx(
            [s / seconds[0] for s in seconds], rel=0.02
        ), partition
    assert " ms" in found["balanced"]
    assert "8.0 MiB" in found["uniform"]  # two layers, four microbatches
    assert found["uniform"] == found["2,2,2,2"] != found["balanced"]
    slow = show("GPipe", *sizes, "--bandwidth", 1e6, capsys=capsys)
    assert "message on its way" in slow
    assert "message on its way" not in found["balanced"]


def test_pictures_and_traces_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    svg, trace = tmp_path / "out.svg", tmp_path / "out.json"
    printed = show("DualPipeV", "--svg", svg, "--trace", trace, capsys=capsys)
    assert f"{svg} written" in printed
    assert ElementTree.fromstring(svg.read_text(encoding="utf-8")).tag.endswith("svg")
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) >= 4 * 2 * 2 * 8
    again = show(trace, capsys=capsys)  # a trace is drawn as what it was made of
    assert again.splitlines()[0] == "DualPipeV"


def test_a_recorded_run_is_drawn_under_its_plan(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = show(trace, capsys=capsys)
    assert "20.0 % idle · 22.5 s · step 11" in alone
    assert "24 s · step 12" in show(trace, "--step", 12, capsys=capsys)
    svg, both = tmp_path / "both.svg", tmp_path / "both.json"
    for plan in ((), ("1F1B",)):
        written = ("--svg", svg, "--trace", both)
        printed = show(trace, "--against", *plan, "--step", 12, *written, capsys=capsys)
        assert "planned: 2 ranks" in printed
        assert "recorded: 2 ranks · 2 stages · 4 microbatches · 20.0 % idle · 24 s" in printed
        assert "one step: 23.25 s planned, 24 s recorded" in svg.read_text(encoding="utf-8")
    names = {
        event["args"]["name"]
        for event in json.loads(both.read_text(encoding="utf-8"))["traceEvents"]
        if event["name"] == "process_name"
    }
    assert names == {f"rank {r}, {what}" for r in (0, 1) for what in ("planned", "recorded")}
    assert "planned" not in show(both, capsys=capsys)
    assert "24 s · step 12" in show(both, capsys=capsys)  # the recorded one of the two
    show(both, "--against", "--svg", svg, capsys=capsys)  # the plan in the file is no recorded step
    assert "one step: 24 s planned, 24 s recorded" in svg.read_text(encoding="utf-8")
    times = ("--forward", 1, "--backward", 2)
    assert "15 s · step 12" in show(trace, "--against", "--step", 12, *times, capsys=capsys)


def test_what_cannot_be_drawn_is_refused_with_a_remedy(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "known are GPipe" in refused("nope", capsys=capsys)
    for name in ("absent.csv", "absent.json"):
        assert f"{name}: no such file: give" in refused(tmp_path / name, capsys=capsys)
    assert "cannot be read (Is a directory)" in refused(f"{tmp_path}/", capsys=capsys)
    assert "is no recorded run" in refused("1F1B", "--against", capsys=capsys)
    assert "--step (3) chooses a step" in refused("1F1B", "--step", 3, capsys=capsys)
    assert "steps 11, 12" in refused(trace, "--step", 3, capsys=capsys)
    assert "other computations" in refused(trace, "--against", "zbv", capsys=capsys)
    assert "--pp (2) is for a schedule by name" in refused(trace, "--pp", 2, capsys=capsys)
    assert "costs are 0" in refused("1F1B", "--forward", 0, capsys=capsys)
    assert "costs are 0" in refused("1F1B", "--forward", 1e-320, capsys=capsys)
    assert "use a smaller pp_size" in refused("GPipe", "--pp", 10**12, capsys=capsys)
    assert "there is no model" in refused("1F1B", "--partition", "uniform", capsys=capsys)
    message = refused("1F1B", "--costs", tmp_path / "no", capsys=capsys)
    assert f"--costs: {tmp_path / 'no'}: no such file" in message
    nasty = json.loads(trace.read_text(encoding="utf-8"))
    nasty["otherData"]["schedule"] = "\x1b[2J\ud800\n" + 1000 * "x"
    (tmp_path / "nasty.json").write_text(json.dumps(nasty), encoding="utf-8")
    printed = show(tmp_path / "nasty.json", "--svg", tmp_path / "nasty.svg", capsys=capsys)
    assert printed.startswith("?[2J??xxx")
    ElementTree.parse(tmp_path / "nasty.svg")
    (tmp_path / "list.json").write_text("[1, 2]", encoding="utf-8")
    assert "list.json" in refused(tmp_path / "list.json", capsys=capsys)
    (tmp_path / "profile.json").write_text('{"traceEvents": []}', encoding="utf-8")
    message = refused(tmp_path / "profile.json", capsys=capsys)
    assert "no trace that hfpp wrote" in message
    (tmp_path / "one.csv").write_text("0F0,0B0\n1F0,1B0\n", encoding="utf-8")
    assert "2 ranks · 2 stages · 1 microbatch" in show(tmp_path / "one.csv", capsys=capsys)
    (tmp_path / "dead.csv").write_text("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n", encoding="utf-8")
    assert "deadlock" in refused(tmp_path / "dead.csv", capsys=capsys)


@pytest.mark.parametrize("option", ["--forward", "--backward", "--weight", "--latency"])
@pytest.mark.parametrize("value", ["nan", "-1", "inf", "1e308"])
def test_a_wrong_time_is_named_as_it_was_given(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused("1F1B", option, value, capsys=capsys)
    shown = f"{option} ({float(value)}) must be a number from 0 to 1e+100: use {option} 1"
    assert message == f"hfpp show: error: {shown}\n"
    show("1F1B", option, 1, capsys=capsys)
    show("1F1B", option, 1e-9, "--backward", 1, capsys=capsys)
    show("1F1B", "--backward", 1e100, option, 1e100, capsys=capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--boundary-bytes", "-1"], "--boundary-bytes (-1) must be an integer from 0 to"),
        (["--boundary-bytes", "9" * 99], "--boundary-bytes (a number of more than 64 bits) must"),
        (["--bandwidth", "0"], "--bandwidth (0.0) must be a number from 1e-100"),
        (["--bandwidth", "nan"], "--bandwidth (nan) must be a number from 1e-100"),
        (["--weight", "5"], "--weight (5.0) must be at most --backward (2.0)"),
        (["--pp", "-1"], "--pp (-1) must be at least 1: use --pp=1"),
        (["--microbatches", "0"], "but --microbatches is 0: use --microbatches="),
        (["--stages-per-rank", "2"], "--stages-per-rank (2) must be 1 for 1F1B"),
    ],
)
def test_a_wrong_size_is_named_as_it_was_given(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused("1F1B", *arguments, capsys=capsys)


def test_a_pipe_gets_letters_and_no_torch_is_loaded(tmp_path: Path) -> None:
    command = (
        "python -X importtime -m hfpp show 1F1B --microbatches 4 2> imports.txt; "
        "! grep -E 'torch|transformers|numpy' imports.txt"
    )
    printed = run_command(command, tmp_path)
    assert "\x1b" not in printed
    assert "F0" in printed
    coloured = run_command("FORCE_COLOR=1 COLORTERM=truecolor python -m hfpp show 1F1B", tmp_path)
    assert "\x1b[" in coloured
