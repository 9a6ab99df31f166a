"""Parameters counted from configs against transformers' own models on the meta device."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hfpp.check.shrink import tiny_config
from hfpp.errors import PipelineConfigError
from hfpp.plan.model.families import FAMILIES
from hfpp.plan.model.needs import NEEDS
from hfpp.plan.model.shape import ModelShape

# transformers itself makes no model of these classes' tiny configs here.
_UNBUILT = frozenset(
    (
        "Gemma3nForConditionalGeneration",  # wants timm
        "Gemma4AssistantForCausalLM",
        "Gemma4UnifiedAssistantForCausalLM",
    )
)
_EXACT_SHARE = 0.65  # of the classes; the others are refused


def _classes() -> list[tuple[Any, type[PreTrainedModel]]]:
    found: dict[type[PreTrainedModel], Any] = {}
    for config_class, model_classes in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        first = model_classes[0] if isinstance(model_classes, tuple) else model_classes
        if first.__name__ not in _UNBUILT:
            found.setdefault(first, config_class)
    return [(config_class, model_class) for model_class, config_class in found.items()]


def _bare(model_class: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = model_class._from_config(copy.deepcopy(config))
    return model


def _values(config: Any, *, diff: bool = False) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=diff))
    return values


def _count(parameters: Iterator[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _layer_counts(model: nn.Module, count: int) -> list[list[int]]:
    """Parameters by layer, of every list of as many modules; shared ones where they come first."""
    own: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own.setdefault(id(parameter), name)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return [
        [
            sum(
                parameter.numel()
                for inner, parameter in layer.named_parameters()
                if own[id(parameter)] == f"{name}.{index}.{inner}"
            )
            for index, layer in enumerate(module)
        ]
        for name, module in lists
    ]


def _decoder_count(model: nn.Module, shape: ModelShape) -> int:
    """Parameters, those of encoders left out of a composite model."""
    if not shape.not_counted:
        return _count(model.parameters())
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "language_model" in name or name.startswith("lm_head")
    )


def test_every_causal_class_is_counted_exactly_or_refused() -> None:
    exact, refused, wrong = [], [], []
    for config_class, model_class in _classes():
        config = tiny_config(config_class, model_class)
        try:
            shape = ModelShape.from_config(_values(config))
        except PipelineConfigError:
            refused.append(model_class.__name__)
            continue
        model = _bare(model_class, config)
        layers = [layer.parameters for layer in shape.layers]
        counts = _layer_counts(model, len(layers))
        if shape.parameters == _decoder_count(model, shape) and layers in counts:
            exact.append(model_class.__name__)
        else:
            wrong.append((model_class.__name__, shape.parameters, layers, counts))
        # Files leave out what equals the defaults.
        saved = ModelShape.from_config(_values(config, diff=True))
        assert saved.parameters == shape.parameters, model_class.__name__
    assert not wrong
    share = len(exact) / (len(exact) + len(refused))
    assert share >= _EXACT_SHARE, f"{len(exact)} exact, refused: {refused}"


_VARIED = {
    "llama": [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 24}],
    "qwen2": [{"tie_word_embeddings": True}, {"num_key_value_heads": 1}],
    "qwen3_moe": [{"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}, {"num_local_experts": 3}],
    "gpt2": [{"n_inner": 24}, {"tie_word_embeddings": False}, {"n_positions": 33}],
    "falcon": [
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"parallel_attn": False, "bias": True},
        {"multi_query": False, "alibi": True},
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ],
    "deepseek_v3": [{"q_lora_rank": None}, {"first_k_dense_replace": 3}, {"attention_bias": True}],
    "jamba": [
        {"attn_layer_period": 2, "attn_layer_offset": 1},
        {"expert_layer_period": 3},
        {"num_experts": 1},
    ],
    "mamba2": [{"n_groups": 4}, {"use_bias": True}, {"use_conv_bias": False}],
    "zamba2": [{"adapter_rank": 5}, {"num_mem_blocks": 2}],
    "phi": [{"qk_layernorm": True}],
    "cohere": [{"use_qk_norm": True}],
    "gpt_bigcode": [{"multi_query": False}],
    "lfm2": [{"conv_bias": True}, {"block_auto_adjust_ff_dim": False}],
    "qwen3_next": [{"attention_bias": True}, {"linear_num_value_heads": 16}],
    "gpt_oss": [{"attention_bias": False}],
    "opt": [{"do_layer_norm_before": False}, {"enable_bias": False}],
    "granitemoehybrid": [{"shared_intermediate_size": 24}, {"num_local_experts": 3}],
}


@pytest.mark.parametrize("model_type", _VARIED)
def test_what_a_config_changes_is_counted(model_type: str) -> None:
    model_class: Any
    config_class = CONFIG_MAPPING[model_type]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    base = tiny_config(config_class, model_class)
    unchanged = ModelShape.from_config(_values(base)).parameters
    for change in _VARIED[model_type]:
        values = {**_values(base), **change}
        values.pop("time_step_limit", None)  # infinity, as JSON has it
        config = type(base).from_dict(copy.deepcopy(values))
        shape = ModelShape.from_config(_values(config))
        assert shape.parameters == _count(_bare(model_class, config).parameters()), change
        assert shape.parameters != unchanged, change


def test_an_absent_key_is_the_class_s_default_or_an_error() -> None:
    """Counted on defaults: a config that lacks a key is the same config."""
    counted = 0
    for config_class, _ in _classes():
        try:
            values = _values(config_class())
            shape = ModelShape.from_config(values)
        except Exception:  # no defaults, or none that are counted: the sweep above says which
            continue
        if not shape.is_known or shape.not_counted:
            continue
        for key in values:
            if key == "model_type":
                continue
            fewer = {name: value for name, value in values.items() if name != key}
            try:
                found = ModelShape.from_config(fewer).parameters
            except PipelineConfigError:
                continue
            assert found == shape.parameters, (shape.model_type, key)
            counted += 1
    assert counted > 2000


def test_keys_are_asked_of_known_types_only() -> None:
    assert NEEDS.keys() <= FAMILIES.keys()
