"""Batches of every kind that a model's forward takes: padded, packed, longer than its windows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 2  # sequences in a microbatch
_PADS = 4  # tokens of padding in every other sequence
_LONGEST = 640  # tokens; a window beyond it would make a check too slow
_FEW_IDS = 7  # as many as the hollow run uses, for a model whose vocabulary is not known


class Kind(StrEnum):
    """What is special about a batch."""

    PLAIN = "plain"
    RIGHT_PADDED = "right-padded"
    LEFT_PADDED = "left-padded"
    PACKED = "packed"
    LONG = "long"


ALL_KINDS = tuple(Kind)


@dataclass(frozen=True, slots=True)
class Microbatch:
    """One microbatch.

    Attributes:
        ids: token ids, int64 [rows, tokens].
        kwargs: what every stage gets beside them.
        seed: of the random weights that its loss gives the outputs.
        kept: bool [rows, tokens], False at padding; None where there is none.
    """

    ids: Tensor
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    kept: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """The microbatches of one step."""

    kind: str
    microbatches: tuple[Microbatch, ...]


def batches(
    model: nn.Module, *, tokens: int, kinds: Sequence[Kind] = ALL_KINDS, microbatches: int = 2
) -> Iterator[Batch]:
    """The batches of those ``kinds`` that the model's forward has arguments for.

    Args:
        model: the model; its forward's signature, its config and its embedding are looked at.
        tokens: length of the sequences; `Kind.LONG` has longer ones.
        kinds: which to make.
        microbatches: per batch; all differ.
    """
    accepted = inspect.signature(type(model).forward).parameters
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    draw = _ids_drawer(model)
    for kind in kinds:
        needs = _ARGUMENT.get(kind)
        if needs is not None and needs not in accepted:
            continue
        length = _long_length(model, tokens) if kind is Kind.LONG else tokens
        parts = []
        for index in range(microbatches):
            ids = draw(length, seed=1000 * (index + 1) + length)
            mask = _MASKS[kind](ids, index) if kind in _MASKS else None
            kwargs = {} if needs is None else {needs: mask}
            if kind is Kind.PACKED:
                kwargs = {"position_ids": _restarting_positions(ids, index)}
            parts.append(
                Microbatch(
                    ids.to(device),
                    {name: value.to(device) for name, value in kwargs.items() if value is not None},
                    seed=index,
                    kept=None if mask is None else mask.bool().to(device),
                )
            )
        yield Batch(kind, tuple(parts))


def _padded(ids: Tensor, columns: Any) -> Tensor:
    mask = torch.ones_like(ids)
    mask[::2, columns] = 0
    return mask


def _restarting_positions(ids: Tensor, index: int) -> Tensor:
    """Positions of several documents in each row, which end elsewhere in each row."""
    rows, tokens = ids.shape
    positions = torch.arange(tokens).repeat(rows, 1)
    for row in range(rows):
        for start in range(tokens // 3 + row + index, tokens, tokens // 3 + row + 1):
            positions[row, start:] = torch.arange(tokens - start)
    return positions


_ARGUMENT = {
    Kind.RIGHT_PADDED: "attention_mask",
    Kind.LEFT_PADDED: "attention_mask",
    Kind.PACKED: "position_ids",
}
_MASKS = {
    Kind.RIGHT_PADDED: lambda ids, index: _padded(ids, slice(ids.shape[1] - _PADS - index, None)),
    Kind.LEFT_PADDED: lambda ids, index: _padded(ids, slice(0, _PADS + index)),
}


def _ids_drawer(model: nn.Module) -> Any:
    """Random ids, int64 [rows, tokens], that are nobody's special token."""
    values: dict[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    special = set(_special_ids(values))
    plain = [i for i in range(_vocabulary(model)) if i not in special]
    choices = torch.tensor(plain or [0], dtype=torch.int64)

    def draw(tokens: int, *, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return choices[torch.randint(len(choices), (ROWS, tokens), generator=generator)]

    return draw


def _special_ids(values: Mapping[str, Any]) -> Iterator[int]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _special_ids(value)
        elif str(key).endswith(("token_id", "_token_index", "token_ids")):
            several = value if isinstance(value, list | tuple) else [value]
            yield from (v for v in several if isinstance(v, int))


def _vocabulary(model: nn.Module) -> int:
    """How many ids there are; few where no embedding tells."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    own: Any = None
    find: Any = getattr(model, "get_input_embeddings", None)
    if find is not None:
        try:
            own = find()
        except NotImplementedError:
            own = None
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    known = [getattr(own, "num_embeddings", None), getattr(text, "vocab_size", None)]
    if not any(isinstance(k, int) for k in known):
        known = [table.num_embeddings for table in tables[:1]]
    return min([k for k in known if isinstance(k, int)], default=_FEW_IDS)


def _long_length(model: nn.Module, tokens: int) -> int:
    """Longer than ``tokens`` and than every window of the config, where it has one."""
    values: dict[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    found = [w for w in _windows(values) if w + 8 <= _LONGEST]
    longer = 2 * tokens - tokens % 2
    return max([longer, *(w + 8 for w in found)])


def _windows(values: Mapping[str, Any]) -> Iterator[int]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _windows(value)
        elif ("window" in str(key) or "chunk" in str(key)) and type(value) is int:
            yield value
