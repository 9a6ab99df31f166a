"""A model whose parts take given times, by sleeping: ranks that share a core do not disturb it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfpp.plan.costs import ModelCosts, UnitCost

WIDTH, VOCABULARY = 8, 16


class Sleep(torch.autograd.Function):
    """The identity, which sleeps for given seconds in its forward and in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_seconds = backward
        if x.device.type != "meta":
            time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.backward_seconds)
        return gradient, None, None


class SleepingLayer(nn.Module):
    """A layer that takes so many seconds: a third in the forward, the rest for its inputs."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(Sleep.apply(x, self.seconds / 3, 2 * self.seconds / 3))


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
