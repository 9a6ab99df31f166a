"""What crosses the boundaries between stages: shapes, dtypes and bytes, from sizes alone."""

from __future__ import annotations

from typing import Any, NamedTuple

from hfpp import _core
from hfpp._core import DType
from hfpp.errors import PipelineConfigError

__all__ = [
    "BoundaryTables",
    "BoundaryTensor",
    "DType",
    "HiddenAndVocabSize",
    "boundary_tables",
    "hidden_and_vocab_size",
]


class HiddenAndVocabSize(NamedTuple):
    """The width of the hidden states and of the logits."""

    hidden_size: int
    vocab_size: int


def hidden_and_vocab_size(model_config: Any) -> HiddenAndVocabSize:
    """Widths from a model's config: see `hfpp.functional._get_hidden_and_vocab_size`."""
    return HiddenAndVocabSize(
        _size_from_config(model_config, "hidden_size"),
        _size_from_config(model_config, "vocab_size"),
    )


def _size_from_config(model_config: Any, name: str) -> int:
    text_config = getattr(model_config, "text_config", None)
    for config in (model_config, text_config):
        # Configs of transformers translate their own spelling (GPT-2's n_embd) on attribute access;
        # a plain object with an attribute_map does not.
        attribute_map = getattr(config, "attribute_map", None)
        own_name = attribute_map.get(name, name) if isinstance(attribute_map, dict) else name
        for attribute in (name, own_name):
            value = getattr(config, attribute, None)
            if value is not None:
                return _core.checked_integer(name, value, minimum=1)
    kind = type(model_config).__name__
    inner = "which it lacks" if text_config is None else f"a {type(text_config).__name__}"
    raise PipelineConfigError(
        f"model_config ({kind}) must have {name}, but neither {kind}.{name} nor "
        f"{kind}.text_config.{name} is set (text_config: {inner}): set model_config.{name}."
    )


class BoundaryTensor(NamedTuple):
    """The tensor that enters or leaves a stage."""

    shape: tuple[int, ...]
    dtype: DType


class BoundaryTables(NamedTuple):
    """What enters and leaves every stage.

    Attributes:
        shapes: int64 ``[num_stages, 2, 3]``, the axes of (input, output), in elements; token ids
            have two, and their third is 0.
        dtypes: int8 ``[num_stages, 2]``, codes of `DType` of (input, output).
        boundary_bytes: int64 ``[num_stages + 1]``, bytes per microbatch: entry s enters stage s,
            the last one leaves the last stage.
    """

    shapes: _core.Table
    dtypes: _core.Table
    boundary_bytes: _core.Table

    def input_of(self, stage_index: int) -> BoundaryTensor:
        """The tensor that enters a stage; IndexError where there is no such stage."""
        return self._tensor(stage_index, 0)

    def output_of(self, stage_index: int) -> BoundaryTensor:
        """The tensor that leaves a stage; IndexError where there is no such stage."""
        return self._tensor(stage_index, 1)

    def _tensor(self, stage_index: int, side: int) -> BoundaryTensor:
        shape = tuple(size for size in self.shapes.row(stage_index, side) if size)
        return BoundaryTensor(shape, DType(self.dtypes[stage_index, side]))


def boundary_tables(
    num_stages: int,
    *,
    microbatch_size: int,
    seq_len: int,
    hidden_size: int,
    vocab_size: int | None,
    dtype: DType | int | str = DType.bfloat16,
) -> BoundaryTables:
    """Shapes, dtypes and bytes of what enters and leaves every stage of a decoder.

    Args:
        num_stages: Number of stages, at least 1.
        microbatch_size: Sequences per microbatch.
        seq_len: Tokens per sequence.
        hidden_size: Width of the hidden states, in elements.
        vocab_size: Width of the logits, in elements; None where the last stage has no head and
            gives hidden states.
        dtype: Dtype of hidden states and logits, by code or by torch's name. Token ids are int64.

    Returns:
        The tables. Stage 0 takes ``[microbatch_size, seq_len]`` token ids, the others take
        ``[microbatch_size, seq_len, hidden_size]``; each gives what the next one takes, the last
        one logits.

    Raises:
        PipelineConfigError: If a size is below 1 or the dtype is unknown.
        OverflowError: If a number of bytes does not fit in 64 bits, or a table would be larger than
            2 GiB.

    Example:
        >>> tables = boundary_tables(
        ...     4, microbatch_size=2, seq_len=16, hidden_size=64, vocab_size=1000, dtype="float32"
        ... )
        >>> tables.input_of(0)
        BoundaryTensor(shape=(2, 16), dtype=<DType.int64: 5>)
        >>> tables.output_of(3).shape
        (2, 16, 1000)
        >>> tables.boundary_bytes.row()
        (256, 8192, 8192, 8192, 128000)
    """
    return BoundaryTables(
        *_core.boundary_tables(
            num_stages,
            microbatch_size=microbatch_size,
            seq_len=seq_len,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            dtype=dtype,
        )
    )
