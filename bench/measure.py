"""Fair measurements: competitors take turns in one run, and every table says where it was made."""

import argparse
import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


class Timing(NamedTuple):
    """Times of one competitor, in seconds."""

    median: float
    low: float  # the 10th percentile
    high: float  # the 90th
    rounds: int

    def __str__(self) -> str:
        return f"{seconds(self.median)} ({seconds(self.low)} to {seconds(self.high)})"


def seconds(value: float) -> str:
    """A time with a unit that fits and three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def take_turns(
    competitors: dict[str, Callable[[], object]],
    budget: float = 1.0,
    block: float = 0.002,
    most_rounds: int = 200,
) -> dict[str, Timing]:
    """Times every competitor for a moment, in turns, so that a slow phase of the machine hits all.

    Args:
        competitors: What to call, by name.
        budget: Seconds for all rounds together; at least seven rounds are run.
        block: Seconds that a competitor's turn takes at least: quick calls are repeated within
            it, with warm caches, as `timeit` does. A call that takes longer has its result freed
            after the clock has stopped.
        most_rounds: The largest number of rounds.

    Returns:
        One timing per competitor, per call.
    """
    numbers = {name: _calls_per_block(call, block) for name, call in competitors.items()}
    times: dict[str, list[float]] = {name: [] for name in competitors}
    started = time.perf_counter()
    rounds = 0
    while rounds < 7 or (rounds < most_rounds and time.perf_counter() - started < budget):
        for name, call in competitors.items():
            gc.collect()
            times[name].append(_time_block(call, numbers[name]))
        rounds += 1
    return {name: timing(values) for name, values in times.items()}


def _time_block(call: Callable[[], object], number: int) -> float:
    result = call() if number > 1 else None  # warms the caches of quick calls
    start = time.perf_counter()
    for _ in range(number):
        result = call()
    took = (time.perf_counter() - start) / number
    del result
    return took


def _calls_per_block(call: Callable[[], object], block: float) -> int:
    number = 1
    while _time_block(call, number) * number < block:
        number *= 2
    return number


def timing(values: Sequence[float]) -> Timing:
    """The median of times in seconds, with their spread."""
    tenths = statistics.quantiles(values, n=10)
    return Timing(statistics.median(values), tenths[0], tenths[-1], len(values))


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times the median of one is the median of the other."""
    return slow.median / fast.median


class Target(NamedTuple):
    """A promise and what was measured."""

    what: str
    promised: str
    measured: str
    met: bool


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [list(header), ["---"] * len(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells[1] = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    )


def targets_table(targets: Iterable[Target]) -> str:
    """The promises as a Markdown table."""
    rows = [(t.what, t.promised, t.measured, "yes" if t.met else "NO") for t in targets]
    return table(("what", "promised", "measured", "met"), rows)


def provenance(packages: Sequence[str]) -> str:
    """Machine, versions, commit and date, one per line."""
    versions = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return "\n".join(
        [
            f"- machine: {_processor()}, {os.cpu_count()} cores, {platform.system()}",
            f"- versions: {', '.join(versions)}",
            f"- commit: {_commit()}",
            f"- date: {date}",
        ]
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    """The commit, marked where the tree differs from it; earlier results are no difference."""
    commit = _git("rev-parse", "--short", "HEAD") or "none yet"
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return f"{commit}-dirty" if changed else commit


def _git(*words: str) -> str:
    git = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return git.stdout.strip()


def report(name: str, text: str, targets: Sequence[Target]) -> int:
    """Prints a report and, asked to by ``--write``, keeps it in ``bench/results``.

    Returns:
        The exit code of the script: 1 where a promise was missed.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="write bench/results/NAME.md")
    write = parser.parse_args().write
    print(text)
    if write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text + "\n")
    return 0 if all(target.met for target in targets) else 1
