"""What the report says: cuts, stages, notes, JSON and text."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from hfpp import CheckReport, PipelineConfigError, check_model
from hfpp.check.inputs import Kind
from hfpp.check.instance import check_instance
from hfpp.check.model_check import check_class
from tests.check.strangers import OneByOne, stranger
from tests.models import FAMILIES, PlainModel, config_of, tiny_model
from tests.runtime.test_split_model import Twice

LARGE = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 9000,
    "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def large() -> CheckReport:
    config = LlamaConfig(**LARGE, dtype=torch.bfloat16)
    report = check_model(config, pp_sizes=(2, 3), tokens=133)
    assert config.num_hidden_layers == 12
    return report


def test_a_config_is_checked_small_and_described_large(large: CheckReport) -> None:
    assert large.exact
    assert large.is_shrunk
    assert large.num_layers == 4
    assert large.tokens == 32
    assert large.layout == "model"
    two, three = large.sizes
    assert [cut.layer for cut in two.cuts] == [6]
    assert [cut.layer for cut in three.cuts] == [4, 8]
    (crossing,) = two.cuts[0].crossings
    assert (crossing.description, crossing.shape) == ("hidden state", (2, 133, 512))
    assert (crossing.dtype, crossing.num_bytes) == ("bfloat16", 2 * 133 * 512 * 2)
    first, last = two.stages
    assert (first.first_layer, first.num_layers) == (0, 6)
    assert last.copies == ("lm_head.weight",)
    assert "lm_head.weight" not in first.parameters
    layer = 2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024 + 2 * 512
    assert first.num_parameters == 6 * layer + 9000 * 512
    assert last.num_parameters == 6 * layer + 512
    assert first.num_bytes == 2 * first.num_parameters
    assert {kind.kind for kind in two.kinds} == set(Kind)


def test_the_report_as_json_and_text(large: CheckReport) -> None:
    values = json.loads(json.dumps(large.to_dict(), allow_nan=False))
    assert values["exact"] is True
    assert values["sizes"][1]["stages"][2]["parameters"][-1] == "model.norm.weight"
    text = str(large)
    for part in (
        "LlamaForCausalLM: exact",
        "3 stages: exact",
        "before layer 8 crosses: hidden state [2 x 133 x 512] bfloat16, 272 kB",
        "lm_head.weight (a copy)",
        "batches: plain, right-padded, left-padded, packed, long",
    ):
        assert part in text


def test_values_beside_the_hidden_state_have_names() -> None:
    report = check_instance(tiny_model("gemma3n_text"), pp_sizes=(2,), kinds=[Kind.LONG])
    assert report.exact, str(report)
    named = [crossing.description for crossing in report.sizes[0].cuts[0].crossings]
    assert named[0] == "hidden state"
    assert any("per_layer_input of layer" in name for name in named)
    plain = check_model(PlainModel(), pp_sizes=(2,)).sizes[0].cuts[0].crossings[1]
    assert (plain.description, plain.dtype) == ("memory of layer 2", "float32")


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "falcon"])
def test_families_are_exact_on_every_kind(family: str) -> None:
    report = check_class(type(tiny_model(family)), config_of(family))
    assert report.exact, str(report)
    assert [size.pp_size for size in report.sizes] == [2, 3, 4]
    assert (report.dtype == "float32") == (family == "mixtral")
    assert family in FAMILIES
    assert len(report.sizes[0].kinds) >= 4


def test_more_stages_than_layers_are_refused() -> None:
    report = check_model(PlainModel(depth=3), pp_sizes=(2, 5))
    assert [size.result for size in report.sizes] == ["exact", "refused"]
    assert report.result == "refused"
    assert "has 5 stages, but PlainModel has 3 layers" in report.sizes[1].reason


def test_a_model_that_cannot_be_cut_is_refused_for_every_size() -> None:
    report = check_model(Twice().double(), pp_sizes=(2, 3))
    assert [size.result for size in report.sizes] == ["refused", "refused"]
    assert "Twice cannot be split" in report.sizes[0].reason
    assert report.layers is None
    assert "2 stages: refused" in str(report)


class Broken(OneByOne):
    def forward(self, tokens: Tensor) -> Tensor:
        raise RuntimeError("no such luck")


def test_a_model_that_does_not_run_failed() -> None:
    report = check_model(Broken(), pp_sizes=(2,))
    assert report.result == "failed"
    assert report.unsplit_error is not None
    assert "the unsplit Broken does not run: RuntimeError: no such luck" in report.unsplit_error


class Chunked(OneByOne):
    def forward(self, tokens: Tensor) -> Any:
        return super().forward(tokens.unflatten(1, (-1, 8)).flatten(1))


def test_a_model_that_wants_round_lengths_gets_them() -> None:
    report = check_instance(Chunked(), pp_sizes=(2,))
    assert report.tokens == 24
    assert report.unsplit_error is None


class Noisy(OneByOne):
    def forward(self, tokens: Tensor) -> Any:
        return nn.functional.dropout(super().forward(tokens)[0], 0.5, self.training)


def test_a_model_that_draws_random_numbers_is_compared_in_eval_mode() -> None:
    report = check_model(Noisy(), pp_sizes=(2,))
    assert report.exact, str(report)
    assert "eval mode" in " ".join(report.notes)
    assert "eval mode" not in " ".join(check_model(OneByOne(), pp_sizes=(2,)).notes)


class Unused(OneByOne):
    """A layer's parameter that no output depends on, and one of nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)
        self.blocks[2].spare = nn.Linear(2, 2)


def test_parameters_that_nobody_uses_are_owned_once() -> None:
    report = check_model(Unused(), pp_sizes=(2,))
    assert report.exact, str(report)
    first, last = report.sizes[0].stages
    assert "spare.weight" in first.parameters
    assert "blocks.2.spare.weight" in last.parameters


class Idle(nn.Module):
    """Takes a second tensor that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor, idle: Tensor) -> Tensor:
        return self.linear(x) + 0 * len(idle)


class HandsOnToNobody(OneByOne):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Idle() for _ in range(4))
        self.idle = nn.Linear(12, 12)

    def forward(self, tokens: Tensor) -> Any:
        x = self.embed(tokens)
        idle = self.idle(x)
        for block in self.blocks:
            x = block(x, idle)
        return self.head(x)


def test_zeros_for_parameters_that_are_never_used_are_told() -> None:
    report = check_model(HandsOnToNobody(), pp_sizes=(2,))
    assert report.exact, str(report)
    assert report.sizes[0].zero_for_none == ("idle.weight", "idle.bias")
    assert "it uses them nowhere: idle.weight, idle.bias" in str(report)


def test_only_logits_are_compared_where_asked() -> None:
    report = check_instance(stranger("dict"), pp_sizes=(2,), gradients=False)
    (kind, *_) = report.sizes[0].kinds
    assert report.exact
    assert kind.logits_error == 0.0
    assert kind.gradient_error is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pp_sizes": ()}, r"pp_sizes \(\(\)\) must be positive numbers"),
        ({"pp_sizes": (2, 0)}, r"pp_sizes \(\(2, 0\)\) must be positive"),
        ({"tokens": 3}, r"tokens \(3\) must be a number of at least 8"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineConfigError, match=message):
        check_model(PlainModel(), **options)


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        bare, plain = tiny_model("llama"), PlainModel()
    assert check_model(bare, pp_sizes=(2,)).exact
    with pytest.raises(PipelineConfigError, match="PlainModel has parameters on the meta device"):
        check_model(plain, pp_sizes=(2,))
