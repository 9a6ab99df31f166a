"""Shape tables: they chain from stage to stage, count bytes right and read configs as told."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given

from hfpp import PipelineConfigError
from hfpp.plan.tensor_shapes import DType, boundary_tables, hidden_and_vocab_size
from tests import strategies
from tests.advice import check_advice

ITEM_BYTES = {"int64": 8, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def check_chain(inputs, outputs, boundary_bytes, sizes) -> None:
    """Ids go in, logits or hidden states come out, and every stage takes what the last one gave."""
    ids = (sizes.microbatch_size, sizes.seq_len)
    assert inputs[0] == (ids, DType.int64)
    last = sizes.hidden_size if sizes.vocab_size is None else sizes.vocab_size
    assert outputs[-1] == ((*ids, last), DType[sizes.dtype])
    for given_out, taken_in in zip(outputs[:-1], inputs[1:], strict=True):
        assert given_out == taken_in == ((*ids, sizes.hidden_size), DType[sizes.dtype])
    crossing = [*inputs, outputs[-1]]
    assert list(boundary_bytes) == [
        math.prod(tensor[0]) * ITEM_BYTES[tensor[1].name] for tensor in crossing
    ]


@given(strategies.boundary_sizes())
def test_shapes_chain(sizes):
    tables = boundary_tables(**sizes._asdict())
    assert tables.shapes.shape == (sizes.num_stages, 2, 3)
    assert tables.dtypes.shape == (sizes.num_stages, 2)
    stages = range(sizes.num_stages)
    check_chain(
        [tables.input_of(stage) for stage in stages],
        [tables.output_of(stage) for stage in stages],
        tables.boundary_bytes.row(),
        sizes,
    )


def test_check_chain_trips_on_planted_faults():
    sizes = strategies.BoundarySizes(2, 1, 4, 8, 16, "float32")
    inputs = [((1, 4), DType.int64), ((1, 4, 8), DType.float32)]
    outputs = [((1, 4, 8), DType.float32), ((1, 4, 16), DType.float32)]
    check_chain(inputs, outputs, [32, 128, 256], sizes)
    for fault in (
        (inputs, [outputs[0], ((1, 4, 8), DType.float32)], [32, 128, 256]),
        (inputs, [((1, 4, 8), DType.bfloat16), outputs[1]], [32, 128, 256]),
        ([((1, 4), DType.int32), inputs[1]], outputs, [32, 128, 256]),
        (inputs, outputs, [32, 128, 255]),
    ):
        with pytest.raises(AssertionError):
            check_chain(*fault, sizes)


def test_dtypes_are_known_by_code_and_by_name():
    sizes = {"microbatch_size": 1, "seq_len": 2, "hidden_size": 4, "vocab_size": None}
    by_default = boundary_tables(2, **sizes)
    for dtype in ("bfloat16", DType.bfloat16, 7):
        tables = boundary_tables(2, **sizes, dtype=dtype)
        assert bytes(tables.dtypes) == bytes(by_default.dtypes)


@pytest.mark.torch
def test_item_sizes_are_torchs():
    import torch

    from hfpp._core import itemsize

    for code in DType:
        torch_dtype = getattr(torch, code.name)
        assert itemsize(code) == itemsize(code.name) == torch_dtype.itemsize


SIZES = {
    "num_stages": 4,
    "microbatch_size": 2,
    "seq_len": 8,
    "hidden_size": 16,
    "vocab_size": 32,
    "dtype": "float32",
}


@pytest.mark.parametrize("bad", [0, -1, True])
@pytest.mark.parametrize("name", [name for name in SIZES if name != "dtype"])
def test_sizes_out_of_range_are_named(name, bad):
    arguments = {**SIZES, name: bad}
    with pytest.raises(PipelineConfigError, match=rf"^{name} \({bad}\)"):
        boundary_tables(**arguments)
    check_advice(boundary_tables, arguments)


@pytest.mark.parametrize("bad", ["float8", "", -1, 10, 1 << 40])
def test_unknown_dtypes_list_the_known_ones(bad):
    with pytest.raises(PipelineConfigError, match=r"^dtype .*'bfloat16'"):
        boundary_tables(**{**SIZES, "dtype": bad})


def test_wrong_types_are_named():
    for name in SIZES:
        with pytest.raises(TypeError, match=rf"^{name} must be an integer, not float"):
            boundary_tables(**{**SIZES, name: 4.0})


def test_bytes_that_overflow_are_errors():
    with pytest.raises(OverflowError, match=r"microbatch_size \* seq_len"):
        boundary_tables(**{**SIZES, "seq_len": 1 << 62})
    with pytest.raises(OverflowError, match="vocab_size"):
        boundary_tables(**{**SIZES, "vocab_size": 1 << 60})
    with pytest.raises(OverflowError, match="num_stages"):
        boundary_tables(**{**SIZES, "num_stages": 10**6 * 4096 * 8})
    with pytest.raises(OverflowError, match="hidden_size does not fit in 64 bits"):
        boundary_tables(**{**SIZES, "hidden_size": 1 << 64})


# ---- sizes from a config


def test_sizes_from_the_top_level_then_from_text_config():
    config = SimpleNamespace(
        hidden_size=8, vocab_size=9, text_config=SimpleNamespace(hidden_size=80, vocab_size=90)
    )
    assert hidden_and_vocab_size(config) == (8, 9)
    config.hidden_size = None  # each size falls back on its own
    assert hidden_and_vocab_size(config) == (80, 9)
    del config.vocab_size
    assert hidden_and_vocab_size(config) == (80, 90)


def test_sizes_by_the_configs_own_names():
    plain = SimpleNamespace(attribute_map={"hidden_size": "n_embd"}, n_embd=12, vocab_size=3)
    assert hidden_and_vocab_size(plain) == (12, 3)
    nested = SimpleNamespace(text_config=plain)
    assert hidden_and_vocab_size(nested) == (12, 3)


@pytest.mark.torch
def test_sizes_from_transformers_configs():
    from transformers import Gemma3Config, GPT2Config, LlamaConfig

    llama = LlamaConfig(hidden_size=64, vocab_size=100)
    assert hidden_and_vocab_size(llama) == (64, 100)
    assert hidden_and_vocab_size(GPT2Config(n_embd=48, vocab_size=77)) == (48, 77)
    gemma = Gemma3Config(text_config={"hidden_size": 32, "vocab_size": 55})
    assert hidden_and_vocab_size(gemma) == (32, 55)


def test_a_missing_size_names_the_class_and_both_places():
    class TinyConfig:
        hidden_size = 8

    with pytest.raises(PipelineConfigError) as caught:
        hidden_and_vocab_size(TinyConfig())
    for part in ("TinyConfig.vocab_size", "TinyConfig.text_config.vocab_size"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"NoneType\.hidden_size"):
        hidden_and_vocab_size(None)


@pytest.mark.parametrize("bad", [0, -8, True])
def test_a_size_that_is_no_positive_integer(bad):
    with pytest.raises(PipelineConfigError, match=rf"hidden_size \({bad}\)"):
        hidden_and_vocab_size(SimpleNamespace(hidden_size=bad, vocab_size=5))
