"""Under torchrun: ranks beyond --pp are data parallel, and wrong worlds are an error everywhere."""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from hfpp.train.errors import OptionError
from hfpp.train.inputs import prepare_inputs
from hfpp.train.options import TrainOptions
from hfpp.train.ranks import check_same_inputs
from tests.ranks import run_ranks
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


def test_a_failing_rank_is_named_in_one_line_and_ends_the_others(tmp_path):
    started = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = ["--pp", "2", "--steps", "100000", "--seq-len", "32", "--out", "out"]
    # A short path of its own: what is left there is seen, and sockets have room for their names.
    with tempfile.TemporaryDirectory(prefix="hfpp-") as temporary:
        process = subprocess.Popen(
            [sys.executable, *started, "-m", "tests.train.faults", "train", *arguments],
            cwd=tmp_path,
            env={**ENVIRONMENT, "TMPDIR": temporary},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        (log,) = re.findall(
            r"^hfpp train: error: rank 1 of 2 failed with KeyError: 'a name\\nover lines'; "
            r"the traceback is in (.*)\.$",
            errors,
            flags=re.MULTILINE,
        )
        assert "raise KeyError" in Path(log).read_text()
        assert "raise KeyError" not in errors  # torchrun's own traceback is
        assert [path.name for path in Path(temporary).glob("hfpp-train-*")] == []


def check_inputs(rank, world_size, inputs):
    if rank == 1:
        inputs = replace(inputs, digest="of another text")
    try:
        check_same_inputs(inputs)
    except OptionError as error:
        return str(error)
    return None


def test_ranks_that_read_different_texts_are_told(tmp_path):
    inputs = prepare_inputs(TrainOptions(), tmp_path)
    messages = run_ranks(check_inputs, 2, args=(inputs,))
    assert messages[0] == messages[1]
    assert messages[0].startswith("rank 0 reads another text or model configuration (pydoc_data")
    assert "than rank 1 (" in messages[0]


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
