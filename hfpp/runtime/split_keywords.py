"""A batch's keyword arguments, cut into microbatches: along the batch, wherever it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.distributed.pipelining.microbatch import TensorChunkSpec, split_args_kwargs_into_chunks
from torch.nn.attention.flex_attention import BlockMask

from hfpp.errors import PipelineConfigError
from hfpp.runtime.media_counts import Media, is_count, items_per_sample, modality_of, token_id_of
from hfpp.runtime.paths import map_tensors, walk_tensors

HOOK = "get_pipeline_kwargs_chunk_dims"
"""Method of a model, without arguments: name -> dimension of the batch; None: the same for all."""

Features = Callable[[str, Mapping[str, Any]], "Sequence[int] | None"]
"""Asks a model for the tokens that each row of a modality's arguments becomes; None: unknown."""


def split_keywords(
    kwargs: Mapping[str, Any],
    n: int,
    *,
    batch: int | None,
    ids: torch.Tensor | None = None,
    model: object = None,
    features: Features = lambda _modality, _arguments: None,
) -> list[dict[str, Any]]:
    """Cut keyword arguments into ``n`` microbatches.

    Tensors are cut where the batch is: at the dimension that the model's hook declares, else at the
    first, or the second of position ids of three dimensions. Media that are packed one after
    another follow their samples, by the number of their tokens in ``ids``; a microbatch without any
    gets None. Plain values and scalars are the same for all, but for lists of them, which may as
    well have an item per sample: the model's hook has to say.

    Args:
        kwargs: of the whole batch.
        n: number of microbatches.
        batch: rows of the batch; None where this rank cannot know.
        ids: token ids of the whole batch, int64 [batch, seq], where they are known.
        model: for its class's name, its ``config`` and its hook.
        features: see `Features`.

    Raises:
        PipelineConfigError: naming the argument that cannot be cut.
    """
    declared: Mapping[str, int | None] = getattr(model, HOOK, dict)() or {}
    splitter = _Splitter(n, batch, type(model).__name__)
    pieces: dict[str, list[Any]] = {}
    media: dict[str, dict[str, Any]] = {}
    for name, value in kwargs.items():
        modality = modality_of(name)
        if name in declared:
            pieces[name] = splitter.declared(name, value, declared[name])
        elif isinstance(value, BlockMask):
            chunks = split_args_kwargs_into_chunks((), {name: value}, n)[1]
            pieces[name] = [chunk[name] for chunk in chunks]
        elif next(walk_tensors(value), None) is None:
            pieces[name] = splitter.plain(name, value)
        elif (
            modality
            and ids is not None
            and token_id_of(getattr(model, "config", None), modality) is not None
        ):
            media.setdefault(modality, {})[name] = value
        else:
            pieces[name] = splitter.along_batch(name, value)
    for modality, arguments in media.items():
        token = token_id_of(getattr(model, "config", None), modality)
        assert ids is not None
        assert token is not None
        tokens = torch.eq(ids, token).sum(1).tolist()
        found = items_per_sample(arguments, tokens, partial(features, modality))
        for name, value in arguments.items():
            if found is None and len(set(tokens)) > 1 and _is_floating(value):
                raise splitter.error(name, value, f"{modality}s per sample: {UNTOLD}")
            pieces[name] = splitter.media(name, value, found)
    return [{name: pieces[name][index] for name in kwargs} for index in range(n)]


UNTOLD = "the model's config and their tokens in the ids do not tell their number"


def _is_floating(value: Any) -> bool:
    return any(tensor.is_floating_point() for _, tensor in walk_tensors(value))


def _plain_list(value: Any) -> Sequence[Any] | None:
    """The first list or tuple with items in a value without tensors; None where there is none."""
    if isinstance(value, Mapping):
        return next((f for f in map(_plain_list, value.values()) if f is not None), None)
    if not isinstance(value, list | tuple) or not value:
        return None
    return value if next(walk_tensors(value), None) is None else None


