"""The command line: help without torch, options reach the run, errors are one line."""

import subprocess
import sys
from dataclasses import fields

import pytest

from hfpp import cli
from hfpp.train import launcher
from hfpp.train.options import TrainOptions
from tests.test_import import loaded_by


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "--pp", "0"],
        ["check", "--help"],
        ["check"],
        ["plan", "--help"],
        [],
    ],
)
def test_help_and_wrong_options_load_nothing_heavy(arguments):
    code = (
        "import contextlib, io\nfrom hfpp.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        f"    main({arguments})"
    )
    assert loaded_by(code) == set()


def test_every_option_has_a_flag_and_reaches_the_run(monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr(launcher, "run_training", runs.append)
    assert cli.main(["train"]) == 0
    assert runs == [TrainOptions()]
    arguments = ["--model", "m", "--text", "t", "--pp", "4", "--schedule", "gpipe", "--seed", "7"]
    arguments += ["--microbatch-size", "3", "--batch-size", "12", "--seq-len", "9", "--steps", "5"]
    arguments += ["--lr", "0.5", "--warmup-steps", "1", "--dtype", "float64", "--out", "o"]
    arguments += ["--max-grad-norm", "0.25", "--verify", "--force"]
    arguments += ["--partition", "uniform", "--costs", "c", "--trace", "2"]
    assert cli.main(["train", *arguments]) == 0
    for field in fields(TrainOptions):
        assert getattr(runs[1], field.name) != getattr(runs[0], field.name), field.name
        assert f"--{field.name.replace('_', '-')}" in arguments


def test_help_names_every_option_and_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = "".join(capsys.readouterr().out.split())  # lines break at hyphens too
    for field in fields(TrainOptions):
        assert f"--{field.name.replace('_', '-')}" in text
    for name in ("pp", "steps", "lr", "schedule", "dtype", "out", "seed"):
        assert f"(default:{getattr(TrainOptions(), name)})" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pp", "0"], "--pp (0) must be"),
        (["--schedule", "best"], "--schedule 'best' is unknown; known are "),
        (["--model", "/nowhere"], "--model (/nowhere) has no readable config.json"),
        (["--text", "/nowhere"], "--text (/nowhere) cannot be read"),
        (["--seq-len", "1000000"], "--seq-len (1000000) is more than"),
        (["--pp", "5", "--batch-size", "20"], "--pp (5) with --schedule Interleaved1F1B makes 10"),
    ],
)
def test_wrong_options_end_with_2_and_one_line_and_leave_nothing(
    arguments, message, capsys, tmp_path
):
    out = tmp_path / "out"
    assert cli.main(["train", "--out", str(out), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"hfpp train: error: {message}")
    assert printed.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("arguments", [[], ["train", "--dtype", "int8"], ["train", "--ste", "3"]])
def test_argparse_refuses_with_2(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "hfpp", *arguments], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert b"usage: hfpp" in done.stderr


def test_help_says_that_weights_are_not_saved(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "trained weights are not saved" in " ".join(capsys.readouterr().out.split())


def test_a_folder_of_something_else_is_never_touched(capsys, tmp_path):
    kept = tmp_path / "notes.txt"
    kept.write_text("mine")
    for force in ([], ["--force"]):
        assert cli.main(["train", *force, "--out", str(tmp_path)]) == 2
        assert "already holds something that no run" in capsys.readouterr().err
    assert cli.main(["train", "--force", "--out", str(kept)]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert kept.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [kept]
