"""Text, tokens, windows and configurations: the same for every process, wrong ones refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfpp.train.errors import OptionError
from hfpp.train.inputs import prepare_inputs, read_text, window_starts
from hfpp.train.model import Batches
from hfpp.train.options import TrainOptions

LLAMA = {"model_type": "llama", "vocab_size": 256, "num_hidden_layers": 8}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


@pytest.fixture
def scratch(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def test_the_default_text_is_prose_in_bytes(scratch):
    inputs = prepare_inputs(TrainOptions(), scratch)
    text, _ = read_text(None)
    assert len(text) > 400_000
    assert inputs.num_tokens == inputs.num_bytes == len(text.encode())
    tokens = torch.from_file(
        str(inputs.tokens_file), shared=False, size=inputs.num_tokens, dtype=torch.int32
    )
    assert bytes(tokens.tolist()).decode() == text
    assert json.loads((inputs.config_folder / "config.json").read_text())["vocab_size"] == 256


@given(
    replicas=st.sampled_from([1, 2, 4]),
    step=st.integers(0, 10_000),
    seed=st.integers(0, 2**62),
    num_tokens=st.integers(16, 10**6),
)
def test_windows_are_the_same_every_time_and_lie_inside(replicas, step, seed, num_tokens):
    options = TrainOptions(seed=seed, seq_len=16)
    starts = window_starts(options, num_tokens, step)
    assert starts == window_starts(options, num_tokens, step)
    assert len(starts) == options.batch_size
    assert all(0 <= start <= num_tokens - 16 for start in starts)
    if num_tokens > 1000:
        assert starts != window_starts(options, num_tokens, step + 1)
        assert starts != window_starts(TrainOptions(seed=seed + 1, seq_len=16), num_tokens, step)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_replicas_share_the_batch_out(replicas, scratch):
    options = TrainOptions(seq_len=8)
    inputs = prepare_inputs(options, scratch)
    shares = [Batches(options, inputs, replica=r, replicas=replicas)[3] for r in range(replicas)]
    assert all(share.shape == (16 // replicas, 8) for share in shares)
    text = read_text(None)[0].encode()
    expected = sorted(text[s : s + 8] for s in window_starts(options, inputs.num_tokens, 3))
    assert sorted(bytes(row) for share in shares for row in share.tolist()) == expected


def test_dropout_and_jitter_are_turned_off_and_nothing_else(model, scratch):
    config = {
        **LLAMA,
        "attention_dropout": 0.1,
        "resid_pdrop": 0.2,
        "layerdrop": 1,
        "classifier_dropout": None,
        "dropless": True,
        "rms_norm_eps": 1e-5,
        "text_config": {"dropout": 0.3, "hidden_size": 4},
        "router_jitter_noise": 0.01,
    }
    (model / "config.json").write_text(json.dumps(config))
    prepare_inputs(TrainOptions(model=model), scratch)
    assert json.loads((scratch / "config.json").read_text()) == {
        **config,
        "attention_dropout": 0.0,
        "resid_pdrop": 0.0,
        "layerdrop": 0.0,
        "text_config": {"dropout": 0.0, "hidden_size": 4},
        "router_jitter_noise": 0.0,
    }


def test_weights_are_found(model, scratch):
    assert prepare_inputs(TrainOptions(model=model), scratch).weights_folder is None
    (model / "model.safetensors").touch()
    assert prepare_inputs(TrainOptions(model=model), scratch).weights_folder == model


def test_the_models_tokenizer_is_used(model, scratch, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"a": 3, "b": 5, "?": 7}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(model)
    text = tmp_path / "text"
    text.write_text("a b ä b")
    inputs = prepare_inputs(TrainOptions(model=model, text=text, seq_len=2), scratch)
    tokens = torch.from_file(str(inputs.tokens_file), False, inputs.num_tokens, dtype=torch.int32)
    assert tokens.tolist() == [3, 5, 7, 5]
    assert inputs.num_bytes == 8


def test_text_that_cannot_be_used(tmp_path, scratch):
    def refused(content):
        path = tmp_path / "text"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(OptionError) as raised:
            prepare_inputs(TrainOptions(text=path), scratch)
        assert list(scratch.iterdir()) == []
        return str(raised.value)

    assert refused(None).startswith("--text (")
    assert "byte 3 is 0xff" in refused(b"abc\xff")
    assert "is empty" in refused(b"")
    assert refused(b"x" * 127).startswith("--seq-len (128) is more than the 127 tokens")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no readable config.json"),
        ("{", "config.json is not JSON"),
        ("[]", "names no model_type"),
        ('{"hidden_size": 4}', "names no model_type"),
        (json.dumps({**LLAMA, "num_hidden_layers": 3}), "the model has 3 layers"),
        (json.dumps({**LLAMA, "vocab_size": 100}), "token ids below 100"),
    ],
)
def test_models_that_cannot_be_used(config, message, model, scratch):
    if config is None:
        (model / "config.json").unlink()
    else:
        (model / "config.json").write_text(config)
    with pytest.raises(OptionError, match=message):
        prepare_inputs(TrainOptions(model=model), scratch)
    assert list(scratch.iterdir()) == []


def test_pickled_weights_are_not_taken_for_none(model, scratch):
    (model / "pytorch_model.bin").touch()
    with pytest.raises(OptionError, match="save_pretrained, which writes safetensors"):
        prepare_inputs(TrainOptions(model=model), scratch)
