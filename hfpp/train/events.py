"""What a run tells while it runs: plain data that crosses processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfpp.plan.render.recorded import RankRecord

__all__ = ["RunShape", "StageRow", "StepMetrics", "StepTrace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRow:
    """One line of the stage table.

    Attributes:
        stage: index in the pipeline.
        ranks: ranks that hold it: one per data-parallel replica.
        layers: first layer and the one after the last; empty for a stage without layers.
        parameters: count, tied copies included.
        bytes: of those parameters, over all shards.
    """

    stage: int
    ranks: tuple[int, ...]
    layers: range
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunShape:
    """What stands when all ranks have built their part.

    Attributes:
        stages: the stage table, in the order of the pipeline.
        world_size: number of ranks.
        replicas: data-parallel pipelines.
        n_microbatches: per step and pipeline.
        device: where the ranks run, in words.
    """

    stages: tuple[StageRow, ...]
    world_size: int
    replicas: int
    n_microbatches: int
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        step: from 1.
        loss: mean over the batch, nats per token, before the step.
        grad_norm: over all parameters, before clipping.
        tokens_per_second: tokens of the whole batch over the step's time.
        seconds: the step's time.
    """

    step: int
    loss: float
    grad_norm: float
    tokens_per_second: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """What the ranks of the first pipeline did in one step.

    Attributes:
        step: from 1.
        ranks: of the pipeline, on one clock.
    """

    step: int
    ranks: tuple[RankRecord, ...]
