"""What the ranks build: the model of a run's configuration, and its batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hfpp.train.inputs import RunInputs, window_starts

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hfpp.train.options import TrainOptions

__all__ = ["Batches", "build_model"]


def build_model(options: TrainOptions, inputs: RunInputs) -> nn.Module:
    """The whole model on the CPU: the same on every rank, by the seed or from the checkpoint."""
    config = AutoConfig.from_pretrained(inputs.config_folder)
    config.use_cache = False
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(options.seed)
    if inputs.weights_folder is None:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    else:
        model = AutoModelForCausalLM.from_pretrained(
            inputs.weights_folder, config=config, dtype=dtype, use_safetensors=True
        )
    assert isinstance(model, torch.nn.Module)
    return model.train()


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
