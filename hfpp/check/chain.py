"""The stages of a model in one process, each made as its rank would make it and run in turn.

Every stage comes from a copy of the model of its own. Whatever of that copy the stage does not hold
is then filled with NaN: a value that a stage takes from the unsplit model shows at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain as joined

import torch
from torch import Tensor, nn

from hfpp.check.inputs import Batch
from hfpp.check.unsplit import Outcome, cloned, loss_of
from hfpp.runtime.anatomy import Anatomy
from hfpp.runtime.auxiliary_loss import take_auxiliary_loss
from hfpp.runtime.ownership import Ownership
from hfpp.runtime.split_model import build_stages, uniform_ownership
from hfpp.runtime.stage_boundary import boundary_of

StageBuilder = Callable[[nn.Module, Anatomy, Ownership, int], nn.Module]
"""Makes the stage of an index, of a model that belongs to it alone."""


def build_stage(model: nn.Module, anatomy: Anatomy, ownership: Ownership, index: int) -> nn.Module:
    """The stage as one rank has it."""
    (stage,) = build_stages(model, anatomy, ownership, [index])
    return stage


@dataclass(slots=True)
class Chain:
    """The stages of one pipeline size."""

    stages: list[nn.Module]
    ownership: Ownership

    @classmethod
    def of(
        cls,
        model: nn.Module,
        anatomy: Anatomy,
        num_stages: int,
        build: StageBuilder = build_stage,
    ) -> Chain:
        """Cut ``model`` uniformly; it is not touched.

        Raises:
            PipelineConfigError: if it cannot be cut so.
        """
        ownership = uniform_ownership(model, anatomy, num_stages)
        stages = []
        for index in range(num_stages):
            own = copy.deepcopy(model)
            mine = uniform_ownership(own, anatomy, num_stages)
            stage = build(own, anatomy, mine, index)
            fill_unheld(own, stage)
            stages.append(stage)
        return cls(stages, ownership)

    def run(self, batch: Batch, *, gradients: bool = True) -> Outcome:
        """One step: all microbatches forward, stage by stage, then backward in reverse."""
        for stage in self.stages:
            stage.zero_grad(set_to_none=True)
        arriving: list[tuple[Tensor, ...]] = [(mb.ids,) for mb in batch.microbatches]
        steps: list[list[_Step]] = []
        for stage in self.stages:
            mine = []
            for microbatch, inputs in zip(batch.microbatches, arriving, strict=True):
                inputs = tuple(map(_received, inputs))
                with torch.set_grad_enabled(gradients):
                    result = stage(*inputs, **cloned(microbatch))
                outputs = result if isinstance(result, tuple) else (result,)
                taken = take_auxiliary_loss(stage)
                mine.append(_Step(inputs, outputs, None if taken is None else taken.value))
            arriving = [step.outputs for step in mine]
            steps.append(mine)
        given = [step.outputs[0].detach() for step in steps[-1]]
        if not gradients:
            return Outcome(given, {})
        self._backward(batch, steps)
        return Outcome(given, self._gradients())

    def _backward(self, batch: Batch, steps: list[list[_Step]]) -> None:
        for position, microbatch in enumerate(batch.microbatches):
            step = steps[-1][position]
            torch.autograd.backward(loss_of(step.outputs[0], microbatch, step.auxiliary))
        for stage in range(len(self.stages) - 2, -1, -1):
            for step, following in zip(steps[stage], steps[stage + 1], strict=True):
                pairs = [
                    (out, torch.zeros_like(out) if taken.grad is None else taken.grad)
                    for out, taken in zip(step.outputs, following.inputs, strict=True)
                    if out.requires_grad
                ]
                if pairs:
                    torch.autograd.backward([p[0] for p in pairs], [p[1] for p in pairs])

    def _gradients(self) -> dict[str, Tensor | None]:
        """By FQN; of a tensor that several stages hold, the sum over the copies."""
        found: dict[str, Tensor | None] = {}
        parameters = [dict(s.named_parameters(remove_duplicate=False)) for s in self.stages]
        for own in parameters:
            found.update({name: parameter.grad for name, parameter in own.items()})
        for tied in self.ownership.tied:
            holders = [parameters[stage][names[0]] for stage, names in tied.names]
            gradients = [p.grad for p in holders if p.grad is not None]
            total = torch.stack(gradients).sum(0) if gradients else None
            found.update({name: total for _, names in tied.names for name in names})
        return found

    def parameter_problems(self, model: nn.Module) -> list[str]:
        """Parameters that are lost, doubled, renamed or not the model's values; none is right."""
        wanted = dict(model.named_parameters(remove_duplicate=False))
        tied = {(s, name) for t in self.ownership.tied for s, names in t.names for name in names}
        holders: dict[str, list[int]] = {}
        problems = []
        for index, stage in enumerate(self.stages):
            for name, parameter in stage.named_parameters(remove_duplicate=False):
                holders.setdefault(name, []).append(index)
                want = wanted.get(name)
                if want is None:
                    problems.append(f"stage {index} has {name}, which the model has not")
                elif want.shape != parameter.shape:
                    problems.append(f"{name} on stage {index} has another shape than the model's")
                elif not torch.equal(want, parameter):
                    off = float((want - parameter).detach().abs().max())
                    problems.append(f"{name} on stage {index} is not the model's: off by {off:.1e}")
        for name in wanted:
            stages = holders.get(name, [])
            if not stages:
                problems.append(f"{name} is on no stage")
            elif len(stages) > 1 and any((s, name) not in tied for s in stages):
                problems.append(f"{name} is on stages {stages}, each with a part of its gradient")
        return [*problems, *self._untied(), *self._state_problems(model)]

    def _untied(self) -> Iterable[str]:
        for tied in self.ownership.tied:
            for stage, names in tied.names:
                own = [self.stages[stage].get_parameter(name) for name in names]
                if any(parameter is not own[0] for parameter in own):
                    yield f"{', '.join(names)} are one tensor, but not on stage {stage}"

    def _state_problems(self, model: nn.Module) -> Iterable[str]:
        wanted = set(model.state_dict())
        found = set(joined.from_iterable(stage.state_dict() for stage in self.stages))
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name in sorted((wanted ^ found) - parameters):
            where = "on no stage" if name in wanted else "of no part of the model"
            yield f"the buffer {name} is {where}"

    def boundary_problems(self, batch: Batch) -> list[str]:
        """Values that cross with another shape or dtype than a static pipeline expects."""
        microbatch = batch.microbatches[0]
        rows, tokens = microbatch.ids.shape
        values: tuple[Tensor, ...] = (microbatch.ids,)
        problems = []
        for index, stage in enumerate(self.stages):
            with torch.no_grad():
                result = stage(*(t.clone() for t in values), **cloned(microbatch))
            values = result if isinstance(result, tuple) else (result,)
            boundary = boundary_of(stage)
            metas = None if boundary is None else boundary.tensor_metas(rows, tokens, None)
            if metas is None:
                continue
            expected = [(meta.shape, meta.dtype) for meta in metas[1]]
            found = [(tuple(value.shape), value.dtype) for value in values]
            if expected != found:
                problems.append(
                    f"stage {index} gives {found} where a static pipeline expects {expected}"
                )
        return problems


@dataclass(slots=True)
class _Step:
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    auxiliary: Tensor | None


def _received(tensor: Tensor) -> Tensor:
    """A copy in the receiver's own memory."""
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


@torch.no_grad()
def fill_unheld(model: nn.Module, stage: nn.Module) -> None:
    """Fill what ``stage`` does not hold of ``model`` with NaN; integers are left."""
    held = {t.untyped_storage().data_ptr() for t in joined(stage.parameters(), stage.buffers())}
    for tensor in joined(model.parameters(), model.buffers()):
        floating = tensor.is_floating_point() or tensor.is_complex()
        if floating and tensor.untyped_storage().data_ptr() not in held:
            tensor.fill_(torch.nan)
