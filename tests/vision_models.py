"""Tiny random vision-language models of many families, with pixels for them.

Images per sample may differ where the family packs the images of a batch one after another; where
it keeps a row per sample, samples with fewer images have rows of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

VOCAB = 96
SEQ = 32
IMAGE, VIDEO = 90, 91  # token ids
SIDE = 8  # pixels

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 4,
}
_MROPE = {
    "rope_type": "default",
    "type": "default",
    "mrope_section": [1, 1, 2],
    "rope_theta": 1e4,
}
_QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 92,
         "vision_end_token_id": 93}  # fmt: skip
_QWEN_TEXT = {**_TEXT, "rope_parameters": _MROPE, "rope_scaling": _MROPE}

Media = Callable[[Sequence[int], torch.Generator], tuple[list[int], dict[str, Tensor]]]
"""Images per sample -> image tokens of every image in order, and keyword arguments."""


def _pixels(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _packed(tokens: int) -> Media:
    """``pixel_values`` [images, channels, height, width]."""

    def make(counts: Sequence[int], generator: torch.Generator) -> Any:
        pixels = _pixels((sum(counts), 3, SIDE, SIDE), generator)
        return [tokens] * sum(counts), {"pixel_values": pixels}

    return make


def _rows(tokens: int) -> Media:
    """``pixel_values`` [batch, most images of a sample, channels, height, width]."""

    def make(counts: Sequence[int], generator: torch.Generator) -> Any:
        pixels = _pixels((len(counts), max(counts), 3, SIDE, SIDE), generator)
        for sample, count in enumerate(counts):
            pixels[sample, count:] = 0
        return [tokens] * sum(counts), {"pixel_values": pixels}

    return make


def _sized(counts: Sequence[int], generator: torch.Generator) -> Any:
    """Images of several sizes, padded to the largest, with ``image_sizes``."""
    number = sum(counts)
    sizes = torch.tensor([[8, 8] if i % 3 else [8, 16] for i in range(number)])
    pixels = _pixels((number, 3, 8, int(sizes[:, 1].max())), generator)
    for index, (_, width) in enumerate(sizes.tolist()):
        pixels[index, :, :, width:] = 0
    tokens = [(h // 4) * (w // 4) for h, w in sizes.tolist()]
    return tokens, {"pixel_values": pixels, "image_sizes": sizes}


def _any_resolution(counts: Sequence[int], generator: torch.Generator) -> Any:
    """Every image is a base patch and the patches of its own resolution."""
    number = sum(counts)
    sizes = torch.tensor([[8, 16] if i % 2 else [8, 8] for i in range(number)])
    pixels = _pixels((number, 3, 3, SIDE, SIDE), generator)
    tokens = [4 + 2 * (w // 4) + 2 for _, w in sizes.tolist()]
    for index, (_, width) in enumerate(sizes.tolist()):
        pixels[index, 1 + width // 8 :] = 0
    return tokens, {"pixel_values": pixels, "image_sizes": sizes}


def _grids(merge: int, patch: int) -> Media:
    """``pixel_values`` [patches, values] with ``image_grid_thw`` [images, 3]."""

    def make(counts: Sequence[int], generator: torch.Generator) -> Any:
        choices = [[1, 2, 2], [1, 2, 4], [1, 4, 2]]
        grids = torch.tensor([choices[i % 3] for i in range(sum(counts))])
        pixels = _pixels((int(grids.prod(-1).sum()), 3 * 2 * patch * patch), generator)
        tokens = (grids.prod(-1) // merge**2).tolist()
        return tokens, {"pixel_values": pixels, "image_grid_thw": grids}

    return make


def _tiles(counts: Sequence[int], generator: torch.Generator) -> Any:
    """``pixel_values`` [batch, images, tiles, channels, height, width], one token per image."""
    most, batch = max(counts), len(counts)
    pixels = _pixels((batch, most, 2, 3, SIDE, SIDE), generator)
    ratios = torch.ones(batch, most, dtype=torch.int64)
    mask = torch.ones(batch, most, 2, dtype=torch.int64)
    cross = torch.zeros(batch, SEQ, most, 2, dtype=torch.int64)
    for sample, count in enumerate(counts):
        pixels[sample, count:], mask[sample, count:], ratios[sample, count:] = 0, 0, 0
        mask[sample, count:, 0] = 1
        cross[sample, 2:, :count, 0] = 1
    kwargs = {"pixel_values": pixels, "aspect_ratio_ids": ratios, "aspect_ratio_mask": mask,
              "cross_attention_mask": cross}  # fmt: skip
    return [1] * sum(counts), kwargs


@dataclass(frozen=True)
class Family:
    """Config and media of one family; ``marks``: names of [batch, seq] image-token marks."""

    config: dict[str, Any]
    media: Media
    marks: tuple[str, ...] = ()
    counts: tuple[int, ...] = (2, 1, 0, 1)  # images per sample
    dtype: torch.dtype = torch.float64
    text_type: str | None = None
    vision_type: str | None = None
    text: dict[str, Any] = field(default_factory=lambda: _TEXT)
    vision: dict[str, Any] = field(default_factory=lambda: _VISION)


_SIGLIP = {**_VISION, "vision_use_head": False}
_GEMMA = {
    **_TEXT,
    "num_hidden_layers": 6,
    "sliding_window": 8,
    "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
_IDEFICS = {"image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": 0}
_QWEN2_VISION = {"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
                 "hidden_size": 32}  # fmt: skip
_QWEN25_VISION = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24,
                  "patch_size": 4, "out_hidden_size": 32, "window_size": 16,
                  "fullatt_block_indexes": [1]}  # fmt: skip
_QWEN3_VISION = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24,
                 "patch_size": 4, "out_hidden_size": 32, "num_position_embeddings": 16,
                 "deepstack_visual_indexes": [0, 1]}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llava": Family(
        {"image_token_index": IMAGE, "image_seq_length": 4, "vision_feature_layer": -2},
        _packed(4),
        text_type="llama",
        vision_type="clip_vision_model",
    ),
    "gemma3": Family(
        {"image_token_id": IMAGE, "mm_tokens_per_image": 4},
        _packed(4),
        ("token_type_ids",),
        text_type="gemma3_text",
        vision_type="siglip_vision_model",
        text=_GEMMA,
        vision=_SIGLIP,
    ),
    "paligemma": Family(
        {"image_token_index": IMAGE, "projection_dim": 32, "hidden_size": 32, "vocab_size": VOCAB},
        _packed(4),
        ("token_type_ids",),
        counts=(2, 1, 1, 3),
        text_type="gemma",
        vision_type="siglip_vision_model",
        vision={**_SIGLIP, "projection_dim": 32},
    ),
    "qwen2_vl": Family(
        _QWEN, _grids(2, 4), ("mm_token_type_ids",), text=_QWEN_TEXT, vision=_QWEN2_VISION
    ),
    "qwen2_5_vl": Family(
        _QWEN, _grids(2, 4), ("mm_token_type_ids",), text=_QWEN_TEXT, vision=_QWEN25_VISION
    ),
    "qwen3_vl": Family(
        _QWEN, _grids(2, 4), ("mm_token_type_ids",), text=_QWEN_TEXT, vision=_QWEN3_VISION
    ),
    "llava_onevision": Family(
        {
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "image_grid_pinpoints": [[8, 8], [8, 16]],
            "vision_feature_layer": -1,
        },
        _any_resolution,
        text_type="qwen2",
        vision_type="siglip_vision_model",
        vision=_SIGLIP,
    ),
    "mistral3": Family(
        {"image_token_index": IMAGE, "spatial_merge_size": 2, "vision_feature_layer": -1},
        _sized,
        text_type="mistral",
        vision_type="pixtral",
        vision={**_VISION, "image_size": 16, "patch_size": 2, "head_dim": 8},
    ),
    "internvl": Family(
        {"image_token_id": IMAGE, "image_seq_length": 4},
        _packed(4),
        text_type="qwen2",
        vision_type="internvl_vision",
        vision={**_VISION, "image_size": [SIDE, SIDE], "patch_size": [2, 2]},
    ),
    "idefics3": Family(
        _IDEFICS,
        _rows(4),
        text_type="llama",
        vision_type="idefics3_vision",
        vision={**_VISION, "patch_size": 2},
    ),
    "smolvlm": Family(
        _IDEFICS,
        _rows(4),
        text_type="llama",
        vision_type="smolvlm_vision",
        vision={**_VISION, "patch_size": 2},
    ),
    "llama4": Family(
        {"image_token_index": IMAGE, "boi_token_index": 92, "eoi_token_index": 93},
        _packed(4),
        text_type="llama4_text",
        vision_type="llama4_vision_model",
        text={
            **_TEXT,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "attention_chunk_size": 8,
            "moe_layers": [1, 3],
        },
        vision={
            **_VISION,
            "patch_size": 2,
            "intermediate_size": 64,
            "vision_output_dim": 24,
            "projector_input_dim": 24,
            "projector_output_dim": 24,
        },
    ),
    "mllama": Family(
        {"image_token_index": IMAGE},
        _tiles,
        counts=(2, 1, 2, 1),
        text_type="mllama_text_model",
        vision_type="mllama_vision_model",
        text={**_TEXT, "num_hidden_layers": 6, "cross_attention_layers": [1, 4]},
        vision={
            **_VISION,
            "attention_heads": 2,
            "num_global_layers": 1,
            "max_num_tiles": 2,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
    ),
}
"""By model type."""


def tiny_vision_model(name: str, *, seed: int = 0, **text: Any) -> PreTrainedModel:
    """A random model of a family; every parameter differs from its neutral value."""
    family = FAMILIES[name]
    text = {**family.text, **text}
    vision = dict(family.vision)
    if family.text_type:
        text["model_type"] = family.text_type
    if family.vision_type:
        vision["model_type"] = family.vision_type
    config = AutoConfig.for_model(
        name,
        **family.config,
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)
    model = model.to(family.dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            # norms at 1, biases and gates at 0 would hide that one is gone
            if parameter.dim() <= 1 or bool((parameter == 0).all()):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def vision_batch(
    name: str, counts: Sequence[int] | None = None, *, seed: int = 0, left_padded: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Token ids int64 [batch, SEQ] with image tokens in their places, and keyword arguments."""
    family = FAMILIES[name]
    counts = family.counts if counts is None else counts
    generator = torch.Generator().manual_seed(seed)
    tokens, kwargs = family.media(counts, generator)
    kwargs = {k: v.to(family.dtype) if v.is_floating_point() else v for k, v in kwargs.items()}
    ids = torch.randint(3, 80, (len(counts), SEQ), generator=generator)
    lengths = iter(tokens)
    for sample, count in enumerate(counts):
        position = 4 if left_padded else 1
        for _ in range(count):
            length = next(lengths)
            ids[sample, position : position + length] = IMAGE
            position += length + 1
        assert position <= SEQ, "too many image tokens"
    for mark in family.marks:
        kwargs[mark] = (ids == IMAGE).long()
    if left_padded:
        mask = torch.ones_like(ids)
        mask[::2, :3] = 0
        kwargs["attention_mask"] = mask
    return ids, kwargs


