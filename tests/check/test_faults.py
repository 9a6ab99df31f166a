"""Faults planted into one stage are found, and found at their place; without one all is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hfpp.check.chain import build_stage
from hfpp.check.inputs import Kind
from hfpp.check.instance import check_instance
from hfpp.check.report import CheckReport
from hfpp.runtime.anatomy import Anatomy
from hfpp.runtime.ownership import Ownership
from tests.models import tiny_model

Plant = Callable[[nn.Module, nn.Module], None]
"""Spoils a stage; the model is the copy it was made from."""


def check(family: str, plant: Plant | None, stage: int, **options: Any) -> CheckReport:
    def build(model: nn.Module, anatomy: Anatomy, ownership: Ownership, index: int) -> nn.Module:
        made = build_stage(model, anatomy, ownership, index)
        if plant is not None and index == stage:
            plant(made, model)
        return made

    settings = {"pp_sizes": (2,), "kinds": [Kind.PLAIN], **options}
    return check_instance(tiny_model(family), build=build, **settings)


def own(stage: Any, index: int) -> Any:
    return stage.model.layers[index]


@torch.no_grad()
def off_weight(stage: nn.Module, _: nn.Module) -> None:
    own(stage, 3).self_attn.q_proj.weight.mul_(1.001)


@torch.no_grad()
def off_norm(stage: nn.Module, _: nn.Module) -> None:
    stage.get_parameter("model.norm.weight")[5] *= 1.001


def wrong_window(stage: nn.Module, _: nn.Module) -> None:
    stage.get_submodule("model").config.sliding_window = 4


def dropped_residual_multiplier(stage: nn.Module, _: nn.Module) -> None:
    own(stage, 2).residual_multiplier = 1.0


def dropped_logit_scale(stage: Any, _: nn.Module) -> None:
    stage.config.logits_scaling = 1.0


def dropped_embedding_multiplier(stage: Any, _: nn.Module) -> None:
    stage.model.embedding_multiplier = 1.0


def swapped_layers(stage: Any, _: nn.Module) -> None:
    layers = stage.model.layers
    layers[2], layers[3] = layers[3], layers[2]


def stale_input(stage: nn.Module, _: nn.Module) -> None:
    """The first microbatch's hidden state for all of them."""
    kept: list[Any] = []

    def replace(_module: nn.Module, args: Any) -> Any:
        kept.append(args)
        return kept[0]

    stage.register_forward_pre_hook(replace)


def lost_parameter(stage: nn.Module, _: nn.Module) -> None:
    """The value is right, but nothing trains it."""
    linear = own(stage, 2).mlp.up_proj
    value = linear.weight.detach().clone()
    del linear.weight
    linear.weight = value


def renamed_parameter(stage: nn.Module, _: nn.Module) -> None:
    own(stage, 2).extra = nn.Linear(1, 1, dtype=torch.float64)


def renamed_buffer(stage: nn.Module, _: nn.Module) -> None:
    """A buffer under a name that the model has not; nothing reads it."""
    own(stage, 3).register_buffer("seen", torch.zeros(()))


def leak(stage: nn.Module, model: Any) -> None:
    """A weight of a later stage, used through a side door, so little that no rounding shows it."""
    weight = model.model.layers[3].mlp.up_proj.weight
    own(stage, 1).register_forward_hook(lambda _m, _a, out: out + 1e-30 * weight.sum())


def wrong_gradient(stage: nn.Module, _: nn.Module) -> None:
    """Right results, and a way back that is off by 0.1 %."""

    def spoil(_module: nn.Module, _args: Any, out: torch.Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * 1.001)

    own(stage, 1).register_forward_hook(spoil)


def cut_gradient(stage: nn.Module, _: nn.Module) -> None:
    own(stage, 0).self_attn.register_forward_hook(lambda _m, _a, out: (out[0].detach(), out[1]))


FAULTS: dict[Plant, tuple[str, int, str, str]] = {
    # family, stage, in the reason, the first difference
    off_weight: (
        "llama", 1, "layers.3.self_attn.q_proj.weight on stage 1 is not the model's: off by",
        "the result of layer 3 (model.layers.3, stage 1)",
    ),
    off_norm: ("llama", 1, "model.norm.weight", "the output, after layers"),
    wrong_window: (
        "mistral", 1, "logits are off",
        "layer 2 (model.layers.2, stage 1) takes another attention_mask",
    ),
    dropped_residual_multiplier: ("granite", 1, "logits are off", "the result of layer 2"),
    dropped_logit_scale: ("granite", 1, "logits are off", "the output, after layers"),
    dropped_embedding_multiplier: (
        "granite", 0, "logits are off",
        "layer 0 (model.layers.0, stage 0) takes another hidden_states",
    ),
    swapped_layers: (
        "llama", 1, "is not the model's", "layer 2 (model.layers.2, stage 1)",
    ),
    stale_input: (
        "llama", 1, "logits are off",
        "layer 2 (model.layers.2, stage 1) takes another hidden_states",
    ),
    lost_parameter: (
        "llama", 1, "model.layers.2.mlp.up_proj.weight is on no stage",
        "the gradient of model.layers.2.mlp.up_proj.weight",
    ),
    renamed_parameter: ("llama", 1, "stage 1 has model.layers.2.extra.weight, which", ""),
    renamed_buffer: ("llama", 1, "the buffer model.layers.3.seen is of no part of the model", ""),
    leak: ("llama", 0, "logits are off by inf", "the result of layer 1 (model.layers.1, stage 0)"),
    wrong_gradient: ("llama", 0, "gradients are wrong", "the gradient of model.layers.1."),
    cut_gradient: ("llama", 0, "gradients are wrong", "the gradient of model.layers.0.self_attn"),
}  # fmt: skip


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found_at_its_place(plant: Plant) -> None:
    family, stage, reason, where = FAULTS[plant]
    report = check(family, plant, stage)
    (size,) = report.sizes
    assert report.result == "different"
    assert reason in size.reason
    if where:
        assert size.first_difference is not None
        assert where in size.first_difference
    else:  # it changes no number
        assert size.first_difference is None


@pytest.mark.parametrize("family", sorted({family for family, *_ in FAULTS.values()}))
def test_without_a_fault_all_is_exact(family: str) -> None:
    report = check(family, None, 0)
    assert report.exact, str(report)
    assert report.dtype == "float64"


def test_a_fault_in_float32_is_found_too() -> None:
    def off(stage: Any, _: nn.Module) -> None:
        with torch.no_grad():
            stage.model.layers[2].mlp.gate.weight.mul_(1.001)

    report = check("mixtral", off, 1)
    assert (report.dtype, report.result) == ("float32", "different")
    assert check("mixtral", None, 1).exact


def test_a_fault_that_only_padding_shows_is_found() -> None:
    def blind(stage: nn.Module, _: nn.Module) -> None:
        def drop(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            return args, {k: v for k, v in kwargs.items() if k != "attention_mask"}

        stage.register_forward_pre_hook(drop, with_kwargs=True)

    kinds = [Kind.PLAIN, Kind.RIGHT_PADDED, Kind.LEFT_PADDED]
    (size,) = check("llama", blind, 1, kinds=kinds).sizes
    assert [kind.result for kind in size.kinds] == ["exact", "different", "different"]
    assert size.reason.startswith("right-padded: logits are off")
