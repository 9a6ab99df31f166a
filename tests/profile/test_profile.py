"""Measured costs: of every part, by kind, without a trace in the model; and the command's file."""

import copy

import pytest
import torch
from transformers import LlamaConfig

from hfpp import PipelineConfigError, cli
from hfpp.plan.costs_file import read_costs
from hfpp.profile.measure import profile_model
from tests.models import tiny_model
from tests.sleeping_model import SleepingModel

SLEEP = 0.03


def test_times_are_those_of_the_parts():
    model = SleepingModel([3 * SLEEP, 6 * SLEEP, 3 * SLEEP], 9 * SLEEP)
    costs = profile_model(model, microbatch_size=2, seq_len=4, repeats=2)
    assert costs.source == "measured"
    assert costs.layers[0] is costs.layers[2]  # the same kind, timed once
    for unit, times in zip((*costs.layers[:2], costs.head), (1, 2, 3), strict=True):
        assert times * SLEEP <= unit.forward < 2 * times * SLEEP
        assert 2 * times * SLEEP <= unit.backward_input < 4 * times * SLEEP
        assert unit.backward_weight < times * SLEEP
    assert costs.embedding.seconds < SLEEP
    assert costs.boundary_bytes == 2 * 4 * 8 * 4


def test_bytes_and_parameters():
    model = SleepingModel([0.0, 0.0], 0.0)
    costs = profile_model(model, microbatch_size=2, seq_len=4, repeats=1)
    layer = sum(p.numel() for p in model.layers[0].parameters())
    assert [unit.parameters for unit in costs.layers] == [layer, layer]
    assert costs.embedding.parameters == model.embedding.weight.numel()
    assert costs.head.parameters == layer + sum(p.numel() for p in model.head.parameters())
    # the linear layer keeps its input, [2, 4, 8] in float32, and nothing else
    assert costs.layers[0].activation_bytes == 2 * 4 * 8 * 4
    double = profile_model(model, microbatch_size=4, seq_len=4, repeats=1)
    assert double.layers[0].activation_bytes == 2 * costs.layers[0].activation_bytes


def test_gradients_are_added_up_apart_from_those_that_the_model_has():
    model = SleepingModel([0.0, 0.0], 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    own = [parameter.grad for parameter in model.parameters()]
    weight, places = model.head.weight, []
    weight.register_post_accumulate_grad_hook(lambda p: places.append(p.grad.data_ptr()))
    profile_model(model, microbatch_size=2, seq_len=4, repeats=2)
    assert len(places) >= 4  # two runs to warm up
    assert len(set(places)) == 1  # added to what was there
    assert places[0] != weight.grad.data_ptr()
    for parameter, gradient in zip(model.parameters(), own, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, torch.ones_like(gradient))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2", "gpt2"])
def test_models_of_transformers(name):
    model = tiny_model(name)
    before = copy.deepcopy(model.state_dict())
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    model.eval()
    costs = profile_model(model, microbatch_size=2, seq_len=13, repeats=1)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    units = (*costs.layers, costs.head)
    assert all(unit.forward > 0 and unit.backward_input > 0 for unit in units)
    assert all(unit.activation_bytes > 0 and unit.parameters > 0 for unit in units)
    assert costs.embedding.forward > 0
    total = sum(unit.parameters for unit in (costs.embedding, *units))
    own = sum(p.numel() for p in model.parameters())
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert total == own + (model.lm_head.weight.numel() if tied else 0)


def test_windows_are_kinds_of_their_own():
    costs = profile_model(tiny_model("gemma2"), microbatch_size=1, seq_len=13, repeats=1)
    assert len({id(unit) for unit in costs.layers}) == 2
    costs = profile_model(tiny_model("llama"), microbatch_size=1, seq_len=13, repeats=1)
    assert len({id(unit) for unit in costs.layers}) == 1


def test_the_command_writes_what_training_reads(tmp_path, capsys):
    folder, file = tmp_path / "model", tmp_path / "costs.json"
    LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
    ).save_pretrained(folder)
    options = ["--seq-len", "16", "--repeats", "1", "--device", "cpu", "--out", str(file)]
    assert cli.main(["profile", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    assert "head and loss" in printed
    assert str(file) in printed
    costs = read_costs(file)
    assert len(costs.layers) == 3
    assert costs.source == "measured"


def test_errors(tmp_path, capsys):
    model = SleepingModel([0.0, 0.0], 0.0)
    for name in ("microbatch_size", "seq_len", "repeats"):
        sizes = {"microbatch_size": 1, "seq_len": 1, "repeats": 1, name: 0}
        with pytest.raises(PipelineConfigError, match=rf"{name} \(0\) must be at least 1"):
            profile_model(model, **sizes)
    assert cli.main(["profile", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
    LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path)
    assert cli.main(["profile", str(tmp_path), "--device", "abacus"]) == 2
    assert "--device (abacus) cannot be used" in capsys.readouterr().err
    for option in ("--microbatch-size", "--seq-len", "--repeats"):
        assert cli.main(["profile", str(tmp_path), option, "0"]) == 2
        assert f"error: {option} (0) must be at least 1" in capsys.readouterr().err
    large = ["--device", "cpu", "--seq-len", "1000000000000000"]
    assert cli.main(["profile", str(tmp_path), *large]) == 2
    assert "--seq-len (1000000000000000) needs more memory" in capsys.readouterr().err
