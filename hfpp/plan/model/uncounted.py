"""Model types that are refused, for their configs do not tell what their layers hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hfpp.plan.model.families import FAMILIES

if TYPE_CHECKING:
    from hfpp.plan.model.config import ModelConfig
    from hfpp.plan.model.family import Family

__all__ = ["UNCOUNTED", "family_of"]

_ENCODER = "an encoder's layers"
_DECODER = "the decoder of an encoder-decoder"

UNCOUNTED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "albert",
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "git",
            "megatron-bert",
            "modernbert-decoder",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        ),
        _ENCODER,
    ),
    **dict.fromkeys(
        (
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "moshi",
            "musicgen",
            "musicgen_decoder",
            "musicgen_melody",
            "musicgen_melody_decoder",
            "mvp",
            "pegasus",
            "plbart",
            "prophetnet",
            "t5",
            "trocr",
            "whisper",
        ),
        _DECODER,
    ),
    "axk2": "gated norms",
    "blt": "several stacks",
    "cpmant": "segments and relative positions",
    "deepseek_v4": "compressed attention and hyper-connections",
    "dots3_note": "compressed attention that differs by layer",
    "dots3_note_text": "compressed attention that differs by layer",
    "fuyu": "images that its decoder embeds itself",
    "gemma3n": "alternating updates",
    "gemma3n_text": "alternating updates",
    "hrm_text": "two stacks that run again and again",
    "hy_v4": "hyper-connections",
    "inkling": "relative attention",
    "inkling_text": "relative attention",
    "inkling2": "relative attention",
    "inkling2_text": "relative attention",
    "jetmoe": "experts in attention",
    "longcat_flash": "two attentions a layer",
    "mimo_v2_flash": "heads that differ by layer",
    "mllama": "cross-attention layers",
    "mllama_text_model": "cross-attention layers",
    "phi4_multimodal": "adapters and encoders inside the embedding",
    "qwen4_exp": "hyper-connections",
    "qwen4_exp_text": "hyper-connections",
    "reformer": "reversible layers",
    "rwkv": "time mixing",
    "xlm": "lists of parts instead of layers",
    "xlnet": "relative attention",
    "xlstm": "matrix memories",
    "zaya": "convolved attention",
}
"""Model types that the keys do not tell enough of, with what is missing."""


_STRANGE = re.compile(
    r"^hc_|hyper_connection|altup|laurel|per_layer|cross_attention|encoder_|type_vocab|ngram"
    r"|gated_norm|zero_expert|adapter_rank|compress|mem_blocks|_lru|altern"
)


def family_of(config: ModelConfig) -> Family | None:
    """The family of a config; None where its model_type is not known.

    Raises:
        PipelineConfigError: its keys do not tell enough.
    """
    if config.model_type in UNCOUNTED:
        config.fail(
            "model_type",
            f"is {config.model_type!r}, of which a config does not tell all parameters "
            f"({UNCOUNTED[config.model_type]}): let hfpp profile measure what it costs",
        )
    family = FAMILIES.get(config.model_type)
    if family is None:
        for key, value in config.values.items():
            if isinstance(key, str) and value and _STRANGE.search(key):
                config.fail(
                    key,
                    f"is set, and what it means for the model type {config.model_type!r} is not "
                    "known: let hfpp profile measure what it costs",
                )
    return family
