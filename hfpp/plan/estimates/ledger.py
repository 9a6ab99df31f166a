"""One rank's bytes in flight, computation by computation, in the order of its schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfpp.errors import PipelineConfigError
from hfpp.plan.schedules.actions import ActionKind

if TYPE_CHECKING:
    from hfpp.plan.estimates.memory import StageBytes
    from hfpp.plan.schedules.actions import Action

__all__ = ["Ledger"]


class Ledger:
    """Bytes in flight, computation by computation.

    Attributes:
        peak: where they were most: what layers keep and work in, what the loss does, and what was
            sent or, where buffers are made when they are needed, received.
    """

    def __init__(
        self,
        held: dict[int, StageBytes],
        *,
        last: int,
        boundary: int,
        sends_stay: bool,
        buffers_ahead: bool,
        outputs: bool,
        in_one_piece: bool,
    ) -> None:
        self.peak = (0, 0, 0)
        self._held = held
        self._last = last
        self._in_one_piece = in_one_piece
        self._boundary = boundary
        self._sends_stay = sends_stay
        self._on_demand = not buffers_ahead
        self._keeps_outputs = outputs
        self._kept = self._loss = self._exchanged = 0

    def run(self, action: Action) -> None:
        """One computation: what it works in, keeps and frees."""
        index = action.stage
        stage = self._held.get(index)
        if stage is None:
            raise PipelineConfigError(
                f"{action} is of a stage that the rank does not have: it has {sorted(self._held)}"
            )
        layers = stage.kept - stage.kept_by_loss - self._freed_output(index)
        if action.kind == ActionKind.FORWARD:
            self._kept += layers
            self._loss += stage.kept_by_loss
            self._exchanged += self._input(index)
            self._see(0, stage.loss_work_space // 2)
            return
        late = stage.late - stage.kept
        if action.kind == ActionKind.BACKWARD_WEIGHT:
            if self._in_one_piece:
                return
            self._see(stage.work_space)
            self._kept -= late
            self._exchanged -= self._gradient(index)
        else:
            is_split = action.kind == ActionKind.BACKWARD_INPUT and not self._in_one_piece
            self._see(0, stage.loss_work_space)
            self._see(stage.work_space, 0 if is_split else -stage.freed_by_loss)
            self._send(index - 1)
            if is_split:
                self._kept += late
                self._exchanged += self._gradient(index)
                self._see(stage.work_space)
                return
        self._kept -= layers
        self._loss -= stage.kept_by_loss - (stage.output if self._keeps_outputs else 0)
        if self._on_demand:
            is_split = action.kind == ActionKind.BACKWARD_WEIGHT
            self._exchanged -= self._input(index) if is_split or index < self._last else 0
        else:
            self._send(index + 1)  # its output, which was among what it kept
        self._see(stage.after)

    def finish(self, exchanged: int) -> None:
        """The end of the step: outputs that were kept are joined beside what they are joined of."""
        self._kept = 0
        self._loss *= 2
        self._exchanged = exchanged
        self._see(0)

    def _is_remote(self, other: int) -> bool:
        return 0 <= other <= self._last and other not in self._held

    def _send(self, other: int) -> None:
        if self._sends_stay and self._is_remote(other):
            self._exchanged += self._boundary

    def _freed_output(self, index: int) -> int:
        """Of what a stage keeps: the output, where it is freed once it is sent."""
        is_freed = self._on_demand and not self._sends_stay and self._is_remote(index + 1)
        return self._boundary if is_freed else 0

    def _input(self, index: int) -> int:
        """A stage's input, where no buffer was made ahead; a stage of the same rank has it."""
        return self._boundary if self._on_demand and self._is_remote(index - 1) else 0

    def _gradient(self, index: int) -> int:
        """The gradient that a split backward has come from, up to its weights' part."""
        return self._boundary if self._on_demand and index < self._last else 0

    def _see(self, space: int, loss_space: int = 0) -> None:
        now = (self._kept + space, self._loss + loss_space, self._exchanged)
        if sum(now) > sum(self.peak):
            self.peak = now
