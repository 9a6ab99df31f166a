"""Shapes from config.json: sizes of released models, and what is wrong with bad ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfpp.errors import PipelineConfigError
from hfpp.plan.model.layer_shape import Attention, Experts
from hfpp.plan.model.shape import ModelShape

LLAMA_405B = {
    "model_type": "llama",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
QWEN3_235B = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("config", "parameters", "active"),
    [
        (LLAMA_405B, 405_853_388_800, None),
        (DEEPSEEK_V3, 671_026_404_352, 37_000_000_000),
        (MIXTRAL, 46_702_792_704, 12_900_000_000),
        (QWEN3_235B, 235_093_634_560, 22_000_000_000),
    ],
)
def test_sizes_of_released_models(
    config: dict[str, Any], parameters: int, active: int | None
) -> None:
    """The total is what their weight files hold; the active ones are what they are said to have."""
    shape = ModelShape.from_config(config)
    assert shape.parameters == parameters
    assert shape.is_known
    if active is not None:
        assert shape.active_parameters == pytest.approx(active, rel=0.03)


def test_layers_of_deepseek_v3() -> None:
    shape = ModelShape.from_config(DEEPSEEK_V3)
    assert [layer.kind for layer in shape.layers] == ["full dense"] * 3 + ["full experts"] * 58
    assert shape.layers[3] is shape.layers[60]
    (attention,) = shape.layers[0].mixers
    (experts,) = shape.layers[3].feed_forwards
    assert isinstance(attention, Attention)
    assert isinstance(experts, Experts)
    assert (attention.heads, attention.head_dim, attention.value_dim) == (128, 192, 128)
    assert (experts.count, experts.top_k) == (256, 8)
    assert experts.shared is not None


def test_windows() -> None:
    gemma = {**TINY, "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 8}
    gemma["num_hidden_layers"] = 12
    shape = ModelShape.from_config({**gemma, "sliding_window_pattern": 6})
    assert [layer.kind for layer in shape.layers] == (["sliding dense"] * 5 + ["full dense"]) * 2
    (attention,) = shape.layers[0].mixers
    assert isinstance(attention, Attention)
    seen = [min(position + 1, 8) for position in range(20)]
    assert attention.pairs(20) == sum(seen)
    assert attention.pairs(5) == 15
    llama4 = {
        **TINY,
        "model_type": "llama4_text",
        "intermediate_size_mlp": 256,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
    }
    shape = ModelShape.from_config(llama4)
    kinds = ["chunked dense", "chunked experts", "chunked dense", "full experts"]
    assert [layer.kind for layer in shape.layers] == kinds
    (attention,) = shape.layers[0].mixers
    assert isinstance(attention, Attention)
    assert attention.pairs(20) == sum(position % 8 + 1 for position in range(20))


def test_text_config_of_a_multimodal_one() -> None:
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32}
    outer = {"model_type": "gemma3", "text_config": TINY, "vision_config": vision}
    shape = ModelShape.from_config({**outer, "tie_word_embeddings": True})
    assert shape.not_counted == ("vision_config",)
    assert shape.is_tied
    untied = ModelShape.from_config({**TINY, "tie_word_embeddings": False})
    assert shape.parameters == untied.parameters - 100 * 64


def test_unknown_types_are_read_by_their_keys() -> None:
    shape = ModelShape.from_config({**TINY, "model_type": "brand_new"})
    assert not shape.is_known
    assert shape.parameters == ModelShape.from_config(TINY).parameters
    with pytest.raises(PipelineConfigError, match=r"hc_mult is set.*'brand_new'"):
        ModelShape.from_config({**TINY, "model_type": "brand_new", "hc_mult": 4})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "none of the keys hidden_size, n_embd"),
        ({"num_hidden_layers": None}, "'llama'.*num_hidden_layers, n_layer"),
        ({"vocab_size": None}, "vocab_size"),
        ({"intermediate_size": None}, "intermediate_size"),
        ({"hidden_size": -64}, "hidden_size is -64: it must be from 1"),
        ({"hidden_size": 10**18}, "hidden_size is 1000000000000000000: it must be from 1"),
        ({"hidden_size": 10**300}, "hidden_size is a number of 301 digits"),
        ({"hidden_size": "64"}, 'hidden_size is "64": it must be an integer'),
        ({"hidden_size": math.nan}, "hidden_size is NaN: it must be an integer"),
        ({"hidden_size": True}, "hidden_size is true: it must be an integer"),
        ({"hidden_size": [[[[64] * 100]]]}, r"hidden_size is \[\[\[\[64.*\.\.\.: it must"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000: .* to 4096"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 6}, "hidden_size is 64: .*multiple of num_attention_heads .6."),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes": it must be true or false'),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 layers"),
        ({"layer_types": ["full_attention"] * 3 + ["magic"]}, "'magic', which is unknown"),
        ({"layer_types": "full_attention"}, "layer_types is .*it must be a list"),
        ({"layer_types": [1] * 200_000}, "layer_types has 200000 entries: at most"),
        ({"num_experts": 4}, "num_experts_per_tok"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "more than the number of experts"),
        (
            {"num_attention_heads": 3, "hidden_size": 63},
            "heads is 3: it must be a multiple of n.*2",
        ),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0: it must be from 1"),
        ({"num_key_value_heads": -2}, "num_key_value_heads is -2: it must be from 1"),
        ({"text_config": 3}, "text_config is 3: it must be an object"),
        ({"text_config": "llama"}, 'text_config is "llama": it must be an object'),
        ({"model_type": 3}, "model_type is 3: it must be a name"),
        ({"torch_dtype": "int8"}, 'torch_dtype is "int8": it must be one of bfloat16, float16'),
        ({"dtype": ["bfloat16"]}, "dtype is no dtype: it must be one of"),
        ({"hidden_act": 3}, "hidden_act is 3: it must be a string"),
        ({"per_layer_config": 3}, "per_layer_config is 3: it must be an object"),
        ({"num_attention_heads_per_layer": [4]}, "has 1 entries for 4 layers"),
        (
            {"model_type": "dbrx", "kv_n_heads": 2, "attn_config": 7},
            "attn_config is 7: it must be an object",
        ),
        ({"model_type": "bert"}, "an encoder's layers.*hfpp profile"),
        ({"model_type": "mistral", "num_key_value_heads": ...}, "num_key_value_heads"),
        ({"per_layer_config": {"first": {}}}, "per_layer_config must hold an object by number"),
    ],
)
def test_bad_values(change: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in {**TINY, **change}.items() if value is not ...}
    with pytest.raises(PipelineConfigError, match=message):
        ModelShape.from_config(config)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"hidden_size": 64,\n "a": }', "line 2, column 7: not JSON"),
        (b'{"hidden_size": 64', "line 1, column 19: not JSON"),
        (b"", "line 1, column 1: not JSON"),
        (b"\x00\x01\x02", "line 1, column 1: not JSON"),
        (b'{"a": 1,\n "b": "\xff"}', "line 2, column 8: not UTF-8"),
        (b"[1, 2]", "line 1, column 1: the file must hold one JSON object"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"hidden_size": ' + b"9" * 10_000 + b"}", "line 1, column 17: a number of 10000 digits"),
        (json.dumps({**TINY, "hidden_size": -1}, indent=1).encode(), "line 3, column 2: hidden_s"),
    ],
)
def test_bad_files(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(PipelineConfigError, match=r"config\.json.*" + message):
        ModelShape.from_config(tmp_path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file: give the path of a"):
        ModelShape.from_config(tmp_path)
    with pytest.raises(PipelineConfigError, match=r"^/dev/zero is no regular file"):
        ModelShape.from_config("/dev/zero")
    with pytest.raises(PipelineConfigError, match="source is a list"):
        ModelShape.from_config([])  # type: ignore[arg-type]
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate((8 << 20) + 1)
    with pytest.raises(PipelineConfigError, match="larger than 8 MiB"):
        ModelShape.from_config(large)


def test_the_line_is_that_of_the_value_which_is_wrong(tmp_path: Path) -> None:
    """Not of another one of its name that stands before it."""
    path = tmp_path / "config.json"
    vision = {"hidden_size": -3, "about": '"hidden_size": -1'}
    for config, place in (
        ({"vision_config": vision, **TINY, "hidden_size": -1}, "line 7, column 2: hidden_size is"),
        (
            {"vision_config": vision, "text_config": {**TINY, "hidden_size": -1}},
            "line 8, column 3: text_config.hidden_size is -1",
        ),
    ):
        path.write_text(json.dumps(config, indent=1))
        with pytest.raises(PipelineConfigError) as caught:
            ModelShape.from_config(path)
        assert str(caught.value).startswith(f"{path}, {place}")
    dbrx = {**TINY, "model_type": "dbrx", "ffn_config": {"moe_num_experts": -1}}
    path.write_text(json.dumps({**dbrx, "attn_config": {"kv_n_heads": 2}}, indent=1))
    with pytest.raises(PipelineConfigError) as caught:
        ModelShape.from_config(path)
    assert str(caught.value).startswith(f"{path}, line 10, column 3: ffn_config.moe_num_experts is")


def test_infinity_stands_in_configs_of_state_spaces(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TINY, "time_step_limit": [0.0, math.inf]}))
    assert ModelShape.from_config(path) == ModelShape.from_config(TINY)
    for value, shown in ((-math.inf, "-Infinity"), (math.nan, "NaN")):
        path.write_text(json.dumps({**TINY, "time_step_limit": [0.0, value]}))
        with pytest.raises(PipelineConfigError, match=f"column .*: {shown} is no JSON number"):
            ModelShape.from_config(path)
    path.write_text(json.dumps({**TINY, "hidden_size": math.inf}))
    with pytest.raises(PipelineConfigError, match="hidden_size is Infinity: it must be an integer"):
        ModelShape.from_config(path)


def test_the_dtype_is_the_configs_or_the_whole_models_or_the_one_given() -> None:
    for config, expected in (
        (TINY, None),
        ({**TINY, "torch_dtype": "float16"}, "float16"),
        ({**TINY, "torch_dtype": "auto"}, None),
        ({**TINY, "dtype": None, "torch_dtype": "torch.float32"}, "float32"),
        ({"text_config": TINY, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"text_config": {**TINY, "dtype": "float32"}, "dtype": "bfloat16"}, "float32"),
    ):
        assert ModelShape.from_config(config).dtype == expected
        assert ModelShape.from_config(config, dtype="float64").dtype == "float64"
    assert ModelShape.from_config({**TINY, "dtype": "int8"}, dtype="float16").dtype == "float16"
    with pytest.raises(PipelineConfigError, match=r"dtype \(''\) must be one of"):
        ModelShape.from_config(TINY, dtype="")


def test_a_file_is_read_like_its_values(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("\ufeff" + json.dumps(LLAMA_405B), encoding="utf-8")
    assert ModelShape.from_config(path) == ModelShape.from_config(LLAMA_405B)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    base=st.sampled_from([TINY, DEEPSEEK_V3, QWEN3_235B]),
    changes=st.dictionaries(
        st.sampled_from(sorted({*DEEPSEEK_V3, *QWEN3_235B, "layer_types", "text_config"})),
        _VALUES,
        max_size=4,
    ),
)
def test_whatever_a_config_holds_there_is_a_shape_or_an_error(
    base: dict[str, Any], changes: dict[str, Any]
) -> None:
    try:
        shape = ModelShape.from_config({**base, **changes})
    except PipelineConfigError:
        return
    assert shape.parameters > 0
