"""Anatomies of models that were taken apart before, found again by what models are made of."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from hfpp.runtime.model_digest import ModelDigest, digest_of
from hfpp.runtime.module_copy import copy_structure

if TYPE_CHECKING:
    from hfpp.runtime.anatomy import Anatomy


class AnatomyCache:
    """The anatomies that were used last.

    An anatomy depends on nothing but what a `ModelDigest` covers, so that pipelines that share one
    know nothing of each other: everybody gets a skeleton of their own.

    Args:
        most: how many anatomies are held.
        most_nodes: bound on all nodes of their graphs and all modules of their skeletons together;
            a thousand take about 3 MB. A single anatomy beyond it is not held.
    """

    def __init__(self, *, most: int = 8, most_nodes: int = 100_000) -> None:
        self._most, self._most_nodes = most, most_nodes
        self._held: OrderedDict[ModelDigest, tuple[Anatomy, int]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, model: nn.Module, make: Callable[[nn.Module], Anatomy]) -> Anatomy:
        """What ``make(model)`` returns, or returned for a model that was the same."""
        digest = digest_of(model)
        if digest is None:
            return make(model)
        with self._lock:
            known = self._held.get(digest)
            if known is not None:
                self._held.move_to_end(digest)
        if known is not None:
            return _with_own_skeleton(known[0])
        anatomy = make(model)
        self._hold(digest, anatomy)
        return anatomy

    def _hold(self, digest: ModelDigest, anatomy: Anatomy) -> None:
        size = anatomy.size()
        if size > self._most_nodes:
            return
        with self._lock:
            self._held[digest] = (_with_own_skeleton(anatomy), size)
            while (
                len(self._held) > self._most
                or sum(size for _, size in self._held.values()) > self._most_nodes
            ):
                self._held.popitem(last=False)

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._held.clear()

    def __len__(self) -> int:
        return len(self._held)


def _with_own_skeleton(anatomy: Anatomy) -> Anatomy:
    """Stages hand parts of the skeleton to the model's code, which may write on them.

    Further runs, of other sizes and arguments, stay with whoever asked for them: their number is
    bounded for each.
    """
    memo = {id(parameter): parameter for parameter in anatomy.skeleton.parameters()}
    skeleton = copy_structure(anatomy.skeleton, memo)
    return dataclasses.replace(anatomy, skeleton=skeleton, kinds={}, _resized={})
