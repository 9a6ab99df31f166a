"""Adapters of PEFT, made before or after the split: trained as in the unsplit model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from torch import nn

from hfpp import PipelineConfigError
from tests.models import relative_error
from tests.ranks import run_ranks
from tests.runtime.real_pipelines import (
    MICROBATCHES,
    SEQ,
    TOLERANCE,
    batches,
    build,
    data_and_pipeline_mesh,
    loss,
    split,
    step,
    tiny_llama,
)

STEPS = 2
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]
FIRST_AND_LAST = ["embed_tokens", "lm_head"]


def lora(**changes: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return LoraConfig(**{**settings, **changes})


CONFIGS: dict[str, Callable[[], LoraConfig]] = {
    "causal": partial(lora, task_type="CAUSAL_LM"),
    "plain": lora,
    "saved": partial(lora, task_type="CAUSAL_LM", modules_to_save=FIRST_AND_LAST),
    "everywhere": partial(lora, target_modules=["q_proj", *FIRST_AND_LAST]),
    "dora": partial(lora, use_dora=True, task_type="CAUSAL_LM"),
    "rslora": partial(lora, use_rslora=True, target_modules="all-linear"),
    "one layer": partial(lora, layers_to_transform=[2]),
}


def draw(module: Any) -> Any:
    """Weights of the adapters by what they are called in the unsplit model; all others frozen."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            seed = sum(plain(name).encode())
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.data = values.to(torch.float64) / 5
    return module


def plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


def peft_model(which: str, model: Any) -> Any:
    return draw(get_peft_model(model, CONFIGS[which]()))


def injected(which: str, model: Any) -> Any:
    return draw(inject_adapter_in_model(CONFIGS[which](), model))


def added(which: str, model: Any) -> Any:
    """As transformers does it."""
    model.add_adapter(CONFIGS[which]())
    return draw(model)


def adapters_of(module: Any) -> dict[str, torch.Tensor]:
    return {plain(name): value for name, value in get_peft_model_state_dict(module).items()}


def train_unsplit(model: Any) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for ids in batches(STEPS):
        for rows in ids.chunk(MICROBATCHES):
            loss(model(rows).logits, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


Case = tuple[str, str, str, str]  # adapters made how, when, which, schedule


def trained(
    rank: int, world_size: int, cases: list[Case], fault: bool = False
) -> list[tuple[list[str], list[str]]]:
    """By case, what is wrong and the adapters' names; the fault scales the last stage's."""
    mesh = data_and_pipeline_mesh(world_size)
    results = []
    for how, when, which, schedule in cases:
        make = partial({"peft": peft_model, "inject": injected, "add": added}[how], which)
        expected = train_unsplit(make(tiny_llama()))
        later = {"parallelize_fn": lambda part, *_, m=make, **__: m(part)}
        pipeline = build(
            make(tiny_llama()) if when == "before" else tiny_llama(),
            mesh,
            schedule,
            **({} if when == "before" else later),
        )
        parts = pipeline.model_parts
        if fault and pipeline.has_last_stage:
            for module in parts[-1].modules():
                if isinstance(module, LoraLayer):
                    module.scaling["default"] *= 1.001
        trainable = [p for part in parts for p in part.parameters() if p.requires_grad]
        trainable = trainable or [nn.Parameter(torch.zeros(1))]  # all adapters on the other rank
        optimizer = torch.optim.AdamW(trainable, lr=1e-2)
        for ids in batches(STEPS):
            step(pipeline, mesh, ids)
            optimizer.step()
            optimizer.zero_grad()
        before, wanted = dict(tiny_llama().named_parameters()), adapters_of(expected)
        wrong, names = [], []
        for part in parts:
            for name, value in adapters_of(part).items():
                names.append(name)
                if relative_error(value, wanted[name]) > TOLERANCE:
                    wrong.append(f"{how} {when} {which} {schedule}: {name}")
            for name, parameter in part.named_parameters():
                same = before.get(plain(name).replace(".base_layer", ""))
                if not parameter.requires_grad and same is not None:
                    wrong += [] if torch.equal(parameter, same) else [f"{name} has changed"]
        results.append((wrong, names))
    return results


def check(cases: list[Case]) -> None:
    first, second = run_ranks(trained, 2, args=(cases,))
    for case, (wrong, names), (other_wrong, other_names) in zip(cases, first, second, strict=True):
        assert wrong + other_wrong == []
        how, _, which, _ = case
        make = {"peft": peft_model, "inject": injected, "add": added}[how]
        assert sorted(names + other_names) == sorted(adapters_of(make(which, tiny_llama())))


def test_adapters_made_before_the_split() -> None:
    check(
        [
            ("peft", "before", "causal", "1F1B"),
            ("peft", "before", "plain", "Interleaved1F1B"),
            ("peft", "before", "saved", "ZBVZeroBubble"),
            ("peft", "before", "everywhere", "InterleavedZeroBubble"),
            ("peft", "before", "dora", "DualPipeV"),
            ("peft", "before", "one layer", "GPipe"),
            ("add", "before", "causal", "LoopedBFS"),
        ]
    )


def test_adapters_made_after_the_split() -> None:
    check(
        [
            ("inject", "after", "rslora", "ZBVZeroBubble"),
            ("inject", "after", "plain", "1F1B"),
            ("peft", "after", "plain", "InterleavedZeroBubble"),
            ("peft", "after", "causal", "DualPipeV"),
        ]
    )


def test_a_scale_that_is_off_on_one_stage_is_seen() -> None:
    case = ("peft", "before", "causal", "1F1B")
    (_, _), (wrong, _) = (ranks[0] for ranks in run_ranks(trained, 2, args=([case], True)))
    assert any("layers.2.self_attn.q_proj.lora_B" in what for what in wrong)


def run_chain(stages: list[nn.Module], value: torch.Tensor) -> torch.Tensor:
    for stage in stages:
        value = stage(value)
    return value


def test_adapters_are_turned_off_as_in_the_unsplit_model() -> None:
    """What they replaced lives where they do, also what no forward used when it was split."""
    model = peft_model("saved", tiny_llama())
    stages, ids = split(model, 2), batches()[0]
    with torch.no_grad(), ExitStack() as contexts:
        for module in (model, *stages):
            contexts.enter_context(module.disable_adapter())
        assert relative_error(run_chain(stages, ids), model(ids).logits) < TOLERANCE
        assert relative_error(run_chain(stages, ids), tiny_llama()(ids).logits) < TOLERANCE


def test_adapters_are_loaded_into_parts() -> None:
    model = peft_model("saved", tiny_llama())
    stages = split(peft_model("saved", tiny_llama()), 2)
    saved = {name: value * 1.5 for name, value in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, copy.deepcopy(saved))
    for stage in stages:
        names = set(get_peft_model_state_dict(stage))
        set_peft_model_state_dict(stage, {n: v for n, v in saved.items() if n in names})
    ids = batches()[0]
    assert relative_error(run_chain(stages, ids), model(ids).logits) < TOLERANCE


def disagreeing(rank: int, world_size: int) -> str:
    """Settings that no shape shows."""
    model = get_peft_model(tiny_llama(), lora(lora_alpha=6 + rank))
    try:
        build(model, data_and_pipeline_mesh(world_size), "1F1B", seq_len=SEQ)
    except PipelineConfigError as error:
        return str(error)
    return ""


def test_ranks_with_other_adapter_settings_all_hear_of_it() -> None:
    assert all("adapters" in message for message in run_ranks(disagreeing, 2))
