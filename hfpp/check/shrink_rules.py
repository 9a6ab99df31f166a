"""Relations between a config's sizes that their names alone do not tell."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from hfpp.check.shrink_layers import KeptLayers
from hfpp.check.shrink_sizes import OTHER_HIDDEN, StackSizes

Old = Mapping[str, Any]
New = MutableMapping[str, Any]
Rule = Callable[[Old, New, StackSizes, "KeptLayers | None"], None]


def _ints(values: Old, *names: str) -> bool:
    return all(isinstance(values.get(name), int) for name in names)


def _query_key_dim(old: Old, new: New, sizes: StackSizes, stack: KeptLayers | None) -> None:
    """Queries and keys of compressed attention: a rotary and another part."""
    if _ints(old, "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"):
        new["qk_head_dim"] = new["qk_nope_head_dim"] + new["qk_rope_head_dim"]


def _period_offset(old: Old, new: New, sizes: StackSizes, stack: KeptLayers | None) -> None:
    """An offset into a period stays in step with it."""
    for name in old:
        period = name.replace("_offset", "_period")
        if name.endswith("_offset") and period != name and _ints(old, name, period):
            new[name] = old[name] % new[period]


_STATE_SPACE = (  # heads, dimension of one, groups of heads
    ("mamba_n_heads", "mamba_d_head", "mamba_n_groups"),
    ("mamba_num_heads", "mamba_head_dim", "n_groups"),
    ("n_mamba_heads", "mamba_headdim", "mamba_ngroups"),
    ("num_heads", "head_dim", "n_groups"),
)


def _state_space(old: Old, new: New, sizes: StackSizes, stack: KeptLayers | None) -> None:
    """Heads of a state-space layer make up its inner width, and divide into groups."""
    expand = old.get("mamba_expand", old.get("expand"))
    for heads, dim, groups in _STATE_SPACE:
        if expand is None or not _ints(old, heads, dim):
            continue
        inner = int(expand * sizes.hidden[1])
        if old.get("mamba_d_ssm") is not None:
            inner = new["mamba_d_ssm"] = sizes.hidden[1]
        new[dim] = 16
        new[heads] = inner // new[dim]
        if _ints(old, groups):
            new[groups] = min(old[groups], 2)


def _indexer_budget(old: Old, new: New, sizes: StackSizes, stack: KeptLayers | None) -> None:
    """A token budget in blocks."""
    if _ints(old, "indexer_budget", "indexer_compress_ratio"):
        new["indexer_compress_ratio"] = min(old["indexer_compress_ratio"], 4)
        new["indexer_budget"] = 2 * new["indexer_compress_ratio"]


_TEXT_WIDTH = re.compile(r"^(out_hidden_size|text_hidden_size|adapter_out_dim)$")


def _text_width(old: Old, new: New, sizes: StackSizes, stack: KeptLayers | None) -> None:
    """What an encoder hands to the text stack has its width, also where defaults do not say so."""
    for name in old:
        if _TEXT_WIDTH.search(name) and _ints(old, name):
            new[name] = sizes.shared.widths.get(sizes.shared.text_hidden, new[name])


def _conv_channels(old: Old, new: New, sizes: StackSizes, stack: KeptLayers | None) -> None:
    """Convolutional image tokenizers normalize groups of 32 channels."""
    new["base_channels"] = 32
    new["channel_multiplier"] = type(old["channel_multiplier"])((1, 2))
    new["num_res_blocks"] = 1
    if old.get("latent_channels", 0) > 32:
        new["latent_channels"] = 32


def _pyramid(old: Old, new: New, sizes: StackSizes, stack: KeptLayers | None) -> None:
    """A pyramid of stages, each twice as wide as the one before."""
    for name, first in (
        ("embed_dim", 16),
        ("hidden_sizes", 16),
        ("num_heads", 2),
        ("num_groups", 2),
    ):
        if isinstance(old.get(name), (list, tuple)):
            new[name] = type(old[name])(first * 2**stage for stage in range(len(old[name])))
    new["depths"] = type(old["depths"])(1 for _ in old["depths"])
    for name in ("patch_size", "patch_sizes", "num_hidden_layers"):
        if name in old:
            new[name] = old[name]


def _codebooks(old: Old, new: New, sizes: StackSizes, stack: KeptLayers | None) -> None:
    """One row of tokens per codebook: two rows are one sample."""
    new["num_codebooks"] = min(old["num_codebooks"], 2)


def _audio_convolution(old: Old, new: New, sizes: StackSizes, stack: KeptLayers | None) -> None:
    """What comes out of a strided convolution: its channels times the frequencies left."""
    left = old["conv_output_size"] // old["downsample_hidden_size"]
    new["conv_output_size"] = new["downsample_hidden_size"] * left
    new["adapter_input_size"] = new.get("d_model", OTHER_HIDDEN)


def _mllama_vision(old: Old, new: New, sizes: StackSizes, stack: KeptLayers | None) -> None:
    """The output is the last layer's and those of some layers on the way."""
    new["vision_output_dim"] = new["hidden_size"] * (1 + len(new["intermediate_layers_indices"]))


_GENERAL: tuple[Rule, ...] = (
    _query_key_dim,
    _period_offset,
    _state_space,
    _indexer_budget,
    _text_width,
)
_BY_MODEL_TYPE: Mapping[str, Rule] = {
    "chameleon_vqgan": _conv_channels,
    "dots3_note_audio_encoder": _audio_convolution,
    "emu3_vqgan": _conv_channels,
    "florence_vision": _pyramid,
    "janus_vqgan": _conv_channels,
    "mllama_vision_model": _mllama_vision,
    "muse_spark_audio": _pyramid,
    "musicgen_decoder": _codebooks,
    "musicgen_melody_decoder": _codebooks,
}


def apply_rules(part: Any, old: Old, new: New, sizes: StackSizes, stack: KeptLayers | None) -> None:
    """Put right, in `new`, what shrinking each attribute on its own has broken.

    Args:
        part: The config (or plain dict) the attributes belong to.
        old: Its attributes before.
        new: Its attributes now; changed in place.
        sizes: The stack's measures.
        stack: The layers kept, if it has any.
    """
    for rule in _GENERAL:
        rule(old, new, sizes, stack)
    special = _BY_MODEL_TYPE.get(getattr(part, "model_type", ""))
    if special is not None:
        special(old, new, sizes, stack)
