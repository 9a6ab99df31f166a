"""A live model in pieces that run by themselves: before the layers, each layer, after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfpp.errors import PipelineConfigError
from hfpp.runtime.anatomy import Anatomy
from hfpp.runtime.layer_list import list_of_layers
from hfpp.runtime.model_inputs import first_argument, forward_constants
from hfpp.runtime.paths import get_at, map_tensors, set_at, tensors_in

__all__ = ["Piece", "pieces_of"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a model and how to run it.

    Attributes:
        run: gives the part's result for its input.
        hidden: the input that gradients go back to; None before the layers.
        parameters: what it trains.
    """

    run: Callable[[Tensor | None], Tensor]
    hidden: Tensor | None
    parameters: tuple[nn.Parameter, ...]


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a layer."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any


class _LayersReached(BaseException):
    """Ends a forward at the first layer; no model's ``except Exception`` may swallow it."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def pieces_of(
    model: nn.Module, anatomy: Anatomy, ids: Tensor, loss_fn: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Piece, list[Piece], Piece]:
    """Takes a model apart, as one of its forwards calls it.

    Args:
        model: on the device, with weights.
        anatomy: of the model.
        ids: token ids of a microbatch.
        loss_fn: of the model's output and the token ids.

    Returns:
        What runs before the layers (embeddings, masks, positions), the layers, and what runs after
        them with the loss.

    Raises:
        PipelineConfigError: the forward does not call every layer.
    """
    layers = list(list_of_layers(model.get_submodule(anatomy.layers_name)))
    inputs = {first_argument(model): ids, **forward_constants(model)}
    calls = _calls(model, layers, inputs)
    if missing := [index for index in range(len(layers)) if index not in calls]:
        raise PipelineConfigError(
            f"{type(model).__name__} does not call layer {missing[0]} of {anatomy.layers_name!r} "
            f"for plain token ids: it cannot be timed"
        )
    own = {id(p) for layer in layers for p in layer.parameters()}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    last = len(layers) - 1

    def outer(start: int) -> tuple[nn.Parameter, ...]:
        names = sorted(anatomy.outer_parameters(start, start + 1))
        found = {id(by_name[n]): by_name[n] for n in names if n in by_name}
        return tuple(p for key, p in found.items() if key not in own and p.requires_grad)

    def before(_: Tensor | None) -> Tensor:
        path = anatomy.calls[0].hidden_path
        with _replaced(layers[0], _stop(path)):
            try:
                model(**inputs)
            except _LayersReached as reached:
                return reached.hidden
        raise AssertionError("layer 0 was called before")

    def after(hidden: Tensor | None) -> Tensor:
        assert hidden is not None
        with _handing_on(layers, calls, anatomy, hidden):
            output = model(**inputs)
        return loss_fn(getattr(output, "logits", output), ids)

    shown = [_hidden(calls, anatomy, index) for index in range(len(layers))]
    result = _find(calls[last].output, shown[last])
    return (
        Piece(before, None, outer(0) if last else ()),
        [
            Piece(
                _layer(layer, calls[index], anatomy.calls[index].hidden_path),
                _leaf(shown[index]),
                tuple(p for p in layer.parameters() if p.requires_grad),
            )
            for index, layer in enumerate(layers)
        ],
        Piece(after, _leaf(result), outer(last)),
    )


def _calls(
    model: nn.Module, layers: list[nn.Module], inputs: Mapping[str, Any]
) -> dict[int, _Call]:
    calls: dict[int, _Call] = {}
    handles = []
    for index, layer in enumerate(layers):

        def record(
            _module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Any,
            index: int = index,
        ) -> None:
            calls[index] = _Call((args, kwargs), output)

        handles.append(layer.register_forward_hook(record, with_kwargs=True))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _hidden(calls: Mapping[int, _Call], anatomy: Anatomy, index: int) -> Tensor:
    hidden = get_at(calls[index].arguments, anatomy.calls[index].hidden_path)
    assert isinstance(hidden, Tensor)
    return hidden


def _leaf(hidden: Tensor) -> Tensor:
    return hidden.detach().clone().requires_grad_()


def _layer(layer: nn.Module, call: _Call, path: Any) -> Callable[[Tensor | None], Tensor]:
    def run(hidden: Tensor | None) -> Tensor:
        args, kwargs = set_at(call.arguments, path, hidden)
        assert hidden is not None
        return _find(layer(*args, **kwargs), hidden)

    return run


def _find(output: Any, hidden: Tensor) -> Tensor:
    """The hidden state in a layer's result: the first tensor of its shape."""
    tensors = tensors_in(output)
    return next(t for t in tensors if t.shape == hidden.shape and t.is_floating_point())


def _stop(path: Any) -> Callable[..., Any]:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise _LayersReached(get_at((args, kwargs), path))

    return stop


@contextmanager
def _replaced(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


@contextmanager
def _handing_on(
    layers: list[nn.Module], calls: Mapping[int, _Call], anatomy: Anatomy, hidden: Tensor
) -> Iterator[None]:
    """Layers that return what they returned before, the last one with another hidden state."""
    last = len(layers) - 1
    old = _find(calls[last].output, _hidden(calls, anatomy, last))
    results = {index: call.output for index, call in calls.items()}
    results[last] = map_tensors(lambda t: hidden if t is old else t, results[last])
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(_replaced(layer, lambda *_, index=index, **__: results[index]))
        yield
