"""A text as the token ids of a model's own tokenizer."""

from __future__ import annotations

from textwrap import shorten
from typing import TYPE_CHECKING

from hfpp.train.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hfpp.train.model_folder import ModelFolder

__all__ = ["tokenize"]


def tokenize(text: str, folder: ModelFolder) -> tuple[str, Iterable[int]]:
    """The tokenizer's name and the text's ids; bytes where the folder has no tokenizer.

    Raises:
        OptionError: the folder has files of a tokenizer that cannot be loaded or used.
    """
    if not folder.tokenizer_files:
        return "bytes, as the folder has no tokenizer", iter(text.encode())
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False)
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # it raises whatever the reader of the file raises
        reason = shorten(f"{type(error).__name__}: {error}", 300)
        raise _unusable(folder, f"cannot be used: {reason}") from None
    # A tokenizer whose vocabulary was not found is an empty one, without an error.
    if len(set(ids)) < min(2, len(set(text))):
        raise _unusable(folder, f"makes {'one token only' if ids else 'no token'} of the text")
    return type(tokenizer).__name__, ids


def _unusable(folder: ModelFolder, reason: str) -> OptionError:
    return OptionError(
        f"--model ({folder.path}): its tokenizer ({', '.join(folder.tokenizer_files)}) {reason}: "
        "complete its files; or, to train on bytes, give a folder without them."
    )
