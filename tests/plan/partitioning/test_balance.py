"""Balanced partitions against every partition there is, and against bounds where those are many."""

import itertools
import random
import time
from fractions import Fraction
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfpp import PipelineConfigError
from hfpp.plan.costs import ModelCosts, UnitCost
from hfpp.plan.partition import uniform_offsets
from hfpp.plan.partitioning.balance import MemoryCap, balance_layers, balanced_partition
from hfpp.plan.placement import Placement
from tests.reference import balance as reference


class Case(NamedTuple):
    """Layers to cut, and where the stages lie."""

    pp_size: int
    num_stages: int
    style: str
    seconds: list[float]


def _times(count: int) -> st.SearchStrategy[list[float]]:
    """Coarse times with many ties, fine ones, and ones of very different size."""
    each = st.sampled_from(
        [
            st.integers(0, 4).map(float),
            st.floats(0.25, 4),
            st.floats(1e-9, 1e3),
            st.sampled_from([1.0, 1.0, 1.0, 2.5]),
        ]
    )
    return each.flatmap(lambda one: st.lists(one, min_size=count, max_size=count))


@st.composite
def cases(draw, max_layers: int = 12, max_stages: int = 6) -> Case:
    """Any world of up to that many stages: one or several per rank, dealt round or in a v."""
    num_stages = draw(st.integers(1, max_stages))
    pp_size = draw(st.sampled_from([p for p in range(1, num_stages + 1) if num_stages % p == 0]))
    styles = ["loop", "v"] if num_stages == 2 * pp_size else ["loop"]
    num_layers = draw(st.integers(num_stages, max_layers))
    return Case(pp_size, num_stages, draw(st.sampled_from(styles)), draw(_times(num_layers)))


def _balance(case: Case, **memory):
    return balance_layers(
        case.seconds,
        pp_size=case.pp_size,
        num_stages=case.num_stages,
        placement=Placement(case.style),
        **memory,
    )


def _check_is_partition(offsets, num_layers: int, num_stages: int) -> None:
    assert len(offsets) == num_stages + 1
    assert (offsets[0], offsets[-1]) == (0, num_layers)
    assert all(a < b for a, b in itertools.pairwise(offsets))


@settings(max_examples=250)
@given(cases())
def test_as_good_as_the_best_of_all_partitions(case):
    found = _balance(case)
    _check_is_partition(found.offsets, len(case.seconds), case.num_stages)
    best = reference.least_slowest(*case)
    sums = reference.rank_sums(found.offsets, case.pp_size, case.style, case.seconds)
    assert max(sums) == best  # exact fractions
    assert found.slowest == found.lower_bound == float(best)
    assert found.proven_optimal
    assert found.gap == 0


@settings(max_examples=200)
@given(cases(max_layers=10), st.data())
def test_under_a_cap(case, data):
    count = len(case.seconds)
    parameters = data.draw(st.lists(st.integers(0, 20), min_size=count, max_size=count))
    activations = data.draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
    stages = case.num_stages
    live = data.draw(st.lists(st.integers(0, 5), min_size=stages, max_size=stages))
    held = [4 * p for p in parameters]
    least = reference.least_cap(case.pp_size, stages, case.style, held, activations, live)
    cap = max(0, least + data.draw(st.sampled_from([-1, 0, 1, 9, 10**6])))

    def balance(cap):
        memory = MemoryCap(bytes_per_rank=cap, live_microbatches=live, bytes_per_parameter=4)
        return _balance(case, memory=memory, parameters=parameters, activation_bytes=activations)

    if cap < least:
        with pytest.raises(PipelineConfigError, match=rf"use a cap of {least} bytes or more"):
            balance(cap)
        cap = least
    found = balance(cap)
    _check_is_partition(found.offsets, count, stages)
    memory = {"static_bytes": held, "activation_bytes": activations, "live": live}
    best = reference.least_slowest(*case, **memory, cap=cap)
    sums = reference.rank_sums(found.offsets, case.pp_size, case.style, case.seconds)
    assert max(sums) == best
    assert found.slowest == float(best)
    assert found.proven_optimal
    sizes = reference.rank_sums(found.offsets, case.pp_size, case.style, held, activations, live)
    assert max(sizes) <= cap


