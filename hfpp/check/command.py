"""What `hfpp check` does: check, and print the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import transformers
from rich.console import Console

from hfpp.check.model_check import check_model
from hfpp.check.render import print_report
from hfpp.check.report import CheckReport


def check_and_print(
    model: str,
    *,
    pp_sizes: Sequence[int],
    tokens: int,
    full: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> CheckReport:
    """Check what ``model`` names and print the report on standard output.

    Raises:
        PipelineConfigError: if there is no such model, or an option cannot work.
    """
    with _quiet_transformers():
        report = check_model(
            model,
            pp_sizes=pp_sizes,
            tokens=tokens,
            full=full,
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        sys.stdout.write(json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")
    else:
        print_report(report, Console(file=sys.stdout, highlight=False))
    return report


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Its advice on kernels and weights is about training the model, which nobody does here."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
