"""The grammar of partitions: what each spelling means, and what is said of anything else."""

import itertools
import json
import re
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hfpp import PipelineConfigError
from hfpp.plan.costs import ModelCosts, UnitCost
from hfpp.plan.partition import generate_hf_model_fqn_per_model_part, uniform_offsets
from hfpp.plan.partitioning.balance import balance_layers
from hfpp.plan.partitioning.grammar import parse_partition
from hfpp.plan.placement import Placement
from tests.reference import balance as reference


def _counts(text, **sizes):
    offsets = parse_partition(text).offsets(**sizes)
    return [b - a for a, b in itertools.pairwise(offsets)]


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("7,8,9,8", [7, 8, 9, 8]),
        ("  7 , 8,\t9 ,8 ", [7, 8, 9, 8]),
        ("12", [12]),
        ("Et*3|(t*4|)*2tL", [3, 4, 4, 1]),
        ("E t * 3 | ( t * 4 | ) * 2 t L", [3, 4, 4, 1]),
        ("E,t*3|(t*4|)*2,t,L", [3, 4, 4, 1]),
        ("EtL", [1]),
        ("Et|t|tL", [1, 1, 1]),
        ("Ett(|t)*3L", [2, 1, 1, 1]),
        ("E(t*2|)*3tL", [2, 2, 2, 1]),
        ("E((t|)*2tt|)*2tL", [1, 1, 2, 1, 1, 2, 1]),
        ("(Et)*1|*1tL*1", [1, 1]),
        ("E(t|t)*3L", [1, 2, 2, 1]),
        ("E(tt)*3|tL", [6, 1]),
        ("uniform", None),
        (" uniform ", None),
    ],
)
def test_counts_and_layouts(text, counts):
    if counts is None:
        assert _counts(text, num_layers=11, num_stages=4) == [3, 3, 3, 2]
    else:
        assert list(parse_partition(text).counts) == counts
        assert _counts(text, num_layers=sum(counts), num_stages=len(counts)) == counts


@st.composite
def layouts(draw) -> tuple[str, str]:
    """A layout with repetitions, and the same written out."""
    short = draw(st.sampled_from(["E", "E ", "E*1"]))
    long = "E"
    for _ in range(draw(st.integers(1, 4))):
        inner = draw(st.sampled_from(["t", "tt", "t|t", "|t", "t|", "tt|t"]))
        count = draw(st.integers(1, 4))
        if len(inner) == 1:
            short += draw(st.sampled_from([f"{inner}*{count}", f"({inner})*{count}"]))
        else:
            short += f"({inner})*{count}"
        long += inner * count
    return short + "L", long + "L"


@given(layouts())
def test_layouts_mean_what_they_are_written_out(texts):
    """Against the obvious reading: split what is written out at every separator."""
    short, long = texts
    stages = long.split("|")
    counts = [stage.count("t") for stage in stages]
    if 0 in counts:
        with pytest.raises(PipelineConfigError, match=rf"stage {counts.index(0)} has no layer"):
            parse_partition(short)
    else:
        assert list(parse_partition(short).counts) == counts


def _torchtitan(num_layers, num_stages, input_weight, output_weight):
    """Layers one by one, as torchtitan deals them out; None where a stage would get none."""
    effective = ["in"] * input_weight + ["layer"] * num_layers + ["out"] * output_weight
    sizes = [len(effective[stage::num_stages]) for stage in range(num_stages)]
    counts, at = [], 0
    for size in sizes:
        counts.append(effective[at : at + size].count("layer"))
        at += size
    fits = sizes[0] >= input_weight and sizes[-1] >= output_weight
    return counts if fits and min(counts) > 0 else None


@given(st.integers(1, 40), st.integers(2, 8), st.integers(0, 4), st.integers(0, 4))
def test_weights(num_layers, num_stages, input_weight, output_weight):
    text = f"input_weight={input_weight},output_weight={output_weight}"
    want = _torchtitan(num_layers, num_stages, input_weight, output_weight)
    if want is None or num_stages > num_layers:
        with pytest.raises(PipelineConfigError, match="every stage needs a layer"):
            _counts(text, num_layers=num_layers, num_stages=num_stages)
    else:
        assert _counts(text, num_layers=num_layers, num_stages=num_stages) == want


