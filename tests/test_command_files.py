"""Files that commands read and write: one exit code for the absent, and no work for nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hfpp import cli
from hfpp.plan.schedules import SCHEDULES, compute_table, write_csv
from tests.plan.search.small_jobs import SMALL

JOB = ("--gpus", "8", "--global-batch", "32", "--seq-len", "1024", "--pp", "4")
OUTPUTS = [
    ("plan", "--out"),
    ("plan", "--csv"),
    ("plan", "--html"),
    ("show", "--svg"),
    ("show", "--trace"),
    ("profile", "--out"),
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL), encoding="utf-8")
    return path


def ended(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """What a command that ends with an error says, in one line; it prints nothing else."""
    assert cli.main([str(argument) for argument in arguments]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"hfpp {arguments[0]}: error: ")
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix(f"hfpp {arguments[0]}: error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "ABSENT", *JOB),
        ("plan", "CONFIG", *JOB, "--costs", "ABSENT"),
        ("show", "ABSENT.csv"),
        ("show", "ABSENT.json"),
        ("show", "TRACE", "--against", "ABSENT.csv"),
        ("show", "1F1B", "--costs", "ABSENT"),
        ("profile", "ABSENT"),
        ("check", "ABSENT"),
        ("train", "--model", "ABSENT"),
        ("train", "--text", "ABSENT"),
        ("train", "--costs", "ABSENT"),
    ],
)
def test_a_file_that_is_not_there_ends_with_2_in_every_command(
    arguments: tuple[str, ...], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    if "TRACE" in arguments:
        assert cli.main(["show", "1F1B", "--trace", str(trace)]) == 0
        capsys.readouterr()
    known = {"ABSENT": str(tmp_path / "absent"), "CONFIG": str(config), "TRACE": str(trace)}
    given = list(arguments)
    for name, path in known.items():
        given = [text.replace(name, path) for text in given]
    message = ended(capsys, *given)
    assert str(tmp_path / "absent") in message
    assert "rrno" not in message


@pytest.mark.parametrize(("command", "option"), OUTPUTS)
def test_what_cannot_be_written_is_refused_before_anything_is_read(
    command: str, option: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file that is read is not there either: it would be told first if it were looked at."""
    read = (command, tmp_path / "absent.csv", *(JOB if command == "plan" else ()))
    target = tmp_path / "new" / "file"
    message = ended(capsys, *read, option, target)
    assert message.startswith(f"{option} ({target}) lies in a folder that does not exist: make it")
    assert f"mkdir -p {target.parent}," in message
    message = ended(capsys, *read, option, tmp_path)
    assert message.startswith(f"{option} ({tmp_path}) is a folder: give the path of a file")
    message = ended(capsys, *read, option, config / "file")
    assert message.startswith(f"{option} ({config / 'file'}) lies in {config}, which is no folder")
    message = ended(capsys, *read, option, tmp_path / ("x" * 300))
    assert "cannot be written (File name too long)" in message
    target.parent.mkdir()  # the advice
    assert option not in ended(capsys, *read, option, target)
    assert not target.exists()


@pytest.mark.parametrize(("command", "option"), OUTPUTS)
def test_what_is_read_is_not_written_over(
    command: str, option: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = config
    if command == "show":
        source = tmp_path / "table.csv"
        write_csv(compute_table(SCHEDULES["1F1B"], pp_size=2, n_microbatches=2), source)
    before = source.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(source)
    given = (command, source, *(JOB if command == "plan" else ()))
    for path in (source, link):
        assert ended(capsys, *given, option, path) == (
            f"{option} ({path}) is a file that is read, and would be lost: give another path\n"
        )
    assert source.read_bytes() == before


def test_a_folders_config_is_not_written_over(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (("plan", config.parent, *JOB), ("profile", config.parent)):
        assert "is a file that is read" in ended(capsys, *command, "--out", config)


def test_two_options_do_not_write_one_file(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "both"
    message = ended(capsys, "plan", config, *JOB, "--out", path, "--csv", path)
    assert message.startswith(f"--csv ({path}) is also the file of --out")
    assert not path.exists()
    null = ("--svg", "/dev/null", "--trace", "/dev/null")
    assert cli.main(["show", "1F1B", *null]) == 0


@pytest.mark.parametrize(("command", "option"), OUTPUTS[:-1])
def test_a_full_disk_ends_with_1_and_names_the_option(
    command: str, option: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["plan", str(config), *JOB] if command == "plan" else ["show", "1F1B"]
    assert cli.main([*given, option, "/dev/full"]) == 1
    message = capsys.readouterr().err
    assert f"{option} (/dev/full) could not be written: No space left on device" in message
