"""A representative third of all classes is no worse than docs/architectures.md says."""

from __future__ import annotations

import pytest

from tests.sweep.classes import CAUSAL, all_entries, representative_entries
from tests.sweep.forked import run_forked
from tests.sweep.sweep import sweep
from tests.sweep.table import (
    DIFFERENT,
    EXACT,
    FAILED,
    REFUSED,
    TABLE,
    ClassResult,
    read,
    render,
    worse,
)

pytestmark = pytest.mark.torch

COMMITTED = read(TABLE.read_text(encoding="utf-8"))


@pytest.mark.timeout(1500)
def test_no_class_of_the_third_got_worse():
    entries = representative_entries()
    assert 3 * len(entries) >= len(all_entries())
    results = list(sweep(entries, at_once=2))
    assert len(results) == len(entries)
    assert worse(results, COMMITTED) == []


def test_the_committed_table_holds_the_promise():
    causal = {e.name for e in all_entries() if e.mapping == CAUSAL}
    run = {name: results for name, results in COMMITTED.items() if name in causal}
    assert len(run) > 0.95 * len(causal)
    assert not [n for n, r in COMMITTED.items() if {DIFFERENT, FAILED} & set(r.values())]
    exact = [name for name, results in run.items() if set(results.values()) == {EXACT}]
    assert len(exact) >= 0.975 * len(run)


def _result(name: str, results: dict[int, str], reason: str = "") -> ClassResult:
    return ClassResult(name=name, mapping=CAUSAL, results=results, reason=reason)


def test_a_table_reads_back_as_it_was_written():
    results = [
        _result("A", {2: EXACT, 3: EXACT, 4: EXACT}),
        _result("B", {2: EXACT, 3: REFUSED, 4: REFUSED}, "B cannot be cut there"),
        _result("C", {}, "needs a package"),
    ]
    page = render(results, "Today.")
    assert read(page) == {"A": dict(results[0].results), "B": dict(results[1].results)}
    assert "1 of 2 classes are exact" in page
    assert "`B`: B cannot be cut there" in page
    assert "`C`: needs a package" in page


@pytest.mark.parametrize(
    ("now", "bad"),
    [
        ({2: EXACT, 4: REFUSED}, 0),
        ({2: EXACT, 4: EXACT}, 0),
        ({2: REFUSED, 4: REFUSED}, 1),
        ({2: EXACT, 4: DIFFERENT}, 1),
        ({2: FAILED, 4: DIFFERENT}, 2),
        ({}, 1),
    ],
)
def test_worse_than_the_table_is_found(now, bad):
    before = {"A": {2: EXACT, 4: REFUSED}}
    assert len(worse([_result("A", now)], before)) == bad


def test_a_class_that_the_table_lacks_must_not_be_wrong():
    assert worse([_result("New", {2: REFUSED})], {}) == []
    assert len(worse([_result("New", {2: DIFFERENT})], {})) == 1


def _square_or_fail(job: int) -> int:
    if job < 0:
        raise ValueError(f"{job} is negative")
    while job == 0:
        pass
    if job == 99:
        import os

        os._exit(7)
    return job * job


def test_forked_jobs_answer_fail_die_or_are_killed():
    outcomes = {
        o.job: o for o in run_forked(_square_or_fail, [3, -1, 0, 99, 4], at_once=2, timeout_s=2.0)
    }
    assert outcomes[3].value == 9
    assert outcomes[4].value == 16
    assert "-1 is negative" in outcomes[-1].error
    assert "still running after 2 s" in outcomes[0].error
    assert "wait status 1792" in outcomes[99].error
