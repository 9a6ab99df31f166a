"""Models in plain torch, as strangers to hfpp write them: no config, no base class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models import VOCAB, PlainModel

WIDTH = 12


class MixBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x)))).cumsum(1) / x.shape[1]


class OneByOne(nn.Module):
    """A list of blocks in a plain loop, and the mean of its output as a second result."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(MixBlock() for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens) * 3.0
        for block in self.blocks:
            x = block(x)
        logits = self.head(x if scale is None else x * scale[:, None, None])
        return logits, logits.mean()


class InASequential(nn.Module):
    """The blocks are called by an nn.Sequential, not by the model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.trunk = nn.Sequential(*(MixBlock() for _ in range(5)))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.head(self.trunk(self.embed(tokens))))


class DictBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = MixBlock()
        self.gate = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.mix(x) * torch.sigmoid(state["level"])
        return y, {"level": state["level"] + self.gate(y), "first": state["first"]}


class DictAlong(nn.Module):
    """A dict goes from block to block; the head reads nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(DictBlock() for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.embed(tokens)
        state = {"level": x.mean(-1, keepdim=True), "first": x[:, :1]}
        for layer in self.layers:
            x, state = layer(x, state)
        return {"logits": self.head(x)}


class PromptBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = MixBlock()
        self.read = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, prompt: Tensor, *, strength: float) -> Tensor:
        return self.mix(x) + strength * self.read(prompt) @ x.transpose(1, 2).mean(-1)[..., None]


class LearnedPrompt(nn.Module):
    """One learned tensor that every block takes, and a table computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.prompt = nn.Parameter(torch.randn(1, WIDTH))
        self.to_prompt = nn.Linear(WIDTH, WIDTH)
        self.stack = nn.ModuleList(PromptBlock() for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        prompt = torch.tanh(self.to_prompt(self.prompt))
        for index, block in enumerate(self.stack):
            x = block(x, prompt, strength=0.5 + index)
        return self.head(x)


STRANGERS: dict[str, Any] = {
    "positional": PlainModel,
    "one by one": OneByOne,
    "sequential": InASequential,
    "dict": DictAlong,
    "prompt": LearnedPrompt,
}


def stranger(name: str) -> nn.Module:
    torch.manual_seed(3)
    return STRANGERS[name]().double()
