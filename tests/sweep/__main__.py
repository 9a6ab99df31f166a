"""Sweeps all classes and writes docs/architectures.md: python -m tests.sweep [CLASS ...]."""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
import time

import torch
import transformers

from tests.sweep.classes import all_entries
from tests.sweep.sweep import sweep
from tests.sweep.table import TABLE, ClassResult, read, render, worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="CLASS", help="only these, writing nothing")
    parser.add_argument("--at-once", type=int, default=2, help="processes (default: %(default)s)")
    given = parser.parse_args()
    entries = [e for e in all_entries() if not given.names or e.name in given.names]
    started = time.monotonic()
    results: list[ClassResult] = []
    for result in sweep(entries, at_once=given.at_once):
        results.append(result)
        shown = result.results or "not run"
        print(f"{len(results):4d}/{len(entries)} {result.name}: {shown} {result.seconds:.1f} s")
        if not result.exact:
            print(f"          {result.reason}")
        sys.stdout.flush()
    minutes = (time.monotonic() - started) / 60
    before = read(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    problems = worse(results, before)
    print(*problems, sep="\n")
    print(f"{sum(r.exact for r in results)} of {len(results)} exact, {minutes:.1f} minutes")
    if not given.names:
        order = {entry.name: index for index, entry in enumerate(entries)}
        results.sort(key=lambda result: order[result.name])
        TABLE.write_text(render(results, _provenance(minutes, given.at_once)), encoding="utf-8")
    return 1 if problems else 0


def _provenance(minutes: float, at_once: int) -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return (
        f"This one: {datetime.date.today():%-d %B %Y}, commit {commit}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {minutes:.0f} minutes with {at_once} processes."
    )


if __name__ == "__main__":
    sys.exit(main())
