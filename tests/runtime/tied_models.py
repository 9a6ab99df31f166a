"""Models in plain torch that hold one tensor in several places, each in another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import VOCAB

WIDTH = 12
DEPTH = 4


class Mix(nn.Module):
    """A small function of the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """A hidden state of the same shape."""
        return torch.tanh(self.linear(x))


class Block(nn.Module):
    """A residual block: a mix that may be others' too, and a norm of its own."""

    def __init__(self, mix: Mix | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = Mix() if mix is None else mix

    def forward(self, x: Tensor) -> Tensor:
        """A hidden state of the same shape."""
        return x + self.mix(self.norm(x))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Embedding, blocks, head; nothing tied."""

    def __init__(self, blocks: list[Any] | None = None, tokens: nn.Embedding | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH) if tokens is None else tokens
        self.blocks = nn.ModuleList(blocks or [Block() for _ in range(DEPTH)])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def hidden(self, x: Tensor) -> Tensor:
        """The hidden state after all blocks."""
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, float [batch, seq, vocab]."""
        return self.head(self.hidden(self.tokens(ids)))  # type: ignore[no-any-return]


class HeadByCall(Model):
    """No head: the forward multiplies by the embedding."""

    def __init__(self) -> None:
        super().__init__()
        del self.head

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, float [batch, seq, vocab]."""
        return nn.functional.linear(self.hidden(self.tokens(ids)), self.tokens.weight)


class HeadModule(Model):
    """The embedding module registered a second time, as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = self.tokens

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, float [batch, seq, vocab]."""
        return nn.functional.linear(self.hidden(self.tokens(ids)), self.head.weight)


class Looking(Block):
    """Looks the hidden state up in the embedding, a submodule or an unregistered reference."""

    def __init__(self, tokens: nn.Embedding, *, registered: bool = True) -> None:
        super().__init__()
        self.table: Any = tokens if registered else [tokens]

    def forward(self, x: Tensor) -> Tensor:
        """A hidden state of the same shape."""
        table = self.table[0] if isinstance(self.table, list) else self.table
        return super().forward(x) + torch.softmax(x @ table.weight.T, -1) @ table.weight


class Projecting(Block):
    """Has an output projection, to be tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """A hidden state of the same shape."""
        return super().forward(x) + torch.softmax(self.out(x), -1) @ self.out.weight


class Listed(Model):
    """What the blocks share is a module of the model as well, which may also call it itself."""

    def __init__(self, *, calls: bool = False) -> None:
        super().__init__()
        self.shared, self.calls = Mix(), calls
        for block in self.blocks:
            block.mix = self.shared

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, float [batch, seq, vocab]."""
        if not self.calls:
            return super().forward(ids)
        return self.head(self.shared(self.hidden(self.shared(self.tokens(ids)))))  # type: ignore[no-any-return]


class ListedFirst(Listed):
    """The shared module comes before the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self._modules = {"shared": self.shared, **self._modules}


class TwoLists(Model):
    """The blocks stand in a second list, which nobody runs."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.ModuleList(list(self.blocks))


def head(depth: int = DEPTH) -> Model:
    model = Model([Block() for _ in range(depth)])
    model.head.weight = model.tokens.weight
    return model


def one_layer() -> Model:
    return Model([Block()] * DEPTH)


def two_layers_in_turn() -> Model:
    return Model([Block(), Block()] * (DEPTH // 2))


def one_layer_in_a_sequential() -> Model:
    model = one_layer()
    model.blocks = nn.Sequential(*model.blocks)  # type: ignore[assignment]
    return model


def one_submodule() -> Model:
    mix = Mix()
    return Model([Block(mix) for _ in range(DEPTH)])


def one_set_of_tensors() -> Model:
    model = Model()
    first: Any = model.blocks[0]
    for block in model.blocks:
        block.mix.linear.weight = first.mix.linear.weight
        block.mix.linear.bias = first.mix.linear.bias
    return model


def two_of_four() -> Model:
    model = Model()
    model.blocks[3].mix.linear.weight = model.blocks[1].mix.linear.weight  # type: ignore[union-attr]
    return model


def looking() -> Model:
    tokens = nn.Embedding(VOCAB, WIDTH)
    return Model([Looking(tokens) for _ in range(DEPTH)], tokens)


def looking_with_a_head() -> Model:
    model = looking()
    model.head.weight = model.tokens.weight
    return model


def one_block_looking() -> Model:
    tokens = nn.Embedding(VOCAB, WIDTH)
    return Model([*(Block() for _ in range(DEPTH - 1)), Looking(tokens)], tokens)


def blocks_before_the_embedding() -> Model:
    model = looking()
    model._modules = {"blocks": model.blocks, **model._modules}
    return model


def unregistered() -> Model:
    tokens = nn.Embedding(VOCAB, WIDTH)
    return Model([Looking(tokens, registered=False) for _ in range(DEPTH)], tokens)


def projecting() -> Model:
    model = Model([Projecting() for _ in range(DEPTH)])
    for block in model.blocks:
        block.out.weight = model.tokens.weight
    return model


def three_holders() -> Model:
    model = Model([Block(), Projecting(), Block(), Block()])
    model.head.weight = model.blocks[1].out.weight = model.tokens.weight  # type: ignore[union-attr]
    return model


def unused() -> Model:
    """A tensor that all blocks hold and none uses: no gradient, and so no weight decay."""
    model, spare = Model(), nn.Parameter(torch.ones(3))
    for block in model.blocks:
        block.register_parameter("spare", spare)
    return model


MODELS: dict[str, Callable[[], Model]] = {
    "head": head,
    "head of eight layers": lambda: head(8),
    "head by call": HeadByCall,
    "head is the embedding module": HeadModule,
    "one layer": one_layer,
    "two layers in turn": two_layers_in_turn,
    "one layer in a Sequential": one_layer_in_a_sequential,
    "one submodule": one_submodule,
    "one set of tensors": one_set_of_tensors,
    "two of four": two_of_four,
    "looking": looking,
    "looking with a head": looking_with_a_head,
    "one block looking": one_block_looking,
    "blocks before the embedding": blocks_before_the_embedding,
    "unregistered": unregistered,
    "projecting": projecting,
    "three holders": three_holders,
    "listed": Listed,
    "listed first": ListedFirst,
    "listed and called": lambda: Listed(calls=True),
    "two lists": TwoLists,
    "unused": unused,
}


def tied_model(name: str) -> Model:
    """A random model in float64, the same on every call."""
    torch.manual_seed(0)
    return MODELS[name]().double()
