"""The routers' auxiliary loss in a pipeline: taken from the last stage, added to the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from hfpp.errors import PipelineConfigError
from hfpp.runtime.auxiliary_term import FLAG, AuxiliaryTerm, asks_for_auxiliary_loss
from hfpp.runtime.paths import Path, get_at
from hfpp.runtime.stage_boundary import boundary_of, unwrapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.pipelining import PipelineStage


class AuxiliaryLoss(NamedTuple):
    """Of one microbatch: the model's value, a scalar, and what it is multiplied by."""

    value: torch.Tensor
    coefficient: float


def check_flag(stage: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Refuse a stage's forward that collects other outputs than the model did when it was split."""
    split_with: bool = stage.__dict__["_hfpp_flag"]
    now = kwargs.get(FLAG)
    if now is None:
        now = asks_for_auxiliary_loss(stage.__dict__["_hfpp_flagged_configs"])
    if bool(now) != split_with:
        raise PipelineConfigError(
            f"{FLAG} is {bool(now)} in this forward of a stage of {type(stage).__name__}, but was "
            f"{split_with} in the model's config when it was split: set config.{FLAG}={bool(now)} "
            f"before splitting, and leave it then."
        )


def check_taken(stage: nn.Module) -> None:
    """Refuse to go on where a forward's auxiliary loss was added to no loss."""
    left: AuxiliaryLoss | None = stage.__dict__["_hfpp_running"].auxiliary
    if left is not None and left.value.requires_grad:
        raise RuntimeError(
            f"the auxiliary loss of the forward before of {type(stage).__name__} was added to no "
            f"loss: use the schedule of hfpp.build_pipeline_schedule, or take it after every "
            f"forward of the last stage with hfpp.runtime.auxiliary_loss.take_auxiliary_loss."
        )


def take_auxiliary_loss(part: nn.Module) -> AuxiliaryLoss | None:
    """The auxiliary loss of the latest forward of the last stage; each can be taken once.

    Args:
        part: a stage, in whatever wraps it.

    Returns:
        The loss, connected to the graph of its forward; None for a stage that has none.
    """
    running = unwrapped(part).__dict__.get("_hfpp_running")
    if running is None:
        return None
    taken: AuxiliaryLoss | None = running.auxiliary
    running.auxiliary = None
    return taken


class AuxiliaryLosses:
    """The auxiliary losses of a batch's microbatches, taken from this rank's last stage.

    ``values``: of the current or latest batch, scalars as the model computes them, in the order of
    the microbatches; empty on other ranks and for models without.
    """

    def __init__(self, stages: Sequence[PipelineStage]) -> None:
        self.values: list[torch.Tensor] = []
        self._last = next((stage for stage in stages if stage.is_last and _has(stage)), None)

    def start(self) -> None:
        """Begin a batch: drop the values of the one before, and what belongs to no batch."""
        self.values = []
        if self._last is not None:
            take_auxiliary_loss(self._last.submod)

    def take(self) -> AuxiliaryLoss | None:
        """Note and give that of the microbatch that the last stage has just run forward."""
        if self._last is None:
            return None
        found = take_auxiliary_loss(self._last.submod)
        if found is None:
            raise RuntimeError("a loss was computed without a forward of the last stage before it.")
        self.values.append(found.value.detach())
        return found

    def add_to(self, loss: torch.Tensor) -> torch.Tensor:
        """``loss`` plus what the model would add to it for the same microbatch."""
        found = self.take()
        if found is None:
            return loss
        return (loss + found.coefficient * found.value.to(loss.device)).to(loss.dtype)


def _has(stage: PipelineStage) -> bool:
    boundary = boundary_of(stage.submod)
    return (
        boundary is not None
        and boundary.anatomy is not None
        and boundary.anatomy.auxiliary is not None
    )


def auxiliary_loss_in(
    stage: nn.Module, term: AuxiliaryTerm, result: Any, expected: Mapping[Path, torch.Tensor]
) -> AuxiliaryLoss:
    """Take the auxiliary loss out of the result of the last stage's forward.

    Args:
        stage: the stage.
        term: what to look for.
        result: what its own forward returned.
        expected: the received router logits, by where the model returns them.

    Raises:
        RuntimeError: if the model's code did not collect just these.
    """
    try:
        value = get_at(result, term.path)
        same = all(get_at(result, path) is tensor for path, tensor in expected.items())
    except (KeyError, IndexError, TypeError):
        value, same = None, False
    if not same or not isinstance(value, torch.Tensor):
        raise RuntimeError(
            f"the forward of {type(stage).__name__} did not collect the router logits that it "
            f"collected when it was split: change nothing that says which outputs it returns."
        )
    return AuxiliaryLoss(value, term.coefficient_of(stage))