class _Splitter:
    def __init__(self, n: int, batch: int | None, model_name: str) -> None:
        self.n, self.batch, self.model_name = n, batch, model_name

    def declared(self, name: str, value: Any, dim: int | None) -> list[Any]:
        if dim is None:
            return [value] * self.n
        if _plain_list(value) is not None and next(walk_tensors(value), None) is None:
            return self._items(name, value, dim)
        for _, tensor in walk_tensors(value):
            rows = tensor.shape[dim] if -tensor.dim() <= dim < tensor.dim() else 0
            if rows == 0 or rows % self.n or (self.batch is not None and rows != self.batch):
                raise self.error(name, tensor, f"{HOOK} says that dimension {dim} is the batch")
        return self._chunks(value, dim)

    def plain(self, name: str, value: Any) -> list[Any]:
        found = _plain_list(value)
        if found is not None and self.n > 1:
            rows = "" if self.batch is None else f" of a batch of {self.batch} rows"
            raise PipelineConfigError(
                f"{name} holds a {type(found).__name__} of {len(found)} items without tensors, "
                f"which cannot be cut into {self.n} microbatches{rows}: it may have an item per "
                f"sample, or be the same for all. Pass a tensor, or give {self.model_name} a "
                f"method {HOOK}() that returns a dict with {name!r}: 0 to cut it along its items, "
                f"one for each row of the batch, or {name!r}: None to pass all of it to every "
                f"microbatch."
            )
        return [value] * self.n

    def _items(self, name: str, value: Any, dim: int) -> list[Any]:
        """A list without tensors, cut along its items."""
        rows = len(value) if isinstance(value, list | tuple) else 0
        if dim != 0 or rows == 0 or rows % self.n or not self._is_batch(rows):
            why = f"{HOOK} says that dimension {dim} is the batch, and a list is cut along its"
            raise self.error(name, value, f"{why} items, one for each row")
        size = rows // self.n
        return [value[i * size : (i + 1) * size] for i in range(self.n)]

    def along_batch(self, name: str, value: Any) -> list[Any]:
        if name == "position_ids" and isinstance(value, torch.Tensor) and value.dim() > 2:
            if not self._is_batch(value.shape[1]):
                raise self.error(
                    name, value, "of position ids of three dimensions it is the second"
                )
            return self._chunks(value, 1)
        tensors = [tensor for _, tensor in walk_tensors(value)]
        if all(tensor.dim() == 0 for tensor in tensors):
            return [value] * self.n
        if isinstance(value, list) and self._is_batch(len(value)) and self.batch is not None:
            size = len(value) // self.n
            return [value[i * size : (i + 1) * size] for i in range(self.n)]
        for tensor in tensors:
            if tensor.dim() == 0 or not self._is_batch(tensor.shape[0]):
                raise self.error(name, tensor, "the first dimension is another")
        return self._chunks(value, 0)

    def media(self, name: str, value: Any, found: Media | None) -> list[Any]:
        if found is None or found.by_row or is_count(name):
            return self.along_batch(name, value)
        size = len(value) if isinstance(value, list | tuple) else value.shape[0]
        if size == sum(found.items):
            counts = found.items
        elif size == sum(found.rows):
            counts = found.rows
        elif self._is_batch(size):
            return self.along_batch(name, value)
        else:
            raise self.error(name, value, f"there are {sum(found.items)} items of it in the ids")
        each = len(counts) // self.n
        ends = [sum(counts[: i * each]) for i in range(self.n + 1)]
        return [
            value[start:stop] if start < stop else None for start, stop in itertools.pairwise(ends)
        ]

    def _is_batch(self, rows: int) -> bool:
        return rows == self.batch if self.batch is not None else rows > 0 and rows % self.n == 0

    def _chunks(self, value: Any, dim: int) -> list[Any]:
        if isinstance(value, torch.Tensor):
            spec = {"value": TensorChunkSpec(dim)}  # type: ignore[no-untyped-call]
            chunks = split_args_kwargs_into_chunks((), {"value": value}, self.n, None, spec)[1]
            return [chunk["value"] for chunk in chunks]

        def part(tensor: torch.Tensor, index: int) -> torch.Tensor:
            return tensor.tensor_split(self.n, dim)[index]

        return [map_tensors(partial(part, index=index), value) for index in range(self.n)]

    def error(self, name: str, value: Any, why: str) -> PipelineConfigError:
        shape = list(value.shape) if isinstance(value, torch.Tensor) else f"{len(value)} items"
        rows = "rows that divide by" if self.batch is None else f"{self.batch} rows in"
        return PipelineConfigError(
            f"{name} of shape {shape} cannot be cut into microbatches, as the batch has {rows} "
            f"{self.n} microbatches: {why}. Give {self.model_name} a method {HOOK}() that returns "
            f"a dict with the dimension of the batch in {name!r}, or None where every microbatch "
            f"takes all of it."
        )
