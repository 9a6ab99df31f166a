"""Comparing curves: what differs is seen, and nothing passes without being compared."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfpp.train.events import StepMetrics
from hfpp.train.options import RunDtype
from hfpp.train.verify import TOLERANCES, compare_runs
from hfpp.train.verify import compare_curves as compare_named_curves


def compare_curves(pipeline, reference, *, tolerance):
    return compare_named_curves(pipeline, reference, curve="loss", tolerance=tolerance)


CURVES = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=20)


def test_the_tolerances():
    assert TOLERANCES == {RunDtype.FLOAT32: (1e-5, 1e-3), RunDtype.FLOAT64: (1e-9, 1e-7)}


@given(curve=CURVES)
def test_equal_curves_hold(curve):
    verdict = compare_curves(curve, list(curve), tolerance=1e-12)
    assert verdict.holds
    assert verdict.largest_difference == 0.0


@given(curve=CURVES, data=st.data(), change=st.sampled_from([1.1e-5, -1.1e-5, 0.5]))
def test_one_step_that_is_off_is_found(curve, data, change):
    step = data.draw(st.integers(0, len(curve) - 1))
    other = [loss * (1 + change) if i == step else loss for i, loss in enumerate(curve)]
    verdict = compare_curves(other, curve, tolerance=1e-5)
    assert not verdict.holds
    assert verdict.step == step + 1
    assert verdict.largest_difference == pytest.approx(abs(change), rel=1e-3)


@given(curve=CURVES)
def test_less_than_the_tolerance_holds(curve):
    assert compare_curves([loss * (1 + 9e-6) for loss in curve], curve, tolerance=1e-5).holds


@pytest.mark.parametrize(
    ("losses", "reference"),
    [
        ([], []),
        ([1.0], []),
        ([], [1.0]),
        ([1.0], [1.0, 0.9]),
        ([1.0, 0.9], [1.0]),
        ([math.nan], [math.nan]),
        ([math.inf], [math.inf]),
        ([1.0], [math.nan]),
        ([1e-3], [0.0]),
    ],
)
def test_what_cannot_be_compared_does_not_hold(losses, reference):
    assert not compare_curves(losses, reference, tolerance=1e-5).holds


def test_losses_and_norms_are_compared_each_with_its_tolerance():
    def step(loss, grad_norm):
        return StepMetrics(
            step=1, loss=loss, grad_norm=grad_norm, tokens_per_second=1.0, seconds=1.0
        )

    def held(loss, grad_norm, dtype=RunDtype.FLOAT32):
        verdicts = compare_runs([step(loss, grad_norm)], [(1.0, 2.0)], dtype)
        assert [verdict.curve for verdict in verdicts] == ["loss", "gradient norm"]
        return [verdict.holds for verdict in verdicts]

    assert held(1.000009, 2.0019) == [True, True]
    assert held(1.000011, 2.0019) == [False, True]
    assert held(1.000009, 2.0021) == [True, False]
    assert held(1.000009, 2.0019, RunDtype.FLOAT64) == [False, False]
