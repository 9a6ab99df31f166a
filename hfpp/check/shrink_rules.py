"""Relations between a config's sizes that their names alone do not tell."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from hfpp.check.shrink_sizes import ORIGINAL_POSITIONS, OTHER_HIDDEN, PATCH, StackSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One config's attributes before and after each was shrunk on its own.

    Attributes:
        model_type: The config's model type, empty for a plain dict.
        old: The attributes before.
        new: The attributes now; rules change them in place.
        sizes: The stack's measures.
    """

    model_type: str
    old: Mapping[str, Any]
    new: MutableMapping[str, Any]
    sizes: StackSizes


Rule = Callable[[Change], None]


def _ints(values: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(values.get(name), int) for name in names)


def _query_key_dim(change: Change) -> None:
    """Queries and keys of compressed attention: a rotary and another part."""
    old, new = change.old, change.new
    if _ints(old, "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"):
        new["qk_head_dim"] = new["qk_nope_head_dim"] + new["qk_rope_head_dim"]


def _period_offset(change: Change) -> None:
    """An offset into a period stays in step with it."""
    old, new = change.old, change.new
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


def _state_space(change: Change) -> None:
    """Heads of a state-space layer make up its inner width, and divide into groups."""
    old, new = change.old, change.new
    expand = old.get("mamba_expand", old.get("expand"))
    for heads, dim, groups in _STATE_SPACE:
        if expand is None or not _ints(old, heads, dim):
            continue
        inner = int(expand * change.sizes.hidden[1])
        if old.get("mamba_d_ssm") is not None:
            inner = new["mamba_d_ssm"] = change.sizes.hidden[1]
        new[dim] = 16
        new[heads] = inner // new[dim]
        if _ints(old, groups):
            new[groups] = min(old[groups], 2)


def _indexer_budget(change: Change) -> None:
    """A token budget in blocks."""
    old, new = change.old, change.new
    if _ints(old, "indexer_budget", "indexer_compress_ratio"):
        new["indexer_compress_ratio"] = min(old["indexer_compress_ratio"], 4)
        new["indexer_budget"] = 2 * new["indexer_compress_ratio"]


def _rope_positions(change: Change) -> None:
    """A context stretched from a shorter one stays stretched as far."""
    new = change.new
    rope = new.get("rope_parameters") or {}
    parts = [new, rope, *(part for part in rope.values() if isinstance(part, dict))]
    before = change.old.get("rope_parameters") or {}
    olds = [change.old, before, *(part for part in before.values() if isinstance(part, dict))]
    for part, old in zip(parts, olds, strict=True):
        if _ints(old, _ORIGINAL) and _ints(change.old, "max_position_embeddings"):
            part[_ORIGINAL] = ORIGINAL_POSITIONS
            stretched = change.old["max_position_embeddings"] * ORIGINAL_POSITIONS
            new["max_position_embeddings"] = stretched // old[_ORIGINAL]


_ORIGINAL = "original_max_position_embeddings"
_TEXT_WIDTH = re.compile(r"^(out_hidden_size|text_hidden_size|adapter_out_dim)$")


def _text_width(change: Change) -> None:
    """What an encoder hands to the text stack has its width, also where defaults do not say so."""
    old, new = change.old, change.new
    for name in old:
        if _TEXT_WIDTH.search(name) and _ints(old, name):
            new[name] = change.sizes.shared.widths.get(change.sizes.shared.text_hidden, new[name])


def _tiled_images(change: Change) -> None:
    """Images cut into tiles have sides that are multiples of a tile's."""
    points = change.old.get("image_grid_pinpoints")
    if points:
        tile = min(side for point in points for side in point)
        small = change.sizes.shared.grid[1] * PATCH
        change.new["image_grid_pinpoints"] = [
            type(point)(side // tile * small for side in point) for point in points
        ]


def _own_width(change: Change) -> None:
    """A vision stack whose hidden size is the text's calls its own an embedding's."""
    shared = change.sizes.shared
    change.new["embed_dim"] = OTHER_HIDDEN
    change.new["hidden_size"] = shared.widths[shared.text_hidden]


def _conv_channels(change: Change) -> None:
    """Convolutional image tokenizers normalize groups of 32 channels."""
    old, new = change.old, change.new
    new["base_channels"] = 32
    new["channel_multiplier"] = type(old["channel_multiplier"])((1, 2))
    new["num_res_blocks"] = 1
    if old.get("latent_channels", 0) > 32:
        new["latent_channels"] = 32


def _pyramid(change: Change) -> None:
    """A pyramid of stages, each twice as wide as the one before."""
    old, new = change.old, change.new
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


def _codebooks(change: Change) -> None:
    """One row of tokens per codebook: two rows are one sample."""
    old, new = change.old, change.new
    new["num_codebooks"] = min(old["num_codebooks"], 2)


def _axial_positions(change: Change) -> None:
    """Positions factored into two: in training a sequence has as many tokens as their product.

    Hashes are drawn from a seed: without one no two runs are alike.
    """
    change.new["axial_pos_shape"] = type(change.old["axial_pos_shape"])((8, 8))
    change.new["hash_seed"] = 0


def _audio_convolution(change: Change) -> None:
    """What comes out of a strided convolution: its channels times the frequencies left."""
    old, new = change.old, change.new
    left = old["conv_output_size"] // old["downsample_hidden_size"]
    new["conv_output_size"] = new["downsample_hidden_size"] * left
    new["adapter_input_size"] = new.get("d_model", OTHER_HIDDEN)


_GENERAL: tuple[Rule, ...] = (
    _query_key_dim,
    _period_offset,
    _state_space,
    _indexer_budget,
    _rope_positions,
    _tiled_images,
    _text_width,
)
_BY_MODEL_TYPE: Mapping[str, Rule] = {
    "chameleon_vqgan": _conv_channels,
    "dots3_note_audio_encoder": _audio_convolution,
    "emu3_vqgan": _conv_channels,
    "florence_vision": _pyramid,
    "janus_vqgan": _conv_channels,
    "muse_spark_audio": _pyramid,
    "musicgen_decoder": _codebooks,
    "musicgen_melody_decoder": _codebooks,
    "qwen2_vl_vision": _own_width,
    "reformer": _axial_positions,
}


def apply_rules(change: Change) -> None:
    """Put right what shrinking each attribute on its own has broken."""
    for rule in _GENERAL:
        rule(change)
    special = _BY_MODEL_TYPE.get(change.model_type)
    if special is not None:
        special(change)
