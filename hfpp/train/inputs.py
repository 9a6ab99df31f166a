"""Turns options into plain files that every process of a run reads: a config and token ids."""

from __future__ import annotations

import json
import random
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpp.train.errors import OptionError

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
# Names that configurations give to their number of layers and of known token ids.
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
# What draws random numbers in a forward: a pipeline's ranks draw others than one process would.
_RANDOM_PARTS = ("drop", "jitter")


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
    """

    config_folder: Path
    weights_folder: Path | None
    tokens_file: Path
    num_tokens: int
    num_bytes: int
    text_name: str
    model_name: str


def prepare_inputs(options: TrainOptions, folder: Path) -> RunInputs:
    """Writes what the run reads into `folder`, checking model and text on the way.

    Raises:
        OptionError: a model folder or a text that cannot be used, or that do not fit the other
            options.
    """
    config = _DEFAULT_CONFIG if options.model is None else _read_config(options.model)
    num_layers = _first_count(config, _LAYER_COUNTS)
    if num_layers is not None:
        options.check_layers(num_layers)
    text, text_name = read_text(options.text)
    tokens = _tokenize(text, options, _first_count(config, ("vocab_size",)))
    if len(tokens) < options.seq_len:
        raise OptionError(
            f"--seq-len ({options.seq_len}) is more than the {len(tokens)} tokens of {text_name}: "
            "use a longer --text or a smaller --seq-len."
        )
    (folder / "config.json").write_text(json.dumps(_without_randomness(config)), encoding="utf-8")
    tokens_file = folder / "tokens.int32"
    with tokens_file.open("wb") as file:
        tokens.tofile(file)
    has_weights = options.model is not None and _holds_any(options.model, _WEIGHT_FILES)
    return RunInputs(
        config_folder=folder,
        weights_folder=options.model if has_weights else None,
        tokens_file=tokens_file,
        num_tokens=len(tokens),
        num_bytes=len(text.encode()),
        text_name=text_name,
        model_name=f"small {config['model_type']}" if options.model is None else str(options.model),
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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(
            f"--model ({folder}) has no readable config.json ({error.strerror}): give a local "
            "folder that holds a model's configuration, with or without its safetensors."
        ) from None
    except ValueError as error:
        raise OptionError(f"--model ({folder}): config.json is not JSON: {error}.") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise OptionError(
            f"--model ({folder}): config.json names no model_type: give the configuration of a "
            "transformers model."
        )
    if not _holds_any(folder, _WEIGHT_FILES) and _holds_any(folder, ("pytorch_model.bin",)):
        raise OptionError(
            f"--model ({folder}) holds pytorch_model.bin but no model.safetensors: save the model "
            "with transformers' save_pretrained, which writes safetensors."
        )
    return config


def _tokenize(text: str, options: TrainOptions, vocab_size: int | None) -> array[int]:
    if options.model is not None and _holds_any(options.model, _TOKENIZER_FILES):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.model)
        tokens = array("i", tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        kind = "its tokenizer"
    else:
        tokens, kind = array("i", iter(text.encode())), "bytes, as the folder has no tokenizer"
    largest = max(tokens, default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise OptionError(
            f"--model ({options.model}) knows token ids below {vocab_size}, but the text holds "
            f"{largest} ({kind}): use a model folder whose tokenizer fits its vocab_size."
        )
    return tokens


def _without_randomness(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _without_randomness(item, key) for key, item in value.items()}
    if isinstance(value, float | int) and not isinstance(value, bool):
        return 0.0 if any(part in name.lower() for part in _RANDOM_PARTS) else value
    return value


def _first_count(config: dict[str, Any], names: Iterable[str]) -> int | None:
    """The first of the names that the configuration, or its text part, has a count under."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            for name in names:
                if isinstance(part.get(name), int):
                    return int(part[name])
    return None


def _holds_any(folder: Path, names: Iterable[str]) -> bool:
    return any((folder / name).is_file() for name in names)
