"""`hfpp profile`: what the parts of a model cost on this device."""

from __future__ import annotations

import argparse
from pathlib import Path

from hfpp import _core
from hfpp.commands.option_values import integer
from hfpp.commands.output_files import check_outputs

__all__ = ["add_to", "run"]

_DEFAULT = " (default: %(default)s)"  # argparse fills it in


def run(given: argparse.Namespace) -> int:
    """Times, prints and writes."""
    for name in ("microbatch_size", "seq_len", "repeats"):
        _core.checked_integer(f"--{name.replace('_', '-')}", getattr(given, name), minimum=1)
    model = Path(given.model)
    check_outputs({"--out": given.out}, inputs=[model, model / "config.json"])
    from hfpp.profile.command import profile_and_write  # only now: it loads torch

    profile_and_write(
        given.model,
        microbatch_size=given.microbatch_size,
        seq_len=given.seq_len,
        dtype=given.dtype,
        device=given.device,
        repeats=given.repeats,
        out=given.out,
        trust_remote_code=given.trust_remote_code,
    )
    return 0


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    profile = commands.add_parser(
        "profile",
        help="time the parts of a model on this device",
        description=(
            "Builds a model with random weights on this device and times its parts: what runs "
            "before the layers, each kind of layer, and what runs after them with the loss; "
            "forward, and the backward of inputs and of weights. The file that is written is what "
            "hfpp plan, train and show read with --costs."
        ),
        allow_abbrev=False,
    )
    add = profile.add_argument
    add(
        "model",
        metavar="MODEL",
        help="a config.json, a local folder with one, or module:function, a function without "
        "arguments that returns a model or a transformers config",
    )
    add(
        "--microbatch-size",
        type=integer,
        metavar="N",
        default=1,
        help=f"sequences per microbatch{_DEFAULT}",
    )
    add("--seq-len", type=integer, metavar="N", default=1024, help=f"tokens per sequence{_DEFAULT}")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "float64"),
        help="of weights and activations (default: the config's)",
    )
    add("--device", metavar="NAME", help="such as cuda:1 (default: a GPU if there is one)")
    add("--repeats", type=integer, metavar="N", default=10, help=f"runs of each part{_DEFAULT}")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        default=Path("costs.json"),
        help=f"file to write{_DEFAULT}",
    )
    add(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that the folder brings for its model",
    )
