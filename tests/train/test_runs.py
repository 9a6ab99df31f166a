"""Real runs over gloo processes: every schedule, checkpoints, what is left behind, faults seen."""

import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from hfpp import cli
from hfpp.plan.schedules import SCHEDULES
from hfpp.train import launcher
from hfpp.train.inputs import prepare_inputs
from hfpp.train.loop import train_rank
from hfpp.train.options import RunDtype, TrainOptions
from hfpp.train.verify import compare_runs, reference_run
from tests.ranks import run_ranks
from tests.train import faults
from tests.train.sessions import members, nothing_left, session, wait_for_line

SMALL = {"seq_len": 12, "steps": 2, "lr": 0.01, "warmup_steps": 2}
FLAGS = ["--seq-len", "12", "--steps", "2", "--lr", "0.01", "--warmup-steps", "2"]
LLAMA = LlamaConfig(
    vocab_size=256,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)


@pytest.fixture
def llama(tmp_path):
    LLAMA.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def schedules_of_one_world(rank, world_size, options, inputs, schedules):
    """The shape and the steps of every schedule, as the first rank reports them."""
    sizes = (options.pp, world_size // options.pp)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("pp", "dp"))
    runs = {}
    for schedule in schedules:
        events = []
        train_rank(
            replace(options, schedule=schedule), inputs, mesh, torch.device("cpu"), events.append
        )
        dist.barrier()
        runs[schedule] = events
    return runs if rank == 0 else all(events == [] for events in runs.values())


@pytest.mark.parametrize(
    ("pp", "world_size", "schedules"),
    [
        (1, 1, tuple(SCHEDULES)),
        (2, 2, tuple(SCHEDULES)),
        (4, 4, tuple(SCHEDULES)),
        (2, 4, ("Interleaved1F1B", "ZBVZeroBubble")),
    ],
)
def test_every_schedule_trains_like_the_plain_model(pp, world_size, schedules, llama, tmp_path):
    """Also with replicas (FSDP2), in float64: tolerances that no wrong gradient meets."""
    options = TrainOptions(pp=pp, model=llama, dtype=RunDtype.FLOAT64, microbatch_size=1, **SMALL)
    inputs = prepare_inputs(options, tmp_path)
    plain = []
    reference_run(options, inputs, device="cpu", threads=1)(0, plain.append)
    runs, *others = run_ranks(
        schedules_of_one_world, world_size, args=(options, inputs, schedules), timeout_s=120
    )
    assert all(others)  # only the first rank reports
    for schedule, (shape, *steps) in runs.items():
        verdicts = compare_runs(steps, plain, options.dtype)
        assert all(verdict.holds for verdict in verdicts), (schedule, verdicts)
        stages = pp * (1 if SCHEDULES[schedule].single_stage else 2)
        assert [row.stage for row in shape.stages] == list(range(stages))
        assert all(len(row.ranks) == world_size // pp for row in shape.stages)
        assert [i for row in shape.stages for i in row.layers] == list(range(8))
    assert plain[-1][0] < plain[0][0]


@pytest.mark.parametrize("pp", [2, 4])
def test_the_defaults_run_with_every_schedule(pp, tmp_path):
    """The command's own model, text and sizes, in float32, for two steps."""
    options = TrainOptions(pp=pp, steps=2)
    inputs = prepare_inputs(options, tmp_path)
    plain = []
    reference_run(options, inputs, device="cpu", threads=1)(0, plain.append)
    schedules = tuple(SCHEDULES)
    runs, *others = run_ranks(
        schedules_of_one_world, pp, args=(options, inputs, schedules), timeout_s=200
    )
    assert all(others)
    for schedule, (shape, *steps) in runs.items():
        assert shape.n_microbatches == 8
        verdicts = compare_runs(steps, plain, options.dtype)
        assert all(verdict.holds for verdict in verdicts), (schedule, verdicts)


def train(*arguments, out):
    return cli.main(["train", *FLAGS, "--out", str(out), *map(str, arguments)])


def test_a_run_leaves_its_results(llama, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--model", llama, "--pp", 2, "--schedule", "1f1b", "--partition", "5,3")
    assert train(*options, "--verify", out=out) == 0
    printed = capsys.readouterr()
    assert "verify: loss equal to the plain model's" in printed.out
    assert "verify: gradient norm equal to the plain model's" in printed.out
    assert "starts from random weights (--seed 0); tokenizer: bytes, as the folder" in printed.out
    assert "dropout is off" not in printed.out
    assert "the trained weights are not saved" in printed.out
    assert "stage" in printed.out
    assert printed.err == ""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in metrics] == [1, 2]
    assert all(step["grad_norm"] > 0 and step["tokens_per_second"] > 0 for step in metrics)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["verify"]["holds"] is True
    assert summary["verify"]["curves"][0]["largest_difference"] < 1e-5
    assert summary["verify"]["curves"][0]["tolerance"] == 1e-5
    assert len(summary["verify"]["plain_losses"]) == 2
    assert summary["weights_saved"] is False
    assert summary["start"] == "starts from random weights (--seed 0)"
    assert summary["result"]["final_loss"] == metrics[-1]["loss"] < metrics[0]["loss"]
    assert [row["layers"] for row in summary["pipeline"]["stages"]] == [[0, 5], [5, 8]]
    assert summary["options"]["pp"] == 2
    assert ElementTree.parse(out / "schedule.svg").getroot().tag.endswith("svg")
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.iterdir()} == {
        ".hfpp-run", "logs", "loss.png", "metrics.jsonl", "schedule.svg", "summary.json"
    }  # fmt: skip

    # The folder is kept unless it is given up, and then only the results are.
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert train("--model", llama, out=out) == 2
    assert {path: path.read_bytes() for path in before} == before
    (out / "notes.txt").write_text("mine")
    assert train("--model", llama, "--pp", 1, "--steps", 1, "--force", out=out) == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    assert (out / "notes.txt").read_text() == "mine"


def test_verify_fails_loudly_when_the_curves_differ(llama, tmp_path, capsys, monkeypatch):
    def altered(options, inputs, **settings):
        return reference_run(replace(options, lr=options.lr * 1.01), inputs, **settings)

    monkeypatch.setattr(launcher, "reference_run", altered)
    out = tmp_path / "out"
    assert train("--model", llama, "--pp", 2, "--verify", out=out) == 1
    printed = capsys.readouterr()
    assert "loss NOT equal to the plain model's" in printed.out
    assert printed.err.startswith("hfpp train: error: --verify: the pipeline's loss differs")
    assert json.loads((out / "summary.json").read_text())["verify"]["holds"] is False


def test_a_checkpoint_with_dropout_and_another_architecture(tmp_path, capsys):
    torch.manual_seed(5)
    config = GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=256, n_positions=32)
    assert config.resid_pdrop > 0
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 50)
    common = ("--model", tmp_path / "gpt2", "--text", text, "--verify", "--dtype", "float64")
    assert train(*common, "--pp", 2, "--seed", 3, out=tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert f"starts from the checkpoint in {tmp_path / 'gpt2'}; tokenizer: bytes" in printed
    assert "dropout is off, set to 0: " in printed
    assert "resid_pdrop" in printed
    assert "allowed below 1e-09" in printed
    assert_refused_before_anything_is_touched(
        [*common, "--seq-len", 33, "--force"],
        "--seq-len (33) is more than the 32",
        tmp_path,
        capsys,
    )


def assert_refused_before_anything_is_touched(arguments, message, tmp_path, capsys):
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert train(*arguments, out=tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"hfpp train: error: {message}")
    assert printed.err.count("\n") == 1
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("faulty", "curve"),
    [
        (faults.rank_with_a_wrong_gradient, "gradient norm"),
        (faults.rank_with_a_wrong_weight, "loss"),
    ],
)
def test_verify_catches_a_broken_pipeline(faulty, curve, llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launcher, "_train_as_local_rank", faulty)
    assert train("--model", llama, "--pp", 2, "--verify", out=tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert f"{curve} NOT equal to the plain model's" in printed.out
    assert printed.err.startswith("hfpp train: error: --verify: the pipeline's ")


def test_a_norm_that_is_lost_ends_the_run_and_leaves_json(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launcher, "_train_as_local_rank", faults.rank_with_a_lost_gradient)
    out = tmp_path / "out"
    assert train("--model", llama, "--pp", 2, out=out) == 1
    error = capsys.readouterr().err
    assert error.startswith("hfpp train: error: The norm of the gradients is ")
    assert "at step 1" in error
    assert not (out / "metrics.jsonl").exists()


def test_the_plain_model_is_trained_where_the_runtime_is_not_imported(tmp_path):
    """In a session of its own: this process has imported all there is."""
    with session(["-m", "tests.train.workers", "loaded", str(tmp_path)], tmp_path) as process:
        output, errors = process.communicate(timeout=120)
    assert errors == ""
    modules = output.split()
    assert {"torch", "hfpp.train.reference"} <= set(modules)
    assert [name for name in modules if name.startswith("hfpp.runtime")] == []


def test_a_loss_that_is_lost_ends_the_run(llama, tmp_path, capsys):
    assert train("--model", llama, "--lr", "1e30", "--steps", 6, out=tmp_path / "out") == 1
    error = capsys.readouterr().err
    lost = r"hfpp train: error: The (loss|norm of the gradients) is nan at step \d: "
    assert re.match(lost, error)
    assert "use a lower --lr (1e+30)" in error
    assert error.count("\n") == 1


def start(tmp_path, out):
    return ["-m", "hfpp", "train", "--pp", "2", "--steps", "100000", "--out", str(out)]


@pytest.mark.parametrize("moment", ["starting", "training"])
def test_ctrl_c_ends_the_run_with_one_line(moment, tmp_path):
    out = tmp_path / "out"
    with session(start(tmp_path, out), tmp_path) as process:
        if moment == "training":
            wait_for_metrics(out, process)
        else:
            wait_for_line(process, "hfpp train: ")
            time.sleep(1.0)  # processes are importing
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert nothing_left(process.pid) == {}
        assert process.stderr.read() == "hfpp train: interrupted\n"


@pytest.mark.parametrize("victim", ["rank", "parent"])
def test_a_killed_process_takes_the_others_along(victim, tmp_path):
    out = tmp_path / "out"
    with session(start(tmp_path, out), tmp_path) as process:
        wait_for_metrics(out, process)
        if victim == "parent":
            process.kill()
        else:
            os.kill(rank_of(process.pid), signal.SIGKILL)
        code = process.wait(timeout=30)
        assert nothing_left(process.pid) == {}
        if victim == "rank":
            assert code == 1
            error = process.stderr.read()
            assert error.startswith("hfpp train: error: rank ")
            assert " of 2 died (SIGKILL, as when memory runs out); what it printed is in" in error
            assert error.count("\n") == 1


def wait_for_metrics(out, process):
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def rank_of(session_id):
    """A process that the server forked: its parent is neither the command nor outside."""
    parents = {
        pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        for pid in members(session_id)
    }
    return next(
        pid for pid, parent in parents.items() if parent in parents and parent != session_id
    )
