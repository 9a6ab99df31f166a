"""A report as text for a terminal."""

from __future__ import annotations

from hfpp.check.report import CheckReport


def as_text(report: CheckReport) -> str:
    """The report in lines."""
    return "\n".join(f"{size.pp_size} stages: {size.result}" for size in report.sizes)