def test_weights_that_are_left_out_are_one():
    for text in ("input_weight=1", "output_weight=1", "output_weight=1,input_weight=1"):
        assert _counts(text, num_layers=10, num_stages=4) == [2, 3, 3, 2]
    assert _counts("input_weight=3,output_weight=9", num_layers=10, num_stages=1) == [10]


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("first=2", [2, 4, 3, 3]),
        ("last=3", [3, 3, 3, 3]),
        ("first=1,last=1", [1, 5, 5, 1]),
        ("last=5, first=3", [3, 2, 2, 5]),
    ],
)
def test_ends(text, counts):
    assert _counts(text, num_layers=12, num_stages=4) == counts


def _costs(seconds, parameters, head=0.0):
    unit = [
        UnitCost(forward=s, backward_input=0.0, backward_weight=0.0, parameters=p)
        for s, p in zip(seconds, parameters, strict=True)
    ]
    free = UnitCost(forward=0.0, backward_input=0.0, backward_weight=0.0, parameters=5)
    heavy = UnitCost(forward=head, backward_input=0.0, backward_weight=0.0, parameters=7)
    return ModelCosts(
        embedding=free, layers=tuple(unit), head=heavy, boundary_bytes=0, source="measured"
    )


def test_balanced_by_time_and_by_parameters():
    costs = _costs([1.0] * 8, [3, 1, 1, 1, 1, 1, 1, 3], head=4.0)
    assert _counts("balanced", num_layers=8, num_stages=3, costs=costs) == [4, 3, 1]
    want = [3 + 5, 1, 1, 1, 1, 1, 1, 3 + 7]
    for options in ({"costs": costs}, {"parameters": want}):
        offsets = parse_partition("parameters").offsets(num_layers=8, num_stages=3, **options)
        sums = reference.rank_sums(offsets, 3, "loop", want)
        assert max(sums) == reference.least_slowest(3, 3, "loop", want)
    both = parse_partition("balanced").offsets(
        num_layers=8, num_stages=4, pp_size=2, placement=Placement.V, costs=costs
    )
    assert (
        both
        == balance_layers(costs.seconds, pp_size=2, num_stages=4, placement=Placement.V).offsets
    )


def test_types_share_out_the_layers_that_match():
    types = ["MambaBlock", "AttentionBlock", "MambaBlock", "MambaBlock", "MambaBlock", "Attention"]
    options = {"num_layers": 6, "num_stages": 2, "layer_types": types}
    for text in ("type:attention", "type:^ATT"):
        offsets = parse_partition(text).offsets(**options)
        assert 2 <= offsets[1] <= 5  # one on either side
    assert parse_partition("type:mamba").offsets(**options) == (0, 3, 6)  # two and two
    with pytest.raises(PipelineConfigError, match=r"type:moe.* matches none .*MambaBlock, Atten"):
        parse_partition("type:moe").offsets(**options)


