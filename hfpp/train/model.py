"""What the ranks build: the model of a run's configuration, and its batches; and its check."""

from __future__ import annotations

import re
from contextlib import suppress
from itertools import chain
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hfpp.errors import PipelineConfigError
from hfpp.runtime.find_anatomy import find_anatomy
from hfpp.train.errors import OptionError
from hfpp.train.inputs import RunInputs, window_starts
from hfpp.train.randomness import without_randomness

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from hfpp.train.model_folder import ModelFolder
    from hfpp.train.options import TrainOptions

__all__ = ["Batches", "build_model", "check_model"]

_POSITION_TABLE = re.compile(r"pos|wpe")
_SPARE_POSITIONS = 2  # some tables begin with rows for padding


def check_model(options: TrainOptions, folder: ModelFolder) -> tuple[dict[str, Any], int | None]:
    """Builds the model without its weights, and checks that it fits the other options.

    Args:
        options: the run.
        folder: the model's.

    Returns:
        The configuration with dropout that is on by default, which need not be written; and the
        size of the vocabulary where it has one.

    Raises:
        OptionError: transformers cannot build a causal language model from the configuration; it
            has fewer layers than stages, or fewer positions than `seq_len`.
    """
    try:
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
        text_config = config.get_text_config()
    except Exception as error:  # transformers raises whatever its parts raise
        raise OptionError(
            f"--model ({options.model}): transformers makes no causal language model of its "
            f"config.json: {_short(error)}"
        ) from None
    num_layers = getattr(text_config, "num_hidden_layers", None)
    with suppress(PipelineConfigError):  # it may need values that it lacks here: the ranks tell
        num_layers = find_anatomy(model).num_layers
    if num_layers is not None:
        options.check_layers(num_layers)
    positions = _num_positions(model, getattr(text_config, "max_position_embeddings", None))
    if positions is not None and options.seq_len > positions:
        raise OptionError(
            f"--seq-len ({options.seq_len}) is more than the {positions} positions that the model "
            f"in {options.model} has: use --seq-len {positions} or less."
        )
    defaults = config.to_dict()
    _, random = without_randomness(defaults)
    sections = {path.partition(".")[0] for path in random}
    completed = {**folder.config, **{name: defaults[name] for name in sections}}
    return completed, getattr(text_config, "vocab_size", None)


def _num_positions(model: nn.Module, configured: int | None) -> int | None:
    """How long a sequence can be; None where positions are computed and no table ends."""
    if not isinstance(configured, int):
        return None
    for name, table in chain(model.named_parameters(), model.named_buffers()):
        rows = table.shape[0] if table.ndim == 2 else 0
        if (
            _POSITION_TABLE.search(name.lower())
            and configured <= rows <= configured + _SPARE_POSITIONS
        ):
            owner = model.get_submodule(name.rpartition(".")[0])
            padding = getattr(owner, "padding_idx", None)
            return configured if padding is None else min(configured, rows - padding - 1)
    return None


def build_model(options: TrainOptions, inputs: RunInputs) -> nn.Module:
    """The whole model on the CPU: the same on every rank, by the seed or from the checkpoint.

    Raises:
        OptionError: the checkpoint cannot be read, or lacks parameters.
    """
    config = AutoConfig.from_pretrained(inputs.config_folder)
    config.use_cache = False
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(options.seed)
    if inputs.weights_folder is None:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    else:
        model = _from_checkpoint(inputs.weights_folder, config, dtype)
    assert isinstance(model, torch.nn.Module)
    return model.train()


def _from_checkpoint(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # whatever a damaged file leads to
        raise OptionError(
            f"--model ({folder}): its weights cannot be loaded: {_short(error)}"
        ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise OptionError(
            f"--model ({folder}): its weights lack {len(missing)} parameters of the model, such as "
            f"{missing[0]}, which would start from random numbers: give the checkpoint of a causal "
            "language model, or a folder without weights."
        )
    return model


def _short(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}", 300)


class Batches:
    """The sequences of each step that belong to one data-parallel replica."""

    def __init__(
        self, options: TrainOptions, inputs: RunInputs, *, replica: int, replicas: int
    ) -> None:
        self._options = options
        self._tokens = torch.from_file(
            str(inputs.tokens_file), shared=False, size=inputs.num_tokens, dtype=torch.int32
        )
        self._share = slice(replica, None, replicas)

    def __getitem__(self, step: int) -> Tensor:
        """Input ids `[batch_size / replicas, seq_len]`, int64, of one step."""
        starts = window_starts(self._options, len(self._tokens), step)[self._share]
        length = self._options.seq_len
        return torch.stack([self._tokens[start : start + length] for start in starts]).long()
