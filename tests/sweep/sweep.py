"""Builds each class tiny, splits it and compares: one forked process per class."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from hfpp.check.model_check import check_class
from hfpp.check.report import CheckReport
from hfpp.check.shrink import tiny_config
from tests.sweep.classes import Entry, with_other_multipliers
from tests.sweep.forked import run_forked
from tests.sweep.table import FAILED, ClassResult

SIZES = (2, 3, 4)
DEADLINE_S = 150.0


def sweep(entries: Sequence[Entry], *, at_once: int) -> Iterator[ClassResult]:
    """Yield the result of every class, as they come."""
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for outcome in run_forked(check_entry, entries, at_once=at_once, timeout_s=DEADLINE_S):
        entry: Entry = outcome.job
        if outcome.error:
            last = outcome.error.strip().splitlines()[-1]
            yield ClassResult(
                name=entry.name,
                mapping=entry.mapping,
                results=dict.fromkeys(SIZES, FAILED),
                reason=last,
                seconds=outcome.seconds,
            )
            continue
        facts: dict[str, Any] = outcome.value
        yield ClassResult(name=entry.name, mapping=entry.mapping, seconds=outcome.seconds, **facts)


def check_entry(entry: Entry) -> dict[str, Any]:
    """What the class's `ClassResult` says, but for its name."""
    try:
        config = tiny_config(entry.config_class, entry.model_class)
        report = check_class(entry.model_class, config, pp_sizes=SIZES)
    except Exception as error:  # whatever the class's own code raises
        return {"reason": f"cannot be built: {_first_line(error)}"}
    if report.unsplit_error is not None:
        return {"reason": report.unsplit_error}
    reports = [report]
    varied = with_other_multipliers(config)
    if varied is not None:
        again = check_class(entry.model_class, varied, pp_sizes=SIZES)
        if again.unsplit_error is not None:
            raise RuntimeError(f"with other multipliers: {again.unsplit_error}")
        reports.append(again)
    return _facts(reports)


def _facts(reports: Sequence[CheckReport]) -> dict[str, Any]:
    first = reports[0]
    reasons = dict.fromkeys(s.reason for r in reports for s in r.sizes if s.result != "exact")
    crosses: dict[str, None] = {}
    for size in first.sizes:
        for cut in size.cuts:
            crosses.update(dict.fromkeys(_kinds(c.description for c in cut.crossings)))
    return {
        "layers": f"`{first.layers}` x {first.num_layers}" if first.layers else "",
        "crosses": ", ".join(crosses),
        "dtype": first.dtype,
        "inputs": tuple(dict.fromkeys(k.kind for s in first.sizes for k in s.kinds)),
        "results": {
            size: _worst(r.result for report in reports for r in report.sizes if r.pp_size == size)
            for size in SIZES
        },
        "reason": " ".join(reasons),
    }


def _worst(results: Iterable[str]) -> str:
    from hfpp.check.report import worst_result

    return worst_result(results)


def _kinds(descriptions: Iterable[str]) -> Iterator[str]:
    """Descriptions without the number of the layer, which differs from cut to cut."""
    for description in descriptions:
        yield description.partition(" of layer ")[0]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {lines[0]}"
