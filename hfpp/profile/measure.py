"""Seconds and bytes of the parts of a live model: run each by itself, forward and backward."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfpp import _core
from hfpp.plan.costs import ModelCosts, UnitCost
from hfpp.profile.pieces import Piece, pieces_of
from hfpp.runtime import torch_compat as compat
from hfpp.runtime.find_anatomy import find_anatomy
from hfpp.runtime.layer_list import list_of_layers
from hfpp.runtime.loss import causal_lm_loss
from hfpp.runtime.model_inputs import plain_ids

__all__ = ["profile_model"]

_WARM_UPS = 2
_INDEX = re.compile(r"(layer|block)_?(idx|id|index|number|num)|^(idx|index)$")


def profile_model(
    model: nn.Module,
    *,
    microbatch_size: int,
    seq_len: int,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = causal_lm_loss,
    repeats: int = 10,
) -> ModelCosts:
    """Times the parts of a model where it is, in the dtype that it has.

    Each layer is run with the arguments that the model gives it. Layers of the same class, sizes
    and settings are timed once. What runs before the layers counts as the embedding, what runs
    after them, with the loss, as the head. The backward of the inputs is timed by itself; that of
    the weights is what a whole backward takes longer; what a backward in two parts, as
    zero-bubble schedules run it, takes more than a whole one is timed too. Parts run in turns, so
    that none finds more in the caches than in a step, and their gradients are added up as those of
    microbatches are. Of several runs the median counts.

    Bytes of activations are those of tensors that autograd keeps for the backward, without
    parameters; between the halves of a split backward all of a layer's are taken to be kept.

    Args:
        model: on its device, with weights of any values.
        microbatch_size: sequences.
        seq_len: tokens per sequence.
        loss_fn: of the model's output and the token ids.
        repeats: runs of each part, after two to warm up.

    Returns:
        What the parts cost, measured.

    Raises:
        PipelineConfigError: a size below 1, or a model whose layers are not found.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        >>> config = LlamaConfig(vocab_size=64, num_hidden_layers=3, **sizes)
        >>> costs = profile_model(LlamaForCausalLM(config), microbatch_size=1, seq_len=8)
        >>> len(costs.layers), costs.layers[0] == costs.layers[2]
        (3, True)
    """
    for name, value in (
        ("microbatch_size", microbatch_size),
        ("seq_len", seq_len),
        ("repeats", repeats),
    ):
        _core.checked_integer(name, value, minimum=1)
    anatomy = find_anatomy(model)
    device = next(model.parameters()).device
    ids = _token_ids(model, microbatch_size, seq_len).to(device)
    was_training = model.training
    model.train()
    try:
        before, layers, after = pieces_of(model, anatomy, ids, loss_fn)
        modules = list_of_layers(model.get_submodule(anatomy.layers_name))
        kinds = [_kind(module) for module in modules]
        kept = dict(zip(kinds, layers, strict=True))  # of each kind one
        costs = dict(
            zip(
                ("embedding", *kept, "head"),
                _measured((before, *kept.values(), after), device, repeats, model),
                strict=True,
            )
        )
        cut = min(1, anatomy.num_layers - 1)
        crossing = (
            anatomy.slot_metas(cut, microbatch_size, seq_len, next(model.parameters()).dtype)
            if cut
            else ()
        )
        return ModelCosts(
            embedding=costs["embedding"],
            layers=tuple(costs[kind] for kind in kinds),
            head=costs["head"],
            boundary_bytes=sum(_bytes(slot.shape, slot.dtype) for slot in crossing),
            source="measured",
        )
    finally:
        model.train(was_training)


def _token_ids(model: nn.Module, batch: int, seq: int) -> Tensor:
    """Random ids, but none that is special: they decide which experts are taken."""
    plain = plain_ids(model, batch, seq)
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(getattr(embeddings, "weight", None), "shape", (int(plain.max()) + 1,))[0]
    special = set(range(int(plain.max()) + 1)) - set(plain.flatten().tolist())
    values: dict[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    special |= {v for k, v in values.items() if k.endswith("token_id") and isinstance(v, int)}
    drawn = torch.randint(rows, (batch, seq), generator=torch.Generator().manual_seed(0))
    allowed = torch.tensor([value not in special for value in drawn.flatten().tolist()])
    return torch.where(allowed.reshape(batch, seq), drawn, plain)


def _kind(layer: nn.Module) -> Any:
    """What decides how long a layer takes: classes, shapes and settings, without its place."""
    parts = []
    for name, module in layer.named_modules():
        settings = tuple(
            (key, value)
            for key, value in sorted(vars(module).items())
            if isinstance(value, int | float | str) and not _INDEX.search(key)
        )
        parts.append((name, type(module), settings))
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())
    return (tuple(parts), shapes)


@dataclass(frozen=True, slots=True)
class _Run:
    """Seconds of one run of a piece."""

    forward: float
    backward_input: float
    backward: float
    split: float  # of both parts of a backward that is split as zero-bubble schedules do


def _measured(
    pieces: Sequence[Piece], device: torch.device, repeats: int, model: nn.Module
) -> list[UnitCost]:
    with _own_gradients(model):
        turns = [[_run(piece, device) for piece in pieces] for _ in range(_WARM_UPS + repeats)]
    return [
        _cost(piece, runs, _kept_bytes(piece, model))
        for piece, *runs in zip(pieces, *turns[_WARM_UPS:], strict=True)
    ]


def _cost(piece: Piece, runs: Sequence[_Run], kept: int) -> UnitCost:
    backward_input = statistics.median(run.backward_input for run in runs)
    backward = statistics.median(run.backward for run in runs)
    split = statistics.median(run.split for run in runs)
    return UnitCost(
        forward=statistics.median(run.forward for run in runs),
        backward_input=backward_input,
        backward_weight=max(0.0, backward - backward_input),
        parameters=sum(p.numel() for p in piece.parameters),
        activation_bytes=kept,
        weight_bytes=kept if piece.parameters else 0,
        split_backward=max(0.0, split - backward),
    )


@contextmanager
def _own_gradients(model: nn.Module) -> Iterator[None]:
    """Gradients of runs are added to each other, not to those that the model has."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def _run(piece: Piece, device: torch.device) -> _Run:
    started = _now(device)
    output = piece.run(piece.hidden)
    forward = _now(device) - started
    if not output.requires_grad:  # such as a frozen embedding
        return _Run(forward, 0.0, 0.0, 0.0)
    gradient = torch.ones_like(output)
    inputs = () if piece.hidden is None else (piece.hidden,)
    backward_input = 0.0
    if inputs:
        started = _now(device)
        torch.autograd.grad(output, inputs, gradient, retain_graph=True, allow_unused=True)
        backward_input = _now(device) - started
    for tensor in inputs:
        tensor.grad = None  # every microbatch has inputs of its own
    started = _now(device)
    torch.autograd.backward(output, gradient, inputs=(*inputs, *piece.parameters))
    backward = _now(device) - started
    return _Run(forward, backward_input, backward, _split_seconds(piece, device))


def _split_seconds(piece: Piece, device: torch.device) -> float:
    """Both parts of a split backward; 0 where torch does not split this piece's."""
    if piece.hidden is None or not piece.parameters:
        return 0.0  # the first stage does its whole backward at once
    output = piece.run(piece.hidden)
    output = output.clone() if output._is_view() else output
    gradient = torch.ones_like(output)
    piece.hidden.grad = None
    started = _now(device)
    try:
        weights = compat.split_backward(output, gradient, (piece.hidden,), piece.parameters)
        if weights is None:
            return 0.0
        weights()
    except RuntimeError:  # graphs that share parts, which stages do not split either
        return 0.0
    return _now(device) - started


def _kept_bytes(piece: Piece, model: nn.Module) -> int:
    """Bytes that autograd keeps from the forward to the backward, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = piece.run(piece.hidden)
    total = sum(storages.values())
    del output  # until here the storages are alive, and their addresses their own
    return total


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
