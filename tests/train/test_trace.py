"""`hfpp train --trace`: real processes record their steps; `hfpp show` draws them."""

import json
from xml.etree import ElementTree

import pytest
from transformers import LlamaConfig

from hfpp import cli
from hfpp.plan.render.trace_file import read_trace
from hfpp.plan.schedules import SCHEDULES, compute_table
from hfpp.train.errors import OptionError
from hfpp.train.options import TrainOptions

FLAGS = ["--seq-len", "12", "--steps", "4", "--lr", "0.01", "--warmup-steps", "2", "--pp", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two ranks that recorded its last three steps of four, and what it printed."""
    folder = tmp_path_factory.mktemp("trace")
    LlamaConfig(
        vocab_size=256,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
    ).save_pretrained(folder / "llama")
    out = folder / "out"
    schedule = ["--schedule", "ZBVZeroBubble", "--model", str(folder / "llama")]
    assert cli.main(["train", *FLAGS, *schedule, "--trace", "3", "--out", str(out)]) == 0
    return out


def test_every_recorded_step_is_the_schedule_in_real_time(run):
    table = compute_table(SCHEDULES["ZBVZeroBubble"], pp_size=2, n_microbatches=8)
    takes = read_trace(run / "trace.json")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [take.step for take in takes] == [2, 3, 4]
    assert len(metrics) == 4
    for take in takes:
        line = take.timeline
        for rank, row in enumerate(line.bars):
            planned = [str(leaf) for s in table.steps(rank) for leaf in s.action.leaves]
            assert [str(bar.action) for bar in row] == planned
        assert 0 < line.end <= metrics[take.step - 1]["seconds"]
        assert all(t.size > 0 for t in line.transfers)
        sent = {"SEND_F": 0, "SEND_B": 0}
        for transfer in line.transfers:
            sent[transfer.action.kind.value] += 1
        assert sent == {"SEND_F": 16, "SEND_B": 16}  # two boundaries between the ranks
    begins = [take.start for take in takes]
    assert begins == sorted(begins)
    assert begins[0] == 0


def test_the_picture_has_the_plan_above_and_the_run_below(run):
    root = ElementTree.parse(run / "trace.svg").getroot()
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any(text.startswith("planned: 2 ranks · 4 stages") for text in texts)
    assert any(text.startswith("recorded: 2 ranks · 4 stages") for text in texts)
    bars = [element for element in root.iter() if "data-action" in element.attrib]
    assert len(bars) == 2 * 3 * 4 * 8


def test_show_draws_the_run_against_its_plan(run, tmp_path, capsys):
    trace, both = run / "trace.json", tmp_path / "both.json"
    arguments = ["--against", "zbv", "--trace", str(both), "--width", "100"]
    assert cli.main(["show", str(trace), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "planned: 2 ranks · 4 stages · 8 microbatches" in printed
    assert "recorded: 2 ranks · 4 stages · 8 microbatches" in printed
    labels = [(take.label, len(take.timeline.bars)) for take in read_trace(both)]
    assert labels == [("planned", 2), ("recorded", 2)]


def test_the_number_of_steps_is_checked():
    assert TrainOptions(trace=7).trace == 7
    with pytest.raises(OptionError, match=r"--trace \(-1\)"):
        TrainOptions(trace=-1)
