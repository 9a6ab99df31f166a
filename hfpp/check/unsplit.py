"""What the unsplit model computes: the outputs and gradients that its stages must reproduce."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hfpp.check.inputs import Batch, Microbatch
from hfpp.runtime.auxiliary_term import asks_for_auxiliary_loss, flagged_configs
from hfpp.runtime.model_inputs import forward_constants
from hfpp.runtime.paths import walk_tensors
from hfpp.runtime.stage_module import primary_output

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass(slots=True)
class Outcome:
    """What one step gave.

    Attributes:
        outputs: the primary output of every microbatch.
        gradients: summed over the microbatches, by FQN, also under every name of a tied tensor.
    """

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]

    def is_finite(self) -> bool:
        """Whether nothing is NaN or infinite."""
        found = [*self.outputs, *(g for g in self.gradients.values() if g is not None)]
        return all(bool(torch.isfinite(tensor).all()) for tensor in found)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model made fit for comparison.

    Attributes:
        model: a copy of the caller's, its parameters away from neutral values. It has never run:
            what some models keep of a run cannot be copied.
        unsplit: a copy of that to run.
        dtype: float64 where its code runs in it, else float32.
        training: whether it is compared in training mode.
        notes: what a reader of the report should know about it.
    """

    model: nn.Module
    unsplit: nn.Module
    dtype: torch.dtype
    training: bool
    notes: tuple[str, ...]

    @property
    def tolerance(self) -> float:
        """Largest relative error that counts as equal."""
        return _TOLERANCES[self.dtype]


class UnsplitModelError(RuntimeError):
    """The model does not run as it is, so that there is nothing to compare with."""


def make_subject(model: nn.Module, batch: Batch, *, gradients: bool = True) -> Subject:
    """A copy of ``model`` that runs ``batch`` with finite results and without random numbers.

    Parameters at zero or one (biases, gates, scales) would hide a path that is lost, so all of them
    are moved a little.

    Raises:
        UnsplitModelError: naming the model class, if its forward or backward fails on the batch.
    """
    errors: list[str] = []
    for perturbed in (True, False):
        for dtype in _TOLERANCES:
            candidate = copy.deepcopy(model).to(dtype).train()
            if perturbed:
                perturb(candidate)
            unsplit = copy.deepcopy(candidate)
            try:
                training = not _is_random(unsplit, batch)
                unsplit.train(training)
                finite = run_unsplit(unsplit, batch, gradients=gradients).is_finite()
            except Exception as error:  # whatever the model's own code raises
                errors.append(f"{type(error).__name__}: {error}")
                continue
            if not finite:
                errors.append(f"its results are not finite in {_name(dtype)}")
                continue
            notes = []
            if dtype is not torch.float64:
                notes.append(f"compared in {_name(dtype)}: {errors[0]}"[:300])
            if not perturbed:
                notes.append("parameters as they were initialised: moved, its results overflow")
            if not training:
                notes.append("compared in eval mode: its training forward draws random numbers")
            candidate.train(training)
            return Subject(candidate, unsplit, dtype, training, tuple(notes))
    raise UnsplitModelError(
        f"the unsplit {type(model).__name__} does not run: {min(errors, key=len)}"
    )


@torch.no_grad()
def perturb(model: nn.Module, *, seed: int = 0) -> None:
    """Add small random numbers to every floating parameter, in place."""
    for index, parameter in enumerate(model.parameters()):
        if not parameter.is_floating_point():
            continue
        generator = torch.Generator().manual_seed(seed + index)
        scale = 0.1 if parameter.dim() < 2 else 0.5 / math.sqrt(max(parameter.shape[-1], 1))
        noise = torch.randn(parameter.shape, generator=generator) * scale
        parameter.add_(noise.to(parameter.device, parameter.dtype))


def run_unsplit(model: nn.Module, batch: Batch, *, gradients: bool = True) -> Outcome:
    """One step of the whole model over the batch's microbatches."""
    model.zero_grad(set_to_none=True)
    constants = forward_constants(model)
    outputs = []
    for microbatch in batch.microbatches:
        with torch.set_grad_enabled(gradients):
            result = model(microbatch.ids.clone(), **cloned(microbatch), **constants)
            output = primary_output(result)
            if gradients:
                torch.autograd.backward(loss_of(output, microbatch, _auxiliary(model, result)))
        outputs.append(output.detach())
    named = model.named_parameters(remove_duplicate=False)
    found = {n: None if p.grad is None else p.grad.clone() for n, p in named} if gradients else {}
    model.zero_grad(set_to_none=True)
    return Outcome(outputs, found)


def cloned(microbatch: Microbatch) -> dict[str, object]:
    """Keyword arguments that the callee may write into."""
    return {
        name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in microbatch.kwargs.items()
    }


def _auxiliary(model: nn.Module, result: object) -> Tensor | None:
    """The auxiliary loss of the routers, where the config asks for it."""
    if not asks_for_auxiliary_loss(flagged_configs(model)):
        return None
    scalars = [t for _, t in walk_tensors(result) if t.requires_grad and not t.dim()]
    return torch.stack([scalar.double() for scalar in scalars]).sum() if scalars else None


def loss_of(output: Tensor, microbatch: Microbatch, auxiliary: Tensor | None = None) -> Tensor:
    """A loss whose gradient reaches every output value with a weight of its own.

    Values at padding count nothing, as in training; ``auxiliary`` counts once.
    """
    generator = torch.Generator().manual_seed(microbatch.seed)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    weights = (weights / math.sqrt(max(weights.numel(), 1))).to(output.device, output.dtype)
    kept = microbatch.kept
    if kept is not None and output.shape[: kept.dim()] == kept.shape:
        blank = ~kept.reshape(*kept.shape, *(1,) * (output.dim() - kept.dim()))
        weights = weights.masked_fill(blank, 0.0)
        output = output.masked_fill(blank, 0.0)
    loss = (output * weights).sum()
    return loss if auxiliary is None else loss + auxiliary


def _is_random(model: nn.Module, batch: Batch) -> bool:
    """Whether two runs under different seeds differ."""
    with own_randomness(model):
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        first = run_unsplit(model, batch, gradients=False).outputs
        if torch.equal(before, torch.random.get_rng_state()):
            return False
        torch.manual_seed(2)
        second = run_unsplit(model, batch, gradients=False).outputs
    return any(
        not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True)
    )


@contextmanager
def own_randomness(model: nn.Module) -> Iterator[None]:
    """While open, random numbers are drawn from other generators than the caller's."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        yield


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
