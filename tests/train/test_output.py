"""The folder of a run: a stranger's is never touched, and what is written is JSON."""

import json
import math
import os
from pathlib import Path

import pytest

from hfpp.train.errors import OptionError
from hfpp.train.events import StepMetrics
from hfpp.train.output import RunFolder


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def run_folder(path):
    folder = RunFolder(path)
    folder.check(force=False)
    folder.create()
    for name in ("rank-0.log", "rank-11.log", "plain-model-0.log"):
        (folder.logs / name).write_text("printed")
    for written in (folder.metrics, folder.summary, folder.loss_picture, folder.schedule_picture):
        written.write_text("results")
    return folder


def refused(folder, *, force=True):
    """The message; nothing may have changed."""
    before = contents(folder.path) if os.path.isdir(folder.path) else None  # noqa: PTH112
    with pytest.raises(OptionError) as raised:
        folder.check(force=force)
    assert before is None or contents(folder.path) == before
    message = str(raised.value)
    assert message.startswith(f"--out ({folder.path})")
    assert "\n" not in message
    return message


def test_force_replaces_a_runs_results_and_nothing_else(tmp_path):
    folder = run_folder(tmp_path / "out")
    kept = ("notes.txt", "logs/mine.log", "logs/rank-mine.log", "logs/rank-0.log.txt")
    for name in kept:
        (folder.path / name).write_text("mine")
    assert "--force to replace them" in refused(folder, force=False)
    folder.check(force=True)
    folder.create()
    assert set(contents(folder.path)) == {*map(Path, kept), Path("logs"), Path(".hfpp-run")}


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("name", ["notes.txt", "logs/rank-0.log", "summary.json"])
def test_a_strangers_folder_is_refused_even_with_force(name, force, tmp_path):
    stranger = tmp_path / "stranger"
    (stranger / "logs").mkdir(parents=True)
    (stranger / name).write_text("precious")
    message = refused(RunFolder(stranger), force=force)
    assert "no run of hfpp train wrote" in message
    assert "--force" not in message


def test_a_marker_elsewhere_does_not_count(tmp_path):
    mine = run_folder(tmp_path / "mine")
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "summary.json").write_text("precious")
    (stranger / ".hfpp-run").symlink_to(mine.marker)
    assert "no run of hfpp train wrote" in refused(RunFolder(stranger))


def test_linked_logs_are_not_followed(tmp_path):
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "rank-0.log").write_text("precious")
    folder = RunFolder(tmp_path / "out")
    folder.path.mkdir()
    folder.create()
    folder.logs.rmdir()
    folder.logs.symlink_to(stranger)
    assert "logs is not a folder of a run but a link" in refused(folder)
    assert (stranger / "rank-0.log").read_text() == "precious"


def test_a_linked_result_is_unlinked_and_its_target_kept(tmp_path):
    target = tmp_path / "precious.json"
    target.write_text("precious")
    folder = run_folder(tmp_path / "out")
    folder.summary.unlink()
    folder.summary.symlink_to(target)
    folder.check(force=True)
    folder.create()
    folder.write_summary({})
    assert target.read_text() == "precious"


def test_a_folder_in_the_place_of_a_result_is_refused_before_anything_is_deleted(tmp_path):
    folder = run_folder(tmp_path / "out")
    folder.schedule_picture.unlink()
    folder.schedule_picture.mkdir()
    assert "schedule.svg is a folder" in refused(folder)


def test_places_that_can_be_no_folder_of_a_run(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is not a folder" in refused(RunFolder(file))
    assert "lies in something that is none" in refused(RunFolder(file / "out"))
    with pytest.raises(OptionError, match=r"--out \(/\) already holds something that no run"):
        RunFolder(Path("/")).check(force=True)
    assert "File name too long" in refused(RunFolder(tmp_path / ("x" * 300)))
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be written" in refused(RunFolder(tmp_path / "loop"))
    assert file.read_text() == "mine"


def test_a_folder_that_cannot_be_made(tmp_path):
    folder = RunFolder(tmp_path / "missing" / ("x" * 300))
    folder.check(force=False)  # that the name is too long shows only in its place
    with pytest.raises(OptionError, match=r"cannot be written \(File name too long\)"):
        folder.create()


def test_a_folder_without_the_right_to_write(tmp_path, monkeypatch):
    """The superuser has every right, so that the answer of the system is given here."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"no right to write in {tmp_path}" in refused(RunFolder(tmp_path / "a" / "b"))
    assert f"no right to write in {tmp_path}" in refused(RunFolder(tmp_path))


def test_no_infinity_and_no_nan_in_json(tmp_path):
    folder = run_folder(tmp_path / "out")
    folder.write_summary({"verify": {"curves": [{"largest": math.inf}], "plain": (math.nan, 1.0)}})
    text = folder.summary.read_text()
    assert json.loads(text) == {"verify": {"curves": [{"largest": None}], "plain": [None, 1.0]}}
    metrics = StepMetrics(step=1, loss=math.nan, grad_norm=1.0, tokens_per_second=1.0, seconds=1.0)
    with pytest.raises(ValueError):
        folder.append_metrics(metrics)
