"""The command line: `hfpp train` and `hfpp check`."""

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
    from collections.abc import Callable, Sequence

__all__ = ["main"]

# What the shell is told; argparse itself ends with 2 for options that it cannot read.
_FAILED, _BAD_OPTIONS, _REFUSED, _INTERRUPTED = 1, 2, 3, 130
_DEFAULT = " (default: %(default)s)"  # argparse fills it in


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    A script that calls this does so under `if __name__ == "__main__":`: the processes of a run
    import the script.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        The exit code: 0; 1 for a run that failed, or a model whose pipeline is not exact; 2 for
        options that cannot work; 3 for a model that is refused; 130 for Ctrl-C.
    """
    given = _parser().parse_args(arguments)
    command: str = given.command
    try:
        return _COMMANDS[command](given)
    except KeyboardInterrupt:
        return _end(command, _INTERRUPTED, "interrupted")
    except PipelineConfigError as error:
        return _end(command, _BAD_OPTIONS, f"error: {error}")
    except (TrainingError, OSError) as error:  # such as a full disk
        return _end(command, _FAILED, f"error: {error}")


def _check(given: argparse.Namespace) -> int:
    from hfpp.check.command import check_and_print

    report = check_and_print(
        given.model,
        pp_sizes=given.pp,
        tokens=given.tokens,
        full=given.full,
        trust_remote_code=given.trust_remote_code,
        as_json=given.json,
    )
    return {"exact": 0, "refused": _REFUSED}.get(report.result, _FAILED)


def _train(given: argparse.Namespace) -> int:
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
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {"train": _train, "check": _check}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hfpp",
        description="Pipeline parallelism for Hugging Face models.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", dest="command"
    )
    _add_train(commands)
    _add_check(commands)
    return parser


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check",
        help="compare a model's pipeline with the unsplit model",
        description=(
            "Cuts a model into stages, runs them one after the other in one process without "
            "anything of the unsplit model, and compares logits and every gradient: on plain, "
            "padded, packed and long batches of random tokens. A transformers model is made small "
            "first: its own class, with a small config of the same kind and random weights. "
            "Printed are the result for each size, what crosses each cut and what each stage "
            "owns."
        ),
        epilog=(
            "exit code: 0 every size is exact, 1 some size differs or fails, 2 wrong options, 3 "
            "the model, or a size, is refused with the reason and nothing differs"
        ),
        allow_abbrev=False,
    )
    add = check.add_argument
    add(
        "model",
        metavar="MODEL",
        help="a config.json, a local folder with one, or module:function, a function without "
        "arguments that returns a model or a transformers config",
    )
    add(
        "--pp",
        type=_sizes,
        metavar="N[,N...]",
        default=(2, 4),
        help="numbers of stages to check (default: 2,4)",
    )
    add(
        "--tokens",
        type=int,
        metavar="N",
        default=21,
        help="tokens per sequence; a small model is compared with at most 32, and the cuts are "
        f"described for as many as given{_DEFAULT}",
    )
    add(
        "--full",
        action="store_true",
        help="check the model as large as it is, which needs about (4 + number of sizes) times "
        "its size in float64 as memory",
    )
    add(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that the folder brings for its model",
    )
    add("--json", action="store_true", help="print the report as JSON")


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


def _end(command: str, code: int, message: str) -> int:
    sys.stderr.write(f"hfpp {command}: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
