"""A plan for `pipeline_model`: what it says of the arguments, and whether the live model is its."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from hfpp.errors import PipelineConfigError
from hfpp.plan.pipeline_plan import ModelFingerprint, PipelinePlan
from hfpp.plan.plan_file import plan_as_json, read_plan
from hfpp.plan.schedules import find_schedule
from hfpp.plan.tensor_shapes import hidden_and_vocab_size
from hfpp.runtime.find_anatomy import find_anatomy
from hfpp.runtime.module_names import module_names_of
from hfpp.runtime.ownership import find_ownership

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from hfpp.plan.schedules.actions import ScheduleTable

logger = logging.getLogger(__name__)

_SWITCHES = ("activation", "gradient")  # transformers' names of checkpointing, newer first

__all__ = ["Planned", "fingerprint_of", "follow_plan"]


class Planned(NamedTuple):
    """What a plan makes of the arguments of `pipeline_model`.

    Attributes:
        schedule: a name; None where the plan has a table of its own.
        table: that table.
        microbatch_size: sequences of a microbatch.
        local_batch_size: sequences of a step of this pipeline.
        seq_len: tokens of a sequence.
        names: of the modules of every stage.
        fact: the whole plan, to compare between ranks.
    """

    schedule: str | None
    table: ScheduleTable | None
    microbatch_size: int
    local_batch_size: int
    seq_len: int
    names: list[list[str]]
    fact: dict[str, Any]


def follow_plan(
    plan: PipelinePlan | str | PathLike[str],
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    axes: Mapping[str, str | None],
    dp_axis_names: Sequence[str],
    given: Mapping[str, Any],
    is_parallelized: bool,
) -> Planned:
    """Takes the arguments of a pipeline from its plan.

    Args:
        plan: the plan, or the path of its file.
        model: the whole live model.
        mesh: of the job.
        axes: names of its axes for pp, tp and cp.
        dp_axis_names: of its axes for replicas, as far as it has them.
        given: what the caller said himself, by argument; None where he did not.
        is_parallelized: whether the caller changes the stages once they are made.

    Raises:
        FileNotFoundError: no such file.
        PipelineConfigError: the plan is of another model, mesh or batch; the message has all that
            differs.
    """
    name = "the plan" if isinstance(plan, PipelinePlan) else f"the plan {plan}"
    plan = plan if isinstance(plan, PipelinePlan) else read_plan(plan)
    differences = _in_mesh(plan, mesh, axes)
    _warn_of_replicas(plan, name, mesh, axes, dp_axis_names)
    anatomy = find_anatomy(model)
    live = fingerprint_of(model, anatomy.num_layers)
    if unlike := plan.model.differences(live):
        differences.append(f"the model has {', '.join(unlike)}")
    if differences:
        raise PipelineConfigError(
            f"plan: {name} is not for this job: {'; '.join(differences)}. Plan for this model and "
            f"mesh, or build what was planned for"
        )
    _check_recompute(plan, name, model, is_parallelized=is_parallelized)
    schedule = find_schedule(plan.schedule).name if plan.own_table is None else None
    says = {
        "pipeline_parallel_schedule": schedule,
        "microbatch_size": plan.microbatch_size,
        "local_batch_size": plan.local_batch_size,
        "seq_len": plan.seq_len,
    }
    _check_arguments(name, says, given)
    ownership = find_ownership(model, anatomy, plan.offsets)
    return Planned(
        schedule=schedule,
        table=plan.own_table,
        microbatch_size=plan.microbatch_size,
        local_batch_size=plan.local_batch_size,
        seq_len=plan.seq_len,
        names=module_names_of(ownership, anatomy),
        fact=plan_as_json(plan),
    )


def fingerprint_of(model: nn.Module, num_layers: int) -> ModelFingerprint:
    """What a plan knows a live model by."""
    config = getattr(model, "config", None)
    widths: tuple[int | None, int | None]
    try:
        widths = hidden_and_vocab_size(config)
    except PipelineConfigError:  # a model without a config, or of another kind
        widths = (None, None)
    inner = getattr(config, "get_text_config", lambda: config)()
    return ModelFingerprint(
        model_type=str(getattr(inner, "model_type", None) or ""),
        num_layers=num_layers,
        hidden_size=widths[0],
        vocab_size=widths[1],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        is_tied=_is_tied(model),
    )


def _is_tied(model: nn.Module) -> bool | None:
    methods = ("get_input_embeddings", "get_output_embeddings")
    try:
        ends = [getattr(model, method, lambda: None)() for method in methods]
    except NotImplementedError:  # what transformers raises where it does not find them
        return None
    found = [getattr(end, "weight", None) for end in ends]
    weights = [weight for weight in found if isinstance(weight, nn.Parameter)]
    return weights[0] is weights[1] if len(weights) == 2 else None


def _in_mesh(plan: PipelinePlan, mesh: DeviceMesh, axes: Mapping[str, str | None]) -> list[str]:
    sizes = {"pp": plan.pp_size, "tp": plan.parallel.tp, "cp": plan.parallel.cp}
    found = []
    for way, planned in sizes.items():
        axis = axes.get(way)
        size = 1 if axis is None else mesh[axis].size()
        if size != planned:
            found.append(f"world_mesh has {way} size {size} instead of {planned}")
    return found


def _warn_of_replicas(
    plan: PipelinePlan,
    name: str,
    mesh: DeviceMesh,
    axes: Mapping[str, str | None],
    dp_axis_names: Sequence[str],
) -> None:
    """Says, once, that predictions for other replicas do not hold.

    It is no error: each replica's pipeline is the planned one, and to try it on one replica is how
    a plan for thousands of ranks is first run. A plan without a prediction promises nothing.
    """
    names = [axis for axis in dp_axis_names if axis not in axes.values()]
    is_known = names and set(names) <= set(mesh.mesh_dim_names or ())  # flattened axes are not
    if plan.prediction is None or not is_known:
        return
    planned, live = plan.parallel.dp, math.prod(mesh[axis].size() for axis in names)
    if planned != live and mesh.get_rank() == int(mesh.mesh.min()):
        logger.warning(
            "%s counts on dp %d, but world_mesh has dp size %d (%s): a step has %d sequences "
            "instead of %d, and where replicas divide the optimizer's states, a rank holds %.3g "
            "times what was predicted. Plan with --gpus %d for predictions that hold here.",
            name,
            planned,
            live,
            ", ".join(names),
            plan.local_batch_size * live,
            plan.local_batch_size * planned,
            planned / live,
            plan.pp_size * plan.parallel.tp * plan.parallel.cp * live,
        )


def _check_recompute(
    plan: PipelinePlan, name: str, model: nn.Module, *, is_parallelized: bool
) -> None:
    """A model that keeps what the plan recomputes needs more memory, and the reverse more time."""
    word = next((w for w in _SWITCHES if hasattr(type(model), f"is_{w}_checkpointing")), None)
    if word is None or is_parallelized:
        return
    switched_on = getattr(model, f"is_{word}_checkpointing")
    if switched_on and plan.recompute == "none":
        raise PipelineConfigError(
            f"plan: {name} computes nothing again (recompute 'none'), but the model has "
            f"checkpointing: call model.{word}_checkpointing_disable()"
        )
    if not switched_on and plan.recompute != "none":
        remedy = (
            f'call model.{word}_checkpointing_enable({{"use_reentrant": False}})'
            if plan.recompute == "full"
            else "apply selective checkpointing to the stages in parallelize_fn"
        )
        raise PipelineConfigError(
            f"plan: {name} counts on recomputation ({plan.recompute!r}) to fit into memory, but "
            f"the model has no checkpointing: {remedy}"
        )


def _check_arguments(name: str, says: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """What the caller says too must be what the plan says; what only the plan says is left out."""
    for argument, value in given.items():
        planned = says.get(argument)
        if value is None or value == planned:
            continue
        is_alias = argument == "pipeline_parallel_schedule" and planned is not None
        if is_alias and find_schedule(value).name == planned:
            continue
        rule = f"is {planned!r} in {name}" if planned is not None else f"is set by {name}"
        raise PipelineConfigError(
            f"{argument} ({_short(value)}) {rule}: use {argument}={planned!r}, or no plan"
        )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
