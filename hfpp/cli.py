"""The command line: `hfpp train`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hfpp.errors import PipelineConfigError
from hfpp.plan.schedule import SCHEDULES
from hfpp.train.errors import TrainingError
from hfpp.train.options import RunDtype, TrainOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

# What the shell is told; argparse itself ends with 2 for options that it cannot read.
_FAILED, _BAD_OPTIONS, _INTERRUPTED = 1, 2, 130
_DEFAULT = " (default: %(default)s)"  # argparse fills it in


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    A script that calls this does so under `if __name__ == "__main__":`: the processes of a run
    import the script.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        The exit code: 0, 1 for a run that failed, 2 for options that cannot work, 130 for Ctrl-C.
    """
    given = _parser().parse_args(arguments)
    try:
        _train(given)
    except KeyboardInterrupt:
        return _end(_INTERRUPTED, "interrupted")
    except PipelineConfigError as error:
        return _end(_BAD_OPTIONS, f"error: {error}")
    except (TrainingError, OSError) as error:  # such as a full disk
        return _end(_FAILED, f"error: {error}")
    return 0


def _train(given: argparse.Namespace) -> None:
    options = TrainOptions(
        model=given.model,
        text=given.text,
        pp=given.pp,
        schedule=given.schedule,
        microbatch_size=given.microbatch_size,
        batch_size=given.batch_size,
        seq_len=given.seq_len,
        steps=given.steps,
        lr=given.lr,
        warmup_steps=given.warmup_steps,
        dtype=RunDtype(given.dtype),
        seed=given.seed,
        max_grad_norm=given.max_grad_norm,
        out=given.out,
        force=given.force,
        verify=given.verify,
    )
    # Only now: --help and wrong options wait for nothing.
    from hfpp.train.launcher import run_training

    run_training(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hfpp",
        description="Pipeline parallelism for Hugging Face models.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="train a causal language model on a text with pipeline parallelism",
        description=(
            "Trains a causal language model with pipeline parallelism. Started plainly, it runs "
            "--pp local processes; under torchrun it joins that job, and ranks beyond --pp are "
            "data parallel (FSDP2). Dropout is off. What is left is the loss curve, the schedule, "
            "the metrics of every step and a summary: the trained weights are not saved."
        ),
        allow_abbrev=False,
    )
    usual = TrainOptions()
    add = train.add_argument
    add(
        "--model",
        type=Path,
        metavar="FOLDER",
        default=usual.model,
        help="local folder with a config.json, and safetensors to start from, else random weights; "
        "its tokenizer is used, else bytes (default: a small Llama)",
    )
    add(
        "--text",
        type=Path,
        metavar="FILE",
        default=usual.text,
        help="UTF-8 text to train on (default: the prose of Python's pydoc_data.topics)",
    )
    add("--pp", type=int, metavar="N", default=usual.pp, help=f"ranks of the pipeline{_DEFAULT}")
    add(
        "--schedule",
        metavar="NAME",
        default=usual.schedule,
        help=f"one of {', '.join(SCHEDULES)}, in any case, or an alias{_DEFAULT}",
    )
    for name, text in (
        ("microbatch-size", "sequences per microbatch"),
        ("batch-size", "sequences per step, over all ranks"),
        ("seq-len", "tokens per sequence"),
        ("steps", "optimizer steps"),
        ("warmup-steps", "steps over which the learning rate rises"),
        ("seed", "of the weights and of the order of the data"),
    ):
        default = getattr(usual, name.replace("-", "_"))
        add(f"--{name}", type=int, metavar="N", default=default, help=text + _DEFAULT)
    add(
        "--lr",
        type=float,
        metavar="X",
        default=usual.lr,
        help=f"peak learning rate of AdamW{_DEFAULT}",
    )
    add(
        "--max-grad-norm",
        type=float,
        metavar="X",
        default=usual.max_grad_norm,
        help=f"clip all gradients together to this norm; 0 does not clip{_DEFAULT}",
    )
    add(
        "--dtype",
        choices=[str(dtype) for dtype in RunDtype],
        default=str(usual.dtype),
        help=f"type of parameters, activations and gradients{_DEFAULT}",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        default=usual.out,
        help=f"folder for the results, a new one{_DEFAULT}",
    )
    add(
        "--force",
        action="store_true",
        help="replace the results of an earlier run in --out, and nothing else",
    )
    add(
        "--verify",
        action="store_true",
        help="also train the plain model in one process, and fail if the loss or the gradient norm "
        "of any step differs",
    )


def _end(code: int, message: str) -> int:
    sys.stderr.write(f"hfpp train: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
