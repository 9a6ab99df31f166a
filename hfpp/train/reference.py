"""The plain model, trained in one process: what a pipelined run must equal.

None of hfpp's code is used here: transformers' model, torch's loss, clipping and optimizer, the
whole batch at once. A run trains it in a process that has not imported `hfpp.runtime`.
"""

from __future__ import annotations

import array
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["ReferenceRun"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRun:
    """A training run as plain data; picklable.

    Attributes:
        config_folder: holds a `config.json`.
        weights_folder: holds safetensors; None for random weights.
        tokens_file: int32 token ids, in the machine's byte order.
        windows: per step, where its sequences begin in the tokens.
        seq_len: tokens per sequence.
        lr: of AdamW, after the warm-up.
        warmup_steps: over which the learning rate rises linearly.
        max_grad_norm: of all gradients; 0 does not clip.
        dtype: torch's name of the type of everything.
        seed: of the weights.
        device: torch's name of the device.
        threads: CPU threads.
    """

    config_folder: Path
    weights_folder: Path | None
    tokens_file: Path
    windows: tuple[tuple[int, ...], ...]
    seq_len: int
    lr: float
    warmup_steps: int
    max_grad_norm: float
    dtype: str
    seed: int
    device: str
    threads: int

    def __call__(self, _index: int, report: Callable[[tuple[float, float]], None]) -> None:
        """Trains, and reports every step's loss and norm of the gradients."""
        import torch
        from torch.nn.functional import cross_entropy
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(self.threads)
        tokens = array.array("i", self.tokens_file.read_bytes())
        config = AutoConfig.from_pretrained(self.config_folder)
        dtype = getattr(torch, self.dtype)
        torch.manual_seed(self.seed)
        if self.weights_folder is None:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        else:
            model = AutoModelForCausalLM.from_pretrained(
                self.weights_folder, config=config, dtype=dtype, use_safetensors=True
            )
        model.train().to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr)
        for step, starts in enumerate(self.windows):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))
            sequences = [list(tokens[start : start + self.seq_len]) for start in starts]
            ids = torch.tensor(sequences, device=self.device)
            logits = model(input_ids=ids, use_cache=False).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(
                model.parameters(), self.max_grad_norm or math.inf
            )
            optimizer.step()
            optimizer.zero_grad()
            report((loss.item(), norm.item()))
