"""Turns options into plain files that every process of a run reads: a config and token ids."""

from __future__ import annotations

import json
import random
from array import array
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpp.train.errors import OptionError
from hfpp.train.model_folder import read_model_folder
from hfpp.train.randomness import without_randomness

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hfpp.train.options import TrainOptions

__all__ = ["RunInputs", "prepare_inputs", "read_text", "window_starts"]

_BYTE_VALUES = 256
# A small Llama: eight layers, so that eight stages have one each.
_DEFAULT_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": _BYTE_VALUES,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """What is trained on what, as files and numbers; the same for every process of a run.

    Attributes:
        config_folder: holds a `config.json` without dropout.
        weights_folder: holds safetensors; None starts from random weights.
        tokens_file: int32 token ids of the whole text, in the machine's byte order.
        num_tokens: how many.
        num_bytes: of the text in UTF-8.
        text_name: the text, in words.
        model_name: the model, in words.
        tokenizer_name: the tokenizer, in words.
        set_to_zero: entries of the configuration that turn dropout off.
        digest: of the configuration and the tokens.
    """

    config_folder: Path
    weights_folder: Path | None
    tokens_file: Path
    num_tokens: int
    num_bytes: int
    text_name: str
    model_name: str
    tokenizer_name: str
    set_to_zero: tuple[str, ...]
    digest: str


def prepare_inputs(options: TrainOptions, folder: Path) -> RunInputs:
    """Writes what the run reads into `folder`, checking model and text on the way.

    Imports torch and transformers where the options name a model.

    Raises:
        OptionError: a model folder or a text that cannot be used, or that do not fit the other
            options. Nothing is written then.
    """
    text, text_name = read_text(options.text)
    vocab_size: int | None
    ids: Iterable[int]
    if options.model is None:
        config, weights_folder, vocab_size = _DEFAULT_CONFIG, None, _BYTE_VALUES
        options.check_layers(config["num_hidden_layers"])
        tokenizer_name, ids = "bytes", iter(text.encode())
    else:
        from hfpp.train.model import check_model
        from hfpp.train.tokens import tokenize

        model_folder = read_model_folder(options.model)
        config, vocab_size = check_model(options, model_folder)
        weights_folder = options.model if model_folder.has_weights else None
        tokenizer_name, ids = tokenize(text, model_folder)
    config, set_to_zero = without_randomness(config)
    tokens = array("i", ids)
    largest = max(tokens)
    if vocab_size is not None and largest >= vocab_size:
        raise OptionError(
            f"--model ({options.model}) knows token ids below {vocab_size}, but the text holds "
            f"{largest} (tokenizer: {tokenizer_name}): use a model folder whose tokenizer fits its "
            "vocab_size."
        )
    if len(tokens) < options.seq_len:
        raise OptionError(
            f"--seq-len ({options.seq_len}) is more than the {len(tokens)} tokens of {text_name}: "
            "use a longer --text or a smaller --seq-len."
        )
    config_text = json.dumps(config)
    (folder / "config.json").write_text(config_text, encoding="utf-8")
    tokens_file = folder / "tokens.int32"
    with tokens_file.open("wb") as file:
        tokens.tofile(file)
    return RunInputs(
        config_folder=folder,
        weights_folder=weights_folder,
        tokens_file=tokens_file,
        num_tokens=len(tokens),
        num_bytes=len(text.encode()),
        text_name=text_name,
        model_name=f"small {config['model_type']}" if options.model is None else str(options.model),
        tokenizer_name=tokenizer_name,
        set_to_zero=set_to_zero,
        digest=sha256(config_text.encode() + tokens.tobytes()).hexdigest(),
    )


def window_starts(options: TrainOptions, num_tokens: int, step: int) -> list[int]:
    """Where the sequences of one step begin in the text: the same for the same seed and step."""
    draw = random.Random(f"{options.seed}/{step}")
    return [draw.randrange(num_tokens - options.seq_len + 1) for _ in range(options.batch_size)]


def read_text(path: Path | None) -> tuple[str, str]:
    """The text to train on, and what to call it.

    Raises:
        OptionError: a file that cannot be read, is not UTF-8 or is empty.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics)), "pydoc_data.topics"
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise OptionError(
            f"--text ({path}) cannot be read ({error.strerror}): give a UTF-8 text file."
        ) from None
    except UnicodeDecodeError as error:
        raise OptionError(
            f"--text ({path}) is not UTF-8 (byte {error.start} is "
            f"{error.object[error.start]:#04x}): convert it, for example with iconv -t utf-8."
        ) from None
    if not text:
        raise OptionError(f"--text ({path}) is empty: give a file with text.")
    return text, str(path)
