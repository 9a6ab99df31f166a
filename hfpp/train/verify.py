"""Compares a pipelined run's curves with the plain model's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hfpp.train.inputs import window_starts
from hfpp.train.options import RunDtype
from hfpp.train.reference import ReferenceRun

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfpp.train.events import StepMetrics
    from hfpp.train.inputs import RunInputs
    from hfpp.train.options import TrainOptions

__all__ = ["TOLERANCES", "Tolerances", "Verdict", "compare_curves", "compare_runs", "reference_run"]


class Tolerances(NamedTuple):
    """The largest relative differences at any step that are taken for rounding."""

    loss: float
    grad_norm: float


TOLERANCES = {
    RunDtype.FLOAT32: Tolerances(loss=1e-5, grad_norm=1e-3),
    RunDtype.FLOAT64: Tolerances(loss=1e-9, grad_norm=1e-7),
}
"""By the type of the run. A norm sums the rounding of all gradients, so it moves more than a loss.

AdamW does not see a gradient's scale: a wrong norm hardly shows in the loss.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How far two curves are apart.

    Attributes:
        curve: what they show.
        largest_difference: relative to the reference, over all steps; infinity where a curve has no
            number to compare.
        step: where that is, from 1.
        tolerance: what is allowed.
    """

    curve: str
    largest_difference: float
    step: int
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the curves are the same within the tolerance."""
        return self.largest_difference < self.tolerance


def compare_curves(
    pipeline: Sequence[float], reference: Sequence[float], *, curve: str, tolerance: float
) -> Verdict:
    """The largest relative difference between two curves, one value per step.

    Example:
        >>> compare_curves([2.0, 1.1], [2.0, 1.0], curve="loss", tolerance=1e-5).step
        2
    """
    worst, worst_step = 0.0, 1
    for step in range(1, max(len(pipeline), len(reference)) + 1):
        difference = math.inf
        if step <= len(pipeline) and step <= len(reference):
            mine, plain = pipeline[step - 1], reference[step - 1]
            if math.isfinite(mine) and math.isfinite(plain):
                difference = abs(mine - plain) / max(abs(plain), math.ulp(0.0))
        if difference > worst:
            worst, worst_step = difference, step
    if not pipeline:
        worst = math.inf  # two curves without a step prove nothing
    return Verdict(curve=curve, largest_difference=worst, step=worst_step, tolerance=tolerance)


def compare_runs(
    pipeline: Sequence[StepMetrics], reference: Sequence[tuple[float, float]], dtype: RunDtype
) -> tuple[Verdict, ...]:
    """Compares the losses and the norms of the gradients of two runs.

    Args:
        pipeline: every step of the pipelined run.
        reference: every step's loss and norm of the plain model.
        dtype: of both runs.

    Returns:
        The verdict on the loss, then the one on the norm.
    """
    allowed = TOLERANCES[dtype]
    return (
        compare_curves(
            [step.loss for step in pipeline],
            [loss for loss, _ in reference],
            curve="loss",
            tolerance=allowed.loss,
        ),
        compare_curves(
            [step.grad_norm for step in pipeline],
            [norm for _, norm in reference],
            curve="gradient norm",
            tolerance=allowed.grad_norm,
        ),
    )


def reference_run(
    options: TrainOptions, inputs: RunInputs, *, device: str, threads: int
) -> ReferenceRun:
    """The same run without a pipeline, as plain data."""
    return ReferenceRun(
        config_folder=inputs.config_folder,
        weights_folder=inputs.weights_folder,
        tokens_file=inputs.tokens_file,
        windows=tuple(
            tuple(window_starts(options, inputs.num_tokens, step)) for step in range(options.steps)
        ),
        seq_len=options.seq_len,
        lr=options.lr,
        warmup_steps=options.warmup_steps,
        max_grad_norm=options.max_grad_norm,
        dtype=str(options.dtype),
        seed=options.seed,
        device=device,
        threads=threads,
    )
