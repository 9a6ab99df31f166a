"""Under torchrun: ranks beyond --pp are data parallel, and wrong worlds are an error everywhere."""

import json
import subprocess
import sys

from tests.train.sessions import ENVIRONMENT


def torchrun(ranks, *arguments, folder):
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [sys.executable, *command, "-m", "hfpp", "train", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_four_ranks_train_two_pipelines_like_the_plain_model(tmp_path):
    arguments = ["--pp", "2", "--steps", "3", "--seq-len", "32", "--verify", "--out", "out"]
    done = torchrun(4, *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "verify: loss equal to the plain model's" in done.stdout
    pipeline = json.loads((tmp_path / "out" / "summary.json").read_text())["pipeline"]
    assert pipeline["world_size"] == 4
    assert pipeline["replicas"] == 2
    assert [row["ranks"] for row in pipeline["stages"]] == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_world_that_is_no_multiple_of_pp_is_an_error_on_every_rank(tmp_path):
    done = torchrun(3, "--pp", "2", "--out", "out", folder=tmp_path)
    assert done.returncode != 0
    error = "hfpp train: error: the job's 3 ranks must be a multiple of --pp (2)"
    assert done.stderr.count(error) == 3, done.stderr
    assert not (tmp_path / "out").exists()
