"""A model whose parts take given times, by sleeping: ranks that share a core do not disturb it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hfpp.plan.costs import ModelCosts, UnitCost

WIDTH, VOCABULARY = 8, 16


class _Sleep(torch.autograd.Function):
    """Sleeps a third of its time in the forward and the rest in the backward."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        if x.device.type != "meta":
            time.sleep(seconds / 3)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(2 * ctx.seconds / 3)
        return gradient, None


class SleepingLayer(nn.Module):
    """A layer that takes so many seconds, forward and backward."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(_Sleep.apply(x, self.seconds))


class SleepingModel(nn.Module):
    """Layers and a head that take given seconds, forward and backward, per microbatch."""

    def __init__(self, layers: Sequence[float], head: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([SleepingLayer(seconds) for seconds in layers])
        self.before_head = SleepingLayer(head)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.before_head(x))


def sleeping_costs(layers: Sequence[float], head: float) -> ModelCosts:
    """What the parts of the model with these times cost."""
    *units, last = (
        UnitCost(forward=s / 3, backward_input=2 * s / 3, backward_weight=0.0)
        for s in (*layers, head)
    )
    free = UnitCost(forward=0.0, backward_input=0.0, backward_weight=0.0)
    return ModelCosts(
        embedding=free, layers=tuple(units), head=last, boundary_bytes=0, source="measured"
    )
