"""The chained stages against the unsplit model: how far apart, and where it begins."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfpp.check.chain import Chain
from hfpp.check.inputs import Batch
from hfpp.check.unsplit import Outcome, run_unsplit
from hfpp.runtime.anatomy import Anatomy
from hfpp.runtime.paths import Key, Path, walk_tensors
from hfpp.runtime.stage_boundary import own_layers

# A gradient that is zero but for rounding, such as that of a key's bias, is measured against the
# largest gradient of the model.
_SMALLEST = {torch.float64: 1e-5, torch.float32: 1e-2}


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far two outcomes are apart.

    Attributes:
        logits_error: largest difference over the largest value of a microbatch; infinite for NaN.
        gradient_error: the same of the worst parameter; None where no gradients were computed.
        worst_parameter: its FQN.
        wrong: the FQNs beyond the tolerance, in the model's order.
        zero_for_none: FQNs that the unsplit model never uses and a stage gives a zero gradient.
    """

    logits_error: float
    gradient_error: float | None
    worst_parameter: str | None
    wrong: tuple[str, ...]
    zero_for_none: tuple[str, ...]
    is_equal: bool


def compare(want: Outcome, found: Outcome, dtype: torch.dtype, tolerance: float) -> Comparison:
    """Compare outputs, and the gradients of every parameter where there are some."""
    pairs = list(zip(want.outputs, found.outputs, strict=True))
    logits = max((_error(f, w, 0.0) for w, f in pairs), default=0.0)
    if not want.gradients:
        return Comparison(logits, None, None, (), (), logits <= tolerance)
    known = (g for g in want.gradients.values() if g is not None and g.numel())
    sizes = (float(g.nan_to_num(0.0, 0.0, 0.0).abs().max()) for g in known)
    floor = max(sizes, default=0.0) * _SMALLEST[dtype]
    errors: dict[str, float] = {}
    zeros = []
    for name, wanted in want.gradients.items():
        gradient = found.gradients.get(name)
        if wanted is None and gradient is not None and not bool(gradient.any()):
            zeros.append(name)
            gradient = None
        if wanted is None or gradient is None:
            errors[name] = 0.0 if wanted is gradient else math.inf
        else:
            errors[name] = _error(gradient, wanted, floor)
    worst = max(errors, key=lambda name: errors[name])
    wrong = tuple(name for name, error in errors.items() if error > tolerance)
    equal = logits <= tolerance and not wrong
    return Comparison(logits, errors[worst], worst, wrong, tuple(zeros), equal)


def _error(found: Tensor, wanted: Tensor, floor: float) -> float:
    if found.shape != wanted.shape:
        return math.inf
    if not wanted.numel():
        return 0.0
    found, wanted = found.detach(), wanted.detach()
    finite = torch.isfinite(wanted)
    if not bool(finite.all()):
        # the unsplit model's own NaN and infinities belong in the same places
        if not torch.equal(torch.isfinite(found), finite):
            return math.inf
        found, wanted = found[finite], wanted[finite]
        if not wanted.numel():
            return 0.0
    difference = float((found - wanted).abs().max())
    size = max(float(wanted.abs().max()), floor)
    error = difference / size if size else math.inf if difference else 0.0
    return math.inf if math.isnan(error) else error


def first_difference(
    model: nn.Module,
    chain: Chain,
    anatomy: Anatomy,
    batch: Batch,
    comparison: Comparison,
    tolerance: float,
) -> str:
    """Where the stages first part from the unsplit model, in the order of computing."""
    layers = model.get_submodule(anatomy.layers_name)
    with _recorded({i: layers[i] for i in anatomy.calls}) as wanted:  # type: ignore[index]
        run_unsplit(model, batch, gradients=False)
    own: dict[int, nn.Module] = {}
    for stage, indices in zip(chain.stages, chain.ownership.layers, strict=True):
        own.update(zip(indices, own_layers(stage), strict=True))
    with _recorded({i: own[i] for i in anatomy.calls}) as found:
        chain.run(batch, gradients=False)
    for index in sorted(wanted):
        where = f"layer {index} ({anatomy.layers_name}.{index}, stage {_stage(chain, index)})"
        if len(wanted[index]) != len(found.get(index, ())):
            return f"{where} is called {len(found.get(index, ()))} times"
        for want, got in zip(wanted[index], found[index], strict=True):
            if not _differing(want.results, got.results, tolerance):
                continue
            inputs = _differing(want.arguments, got.arguments, tolerance)
            if inputs:
                return f"{where} takes another {argument_name(layers[index], inputs[0])}"  # type: ignore[index]
            return f"the result of {where}"
    if comparison.logits_error > tolerance:
        return "the output, after layers whose results are equal"
    names = comparison.wrong
    if names:
        last = max(names, key=lambda name: _order(name, anatomy))
        return f"the gradient of {last}: the first wrong one on the way back"
    return "none in the results"


def _stage(chain: Chain, layer: int) -> int:
    return next(s for s, layers in enumerate(chain.ownership.layers) if layer in layers)


def _order(name: str, anatomy: Anatomy) -> tuple[int, int]:
    """Place in the forward: what lies outside of the layers may be anywhere, and goes first."""
    prefix = f"{anatomy.layers_name}."
    return (1, int(name[len(prefix) :].split(".")[0])) if name.startswith(prefix) else (0, 0)


def argument_name(layer: nn.Module, path: Path) -> str:
    """An argument of a layer in words, such as ``memory`` or ``states[2]``."""
    first, *rest = path[1:]  # the step before tells args from kwargs
    if isinstance(first, Key):
        name = str(first.name)
    else:
        parameters = list(inspect.signature(type(layer).forward).parameters)[1:]
        position = first if isinstance(first, int) else 0
        name = parameters[position] if position < len(parameters) else f"argument {position}"
    return name + "".join(f"[{s.name!r}]" if isinstance(s, Key) else f"[{s}]" for s in rest)


@dataclass(frozen=True, slots=True)
class _Record:
    arguments: Mapping[Path, Tensor]
    results: Mapping[Path, Tensor]


@contextmanager
def _recorded(layers: Mapping[int, nn.Module]) -> Iterator[dict[int, list[_Record]]]:
    """While open, keeps what the layers take and give."""
    records: dict[int, list[_Record]] = {}
    taken: dict[int, Mapping[Path, Tensor]] = {}

    def before(index: int) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            taken[index] = _copies((args, kwargs))

        return hook

    def after(index: int) -> Any:
        def hook(_module: Any, _args: Any, _kwargs: Any, result: Any) -> None:
            records.setdefault(index, []).append(_Record(taken[index], _copies(result)))

        return hook

    handles = []
    for index, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(before(index), with_kwargs=True))
        handles.append(layer.register_forward_hook(after(index), with_kwargs=True))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _copies(value: Any) -> dict[Path, Tensor]:
    return {path: tensor.detach().clone() for path, tensor in walk_tensors(value)}


def _differing(
    want: Mapping[Path, Tensor], found: Mapping[Path, Tensor], tolerance: float
) -> list[Path]:
    paths: Iterable[Path] = dict.fromkeys((*want, *found))
    return [
        path
        for path in paths
        if path not in want
        or path not in found
        or _error(_number(found[path]), _number(want[path]), 0.0) > tolerance
    ]


def _number(tensor: Tensor) -> Tensor:
    """Masks hold infinities, whose difference is no number."""
    return tensor.double().nan_to_num(nan=math.pi * 1e30) if not tensor.is_complex() else tensor
