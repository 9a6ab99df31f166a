"""docs/architectures.md: written from a sweep's results, and read back to compare with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"

EXACT, REFUSED, DIFFERENT, FAILED, NOT_RUN = "exact", "refused", "different", "failed", "not run"
_ORDER = (DIFFERENT, FAILED, REFUSED, EXACT)  # the worst first


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassResult:
    """What the sweep found for one class.

    Attributes:
        name: the class.
        mapping: where transformers lists it.
        layers: FQN of the list of layers and how many it has, as ``model.layers x 4``.
        crosses: what crosses its cuts.
        dtype: what it was compared in.
        inputs: kinds of input that were compared.
        results: by number of stages; empty where the unsplit model itself does not run.
        reason: of anything but exact.
        seconds: of all comparisons.
    """

    name: str
    mapping: str
    layers: str = ""
    crosses: str = ""
    dtype: str = ""
    inputs: tuple[str, ...] = ()
    results: Mapping[int, str] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0

    @property
    def runs(self) -> bool:
        """Whether there is an unsplit model to compare with."""
        return bool(self.results)

    @property
    def exact(self) -> bool:
        """Exact for every number of stages."""
        return self.runs and set(self.results.values()) == {EXACT}


def render(results: Sequence[ClassResult], provenance: str) -> str:
    """The whole page."""
    parts = [_INTRODUCTION.format(provenance=provenance)]
    for mapping in dict.fromkeys(result.mapping for result in results):
        own = [result for result in results if result.mapping == mapping]
        run = [result for result in own if result.runs]
        exact = sum(result.exact for result in run)
        wrong = sum(bool({DIFFERENT, FAILED} & set(r.results.values())) for r in run)
        parts.append(
            f"## {mapping[0].upper()}{mapping[1:]}\n\n"
            f"{exact} of {len(run)} classes are exact ({exact / len(run):.1%}). Refused for one "
            f"number of stages or more: {len(run) - exact - wrong}. Wrong: {wrong}.\n\n"
            "| class | layers | what crosses a cut | compared in | result |\n"
            "| --- | --- | --- | --- | --- |\n" + "".join(_row(result) for result in run)
        )
        reasons = [result for result in run if not result.exact]
        if reasons:
            parts.append(
                "Not exact, and why:\n\n" + "".join(f"- `{r.name}`: {r.reason}\n" for r in reasons)
            )
        missing = [result for result in own if not result.runs]
        if missing:
            parts.append(
                "Not compared, as the unsplit model does not run:\n\n"
                + "".join(f"- `{r.name}`: {r.reason}\n" for r in missing)
            )
    return "\n".join(parts)


def _row(result: ClassResult) -> str:
    cells = (result.name, result.layers, result.crosses, result.dtype, _summary(result.results))
    return "| " + " | ".join(cells) + " |\n"


def _summary(results: Mapping[int, str]) -> str:
    by_result: dict[str, list[int]] = {}
    for stages, result in results.items():
        by_result.setdefault(result, []).append(stages)
    return "; ".join(
        f"{result} at {', '.join(map(str, stages))}" for result, stages in by_result.items()
    )


def read(text: str) -> dict[str, dict[int, str]]:
    """Results by class and number of stages, from a page that `render` wrote."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 5 and " at " in cells[4]:
            found[cells[0]] = {
                int(stages): result.strip()
                for result, listed in re.findall(r"([\w ]+?) at ([\d, ]+)", cells[4])
                for stages in listed.split(",")
            }
    return found


def worse(results: Iterable[ClassResult], before: Mapping[str, Mapping[int, str]]) -> list[str]:
    """What got worse than the table says; a class that it lacks must be exact or refused."""
    problems = []
    for result in results:
        known = before.get(result.name, {})
        if known and not result.runs:
            problems.append(f"{result.name} does not run any more: {result.reason}")
        for stages, now in result.results.items():
            then = known.get(stages, REFUSED)
            if _ORDER.index(now) < _ORDER.index(then):
                problems.append(
                    f"{result.name} at {stages} stages was {then}, is {now}: {result.reason}"
                )
    return problems


_INTRODUCTION = """\
# Architectures

Every class of the model mappings of transformers, split into 2, 3 and 4 stages and compared with
the unsplit model. *Exact* means that the logits and every parameter's gradient differ by less than
1e-9 of the largest value (1e-5 in float32, for classes whose code knows no float64), for plain
batches, right- and left-padded ones, sequences packed by `position_ids` where the class takes them,
and sequences longer than its windows; and once more with other values of what the class multiplies
by and caps with. Each class has a tiny configuration of its own kind with random weights. Before
the comparison, everything that a stage does not hold is filled with NaN. *Refused* means an error
that names the class and the reason, before anything is built.

`make sweep` writes this page. {provenance}
"""
