"""Which layers a shrunk config keeps, and what becomes of what counts or names layers."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

# A decoder of an encoder-decoder is what a causal LM consists of, so its count goes first.
_COUNTS = (
    "decoder_layers",
    "num_decoder_layers",
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_blocks",
    "depth",
    "layers",
    "encoder_layers",
    "num_encoder_layers",
    "conf_num_hidden_layers",
)
_LISTS = ("layer_types", "layers_block_type")  # count the layers where nothing else does
_OTHER_STACK = re.compile(
    r"(^|_)(num_)?(encoder|global|residual|lstm)_layers$|(^|_)depth$|add_layers$"
)
_INDICES = re.compile(
    r"(_layers|_layer_ids|_idxs|_indexes|_indices)$"  # cross_attention_layers, hybrid_layer_ids, …
)
_FROM_ONE = re.compile(r"^(ple_layer_ids|kda_layers|full_attn_layers)$")
_FEATURES = re.compile(r"^deepstack|^intermediate_layers_indices$")  # each goes its own way
_PREFIX = re.compile(
    r"^(first_k_dense_replace|num_dense_layers|max_window_layers|moe_layer_start_index)$"
)
_LAST = re.compile(r"^moe_layer_end_index$")
_SUFFIX = re.compile(r"^num_kv_shared_layers$")
_FEATURE_LAYER = re.compile(r"feature_layers?$|^spatial_vision_layer$")
_PERIOD = re.compile(
    r"layer_period$|_every_n_layers$|sliding_window_pattern$|_interval$|_sparse_step$"
    r"|layer_step$|_frequency$|^moe_layer_freq$|^layer_group_size$|^n_layers_per_attn_res_block$"
)
_AT_TIMES = re.compile(r"^cross_attention_layers$")  # where there is something to attend to
_SOURCE = re.compile(r"_source_layers$")  # entry i is the layer whose keys layer i uses


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptLayers:
    """The layers of a stack that its shrunk form keeps.

    Attributes:
        name: The config's attribute that counts the layers.
        total: How many layers the stack had.
        kept: The indices kept, ascending: layer `kept[i]` becomes layer `i`.
        overrides: What single layers override, by their old index.
    """

    name: str
    total: int
    kept: tuple[int, ...]
    overrides: Mapping[int, Mapping[str, Any]]


def is_ints(value: object) -> bool:
    """Whether `value` is a list or tuple of integers (booleans are none)."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    )


def _is_per_layer(value: object, total: int) -> bool:
    return isinstance(value, (list, tuple)) and total > 1 and len(value) == total


def _indices(name: str, value: Any, total: int) -> tuple[int, ...] | None:
    """The layers that a list of indices names, from 0; None for other values."""
    if _INDICES.search(name) is None or not is_ints(value):
        return None
    first = 1 if _FROM_ONE.search(name) else 0
    indices = tuple(index - first for index in value)
    ascending = list(indices) == sorted(set(indices))
    return indices if ascending and indices[0] >= 0 and indices[-1] < total else None


def count_name(attributes: Mapping[str, Any]) -> str | None:
    """The attribute that counts the layers of this config's stack, if it has one."""
    for name in _COUNTS:
        value = attributes.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return name
    return next((name for name in _LISTS if isinstance(attributes.get(name), list)), None)


def _signatures(
    attributes: Mapping[str, Any], total: int, overrides: Mapping[int, Mapping[str, Any]]
) -> list[Hashable]:
    """What tells the kinds of layers apart, one entry per layer."""
    marks: list[Sequence[Hashable]] = [
        [repr(sorted(overrides.get(index, {}).items())) for index in range(total)]
    ]
    for name, value in attributes.items():
        if _SOURCE.search(name) and _is_per_layer(value, total):
            marks.append([source == index for index, source in enumerate(value)])
        elif (indices := _indices(name, value, total)) is not None:
            each = _FEATURES.search(name) is not None
            marks.append([index in indices and (index if each else True) for index in range(total)])
        elif _is_per_layer(value, total):
            # Many numbers are sizes of single layers, no kinds.
            if len(set(map(repr, value))) <= 4 or isinstance(value[0], (str, bool)):
                marks.append([repr(item) for item in value])
        elif _PREFIX.search(name) and isinstance(value, int):
            marks.append([index < value for index in range(total)])
        elif _LAST.search(name) and isinstance(value, int):
            marks.append([index <= value for index in range(total)])
        elif _SUFFIX.search(name) and isinstance(value, int):
            marks.append([index >= total - value for index in range(total)])
    return list(zip(*marks, strict=True))


