"""What one rank's memory holds at its peak: what stays there, what is in flight, and work space.

The peak is found by going through the rank's own computations in order, as torch's pipelining runs
them: a split backward keeps everything until its weights' part, and of layers that are computed
again nothing, as it is not split; buffers for what is received stay for the whole step, or, as from
torch 2.15 on, for as long as they are used; the last stage's outputs stay where ``step`` returns
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hfpp.errors import PipelineConfigError
from hfpp.plan.estimates.activations import (
    forward_bytes,
    head_bytes,
    layer_bytes,
    split_backward_bytes,
)
from hfpp.plan.estimates.ledger import Ledger
from hfpp.plan.estimates.local_parameters import (
    embedding_parameters,
    expert_parameters,
    head_parameters,
    layer_parameters,
)
from hfpp.plan.estimates.work_space import embedding_work_space, head_work_space, layer_work_space
from hfpp.plan.prediction import MemoryParts

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hfpp.plan.estimates.workload import Workload
    from hfpp.plan.model.shape import ModelShape
    from hfpp.plan.schedules.actions import Action

__all__ = ["Keeping", "StageBytes", "exchanged_bytes", "rank_memory", "stage_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """What a training run keeps beside the activations.

    Attributes:
        gradient_bytes: of one parameter's gradient; None: as many as the parameter's own.
        optimizer_bytes: of one parameter's states: 8 for both moments of Adam in float32, 4 more
            where it keeps a float32 copy; 0 before the first step.
        replicas: ranks that hold the same parameters, over which the optimizer's states are
            divided; 1 where each keeps all.
        expert_replicas: the same for experts; None: ``replicas`` divided by ``ep``.
        outputs: whether the last stage's outputs are kept to the step's end, and then joined, as
            ``step`` does unless it is called with ``return_outputs=False``.
        sends: whether what was sent stays to the step's end, as in torch's runtime for several
            stages per rank; None: where a rank has several.
        buffers_ahead: whether there is a buffer for every microbatch and direction from the start,
            as in torch 2.11 to 2.14. False: as in torch 2.15, each is made when it is needed. That
            of an input lives as long as the microbatch is in flight, and on the last stage to the
            step's end, where the losses' graphs end in it; that of a gradient while the backward
            goes on from it. A rank with one stage then frees an output as soon as it is sent; of
            several stages, at the microbatch's backward. Plans are made without torch, so they do
            not know its version: they take True, which needs more.
    """

    gradient_bytes: int | None = None
    optimizer_bytes: int = 12
    replicas: int = 1
    expert_replicas: int | None = None
    outputs: bool = False
    sends: bool | None = None
    buffers_ahead: bool = True

    def __post_init__(self) -> None:
        for name in ("gradient_bytes", "optimizer_bytes", "replicas", "expert_replicas"):
            value = getattr(self, name)
            lowest = 1 if name.endswith("replicas") else 0
            if value is not None and value < lowest:
                raise PipelineConfigError(f"{name} ({value}) must be at least {lowest}")


class StageBytes(NamedTuple):
    """What one stage holds for one microbatch.

    Attributes:
        kept: from its forward to its backward.
        kept_by_loss: the part of it that head and loss keep, with the output.
        freed_by_loss: of that, before a backward that is not split comes to the layers; the
            gradient that it hands them takes its place.
        output: the last stage's; 0 for others.
        late: from the inputs' to the weights' part of a split backward; 0 where it is not split.
        work_space: at most beside it while the stage computes.
        loss_work_space: the same while the loss computes; 0 for other stages than the last.
        after: at the end of the backward, when nothing of this microbatch is kept any more.
    """

    kept: int
    kept_by_loss: int
    freed_by_loss: int
    output: int
    late: int
    work_space: int
    loss_work_space: int
    after: int


def stage_bytes(
    shape: ModelShape, work: Workload, offsets: Sequence[int], stage: int
) -> StageBytes:
    """What a stage of a partition holds for one microbatch.

    Args:
        shape: the model.
        work: the microbatch.
        offsets: stage s has the layers ``offsets[s]`` to ``offsets[s + 1] - 1``.
        stage: which.
    """
    layers = shape.layers[offsets[stage] : offsets[stage + 1]]
    is_first, is_last = stage == 0, stage == len(offsets) - 2
    kept = sum(layer_bytes(layer, work) for layer in layers) + forward_bytes(shape, work)
    between = sum(split_backward_bytes(layer, work) for layer in layers)
    space = max((layer_work_space(layer, work) for layer in layers), default=0)
    boundary = work.boundary_bytes * shape.hidden_size
    loss = output = loss_space = 0
    if is_last:
        output = round(work.tokens / work.tp * shape.vocab_size * work.width)
        loss = head_bytes(shape, work) + output
        loss_space = head_work_space(shape, work)
        between += output
    else:
        kept += boundary  # what was sent is kept to start the backward from
    if not is_first and _keeps_its_input(shape, work):
        kept -= boundary  # it is the buffer that it was received in
    return StageBytes(
        kept=kept + loss,
        kept_by_loss=loss,
        freed_by_loss=max(0, loss - output - boundary),
        output=output,
        late=0 if work.has_whole_backwards else kept + loss + between,
        work_space=space,
        loss_work_space=loss_space,
        after=embedding_work_space(shape, work) if is_first else 0,
    )


def _keeps_its_input(shape: ModelShape, work: Workload) -> bool:
    """Whether the first thing that a stage keeps is its input itself, not a copy of it."""
    return shape.norm == "layer" or work.width >= 4 or work.recompute == "full"


def rank_memory(
    shape: ModelShape,
    work: Workload,
    *,
    offsets: Sequence[int],
    stages: Sequence[int],
    actions: Iterable[Action | None],
    n_microbatches: int,
    keeping: Keeping | None = None,
) -> MemoryParts:
    """What one rank's memory holds at its peak, in bytes.

    Args:
        shape: the model.
        work: what the rank works on at a time.
        offsets: stage s has the layers ``offsets[s]`` to ``offsets[s + 1] - 1``.
        stages: the rank's own.
        actions: the rank's own, in order; those that do not compute are left out.
        n_microbatches: in one step.
        keeping: what stays beside the activations; None: Adam in bfloat16, not divided.

    Returns:
        Its parts. Work space counts to the activations, or to the logits where it is the loss's.

    Raises:
        PipelineConfigError: an action is of a stage that is not the rank's own.
    """
    keeping = keeping or Keeping()
    parameters, experts = _parameters(shape, work, offsets, stages)
    held = {stage: stage_bytes(shape, work, offsets, stage) for stage in stages}
    last = len(offsets) - 2
    boundary = work.boundary_bytes * shape.hidden_size
    stay = len(stages) > 1 if keeping.sends is None else keeping.sends
    ledger = Ledger(
        held,
        last=last,
        boundary=boundary,
        sends_stay=stay,
        buffers_ahead=keeping.buffers_ahead,
        outputs=keeping.outputs,
        in_one_piece=work.has_whole_backwards,
    )
    for action in actions:
        for leaf in () if action is None else action.leaves:
            if leaf.kind.is_compute:
                ledger.run(leaf)
    ledger.finish(exchanged_bytes(shape, work, stages, last))
    activations, logits, exchanged = ledger.peak
    ends = sum((stage > 0) + (stage < last) for stage in stages)
    ahead = n_microbatches if keeping.buffers_ahead else 0
    gradient = work.width if keeping.gradient_bytes is None else keeping.gradient_bytes
    return MemoryParts(
        parameters=parameters * work.width,
        gradients=parameters * gradient,
        optimizer=_states(parameters, experts, work, keeping) * keeping.optimizer_bytes,
        activations=activations,
        receive_buffers=exchanged + boundary * ends * ahead,
        logits=logits,
    )


def _parameters(
    shape: ModelShape, work: Workload, offsets: Sequence[int], stages: Sequence[int]
) -> tuple[int, int]:
    """The rank's own parameters, and those of them that expert parallelism divides.

    A tied matrix is held by the first and by the last stage, also where one rank has both, but
    once where they are one stage.
    """
    total = experts = 0
    last = len(offsets) - 2
    for stage in stages:
        for layer in shape.layers[offsets[stage] : offsets[stage + 1]]:
            total += layer_parameters(layer, work)
            experts += expert_parameters(layer, work)
    total += embedding_parameters(shape, work) if 0 in stages else 0
    total += head_parameters(shape, work) if last in stages else 0
    if shape.is_tied and last == 0:
        total -= -(-shape.vocab_size * shape.hidden_size // work.tp)
    return total, experts


def exchanged_bytes(shape: ModelShape, work: Workload, stages: Sequence[int], last: int) -> int:
    """Bytes in which the gradients of a tied matrix are added up, at the end of the step.

    Every rank that has it makes one flat copy; the first one, that adds, receives the other's too.
    """
    if not shape.is_tied or last == 0 or not {0, last} & set(stages):
        return 0
    copies = 2 if 0 in stages and last not in stages else 1
    return copies * round(shape.vocab_size * shape.hidden_size / work.tp * work.width)


def _states(parameters: int, experts: int, work: Workload, keeping: Keeping) -> int:
    """Parameters whose optimizer states the rank holds."""
    replicas = keeping.replicas
    own = keeping.expert_replicas
    own = max(1, replicas // work.ep) if own is None else own
    return -(-(parameters - experts) // replicas) - (-experts // own)