def test_lists_of_names():
    names = generate_hf_model_fqn_per_model_part(3, 7)
    for value in (names, json.dumps(names), f" {json.dumps(names)}\n"):
        spec = parse_partition(value)
        assert [list(part) for part in spec.names] == names
        assert spec.offsets(num_layers=7, num_stages=3) == uniform_offsets(3, 7).row()
    assert parse_partition([2, 3]).offsets(num_layers=5, num_stages=2) == (0, 2, 5)
    assert parse_partition("[2, 3]").offsets(num_layers=5, num_stages=2) == (0, 2, 5)
    spec = parse_partition([["a.0", "a.1"], ["h", "a.2"]])
    assert spec.offsets(num_layers=3, num_stages=2, layers_name="a") == (0, 2, 3)
    with pytest.raises(PipelineConfigError, match=r"lists nothing where a\.3 of 4 layers must"):
        spec.offsets(num_layers=4, num_stages=2, layers_name="a")
    with pytest.raises(PipelineConfigError, match=r"lists a\.2, but 'a' has 2 layers"):
        spec.offsets(num_layers=2, num_stages=2, layers_name="a")
    with pytest.raises(PipelineConfigError, match=r"lists a\.2 where a\.1 of 3 layers must stand"):
        parse_partition([["a.0"], ["a.2"]]).offsets(num_layers=3, num_stages=2)
    with pytest.raises(PipelineConfigError, match=r"gives stage 1 no layer of 'a'"):
        parse_partition([["a.0", "a.1"], ["h"]]).offsets(num_layers=2, num_stages=2)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", 1, "is empty: write uniform, balanced, parameters, type:REGEX"),
        ("   ", 1, "is empty"),
        ("unifrom", 1, "'unifrom' is no partition: write uniform"),
        ("banana", 1, "'banana' is no partition: write uniform, balanced"),
        ("7,x,9", 3, "'x' is no count of layers: write a whole number"),
        ("7,,9", 3, "',' is no count of layers"),
        ("7,8,", 5, "the end is no count of layers"),
        ("7,-8", 3, "'-' is no count of layers"),
        ("7;8", 2, "';' stands where a comma must: write counts as 7,8,9,8"),
        ("7.5,8", 2, "'.' stands where a comma must"),
        ("7, 0,9", 4, "stage 1 has no layers, and every stage needs one: write 1 or more"),
        ("7,9999999999", 3, "a count of layers has 10 digits: write a number of at most 9 digits"),
        ("Et*|tL", 4, "'|' is no number of repetitions"),
        ("Et*0|tL", 4, "nothing is repeated 0 times"),
        ("Et|xL", 4, "'x' is no part of a layout: write E, t, L, | and (...)"),
        ("Et|tmL", 5, "'m' is a multi-token prediction (MTP) layer"),
        ("E(t|tL", 2, "this bracket is not closed"),
        ("Et)|tL", 3, "this bracket closes nothing"),
        ("*3|t", 1, "'*' is no part of a layout"),
        ("Et||tL", 4, "stage 1 has no layer, and every stage needs one: embedding and head stand"),
        ("E|t|tL", 1, "stage 0 has no layer"),
        ("Et|t|L", 6, "stage 2 has no layer"),
        ("Et|t|", 6, "L, the head, is missing: write it last"),
        ("t|tL", 1, "E, the embedding, is missing: write it first"),
        ("Et|EtL", 4, "E, the embedding, stands there 2 times: write it once"),
        ("Et|tE|tL", 5, "stands there 2 times"),
        ("t|EtL", 3, "E, the embedding, must come first"),
        ("tE|tL", 2, "E, the embedding, must come first"),
        ("Et|Lt", 4, "L, the head, must come last"),
        ("EtL|t", 3, "L, the head, must come last"),
        ("(" * 40 + "t|", 33, "brackets are nested 32 deep"),
        ("E(t|)*999999999tL", 7, "that makes more than 65536 stages"),
        ("E((t|)*60000)*60000tL", 15, "that makes more than 65536 stages"),
        ("first=3,first=4", 9, "first is given twice"),
        ("first=3,input_weight=1", 9, "input_weight does not go with first"),
        ("first=x", 7, "'x' is no number of layers"),
        ("first=0", 7, "the first stage has no layers, and needs one"),
        ("frist=3", 1, "'frist' is none of first, last, input_weight, output_weight"),
        ("first=3;last=2", 8, "';' stands where a comma must"),
        ("first =", 8, "the end is no number of layers"),
        ("type:", 6, "no pattern follows type:"),
        ("type:(a", 6, "the pattern is no regular expression (missing ), unterminated"),
        ("type:" + "a" * 1001, 6, "the pattern has 1001 characters"),
        ('[["a.0"]', 9, "no JSON (Expecting ',' delimiter)"),
        ("[" * 100_000, 1, "no JSON that can be read"),
        ("[" + "9" * 5000 + "]", 1, "no JSON that can be read"),
    ],
)
def test_errors_name_place_rule_and_remedy(text, column, message):
    with pytest.raises(PipelineConfigError) as raised:
        parse_partition(text, argument="--partition")
    words = str(raised.value)
    assert words.startswith("--partition ("), words
    assert f"), column {column}: " in words
    assert message in words
    assert words.endswith(".")
    assert len(words) < 500


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, r"^partition is a int: write uniform"),
        ([], r"^partition is an empty list"),
        ([["a"], []], r"^partition\[1\] is empty, and every stage needs a layer"),
        ([["a"], "b"], r"^partition\[1\] is a str, not a list of module names"),
        ([["a"], [3]], r"^partition\[1\] holds '3', which is no name"),
        ([3, 0], r"^partition\[1\] \(0\) is no count of layers"),
        ([3, True], r"^partition\[0\] is a int, not a list"),
        ('{"a": 1}', r"^partition \('{\"a\": 1}'\), column 1: .* is no partition"),
        ("[[1]]", r"^partition\[0\] holds '1', which is no name"),
    ],
)
def test_errors_of_lists(value, message):
    with pytest.raises(PipelineConfigError, match=message):
        parse_partition(value)


