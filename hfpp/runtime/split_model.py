"""A model and a part of the plan become this rank's stage modules."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from hfpp.errors import PipelineConfigError
from hfpp.plan.partition import calculate_virtual_stages, check_rounding, uniform_offsets
from hfpp.plan.partitioning.spec import PartitionKind
from hfpp.plan.placement import Placement, stage_ids_this_rank
from hfpp.plan.schedules import ScheduleTable, find_schedule, read_csv
from hfpp.runtime.anatomy import Anatomy
from hfpp.runtime.auxiliary_term import FLAG, asks_for_auxiliary_loss, flagged_configs
from hfpp.runtime.compiled import compile_alike, nothing_left
from hfpp.runtime.find_anatomy import find_anatomy
from hfpp.runtime.hollow import hollow_layer, hollow_parameters
from hfpp.runtime.model_inputs import first_argument, forward_constants
from hfpp.runtime.module_copy import copy_structure
from hfpp.runtime.module_names import (
    HOOK,
    check_module_names,
    customized,
    module_names_of,
    offsets_of,
    stage_listing,
)
from hfpp.runtime.needed_gradients import SparingStage
from hfpp.runtime.ownership import Ownership, find_ownership, separate_copies
from hfpp.runtime.prune import prune
from hfpp.runtime.repeated_layers import separate_places
from hfpp.runtime.stage_boundary import StageBoundary
from hfpp.runtime.stage_module import make_stage
from hfpp.runtime.stage_ties import keep_ties

if TYPE_CHECKING:
    from os import PathLike

    from torch.distributed.device_mesh import DeviceMesh

    from hfpp.runtime.live_partition import LivePartition

logger = logging.getLogger(__name__)


def split_model_into_stages(
    model: nn.Module,
    pp_mesh: DeviceMesh,
    pp_axis_name: str,
    pp_schedule: str | None,
    device: torch.device,
    module_names_per_stage: list[list[str]] | None = None,
    layers_per_stage: int | None = None,
    patch_inner_model: bool = True,
    patch_causal_lm_model: bool = True,
    round_to_pp_multiple: Literal["up", "down"] | None = None,
    *,
    pipeline_parallel_schedule_csv: ScheduleTable | str | PathLike[str] | None = None,
    anatomy: Anatomy | None = None,
    stage_class: type[PipelineStage] = SparingStage,
    names_argument: str = "module_names_per_stage",
    verify: Callable[[nn.Module, int], None] | None = None,
    partition: LivePartition | None = None,
) -> tuple[list[PipelineStage], list[nn.Module]]:
    """Split ``model``: see `hfpp.functional.split_model_into_stages`.

    Beyond it: a table in place of a CSV file; ``anatomy``, where it is known; the ``stage_class``
    to wrap modules in; what the caller calls ``module_names_per_stage``; what is called with
    the model and the number of stages before anything is built, to raise where they do not fit; and
    another partition than the uniform one.
    """
    check_rounding(round_to_pp_multiple)
    if partition is not None and partition.spec.kind is PartitionKind.NAMES:
        names_argument = partition.spec.argument
        module_names_per_stage = [list(names) for names in partition.spec.names]
    mesh = pp_mesh[pp_axis_name] if pp_mesh.ndim > 1 else pp_mesh
    pp_size, pp_rank, group = mesh.size(), mesh.get_local_rank(), mesh.get_group()
    layout = _layout(pp_schedule, pipeline_parallel_schedule_csv)
    own_forward = not (patch_inner_model or patch_causal_lm_model) or bool(
        getattr(type(model), "_pp_keep_self_forward", False)
    )
    if anatomy is None and not own_forward:
        # even a model that cannot be cut runs on one stage
        anatomy = _try_anatomy(model) if layout.single and pp_size == 1 else find_anatomy(model)
    if module_names_per_stage is not None:
        num_stages = len(module_names_per_stage)
    elif partition is not None and partition.spec.num_stages is not None:
        num_stages = partition.spec.num_stages
    elif layers_per_stage is None and layout.stages_per_rank is not None:
        num_stages = pp_size * layout.stages_per_rank
    else:
        num_layers = _num_layers(model) if anatomy is None else anatomy.num_layers
        num_stages, _ = calculate_virtual_stages(
            num_layers, layers_per_stage, pp_size, layout.single, round_to_pp_multiple
        )
    _check_stage_count(num_stages, pp_size, layout)
    if own_forward and num_stages > 1:
        _refuse_lost_loss(model, "its own forward sees only the routers of its own layers")
    elif not own_forward and anatomy is None:
        _refuse_lost_loss(model, "its forward could not be followed")
    if verify is not None:
        if own_forward:
            raise PipelineConfigError(
                f"verify cannot check {type(model).__name__}, which keeps its own forward: leave "
                f"verify out."
            )
        verify(model, num_stages)
    ids = stage_ids_this_rank(pp_rank, pp_size, num_stages, layout.placement.value)
    if own_forward:
        if partition is not None and partition.spec.kind is not PartitionKind.UNIFORM:
            raise PipelineConfigError(
                f"{partition.spec.argument} ({partition.spec.text!r}) needs to know the layers of "
                f"{type(model).__name__}, which keeps its own forward: use 'uniform' or lists of "
                f"module names."
            )
        modules = prune(model, module_names_per_stage, num_stages, ids, group, names_argument)
    elif anatomy is None:
        modules = [_whole_model(model, group)]
    else:
        names = module_names_per_stage
        if names is None:
            names_argument = HOOK
            offsets = _offsets(model, anatomy, num_stages, pp_size, layout, partition)
            names = _generated_names(model, anatomy, offsets)
        offsets = offsets_of(names, anatomy, names_argument)
        ownership = find_ownership(model, anatomy, offsets, partial(stage_listing, names))
        check_module_names(names, anatomy, ownership, names_argument)
        modules = build_stages(model, anatomy, ownership, ids, group)
    stages = [
        _pipeline_stage(stage_class, module, index, num_stages, device, group)
        for index, module in zip(ids, modules, strict=True)
    ]
    logger.info(
        "pipeline rank %d of %d: stages %s of %d of %s",
        pp_rank, pp_size, list(ids), num_stages, type(model).__name__,
    )  # fmt: skip
    return stages, modules


class _Layout(NamedTuple):
    """What a schedule asks of the stages; ``stages_per_rank`` None means any number from two."""

    schedule: str
    placement: Placement
    stages_per_rank: int | None

    @property
    def single(self) -> bool:
        return self.stages_per_rank == 1


def _layout(schedule: str | None, csv: ScheduleTable | str | PathLike[str] | None) -> _Layout:
    if csv:
        table = csv if isinstance(csv, ScheduleTable) else read_csv(csv)
        return _Layout(f"the schedule in {table.name}", table.placement, table.stages_per_rank)
    if schedule is None:
        raise PipelineConfigError(
            "pp_schedule is None and there is no pipeline_parallel_schedule_csv: use "
            "pp_schedule='1F1B', another schedule's name, or a CSV file."
        )
    spec = find_schedule(schedule, argument="pp_schedule")
    return _Layout(spec.name, spec.placement, spec.stages_per_rank)


def _check_stage_count(num_stages: int, pp_size: int, layout: _Layout) -> None:
    per_rank, rest = divmod(num_stages, pp_size)
    wanted = layout.stages_per_rank
    if rest == 0 and (per_rank == wanted or (wanted is None and per_rank > 1)):
        return
    rule = "2 or more" if wanted is None else f"exactly {wanted}"
    right = pp_size * (wanted or max(2, per_rank))
    raise PipelineConfigError(
        f"{num_stages} stages cannot be dealt to pp_size ({pp_size}) ranks: the number of stages "
        f"must be a positive multiple of pp_size, and {layout.schedule} needs {rule} per rank. Use "
        f"{right} stages."
    )


def _refuse_lost_loss(model: nn.Module, reason: str) -> None:
    """The auxiliary loss of routers that nobody would add to the loss."""
    if asks_for_auxiliary_loss(flagged_configs(model)):
        raise PipelineConfigError(
            f"{type(model).__name__} has config.{FLAG}=True: the auxiliary loss of the routers "
            f"would be lost, as {reason}. Set config.{FLAG}=False to train without it."
        )


def _try_anatomy(model: nn.Module) -> Anatomy | None:
    try:
        return find_anatomy(model)
    except PipelineConfigError:
        return None


def _num_layers(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    layers = getattr(text, "num_hidden_layers", None)
    if layers is None:
        raise PipelineConfigError(
            f"{type(model).__name__} has no config.num_hidden_layers: give "
            f"module_names_per_stage, or leave out layers_per_stage."
        )
    return int(layers)


def uniform_ownership(model: nn.Module, anatomy: Anatomy, num_stages: int) -> Ownership:
    """Who owns what when the layers are dealt out evenly.

    Raises:
        PipelineConfigError: if the model cannot be cut so.
    """
    _check_layers(anatomy, num_stages, "the schedule")
    return find_ownership(model, anatomy, uniform_offsets(num_stages, anatomy.num_layers).row())


def _check_layers(anatomy: Anatomy, num_stages: int, schedule: str) -> None:
    if num_stages > anatomy.num_layers:
        raise PipelineConfigError(
            f"{schedule} on this pipeline has {num_stages} stages, but "
            f"{anatomy.model_name} has {anatomy.num_layers} layers, and every stage needs one: use "
            f"fewer ranks, or a schedule with fewer stages per rank."
        )


def _offsets(
    model: nn.Module,
    anatomy: Anatomy,
    num_stages: int,
    pp_size: int,
    layout: _Layout,
    partition: LivePartition | None,
) -> tuple[int, ...]:
    _check_layers(anatomy, num_stages, layout.schedule)
    if partition is None:
        return uniform_offsets(num_stages, anatomy.num_layers).row()
    return partition.offsets(
        model, anatomy, num_stages=num_stages, pp_size=pp_size, placement=layout.placement
    )


def _generated_names(
    model: nn.Module, anatomy: Anatomy, offsets: tuple[int, ...]
) -> list[list[str]]:
    """A partition in the model's own names, or what the model's hook makes of it."""
    names = module_names_of(find_ownership(model, anatomy, offsets), anatomy)
    return customized(model, names, anatomy.layers_name.rpartition(".")[0])


def build_stages(
    model: nn.Module,
    anatomy: Anatomy,
    ownership: Ownership,
    stage_ids: Sequence[int],
    group: dist.ProcessGroup | None = None,
) -> list[nn.Module]:
    """The stage modules of ``stage_ids``: structural copies that share the model's tensors.

    A tied tensor that two of the stages hold is the model's own in the first and a copy in the
    others: each stage trains its own, and their gradients are summed.
    """
    held: set[int] = set()
    modules = []
    for index in stage_ids:
        stage = _structural_copy(model, anatomy, ownership, index)
        separate_copies(stage, ownership.tied, index, held)
        keep_ties(stage)
        boundary = StageBoundary(
            stage_index=index,
            num_stages=len(ownership.layers),
            layers=ownership.layers[index],
            tied_names=ownership.copies(index),
            tied=ownership.tied,
            pp_group=group,
            anatomy=anatomy,
            ownership=ownership,
        )
        make_stage(
            stage,
            boundary,
            ids_name=anatomy.ids_name,
            constants=forward_constants(model),
            stand_in_owners=[m for m in stage.modules() if "_hfpp_stand_ins" in m.__dict__],
        )
        modules.append(stage)
        held.add(index)
    return modules


def _structural_copy(
    model: nn.Module, anatomy: Anatomy, ownership: Ownership, index: int
) -> nn.Module:
    layers = model.get_submodule(anatomy.layers_name)
    bare = anatomy.skeleton.get_submodule(anatomy.layers_name)
    own = ownership.layers[index]
    hollow = {
        key: hollow_layer(bare_layer)
        for number, (key, bare_layer) in enumerate(_present(bare).items())
        if number not in own
    }
    originals = _present(layers)
    kept_layers = {id(layer) for key, layer in originals.items() if key not in hollow}
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for key, stand_in in hollow.items():
        if id(originals[key]) not in kept_layers:
            memo[id(originals[key])] = stand_in
    stage = copy_structure(model, memo)
    places = stage.get_submodule(anatomy.layers_name)
    places._modules.update(hollow)
    separate_places(places, model, layers, memo)
    kept, prefix = ownership.outer[index], anatomy.layers_name
    for name, module in list(stage.named_modules()):
        if name == prefix or name.startswith(f"{prefix}."):
            continue
        dropped = [
            own_name
            for own_name, parameter in module._parameters.items()
            if parameter is not None and (f"{name}.{own_name}" if name else own_name) not in kept
        ]
        if dropped:
            hollow_parameters(module, dropped)
    compile_alike(model, stage, anatomy.layers_name)
    return stage


def _present(layers: nn.Module) -> dict[str, nn.Module]:
    return {key: layer for key, layer in layers._modules.items() if layer is not None}


def _whole_model(model: nn.Module, group: dist.ProcessGroup | None) -> nn.Module:
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    stage = copy.deepcopy(model, memo)
    boundary = StageBoundary(
        stage_index=0,
        num_stages=1,
        layers=range(0),
        tied_names=frozenset(),
        tied=(),
        pp_group=group,
        anatomy=None,
    )
    make_stage(
        stage,
        boundary,
        ids_name=first_argument(model),
        constants=forward_constants(model),
        stand_in_owners=[],
    )
    return stage


def _pipeline_stage(
    stage_class: type[PipelineStage],
    module: nn.Module,
    index: int,
    num_stages: int,
    device: torch.device,
    group: dist.ProcessGroup,
) -> PipelineStage:
    boundary = module.__dict__.get("_hfpp_boundary")
    slots = () if boundary is None else (boundary.slots_in(), boundary.slots_out())
    # torch's split backward walks the graph once per boundary value and fails where they share
    # it; a weight-gradient step that has nothing left to do is always right
    several = any(sum(slot.is_floating for slot in side) > 1 for side in slots)
    builder = nothing_left if several else None
    return stage_class(module, index, num_stages, device, group=group, dw_builder=builder)
