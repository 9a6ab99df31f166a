"""Files of costs: what comes back, and what is said of files that are none."""

import json

import pytest

from hfpp import PipelineConfigError
from hfpp.plan.costs import ModelCosts, UnitCost
from hfpp.plan.costs_file import costs_as_json, read_costs

UNIT = UnitCost(
    forward=0.1,
    backward_input=1e-7,
    backward_weight=0.0,
    parameters=3,
    activation_bytes=5,
    weight_bytes=7,
    split_backward=0.5,
)
COSTS = ModelCosts(
    embedding=UNIT, layers=(UNIT, UNIT), head=UNIT, boundary_bytes=11, source="measured"
)


def test_there_and_back(tmp_path):
    file = tmp_path / "costs.json"
    file.write_text(costs_as_json(COSTS, device="CPU", seq_len=128))
    assert read_costs(file) == COSTS
    with pytest.raises(FileNotFoundError, match="give the path of a file of costs"):
        read_costs(tmp_path / "none.json")


def _set(document, path, value):
    *steps, last = path
    for step in steps:
        document = document[step]
    if value is None:
        del document[last]
    else:
        document[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "hfpp plan", r"\$\.format \(\"hfpp plan\"\) must be one of hfpp costs 1"),
        (("source",), "guessed", r"\$\.source \(\"guessed\"\) must be one of measured, analytic"),
        (("layers",), [], r"layers is empty: a model has at least one layer"),
        (("layers",), {}, r"\$\.layers \(an object\) must be an array"),
        (("layers", 1, "forward"), -1, r"\$\.layers\[1\]\.forward \(-1\) must be a finite number"),
        (("layers", 1, "forward"), "1", r"\$\.layers\[1\]\.forward \(\"1\"\) must be a finite"),
        (("layers", 0, "forward"), None, r"\$\.layers\[0\] has no member 'forward'"),
        (("head", "parameters"), 1.5, r"\$\.head\.parameters \(1\.5\) must be an integer"),
        (("head", "colour"), 1, r"\$\.head has a member \"colour\" that is not known"),
        (("boundary_bytes",), True, r"\$\.boundary_bytes \(true\) must be an integer"),
    ],
)
def test_wrong_values(tmp_path, path, value, message):
    document = json.loads(costs_as_json(COSTS))
    _set(document, path, value)
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(document))
    with pytest.raises(PipelineConfigError, match=message):
        read_costs(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"line 1, column 1: not JSON"),
        (b'{"format": NaN}', r"NaN is no JSON number"),
        (b"\xff\xfe", r"line 1, column 1: not UTF-8"),
        (b"[" * 100_000, r"nested too deep"),
        (b"[]", r"\$ \(an array\) must be an object"),
    ],
)
def test_no_file_of_costs(tmp_path, data, message):
    file = tmp_path / "costs.json"
    file.write_bytes(data)
    with pytest.raises(PipelineConfigError, match=message):
        read_costs(file)
