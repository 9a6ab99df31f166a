"""Text, tokens, windows and configurations: the same for every process, wrong ones refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hfpp.train.errors import OptionError
from hfpp.train.inputs import prepare_inputs, read_text, window_starts
from hfpp.train.model import Batches, build_model
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


def test_dropout_and_jitter_are_turned_off_and_named(model, scratch):
    config = {
        **LLAMA,
        "attention_dropout": 0.1,
        "resid_pdrop": 0.2,
        "rms_norm_eps": 1e-5,
        "adapter": {"dropout": 0.3, "hidden_size": 4},
        "router_jitter_noise": 0.01,
    }
    (model / "config.json").write_text(json.dumps(config))
    inputs = prepare_inputs(TrainOptions(model=model), scratch)
    names = ("attention_dropout", "resid_pdrop", "router_jitter_noise", "adapter.dropout")
    assert sorted(inputs.set_to_zero) == sorted(names)
    assert json.loads((scratch / "config.json").read_text()) == {
        **config,
        "attention_dropout": 0.0,
        "resid_pdrop": 0.0,
        "adapter": {"dropout": 0.0, "hidden_size": 4},
        "router_jitter_noise": 0.0,
    }


def test_dropout_that_is_on_by_default_is_turned_off(model, scratch):
    (model / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 4}))
    inputs = prepare_inputs(TrainOptions(model=model), scratch)
    assert {"attn_pdrop", "embd_pdrop", "resid_pdrop"} <= set(inputs.set_to_zero)
    config = AutoConfig.from_pretrained(inputs.config_folder)
    assert config.attn_pdrop == config.embd_pdrop == config.resid_pdrop == 0.0
    assert prepare_inputs(TrainOptions(), scratch).set_to_zero == ()


def test_weights_are_found(model, scratch):
    assert prepare_inputs(TrainOptions(model=model), scratch).weights_folder is None
    (model / "model.safetensors").touch()
    assert prepare_inputs(TrainOptions(model=model), scratch).weights_folder == model


def test_the_digest_tells_texts_and_models_apart(model, scratch, tmp_path):
    text = tmp_path / "text"
    text.write_text("to be or not to be " * 10)
    one = prepare_inputs(TrainOptions(text=text), scratch).digest
    assert prepare_inputs(TrainOptions(text=text), scratch).digest == one
    assert prepare_inputs(TrainOptions(text=text, model=model), scratch).digest != one
    text.write_text("to be or not to bee" * 10)
    assert prepare_inputs(TrainOptions(text=text), scratch).digest != one


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
    assert inputs.tokenizer_name == type(AutoTokenizer.from_pretrained(model)).__name__


def test_bytes_are_named_as_the_tokenizer(model, scratch):
    assert prepare_inputs(TrainOptions(), scratch).tokenizer_name == "bytes"
    inputs = prepare_inputs(TrainOptions(model=model), scratch)
    assert inputs.tokenizer_name == "bytes, as the folder has no tokenizer"


@pytest.mark.parametrize(
    "files",
    [
        {"vocab.txt": "hello\nworld\n"},
        {"spiece.model": "no sentencepiece"},
        {"sentencepiece.bpe.model": "no sentencepiece"},
        {"tokenizer.json": "{"},
        {"tokenizer.json": "{}"},
        {"tokenizer_config.json": "{}"},
        {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["x.Own", null]}}'},
        {"special_tokens_map.json": "{}"},
        {"tekken.json": "{}"},
        {"own.tiktoken": ""},
        {"merges.txt": "#version: 0.2\n"},
    ],
)
def test_a_broken_or_unknown_tokenizer_is_not_taken_for_none(files, model, scratch):
    for name, content in files.items():
        (model / name).write_text(content)
    with pytest.raises(OptionError, match=rf"its tokenizer \({next(iter(files))}\) ") as raised:
        prepare_inputs(TrainOptions(model=model), scratch)
    assert "to train on bytes, give a folder without" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(scratch.iterdir()) == []


def test_a_tokenizer_without_its_vocabulary_is_refused(model, scratch):
    """transformers makes an empty one, which knows no word."""
    (model / "config.json").write_text(
        json.dumps({"model_type": "bert", "is_decoder": True, "num_hidden_layers": 4})
    )
    (model / "special_tokens_map.json").write_text("{}")
    with pytest.raises(OptionError, match="of the text: complete its files"):
        prepare_inputs(TrainOptions(model=model), scratch)


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
        ("{", r"--model: .*config\.json, line 1, column 2: not JSON"),
        ("[]", "names no model_type"),
        ('{"hidden_size": 4}', "names no model_type"),
        (json.dumps({**LLAMA, "num_hidden_layers": 3}), "the model has 3 layers"),
        (json.dumps({**LLAMA, "num_hidden_layers": 0}), "has 0 layers.*give a configuration with"),
        (json.dumps({**LLAMA, "vocab_size": 100}), "token ids below 100"),
        (json.dumps({**LLAMA, "model_type": "lama"}), "no causal language model.*lama"),
        (json.dumps({**LLAMA, "model_type": "vit"}), "no causal language model"),
        (json.dumps({**LLAMA, "num_attention_heads": "many"}), "no causal language model"),
        (
            '{"model_type": "llama", "auto_map": {"AutoConfig": "x.Own"}, "num_hidden_layers": 3}',
            "the model has 3 layers",
        ),
        # Layers that the configuration does not name: by default 12 of them.
        ('{"model_type": "gpt2", "n_positions": 64}', "128. is more than the 64 positions"),
        ('{"model_type": "opt", "max_position_embeddings": 100}', "use --seq-len 100 or less"),
        (
            '{"model_type": "roberta", "is_decoder": true, "max_position_embeddings": 66}',
            "use --seq-len 64 or less",
        ),
        (
            '{"model_type": "gptj", "n_positions": 64, "n_embd": 64, "n_head": 1, "n_layer": 4}',
            "use --seq-len 64 or less",
        ),
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


def test_positions_that_are_computed_have_no_end(model, scratch):
    (model / "config.json").write_text(json.dumps({**LLAMA, "max_position_embeddings": 16}))
    assert prepare_inputs(TrainOptions(model=model, seq_len=17), scratch).num_tokens > 17


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "pytorch_model-00001-of-00002.bin",
        "model.pt",
        "consolidated.00.pth",
        "weights.Q4_K_M.gguf",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.ckpt.index",
        "adapter_model.safetensors",
        "model-00001-of-00002.safetensors",
    ],
)
def test_weights_in_another_form_are_not_taken_for_none(name, model, scratch):
    (model / name).touch()
    with pytest.raises(OptionError, match=f"holds {name} but no model.safetensors") as raised:
        prepare_inputs(TrainOptions(model=model), scratch)
    assert "save_pretrained, which writes safetensors" in str(raised.value)
    (model / "model.safetensors").touch()  # beside what is used, it may lie
    assert prepare_inputs(TrainOptions(model=model), scratch).weights_folder == model


def test_a_checkpoint_in_parts_is_complete_or_refused(model, scratch):
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    (model / "one.safetensors").touch()
    with pytest.raises(OptionError, match=r"lacks two\.safetensors.*1 of 2 files"):
        prepare_inputs(TrainOptions(model=model), scratch)
    (model / "two.safetensors").touch()
    assert prepare_inputs(TrainOptions(model=model), scratch).weights_folder == model
    for garbage in ("{", "[]", '{"weight_map": []}'):
        index.write_text(garbage)
        with pytest.raises(OptionError, match="is not an index of safetensors"):
            prepare_inputs(TrainOptions(model=model), scratch)


def test_weights_that_do_not_fit_are_never_replaced_by_random_ones(model, scratch):
    config = GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=256, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(model)
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    options = TrainOptions(model=model)
    inputs = prepare_inputs(options, scratch)
    assert torch.equal(
        build_model(options, inputs).transformer.wpe.weight, tensors["transformer.wpe.weight"]
    )
    del tensors["transformer.wpe.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(OptionError, match=r"lack 1 parameters.*such as transformer\.wpe\.weight"):
        build_model(options, inputs)
    weights.write_bytes(b"garbage")
    with pytest.raises(OptionError, match="its weights cannot be loaded: "):
        build_model(options, inputs)