@pytest.mark.parametrize(
    ("text", "sizes", "message"),
    [
        ("7,8", (16, 2), r"partition \('7,8'\) gives its 2 stages 15 layers, but the model has 16"),
        ("7,8", (15, 3), r"has 2 stages, but the pipeline has 3: write 3 of them"),
        ("Et*3|(t*4|)*2tL", (13, 4), r"gives its 4 stages 12 layers, but the model has 13"),
        ("uniform", (3, 4), r"num_stages \(4\) must not be larger than num_layers \(3\)"),
        ("first=9,last=3", (12, 4), r"leaves 0 of 12 layers for the 2 other stages"),
        ("first=4,last=3", (12, 2), r"leaves 5 of 12 layers for the 0 other stages.* no layers"),
        ("first=4,last=3", (12, 1), r"needs two stages, but the pipeline has 1"),
        ("balanced", (12, 2), r"needs costs of the model"),
        ("parameters", (12, 2), r"needs parameters or costs of the model"),
        ("type:a", (12, 2), r"needs layer_types of the model"),
    ],
)
def test_errors_of_fit(text, sizes, message):
    with pytest.raises(PipelineConfigError, match=message):
        parse_partition(text).offsets(num_layers=sizes[0], num_stages=sizes[1])
    costs = _costs([1.0] * 5, [1] * 5)
    with pytest.raises(PipelineConfigError, match=r"asked for 4 layers, but the costs are of 5"):
        parse_partition("balanced").offsets(num_layers=4, num_stages=2, costs=costs)


_PIECES = [
    "E",
    "t",
    "L",
    "|",
    "(",
    ")",
    "*",
    ",",
    "=",
    "1",
    "2",
    "0",
    "999999999999",
    " ",
    "[",
    "]",
]
_PIECES += [
    "first",
    "last",
    "input_weight",
    "output_weight",
    "type:",
    "uniform",
    "é",
    "\0",
    '"a.0"',
]


@settings(max_examples=400)
@given(st.lists(st.sampled_from(_PIECES), max_size=14).map("".join) | st.text(max_size=40))
@example("Et*999999999|tL")
@example("E(t*999999999)*999999999|tL")
@example("t*999999999999")
@example("type:(a*)*b")
@example('[["\\ud800"]]')
def test_anything_is_a_partition_or_an_error(text):
    try:
        spec = parse_partition(text)
        offsets = spec.offsets(
            num_layers=24,
            num_stages=spec.num_stages or 4,
            costs=_costs([1.0] * 24, [2] * 24),
            layer_types=["Layer"] * 24,
        )
    except PipelineConfigError as error:
        assert re.search(r"[a-z]", str(error))
        return
    assert offsets[0] == 0
    assert offsets[-1] == 24
    assert all(a < b for a, b in itertools.pairwise(offsets))


def test_no_layout_costs_more_memory_than_its_stages():
    tracemalloc.start()
    for text in ("t*999999999999", "E(t|)*999999999tL", "E((((t|)*999)*999)*999)*9tL", "|" * 10**6):
        with pytest.raises(PipelineConfigError):
            parse_partition(text)
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
