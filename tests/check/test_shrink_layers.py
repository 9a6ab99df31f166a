"""Which layers are kept: every kind, in order, with everything that names them following."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfpp.check.shrink_layers import choose_layers, shrink_layer_attribute
from hfpp.check.shrink_rope import shrink_rope


def kept(**attributes):
    return choose_layers(attributes, 4, {}).kept


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"num_hidden_layers": 32}, (0, 1, 2, 3)),
        ({"num_hidden_layers": 3}, (0, 1, 2)),
        ({"n_layer": 12, "layer_types": (["s"] * 5 + ["f"]) * 2}, (0, 5, 6, 11)),
        ({"num_hidden_layers": 5, "layer_types": ["s"] * 4 + ["f"]}, (0, 1, 2, 4)),
        ({"num_hidden_layers": 61, "first_k_dense_replace": 3}, (0, 3, 4, 5)),
        ({"num_hidden_layers": 40, "cross_attention_layers": [3, 8, 13]}, (0, 3, 4, 8, 39)),
        # Six kinds are kept though four layers were asked for.
        ({"num_hidden_layers": 12, "layer_types": list("abcdef") * 2}, (0, 1, 2, 3, 4, 5)),
        # Layer 3 uses the keys of layer 2, which is kept for it.
        ({"num_hidden_layers": 9, "kv_source_layers": [0, 1, 2, 2, *range(4, 9)]}, (0, 2, 3, 4, 5)),
        ({"num_hidden_layers": 8, "num_kv_shared_layers": 2}, (0, 1, 6, 7)),
        # Each of these leads to another layer of the decoder.
        ({"depth": 27, "deepstack_visual_indexes": [8, 16, 24]}, (0, 8, 16, 24)),
    ],
)
def test_layers_kept(attributes, expected):
    assert kept(**attributes) == expected


@given(
    kinds=st.lists(st.sampled_from("abcde"), min_size=2, max_size=40),
    layers=st.integers(min_value=1, max_value=8),
    data=st.data(),
)
def test_every_kind_occurs_and_indices_follow(kinds, layers, data):
    total = len(kinds)
    marked = data.draw(st.lists(st.integers(0, total - 1), unique=True).map(sorted))
    attributes = {
        "num_hidden_layers": total,
        "layer_types": kinds,
        "some_layers": marked,
        "first_k_dense_replace": data.draw(st.integers(0, total)),
    }
    stack = choose_layers(attributes, layers, {})
    new = {name: shrink_layer_attribute(name, v, stack)[1] for name, v in attributes.items()}
    assert list(stack.kept) == sorted(set(stack.kept))
    assert new["num_hidden_layers"] == len(stack.kept) >= min(layers, total)

    before = signatures(attributes)
    assert signatures(new) == [before[index] for index in stack.kept]
    assert {before[index] for index in stack.kept} == set(before)


def signatures(attributes):
    return [
        (kind, layer in attributes["some_layers"], layer < attributes["first_k_dense_replace"])
        for layer, kind in enumerate(attributes["layer_types"])
    ]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("attn_layer_period", 8, 4),  # 8 and 4 keep phases in step
        ("expert_layer_period", 2, 2),
        ("global_attn_every_n_layers", 6, 3),
        ("decoder_sparse_step", 1, 1),
        ("some_interval", 5, 4),  # no divisor but 1
        ("encoder_layers", 12, 2),
    ],
)
def test_periods_and_other_stacks(name, value, expected):
    stack = choose_layers({"decoder_layers": 24}, 4, {})
    assert shrink_layer_attribute(name, value, stack) == (True, expected)


@given(
    sections=st.lists(st.integers(1, 64), min_size=1, max_size=4),
    head_dim=st.sampled_from([8, 16, 32]),
)
def test_rotary_sections_fill_half_the_head(sections, head_dim):
    rope = {"rope_type": "default", "mrope_section": list(sections)}
    shrink_rope(rope, (2 * sum(sections), head_dim), 1.0)
    assert sum(rope["mrope_section"]) == head_dim // 2
    assert min(rope["mrope_section"]) >= 1
    assert len(rope["mrope_section"]) == len(sections)
