"""What lies in a model's folder: its configuration, and which weights and tokenizer it holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfpp.errors import PipelineConfigError
from hfpp.plan.model.config import read_config_file
from hfpp.train.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ModelFolder", "read_model_folder"]

_WEIGHTS, _WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# Parts of the names, such as `pytorch_model.bin.index.json`, of files with weights.
_WEIGHT_ENDINGS = frozenset(
    "safetensors bin pt pth ckpt gguf ggml h5 msgpack onnx npz distcp".split()  # noqa: SIM905
)
_TOKENIZER_PREFIXES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken")
_TOKENIZER_SUFFIXES = (".model", ".spm", ".tiktoken", ".bpe")
_TOKENIZER_NAMES = ("special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """One folder.

    Attributes:
        path: of the folder.
        config: its `config.json`.
        has_weights: whether it holds safetensors to start from.
        tokenizer_files: names of those that look like a tokenizer's.
    """

    path: Path
    config: dict[str, Any]
    has_weights: bool
    tokenizer_files: tuple[str, ...]


def read_model_folder(folder: Path) -> ModelFolder:
    """Looks at a folder; reads no weights, and needs no transformers.

    Raises:
        OptionError: no configuration, or weights in a form that would not be used.
    """
    config = _read_config(folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return ModelFolder(
        path=folder,
        config=config,
        has_weights=_find_weights(folder, names),
        tokenizer_files=tuple(name for name in names if _is_tokenizers(name)),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = read_config_file(folder / "config.json").value
    except FileNotFoundError:
        raise OptionError(
            f"--model ({folder}) has no readable config.json (no such file): give a local "
            "folder that holds a model's configuration, with or without its safetensors."
        ) from None
    except PipelineConfigError as error:
        raise OptionError(f"--model: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise OptionError(
            f"--model ({folder}): config.json names no model_type: give the configuration of a "
            "transformers model."
        )
    return config


def _find_weights(folder: Path, names: list[str]) -> bool:
    if _WEIGHTS in names:
        return True
    if _WEIGHTS_INDEX in names:
        _check_shards(folder, names)
        return True
    others = [n for n in names if any(part in _WEIGHT_ENDINGS for part in n.split(".")[1:])]
    if others:
        raise OptionError(
            f"--model ({folder}) holds {others[0]} but no {_WEIGHTS}: save the model with "
            "transformers' save_pretrained, which writes safetensors; or, to start from random "
            "weights, give a folder without weights."
        )
    return False


def _check_shards(folder: Path, names: list[str]) -> None:
    try:
        index = json.loads((folder / _WEIGHTS_INDEX).read_text(encoding="utf-8"))
        shards = set(index["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise OptionError(
            f"--model ({folder}): {_WEIGHTS_INDEX} is not an index of safetensors: save the model "
            "again with transformers' save_pretrained."
        ) from None
    if missing := sorted(shards.difference(names)):
        raise OptionError(
            f"--model ({folder}) lacks {missing[0]}, which {_WEIGHTS_INDEX} names: complete the "
            f"checkpoint ({len(missing)} of {len(shards)} files are missing)."
        )


def _is_tokenizers(name: str) -> bool:
    return (
        name in _TOKENIZER_NAMES
        or name.startswith(_TOKENIZER_PREFIXES)
        or name.endswith(_TOKENIZER_SUFFIXES)
    )
