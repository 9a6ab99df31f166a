"""Compares a pipelined run's loss curve with the plain model's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfpp.train.inputs import window_starts
from hfpp.train.options import RunDtype
from hfpp.train.reference import ReferenceRun

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfpp.train.inputs import RunInputs
    from hfpp.train.options import TrainOptions

__all__ = ["TOLERANCES", "Verdict", "compare_curves", "reference_run"]

TOLERANCES = {RunDtype.FLOAT32: 1e-5, RunDtype.FLOAT64: 1e-9}
"""The largest relative difference of the losses at any step, by the type of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How far two loss curves are apart.

    Attributes:
        largest_difference: relative to the reference, over all steps; infinity where a curve has no
            number to compare.
        step: where that is, from 1.
        tolerance: what is allowed.
    """

    largest_difference: float
    step: int
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the curves are the same within the tolerance."""
        return self.largest_difference < self.tolerance


def compare_curves(
    losses: Sequence[float], reference: Sequence[float], *, tolerance: float
) -> Verdict:
    """The largest relative difference between two loss curves, one loss per step.

    Example:
        >>> compare_curves([2.0, 1.1], [2.0, 1.0], tolerance=1e-5).step
        2
    """
    worst, worst_step = 0.0, 1
    for step in range(1, max(len(losses), len(reference)) + 1):
        difference = math.inf
        if step <= len(losses) and step <= len(reference):
            mine, plain = losses[step - 1], reference[step - 1]
            if math.isfinite(mine) and math.isfinite(plain):
                difference = abs(mine - plain) / max(abs(plain), math.ulp(0.0))
        if difference > worst:
            worst, worst_step = difference, step
    if not losses:
        worst = math.inf  # two curves without a step prove nothing
    return Verdict(largest_difference=worst, step=worst_step, tolerance=tolerance)


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
