"""Dropout is turned off where it is meant, and no other number is touched."""

import copy

import pytest

from hfpp.train.randomness import without_randomness


@pytest.mark.parametrize(
    "name",
    [
        "attention_dropout", "attention_probs_dropout_prob", "dropout", "resid_pdrop", "attn_pdrop",
        "layerdrop", "decoder_layerdrop", "drop_path_rate", "drop_rate", "dropout_rate",
        "router_jitter_noise", "input_jitter_noise", "gp_dropout_value",
    ],
)  # fmt: skip
def test_rates_are_set_to_zero(name):
    assert without_randomness({name: 0.1}) == ({name: 0.0}, (name,))
    assert without_randomness({name: 0.0}) == ({name: 0.0}, ())


def test_nothing_else_is_touched():
    config = {
        "dropless": 0.5,
        "raindrops": 3.5,
        "drop_tokens_above": 2.0,
        "dropout_layers": 4,
        "token_dropout": True,
        "classifier_dropout": None,
        "jitter_seed": 7.5,
        "name": "dropout",
        "dropout": 1,
        "rope": [0.5, {"factor": 8.0}],
    }
    before = copy.deepcopy(config)
    assert without_randomness(config) == (before, ())
    assert config == before


def test_nested_entries_and_lists():
    config = {
        "dropout": [0.1, 0.0, 0.2],
        "text_config": {"resid_pdrop": 0.3, "hidden_size": 4},
        "blocks": [{"dropout": 0.4, "width": 1.5}, {"width": 2.5}],
    }
    assert without_randomness(config) == (
        {
            "dropout": [0.0, 0.0, 0.0],
            "text_config": {"resid_pdrop": 0.0, "hidden_size": 4},
            "blocks": [{"dropout": 0.0, "width": 1.5}, {"width": 2.5}],
        },
        ("dropout.0", "dropout.2", "text_config.resid_pdrop", "blocks.0.dropout"),
    )
    assert config["dropout"] == [0.1, 0.0, 0.2]