def test_the_oracle_trips_on_planted_faults():
    seconds = [1.0, 2.0, 3.0, 1.0]
    assert reference.least_slowest(2, 2, "loop", seconds) == 4
    assert max(reference.rank_sums((0, 1, 4), 2, "loop", seconds)) == 6
    assert reference.least_slowest(2, 4, "v", seconds) == 5
    assert reference.least_slowest(2, 4, "loop", seconds) == 4
    assert reference.least_slowest_chain([1, 2, 3, 1], 2) == 4


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.data())
def test_more_layers_than_can_be_tried(seconds, data):
    num_stages = data.draw(st.integers(1, len(seconds)))
    found = balance_layers(seconds, pp_size=num_stages, num_stages=num_stages)
    assert found.slowest == reference.least_slowest_chain(seconds, num_stages)
    assert found.proven_optimal


@given(st.integers(1, 40), st.integers(0, 100))
def test_equal_layers_are_cut_uniformly(num_stages, more):
    found = balance_layers([1.0] * (num_stages + more), pp_size=num_stages, num_stages=num_stages)
    assert found.offsets == uniform_offsets(num_stages, num_stages + more).row()


def test_of_equally_fast_partitions_the_evenest():
    # the last stage can do no better than its own layer: the others are not packed to its time
    found = balance_layers([1.0] * 9 + [7.0], pp_size=4, num_stages=4)
    assert found.offsets == (0, 3, 6, 9, 10)


def test_the_first_and_last_stage_hold_embedding_and_head():
    layer = UnitCost(forward=1.0, backward_input=1.0, backward_weight=1.0, parameters=10)
    costs = ModelCosts(
        embedding=UnitCost(forward=0.5, backward_input=0.0, backward_weight=0.5, parameters=70),
        layers=(layer,) * 12,
        head=UnitCost(forward=4.0, backward_input=4.0, backward_weight=4.0, parameters=70),
        boundary_bytes=0,
        source="measured",
    )
    found = balanced_partition(costs, pp_size=4)
    assert found.offsets == (0, 3, 7, 11, 12)
    assert found.slowest == max(unit.seconds for unit in costs.stages(found.offsets)) == 15
    # the embedding and three layers are 100 parameters
    memory = MemoryCap(bytes_per_rank=99, live_microbatches=[1] * 4, bytes_per_parameter=1)
    assert balanced_partition(costs, pp_size=4, memory=memory).offsets == (0, 2, 7, 11, 12)
    memory = MemoryCap(bytes_per_rank=79, live_microbatches=[1] * 4, bytes_per_parameter=1)
    with pytest.raises(PipelineConfigError, match=r"cap \(79 bytes per rank\).*use a cap of 80 by"):
        balanced_partition(costs, pp_size=4, memory=memory)
    both = balanced_partition(costs, pp_size=2, stages_per_rank=2, placement=Placement.V)
    assert both.slowest == 25  # the first rank holds both ends


def _realistic(kind: str, count: int) -> list[float]:
    """Layers as models have them, with an embedding and a heavy head."""
    layers = {
        "equal": [1.0] * count,
        "experts": [0.7] * 3 + [1.0] * (count - 3),
        "hybrid": [(1.7 if i % 8 == 4 else 1.0) * (1.4 if i % 2 else 1.0) for i in range(count)],
        "windows": [1.31 if i % 6 == 5 else 1.0 for i in range(count)],
        "measured": [random.Random(i).uniform(0.9, 1.1) for i in range(count)],
    }[kind]
    return [layers[0] + 0.2, *layers[1:-1], layers[-1] + 3.7]