def microbatch(
    name: str, counts: Sequence[int], ids: Tensor, kwargs: dict[str, Tensor], rows: slice
) -> tuple[Tensor, dict[str, Tensor]]:
    """The rows of a batch and their media, cut by hand from what the family's batch is made of."""
    before, number = sum(counts[: rows.start]), sum(counts[rows])
    images = slice(before, before + number)
    mine: dict[str, Tensor] = {}
    grids = kwargs.get("image_grid_thw")
    by_row = kwargs["pixel_values"].dim() >= 5 and "image_sizes" not in kwargs
    for key, value in kwargs.items():
        if by_row or key in (*FAMILIES[name].marks, "attention_mask"):
            mine[key] = value[rows]
        elif number == 0:
            continue
        elif grids is not None and key == "pixel_values":
            ends = [0, *grids.prod(-1).cumsum(0).tolist()]
            mine[key] = value[ends[images.start] : ends[images.stop]]
        else:
            mine[key] = value[images]
    return ids[rows], mine


def unsplit_loss(model: nn.Module, ids: Tensor, kwargs: dict[str, Tensor]) -> Tensor:
    """The mean next-token loss of one microbatch."""
    return token_loss(model(ids, **kwargs, use_cache=False).logits, ids)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over a microbatch, written without hfpp."""
    logits, labels = logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
    return nn.functional.cross_entropy(logits, labels)
