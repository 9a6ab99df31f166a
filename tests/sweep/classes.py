"""Which model classes the sweep runs, and their tiny configurations."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

CAUSAL, IMAGE_TEXT = "causal language models", "image-text-to-text models"
_MAPPINGS = {CAUSAL: MODEL_FOR_CAUSAL_LM_MAPPING, IMAGE_TEXT: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}


@dataclass(frozen=True, slots=True)
class Entry:
    """A class of one of transformers' mappings, with the configuration class it is listed under."""

    mapping: str
    model_class: type
    config_class: type

    @property
    def name(self) -> str:
        """The class's name."""
        return self.model_class.__name__


def all_entries() -> list[Entry]:
    """Every distinct class of the mappings, once, by name; causal language models first."""
    found: dict[type, Entry] = {}
    for mapping, classes in _MAPPINGS.items():
        for config_class, model_classes in classes.items():
            if not isinstance(model_classes, tuple):
                model_classes = (model_classes,)
            for model_class in model_classes:
                found.setdefault(model_class, Entry(mapping, model_class, config_class))
    return sorted(found.values(), key=lambda e: (list(_MAPPINGS).index(e.mapping), e.name))


# What is special about a family is in its structure; these have the most of it.
_HARD = frozenset(
    (
        "BloomForCausalLM",
        "CpmAntForCausalLM",
        "DeepseekV4ForCausalLM",
        "FalconH1ForCausalLM",
        "Gemma3nForCausalLM",
        "Gemma4ForCausalLM",
        "GlmMoeDsaForCausalLM",
        "GraniteForCausalLM",
        "HrmTextForCausalLM",
        "Inkling2ForCausalLM",
        "MllamaForCausalLM",
        "ReformerModelWithLMHead",
        "RwkvForCausalLM",
        "XLMWithLMHeadModel",
        "XLNetLMHeadModel",
        "Zamba2ForCausalLM",
        "ZambaForCausalLM",
        "ZayaForCausalLM",
    )
)


def representative_entries() -> list[Entry]:
    """A third of the classes: the hard ones, and of the rest enough, evenly over the alphabet."""
    entries = all_entries()
    hard = [e for e in entries if e.name in _HARD]
    rest = [e for e in entries if e.name not in _HARD]
    wanted = -(-len(entries) // 3) - len(hard)
    step = len(rest) / wanted
    return hard + [rest[int(index * step)] for index in range(wanted)]


def with_other_multipliers(config: Any) -> Any | None:
    """A copy whose multipliers, logit scales and soft-caps matter; None where there are none.

    Their defaults are often 1, or so large that a tiny model never reaches them.
    """
    config = copy.deepcopy(config)
    changed = False
    text = config.get_text_config(decoder=True)
    for name, value in list(text.to_dict().items()):
        new = _other_value(name, value)
        if new is not None:
            setattr(text, name, new)
            changed = True
    return config if changed else None


def _other_value(name: str, value: Any) -> Any:
    if "softcap" in name or "soft_cap" in name:
        return 1.5 if isinstance(value, float | int) and value else None
    if not any(part in name for part in ("multiplier", "logit_scale", "logits_scaling", "scale_")):
        return None
    if isinstance(value, list) and value and all(isinstance(item, float) for item in value):
        return [1.3 * item for item in value]
    return 1.3 * value if isinstance(value, float) and value else None
