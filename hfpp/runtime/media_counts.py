"""How many images, videos or sounds each sample of a batch has, by their tokens in the ids."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

_MODALITIES = (
    ("video", ("video", "second_per_grid")),
    ("audio", ("audio", "input_features", "feature_attention_mask", "feature_lens")),
    ("image", ("image", "pixel")),
)
_ROW_RANK = 6  # [batch, images, tiles, channels, height, width]
_SAMPLE_RANK = 5  # [batch, images, channels, height, width], or [images, patches, ...]


class Media(NamedTuple):
    """The items of one modality.

    Attributes:
        items: their number in every sample.
        rows: of what each item has several rows of (patches), their number in every sample.
        by_row: whether every sample has one row, with all of its items.
    """

    items: Sequence[int]
    rows: Sequence[int]
    by_row: bool = False


def modality_of(name: str) -> str | None:
    """``image``, ``video`` or ``audio`` for the name of an argument of such; else None."""
    return next((m for m, parts in _MODALITIES if any(part in name for part in parts)), None)


def is_count(name: str) -> bool:
    """Whether an argument of this name says how many items every sample has: a row per sample."""
    return "num_images" in name


def token_id_of(config: Any, modality: str) -> int | None:
    """The id of the token that stands in the text for a piece of the modality."""
    for end in ("token_id", "token_index"):
        found = getattr(config, f"{modality}_{end}", None)
        if isinstance(found, int):
            return found
    return None


def items_per_sample(
    arguments: Mapping[str, Any],
    tokens: Sequence[int],
    features: Callable[[Mapping[str, Any]], Sequence[int] | None],
) -> Media | None:
    """Assign the items of one modality, which lie one after another, to samples.

    Args:
        arguments: of that modality.
        tokens: of every sample, how many tokens of the modality its ids hold.
        features: asks the model how many tokens each row becomes; None where it cannot tell.

    Returns:
        The counts; None where they cannot be found.
    """
    grid = next((v for n, v in arguments.items() if n.endswith("grid_thw")), None)
    if grid is not None:
        patches = [math.prod(row) for row in grid.tolist()]
        counts = _assign(_scaled(patches, sum(tokens)), tokens)
        return None if counts is None else Media(counts, _sums(patches, counts))
    main = next((v for v in arguments.values() if _is_floating(v)), None)
    if main is None:
        return None
    number, batch = len(main), len(tokens)
    explicit = next((v for n, v in arguments.items() if is_count(n)), None)
    if explicit is not None and int(sum(explicit)) == number:
        counts = [int(count) for count in explicit]
        return Media(counts, counts)
    ranks = main.dim() if isinstance(main, torch.Tensor) else 0
    if number == batch and (ranks >= _ROW_RANK or len(set(tokens)) == 1):
        return Media([1] * batch, [1] * batch, by_row=True)
    sizes = next((v for n, v in arguments.items() if n.endswith("sizes")), None)
    lengths = _likely_lengths(arguments, number, sum(tokens), sizes)
    found = None if lengths is None else _assign(lengths, tokens)
    unsure = number == batch and ranks >= _SAMPLE_RANK and sizes is None
    if found is None and unsure:
        return Media([1] * batch, [1] * batch, by_row=True)
    if found is None or unsure:
        asked = features(arguments)
        if asked is None or len(asked) != number:
            return None
        if number == batch and list(asked) == list(tokens):
            return Media([1] * batch, [1] * batch, by_row=True)
        found = _assign(asked, tokens)
    return None if found is None else Media(found, found)


def _likely_lengths(
    arguments: Mapping[str, Any], number: int, total: int, sizes: Any
) -> list[int] | None:
    """Tokens per item, where all items are alike or grow with their area."""
    if isinstance(sizes, torch.Tensor) and len(sizes) == number and sizes.dim() == 2:
        return _scaled([math.prod(row) for row in sizes.tolist()], total)
    for value in arguments.values():
        if not isinstance(value, torch.Tensor) or _is_floating(value) or len(value) != number:
            continue
        if not bool((value == value[:1]).all()):
            return None
    main = next(v for v in arguments.values() if _is_floating(v))
    if isinstance(main, list | tuple) and len({tuple(item.shape) for item in main}) > 1:
        return None
    return _scaled([1] * number, total)


def _is_floating(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(map(_is_floating, value))
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _scaled(weights: Sequence[int], total: int) -> list[int] | None:
    """``total`` dealt out in proportion to ``weights``; None where that does not come out even."""
    whole = sum(weights)
    if not whole or any(weight * total % whole for weight in weights):
        return None
    return [weight * total // whole for weight in weights]


def _assign(lengths: Sequence[int] | None, tokens: Sequence[int]) -> list[int] | None:
    """How many items, in order, make up the tokens of every sample; None where none do."""
    if lengths is None:
        return None
    counts, position = [], 0
    for wanted in tokens:
        start, got = position, 0
        while got < wanted and position < len(lengths):
            got += lengths[position]
            position += 1
        if got != wanted:
            return None
        counts.append(position - start)
    return counts if position == len(lengths) else None


def _sums(values: Sequence[int], counts: Sequence[int]) -> list[int]:
    sums, position = [], 0
    for count in counts:
        sums.append(sum(values[position : position + count]))
        position += count
    return sums
