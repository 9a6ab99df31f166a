"""`hfpp train`: a causal language model on a text."""

from __future__ import annotations

import argparse
from pathlib import Path

from hfpp.commands.option_values import integer, number
from hfpp.plan.schedules import SCHEDULES
from hfpp.train.options import RunDtype, TrainOptions

__all__ = ["add_to", "run"]

_TRACED = 5  # steps, where no number is given
_DEFAULT = " (default: %(default)s)"  # argparse fills it in


def run(given: argparse.Namespace) -> int:
    """Trains."""
    options = TrainOptions(
        model=given.model,
        text=given.text,
        pp=given.pp,
        schedule=given.schedule,
        partition=given.partition,
        costs=given.costs,
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
        trace=given.trace,
    )
    # Only now: --help and wrong options wait for nothing.
    from hfpp.train.launcher import run_training

    run_training(options)
    return 0


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
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
    add(
        "--pp", type=integer, metavar="N", default=usual.pp, help=f"ranks of the pipeline{_DEFAULT}"
    )
    add(
        "--schedule",
        metavar="NAME",
        default=usual.schedule,
        help=f"one of {', '.join(SCHEDULES)}, in any case, or an alias{_DEFAULT}",
    )
    add(
        "--partition",
        metavar="CUTS",
        default=usual.partition,
        help="where to cut: balanced (the slowest rank as fast as can be), uniform, parameters, "
        "type:REGEX, layers per stage as 3,2,2,1, first=3,last=1, "
        "input_weight=1,output_weight=2, a layout as Et*3|(t*2|)*2tL, or lists of module "
        f"names{_DEFAULT}",
    )
    add(
        "--costs",
        type=Path,
        metavar="FILE",
        default=usual.costs,
        help="what hfpp profile measured, for balanced (default: estimated from the model's shape)",
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
        add(f"--{name}", type=integer, metavar="N", default=default, help=text + _DEFAULT)
    add(
        "--lr",
        type=number,
        metavar="X",
        default=usual.lr,
        help=f"peak learning rate of AdamW{_DEFAULT}",
    )
    add(
        "--max-grad-norm",
        type=number,
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
    add(
        "--trace",
        type=integer,
        metavar="N",
        nargs="?",
        const=_TRACED,
        default=usual.trace,
        help="record when each rank computes and sends in the last N steps (if no number is given: "
        f"{_TRACED}): trace.json, which Perfetto opens and hfpp show draws, and trace.svg, the "
        "recorded step under the planned one",
    )
