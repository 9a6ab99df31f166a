"""A small plain model, its stages, and what it computes without a pipeline (float64)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage

from hfpp.runtime.stage_shapes import precompute_stage_shapes

VOCAB, HIDDEN, LAYERS, SEQ = 11, 6, 8, 5


class Config:
    vocab_size = VOCAB
    hidden_size = HIDDEN


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.calls += 1
        return hidden + self.down(torch.tanh(self.up(hidden)))


class Model(nn.Module):
    """The whole model or, with `keep`, one stage of it: the same names for the same parameters."""

    def __init__(self, keep: range | None = None) -> None:
        super().__init__()
        keep = range(LAYERS) if keep is None else keep
        self.embed = nn.Embedding(VOCAB, HIDDEN) if keep.start == 0 else None
        self.layers = nn.ModuleDict({str(i): Block() for i in keep})
        self.lm_head = nn.Linear(HIDDEN, VOCAB) if keep.stop == LAYERS else None

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor | None = None) -> torch.Tensor:
        if self.embed is not None:
            x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
            if shift is not None:
                x = x + shift[:, None, None]
        return x if self.lm_head is None else self.lm_head(x)


def whole_model() -> Model:
    torch.manual_seed(7)
    return Model().double()


def mean_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def batch(rows: int, seed: int, seq: int = SEQ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, target and the keyword argument that every stage gets."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (rows, seq), generator=draw)
    target = torch.randint(VOCAB, (rows, seq), generator=draw)
    return ids, target, torch.randn(rows, generator=draw, dtype=torch.float64)


def local_parts(indices: list[int], num_stages: int) -> dict[int, Model]:
    """The modules of some stages, with the whole model's weights."""
    weights = whole_model().state_dict()
    bounds = [round(LAYERS * s / num_stages) for s in range(num_stages + 1)]
    parts = {}
    for index in indices:
        part = Model(range(bounds[index], bounds[index + 1])).double()
        part.load_state_dict({name: weights[name] for name in part.state_dict()})
        parts[index] = part
    return parts


def local_stages(
    indices: list[int], num_stages: int, *, static: tuple[int, int] | None = None
) -> list[PipelineStage]:
    """This rank's stages; static: (microbatch size, length)."""
    stages = [
        PipelineStage(part, index, num_stages, torch.device("cpu"))
        for index, part in local_parts(indices, num_stages).items()
    ]
    if static is not None:
        precompute_stage_shapes(stages, Config(), *static)
    return stages


class Reference(NamedTuple):
    losses: list[float]
    gradients: dict[str, torch.Tensor]
    logits: torch.Tensor


def reference(
    batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    n_microbatches: int,
    *,
    mean: bool = False,
    loss_fn: Callable[..., torch.Tensor] = mean_loss,
) -> Reference:
    """The unsplit model over all batches; gradients summed, or (`mean`) averaged in each step."""
    model = whole_model()
    losses: list[float] = []
    logits: list[Any] = []
    for ids, target, shift in batches:
        for i, t, s in zip(
            ids.chunk(n_microbatches),
            target.chunk(n_microbatches),
            shift.chunk(n_microbatches),
            strict=True,
        ):
            out = model(i, shift=s)
            loss = loss_fn(out, t)
            (loss / n_microbatches if mean else loss).backward()
            losses.append(loss.item())
            logits.append(out.detach())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Reference(losses, gradients, torch.cat(logits) if len(batches) == 1 else logits[-1])


def assert_gradients(
    stages: list[PipelineStage], expected: dict[str, torch.Tensor], tolerance: float = 1e-9
) -> int:
    """Each parameter of the stages has the unsplit model's gradient; returns how many there are."""
    count = 0
    for stage in stages:
        for name, parameter in stage.submod.named_parameters():
            assert parameter.grad is not None, f"stage {stage.stage_index}: {name} has no gradient"
            error = (parameter.grad - expected[name]).norm() / expected[name].norm()
            assert error < tolerance, f"stage {stage.stage_index}: {name} is off by {error:.3g}"
            count += 1
    return count


def zero_grad(stages: list[PipelineStage]) -> None:
    for stage in stages:
        stage.submod.zero_grad(set_to_none=True)