def choose_layers(
    attributes: Mapping[str, Any], layers: int, overrides: Mapping[int, Mapping[str, Any]]
) -> KeptLayers | None:
    """Choose `layers` layers, or more where fewer would lose a kind of layer.

    Goes through the stack taking one of each kind, then on from there doing the same again: a
    pattern (five windowed layers, then a full one) becomes a shorter pattern of the same kinds.
    Layers that are called for some inputs only are not the last ones, where they were not before.
    """
    name = count_name(attributes)
    if name is None:
        return None
    total = attributes[name] if isinstance(attributes[name], int) else len(attributes[name])
    kinds = _signatures(attributes, total, overrides)
    wanted = max(min(layers, total), len(set(kinds)))
    chosen: list[int] = []
    start = 0
    while start < total and len(chosen) < wanted:
        one_of_each = [kinds.index(kind, start) for kind in dict.fromkeys(kinds[start:])]
        chosen += one_of_each[: wanted - len(chosen)]
        start = max(one_of_each) + 1
    unused = [index for index in range(total) if index not in chosen]
    chosen = sorted(chosen + unused[: wanted - len(chosen)])
    for list_name, value in attributes.items():
        if _AT_TIMES.search(list_name) and is_ints(value) and chosen[-1] in value:
            chosen += [] if total - 1 in value else [total - 1]
    for source_name, value in attributes.items():
        if _SOURCE.search(source_name) and _is_per_layer(value, total):
            chosen = sorted({*chosen, *(value[index] for index in chosen)})
    return KeptLayers(name=name, total=total, kept=tuple(chosen), overrides=overrides)


def _period(value: int, layers: int) -> int:
    """A shorter period that divides the old one where one does, so that phases stay in step."""
    return next((p for p in range(min(value, layers), 1, -1) if value % p == 0), min(value, layers))


def shrink_layer_attribute(name: str, value: Any, stack: KeptLayers) -> tuple[bool, Any]:
    """What becomes of an attribute that counts, lists or numbers layers.

    Returns:
        Whether nothing is left to shrink in it, and the new value. The entries of a per-layer list
        of numbers may themselves be sizes.
    """
    kept, total = stack.kept, stack.total
    if isinstance(value, bool) or value is None:
        return False, value
    if isinstance(value, int):
        if name == stack.name or (value == total and name in _COUNTS):
            return True, len(kept)
        if _OTHER_STACK.search(name) or name in _COUNTS:
            return True, min(value, 2)
        if _PREFIX.search(name):
            return True, sum(index < value for index in kept)
        if _LAST.search(name):
            return True, sum(index <= value for index in kept) - 1
        if _SUFFIX.search(name):
            return True, sum(index >= total - value for index in kept)
        if _PERIOD.search(name):
            return True, _period(value, len(kept)) if value > 1 else value
        return False, value
    if _SOURCE.search(name) and _is_per_layer(value, total):
        return True, type(value)(kept.index(value[index]) for index in kept)
    indices = _indices(name, value, total)
    if indices is not None:
        first = value[0] - indices[0]
        return True, type(value)(i + first for i, index in enumerate(kept) if index in indices)
    if _is_per_layer(value, total):
        return False, type(value)(value[index] for index in kept)
    return False, value


def point_into_stacks(
    attributes: MutableMapping[str, Any], encoder: KeptLayers | None, decoder: KeptLayers | None
) -> None:
    """Let a composite config, in place, name layers of its stacks that these still have."""
    for name, value in attributes.items():
        if encoder is not None and _FEATURE_LAYER.search(name):
            if isinstance(value, int):
                attributes[name] = _nearest(value, encoder)
            elif is_ints(value):
                attributes[name] = type(value)(_nearest(index, encoder) for index in value)
        elif decoder is not None and name == "spatial_target_layers" and is_ints(value):
            attributes[name] = type(value)(i % len(decoder.kept) for i in range(len(value)))
        elif encoder is not None and decoder is not None and name == "deepstack_layer_map":
            attributes[name] = value and [
                (_nearest(index, encoder), place % len(decoder.kept))
                for place, (index, _) in enumerate(value)
            ]


def _nearest(index: int, stack: KeptLayers) -> int:
    """The place in the shrunk stack of an index (perhaps from the end) into the whole one."""
    if index < 0:
        return max(index, -len(stack.kept))
    return min(index * len(stack.kept) // stack.total, len(stack.kept) - 1)
