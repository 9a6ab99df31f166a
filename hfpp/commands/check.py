"""`hfpp check`: a model's pipeline against the unsplit model."""

from __future__ import annotations

import argparse

from hfpp.commands.option_values import integer, integers

__all__ = ["add_to", "run"]

_DEFAULT = " (default: %(default)s)"  # argparse fills it in
_FAILED, _REFUSED = 1, 3


def run(given: argparse.Namespace) -> int:
    """Compares and prints; the exit code is 1 for a difference and 3 for a refusal."""
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


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
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
        type=integers,
        metavar="N[,N...]",
        default=(2, 4),
        help="numbers of stages to check (default: 2,4)",
    )
    add(
        "--tokens",
        type=integer,
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
