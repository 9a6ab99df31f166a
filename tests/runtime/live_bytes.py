"""Bytes of live tensors while code runs: of every storage that an operation makes, until freed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts what is allocated while it is entered.

    Attributes:
        now: bytes of storages that operations have made and that are alive.
        peak: the most that ``now`` was.
        kept: of these, bytes that autograd has saved for a backward.
        kept_peak: the most that ``kept`` was.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        """Leave out the storages of ``known`` tensors, such as parameters and gradients."""
        super().__init__()
        self.now = self.peak = self.kept = self.kept_peak = 0
        self._known = {t.untyped_storage().data_ptr() for t in known}
        self._seen: dict[int, int] = {}
        self._saved: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen or storage.data_ptr() in self._known:
            return
        self._seen[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._seen.pop(key)
        self.kept -= self._saved.pop(key, 0)

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage()._cdata
        if key in self._seen and key not in self._saved:
            self._saved[key] = self._seen[key]
            self.kept += self._seen[key]
            self.kept_peak = max(self.kept_peak, self.kept)
        return tensor.detach()  # the tensor itself would hold the graph that holds it

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count, what autograd saves too."""
        with self, saved_tensors_hooks(self._save, lambda tensor: tensor):
            yield
