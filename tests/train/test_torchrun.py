"""Under torchrun: ranks beyond --pp are data parallel, and wrong worlds are an error everywhere."""

import json
import subprocess
import sys

from tests.train.sessions import ENVIRONMENT


def train(arguments, folder, launcher=(), **environment):
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "hfpp", "train", "--out", "out", *arguments],
        cwd=folder,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_four_ranks_train_two_pipelines_like_the_plain_model(tmp_path):
    arguments = ["--pp", "2", "--steps", "2", "--seq-len", "32", "--verify"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    with train(arguments, tmp_path, launcher) as process:
        output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert "verify: loss equal to the plain model's" in output
    pipeline = json.loads((tmp_path / "out" / "summary.json").read_text())["pipeline"]
    assert pipeline["world_size"] == 4
    assert pipeline["replicas"] == 2
    assert [row["ranks"] for row in pipeline["stages"]] == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_world_that_is_no_multiple_of_pp_is_an_error_on_every_rank(tmp_path):
    """Started as torchrun would, one by one: it ends the others as soon as the first has failed."""
    for rank in range(3):
        with train(["--pp", "2"], tmp_path, RANK=str(rank), WORLD_SIZE="3") as process:
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert errors == (
            "hfpp train: error: the job's 3 ranks must be a multiple of --pp (2): start 2 ranks, "
            "or use --pp 1.\n"
        )
    assert not (tmp_path / "out").exists()
