"""The one call: a model becomes this rank's stages and a schedule to step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from hfpp.errors import PipelineConfigError
from hfpp.plan.partitioning.grammar import parse_partition
from hfpp.plan.schedules import find_schedule
from hfpp.runtime.build_schedule import build_pipeline_schedule, check_pipeline_schedule
from hfpp.runtime.data_parallel import ReducingStage
from hfpp.runtime.live_partition import LivePartition
from hfpp.runtime.needed_gradients import SparingStage
from hfpp.runtime.planned import follow_plan
from hfpp.runtime.preflight import agree, model_facts
from hfpp.runtime.split_model import split_model_into_stages
from hfpp.runtime.stage_boundary import boundary_of
from hfpp.runtime.stage_shapes import precompute_stage_shapes

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from hfpp.plan.costs import ModelCosts
    from hfpp.plan.partitioning.spec import PartitionSpec
    from hfpp.plan.pipeline_plan import PipelinePlan
    from hfpp.plan.schedules.actions import ScheduleTable
    from hfpp.runtime.torch_compat import TorchSchedule


class Pipeline(NamedTuple):
    """One rank's part of a pipeline.

    Attributes:
        schedule: torch's schedule; ``schedule.step(input_ids, target=labels)`` trains.
        model_parts: this rank's stage modules, as `parallelize_fn` left them.
        has_first_stage: whether this rank takes the token ids.
        has_last_stage: whether this rank takes the targets and returns the losses.
        stages: this rank's PipelineStage objects.
    """

    schedule: TorchSchedule
    model_parts: list[nn.Module]
    has_first_stage: bool
    has_last_stage: bool
    stages: list[PipelineStage]


def pipeline_model(
    model: nn.Module,
    world_mesh: DeviceMesh,
    moe_mesh: DeviceMesh | None,
    *,
    pp_axis_name: str,
    dp_axis_names: tuple[str, ...],
    cp_axis_name: str | None = None,
    tp_axis_name: str | None = None,
    ep_axis_name: str | None = None,
    ep_shard_axis_names: tuple[str, ...] | None = None,
    layers_per_stage: int | None,
    pipeline_parallel_schedule_csv: str | PathLike[str] | None,
    pipeline_parallel_schedule: str | None,
    microbatch_size: int | None,
    local_batch_size: int | None,
    device: torch.device,
    loss_fn: Callable[..., torch.Tensor] | None = None,
    parallelize_fn: Callable[..., Any] | None = None,
    module_fqns_per_model_part: list[list[str]] | None = None,
    patch_inner_model: bool = True,
    patch_causal_lm_model: bool = True,
    scale_grads: bool = False,
    round_to_pp_multiple: Literal["up", "down"] | None = None,
    patch_stage_backward_maybe_with_nosync: bool = False,
    seq_len: int | None = None,
    reduce_grad_per_microbatch: bool = False,
    tensor_dtype: torch.dtype | None = None,
    verify: Callable[[nn.Module, int], None] | None = None,
    plan: PipelinePlan | str | PathLike[str] | None = None,
    partition: PartitionSpec | str | Sequence[int] | Sequence[Sequence[str]] | None = None,
    costs: ModelCosts | None = None,
) -> Pipeline:
    """Split, parallelize, schedule: see `hfpp.functional.pipeline_model`.

    Here ``verify`` is called with the model and the number of stages, to raise before anything is
    built.
    """
    group = _all_ranks(world_mesh, pp_axis_name)
    facts: dict[str, Any] = {}
    refusal: Exception | None = None
    stages: list[PipelineStage] = []
    parts: list[nn.Module] = []
    size, batch = microbatch_size or 0, local_batch_size or 0  # 0 and None are refused below
    csv: ScheduleTable | str | PathLike[str] | None = pipeline_parallel_schedule_csv
    try:
        _check_axes(
            world_mesh,
            pp_axis_name=pp_axis_name,
            dp_axis_names=dp_axis_names,
            cp_axis_name=cp_axis_name,
            tp_axis_name=tp_axis_name,
        )
        if plan is not None:
            planned = follow_plan(
                plan,
                model,
                world_mesh,
                axes={"pp": pp_axis_name, "tp": tp_axis_name, "cp": cp_axis_name},
                dp_axis_names=dp_axis_names,
                given={
                    "pipeline_parallel_schedule": pipeline_parallel_schedule,
                    "pipeline_parallel_schedule_csv": pipeline_parallel_schedule_csv,
                    "layers_per_stage": layers_per_stage,
                    "module_fqns_per_model_part": module_fqns_per_model_part,
                    "partition": partition,
                    "round_to_pp_multiple": round_to_pp_multiple,
                    "microbatch_size": microbatch_size,
                    "local_batch_size": local_batch_size,
                    "seq_len": seq_len,
                },
                is_parallelized=parallelize_fn is not None,
            )
            csv = planned.table
            pipeline_parallel_schedule, seq_len = planned.schedule, planned.seq_len
            size, batch = planned.microbatch_size, planned.local_batch_size
            module_fqns_per_model_part = planned.names
            facts["plan"] = planned.fact
        _check_schedule_is_named(csv, pipeline_parallel_schedule)
        if plan is None:
            _check_sizes(microbatch_size=microbatch_size, local_batch_size=local_batch_size)
        _check_seq_len(seq_len)
        cut = _partition(
            partition,
            None if plan is not None else module_fqns_per_model_part,
            device=device,
            costs=costs,
            microbatch_size=size,
            seq_len=seq_len,
        )
        facts |= {
            "pipeline_parallel_schedule": pipeline_parallel_schedule,
            "pipeline_parallel_schedule_csv": _contents(pipeline_parallel_schedule_csv),
            "layers_per_stage": layers_per_stage,
            "round_to_pp_multiple": round_to_pp_multiple,
            "module_fqns_per_model_part": module_fqns_per_model_part,
            "partition": None if cut is None else [cut.spec.text, cut.spec.names],
            "costs": None if costs is None else asdict(costs),
            "microbatch_size": size,
            "local_batch_size": batch,
            "patch_inner_model": patch_inner_model,
            "patch_causal_lm_model": patch_causal_lm_model,
            "scale_grads": scale_grads,
            "seq_len": seq_len,
            "reduce_grad_per_microbatch": reduce_grad_per_microbatch,
            "patch_stage_backward_maybe_with_nosync": patch_stage_backward_maybe_with_nosync,
            "tensor_dtype": tensor_dtype,
            "a loss_fn": loss_fn is not None,
            "a parallelize_fn": parallelize_fn is not None,
            "verify": verify is not None,
            **model_facts(model),
        }
        stages, parts = split_model_into_stages(
            model,
            world_mesh[pp_axis_name],
            pp_axis_name,
            pipeline_parallel_schedule,
            device,
            module_fqns_per_model_part,
            layers_per_stage,
            patch_inner_model,
            patch_causal_lm_model,
            round_to_pp_multiple,
            pipeline_parallel_schedule_csv=csv,
            stage_class=ReducingStage if reduce_grad_per_microbatch else SparingStage,
            names_argument="module_fqns_per_model_part",
            verify=verify,
            partition=cut,
        )
        check_pipeline_schedule(
            csv,
            pipeline_parallel_schedule,
            size,
            batch,
            stages,
        )
    except Exception as error:  # whatever it is: the other ranks wait for this one
        refusal = error
    agree(facts, refusal, group)
    if parallelize_fn is not None:
        for index, stage in enumerate(stages):
            replaced = parallelize_fn(
                parts[index],
                world_mesh,
                moe_mesh,
                dp_axis_names=dp_axis_names,
                cp_axis_name=cp_axis_name,
                tp_axis_name=tp_axis_name,
                ep_axis_name=ep_axis_name,
                ep_shard_axis_names=ep_shard_axis_names,
            )
            if replaced is not None:
                _check_replacement(parts[index], replaced)
                parts[index] = replaced
            stage.submod = parts[index]
    for part in parts:
        _move(part, device)
    if seq_len is not None:
        precompute_stage_shapes(stages, getattr(model, "config", None), size, seq_len, tensor_dtype)
    schedule = build_pipeline_schedule(
        csv,
        pipeline_parallel_schedule,
        size,
        batch,
        stages,
        loss_fn,
        scale_grads,
    )
    return Pipeline(
        schedule,
        parts,
        any(stage.is_first for stage in stages),
        any(stage.is_last for stage in stages),
        stages,
    )


def _all_ranks(world_mesh: DeviceMesh, pp_axis_name: str) -> dist.ProcessGroup:
    """Everybody who takes part: the other replicas too, where the mesh is the whole job."""
    if world_mesh.size() == dist.get_world_size() and dist.group.WORLD is not None:
        return dist.group.WORLD
    _check_axes(world_mesh, pp_axis_name=pp_axis_name)
    return world_mesh[pp_axis_name].get_group()


def _partition(
    partition: PartitionSpec | str | Sequence[int] | Sequence[Sequence[str]] | None,
    names: list[list[str]] | None,
    **known: Any,
) -> LivePartition | None:
    if partition is None:
        return None
    spec = parse_partition(partition)
    if names is not None:
        raise PipelineConfigError(
            f"partition ({spec.text!r}) and module_fqns_per_model_part both say where to cut: give "
            f"one of them."
        )
    return LivePartition(spec=spec, **known)


def _check_axes(world_mesh: DeviceMesh, **axes: Any) -> None:
    """Data-parallel names are parallelize_fn's business: flattened axes are not in the mesh."""
    names = world_mesh.mesh_dim_names or ()
    for argument, name in axes.items():
        if argument == "dp_axis_names":
            if isinstance(name, str):
                raise PipelineConfigError(
                    f"dp_axis_names ({name!r}) must be a tuple of names: write ({name!r},)."
                )
        elif name is not None and name not in names:
            raise PipelineConfigError(
                f"{argument} ({name!r}) is no axis of world_mesh, which has {list(names)}: use one "
                f"of these, or make the mesh with mesh_dim_names=(..., {name!r})."
            )