@pytest.mark.parametrize(
    ("pp_size", "num_stages", "style"),
    [(64, 64, "loop"), (32, 64, "loop"), (32, 64, "v"), (16, 64, "loop"), (8, 64, "loop")],
)
@pytest.mark.parametrize("kind", ["equal", "experts", "hybrid", "windows", "measured"])
def test_many_layers_are_within_one_percent_of_a_bound(kind, pp_size, num_stages, style):
    case = Case(pp_size, num_stages, style, _realistic(kind, 1000))
    started = time.perf_counter()
    found = _balance(case)
    took = time.perf_counter() - started
    _check_is_partition(found.offsets, 1000, num_stages)
    slowest = max(reference.rank_sums(found.offsets, pp_size, style, case.seconds))
    assert found.slowest == float(slowest)
    assert sum(map(Fraction, case.seconds)) / pp_size <= slowest
    assert found.lower_bound <= found.slowest <= 1.01 * found.lower_bound
    assert found.proven_optimal or num_stages > pp_size
    assert took < (0.5 if num_stages == pp_size else 10)  # orders of magnitude above the usual


@given(cases(max_layers=40, max_stages=20))
def test_bounds_hold_and_results_repeat(case):
    found = _balance(case)
    again = _balance(case)
    assert found == again
    slowest = max(reference.rank_sums(found.offsets, case.pp_size, case.style, case.seconds))
    assert found.slowest == float(slowest)
    assert found.lower_bound <= found.slowest
    uniform = uniform_offsets(case.num_stages, len(case.seconds)).row()
    assert slowest <= max(reference.rank_sums(uniform, case.pp_size, case.style, case.seconds))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], {"pp_size": 2, "num_stages": 2}), r"num_stages \(2\) must not be larger than"),
        (([1.0, -1.0], {"pp_size": 2, "num_stages": 2}), r"seconds \(-1"),
        (([1.0, float("nan")], {"pp_size": 1, "num_stages": 1}), r"seconds \(-?nan"),
        (([1.0, float("inf")], {"pp_size": 1, "num_stages": 1}), r"seconds \(inf"),
        (
            ([1.0] * 9, {"pp_size": 3, "num_stages": 9, "placement": Placement.V}),
            r"num_stages \(9\) must be twice pp_size",
        ),
        (([1.0] * 9, {"pp_size": 2, "num_stages": 3}), r"num_stages \(3\) must be a positive mul"),
    ],
)
def test_errors(arguments, message):
    seconds, options = arguments
    with pytest.raises(PipelineConfigError, match=message):
        balance_layers(seconds, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"live_microbatches": [1]}, r"live must have one entry per stage \(2\), not 1"),
        ({"live_microbatches": [1, -1]}, r"live \(-1\) must be at least 0"),
        ({"bytes_per_rank": -1}, r"cap \(-1\) must be at least 0"),
        ({"bytes_per_parameter": float("nan")}, r"bytes_per_parameter \(nan\)"),
    ],
)
def test_errors_of_a_cap(changes, message):
    memory = MemoryCap(**{"bytes_per_rank": 9, "live_microbatches": [1, 1], **changes})
    with pytest.raises(PipelineConfigError, match=message):
        balance_layers(
            [1.0] * 3,
            pp_size=2,
            num_stages=2,
            memory=memory,
            parameters=[1] * 3,
            activation_bytes=[1] * 3,
        )


def test_absurd_sizes_end_at_once():
    with pytest.raises(OverflowError, match=r"num_layers \(100000\) times num_stages \(50000\)"):
        balance_layers([1.0] * 100_000, pp_size=50_000, num_stages=50_000)


def test_many_layers_of_few_kinds_take_no_memory():
    """Every mix of the kinds would be terabytes: the bound that looks at them is left out."""
    seconds = [1.0, 1.371, 2.113, 3.337] * 10_000
    random.Random(1).shuffle(seconds)
    found = balance_layers(seconds, pp_size=4, num_stages=8)
    assert sum(seconds) / 4 <= found.slowest <= 1.01 * found.lower_bound
