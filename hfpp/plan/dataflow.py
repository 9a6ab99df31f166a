"""What one computation takes from another stage, and what it gives."""

from __future__ import annotations

from hfpp.errors import PipelineConfigError
from hfpp.plan.actions import Action, ActionKind, ScheduleTable, Step

__all__ = ["Result", "gives", "needs", "step_error"]

_F, _B, _I = ActionKind.FORWARD, ActionKind.FULL_BACKWARD, ActionKind.BACKWARD_INPUT

Result = tuple[int, ActionKind, int]
"""A stage's output (F) or the gradient of its inputs (B, also after I) of one microbatch."""


def needs(table: ScheduleTable, leaf: Action) -> Result | None:
    """What a computation takes from a neighbouring stage; None: nothing."""
    if leaf.microbatch is None:
        return None
    if leaf.kind is _F and leaf.stage > 0:
        return (leaf.stage - 1, _F, leaf.microbatch)
    if leaf.kind in (_B, _I) and leaf.stage < table.num_stages - 1:
        return (leaf.stage + 1, _B, leaf.microbatch)
    return None


def gives(leaf: Action) -> Result | None:
    """What a computation makes that a neighbouring stage may take; None: nothing."""
    if leaf.microbatch is None:
        return None
    if leaf.kind is _F:
        return (leaf.stage, _F, leaf.microbatch)
    if leaf.kind in (_B, _I):
        return (leaf.stage, _B, leaf.microbatch)
    return None


def step_error(table: ScheduleTable, step: Step, problem: str) -> PipelineConfigError:
    """An error that names the table, the rank, the column and the action."""
    return PipelineConfigError(f"{table.name}: {step}: {problem}")