def _check_replacement(part: nn.Module, replaced: Any) -> None:
    """A stage must be findable in what stands for it: tied weights and clipping need its names."""
    if not isinstance(replaced, nn.Module) or boundary_of(replaced) is not boundary_of(part):
        raise PipelineConfigError(
            f"parallelize_fn returned a {type(replaced).__name__} that does not hold the part it "
            f"was given as a submodule: return the part, a module around it, or None."
        )


def _move(part: nn.Module, device: torch.device) -> None:
    """Bring to ``device`` what is neither there nor on the meta device, whose owner fills it.

    After parallelize_fn: sharding moves shards by itself, and moving a whole part before would cost
    the memory that sharding saves.
    """
    tensors = (*part.parameters(), *part.buffers())
    elsewhere = [t for t in tensors if t.device.type not in (device.type, "meta")]
    if elsewhere and not any(t.is_meta for t in tensors):
        part.to(device)


def _check_schedule_is_named(
    csv: ScheduleTable | str | PathLike[str] | None, name: str | None
) -> None:
    if not csv and not name:
        raise PipelineConfigError(
            "pipeline_parallel_schedule and pipeline_parallel_schedule_csv are both empty: use "
            "pipeline_parallel_schedule='1F1B', another schedule's name, or a CSV file."
        )
    if not csv and name:
        find_schedule(name)


def _check_sizes(**sizes: int | None) -> None:
    for argument, size in sizes.items():
        if size is None:
            raise PipelineConfigError(
                f"{argument} is None, which needs a plan that says it: use {argument}=1 or more"
            )


def _check_seq_len(seq_len: int | None) -> None:
    if seq_len is not None and (type(seq_len) is not int or seq_len < 1):
        raise PipelineConfigError(
            f"seq_len ({seq_len!r}) must be a positive number of tokens, or None to find the "
            f"shapes on the first step."
        )


def _contents(path: str | PathLike[str] | None) -> str | None:
    """What the file says, not where it lies: paths may differ between machines."""
    if not path or not Path(path).is_file():
        return str(path) if path else None
    return Path(path).read_text(encoding="utf-8", errors="replace")
