"""The contract: every function of hfpp under its stable name, each one call into the library.

Importing this module loads no torch: it is imported inside the functions that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hfpp.plan import partition, placement, tensor_shapes

if TYPE_CHECKING:
    from os import PathLike

    import torch
    from torch import nn
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import _PipelineSchedule
    from transformers import PretrainedConfig

    from hfpp._core import Table
    from hfpp.check.report import CheckReport
    from hfpp.plan.costs import ModelCosts
    from hfpp.plan.partitioning.spec import PartitionSpec
    from hfpp.plan.pipeline_plan import PipelinePlan
    from hfpp.runtime.pipeline import Pipeline

__all__ = [
    "ParallelizeFnProtocol",
    "build_pipeline_schedule",
    "calculate_virtual_stages",
    "causal_lm_loss",
    "check_model",
    "clip_grad_norm_",
    "generate_hf_model_fqn_per_model_part",
    "pipeline_model",
    "ranks_by_stage",
    "reset_pp_stage_shapes",
    "scale_grads_by_divisor",
    "split_model_into_stages",
    "stage_ids_by_rank",
    "stage_ids_this_rank",
]


class ParallelizeFnProtocol(Protocol):
    """What `pipeline_model` calls on every local model part, to shard, wrap or compile it.

    It may change the part in place and return None, or return a replacement, which is then used.

    Example:
        >>> def parallelize(
        ...     model, world_mesh, moe_mesh, *, dp_axis_names, cp_axis_name=None, tp_axis_name=None,
        ...     ep_axis_name=None, ep_shard_axis_names=None,
        ... ):
        ...     from torch.distributed.fsdp import fully_shard
        ...
        ...     return fully_shard(model, mesh=world_mesh[dp_axis_names])
    """

    def __call__(
        self,
        model: nn.Module,
        world_mesh: DeviceMesh,
        moe_mesh: DeviceMesh | None,
        *,
        dp_axis_names: tuple[str, ...],
        cp_axis_name: str | None = None,
        tp_axis_name: str | None = None,
        ep_axis_name: str | None = None,
        ep_shard_axis_names: tuple[str, ...] | None = None,
    ) -> nn.Module | None:
        """Parallelizes one model part over the axes that are not the pipeline's."""


def stage_ids_this_rank(
    pp_rank: int, pp_size: int, num_stages: int, style: str = "loop"
) -> tuple[int, ...]:
    """Gives the stages that one rank of a pipeline holds.

    Args:
        pp_rank: The rank within the pipeline, 0 to `pp_size` - 1.
        pp_size: Number of ranks in the pipeline, at least 1.
        num_stages: Number of stages over all ranks: a positive multiple of `pp_size`, for "v"
            exactly twice `pp_size`.
        style: "loop" deals the stages round the ranks; "v" goes there and back, so that rank 0
            holds the first and the last stage.

    Returns:
        The stage indices in ascending order: for "loop" ``pp_rank + k * pp_size``, for "v"
        ``(pp_rank, num_stages - 1 - pp_rank)``.

    Raises:
        PipelineConfigError: If a size or the rank is out of range, the stages do not fit the style,
            or the style is unknown.
        TypeError: If a number is no integer.
        OverflowError: If a size is beyond anything that can be built.

    Example:
        >>> stage_ids_this_rank(pp_rank=1, pp_size=4, num_stages=8)
        (1, 5)
        >>> stage_ids_this_rank(pp_rank=1, pp_size=4, num_stages=8, style="v")
        (1, 6)
    """
    return placement.stage_ids_this_rank(pp_rank, pp_size, num_stages, style)


def stage_ids_by_rank(pp_size: int, num_stages: int, style: str = "loop") -> Table:
    """Gives the stages of every rank of a pipeline as one table.

    Args:
        pp_size: Number of ranks in the pipeline, at least 1.
        num_stages: Number of stages over all ranks, as in `stage_ids_this_rank`.
        style: "loop" or "v".

    Returns:
        An int32 table ``[pp_size, stages_per_rank]``; row r equals `stage_ids_this_rank` of rank r.
        It has the buffer protocol: ``memoryview(table)``, ``numpy.asarray(table)`` and
        ``torch.frombuffer(table, dtype=torch.int32)`` share its memory.

    Raises:
        PipelineConfigError: If a size is out of range, the stages do not fit the style, or the
            style is unknown.
        TypeError: If a number is no integer.
        OverflowError: If the table would be larger than 2 GiB.

    Example:
        >>> table = stage_ids_by_rank(pp_size=4, num_stages=8)
        >>> table.shape, table[1, 1], table.row(3)
        ((4, 2), 5, (3, 7))
    """
    return placement.stage_ids_by_rank(pp_size, num_stages, style)


def ranks_by_stage(pp_size: int, num_stages: int, style: str = "loop") -> Table:
    """Gives the rank of every stage of a pipeline: the inverse of `stage_ids_by_rank`.

    Args:
        pp_size: Number of ranks in the pipeline, at least 1.
        num_stages: Number of stages over all ranks, as in `stage_ids_this_rank`.
        style: "loop" or "v".

    Returns:
        An int32 table ``[num_stages]``.

    Raises:
        PipelineConfigError: If a size is out of range, the stages do not fit the style, or the
            style is unknown.
        TypeError: If a number is no integer.
        OverflowError: If the table would be larger than 2 GiB.

    Example:
        >>> ranks_by_stage(pp_size=3, num_stages=6, style="v").row()
        (0, 1, 2, 2, 1, 0)
    """
    return placement.ranks_by_stage(pp_size, num_stages, style)


def generate_hf_model_fqn_per_model_part(
    num_stages: int,
    num_layers: int,
    include_embeddings: bool = True,
    include_lm_head: bool = True,
    include_rotary_emb: bool = True,
    include_multimodal_encoders: bool = True,
    extra_module_fqns: Sequence[str] | None = None,
    fqn_prefix: str = "model.",
    lm_head_fqn: str = "lm_head",
) -> list[list[str]]:
    """Lists the module names (FQNs) of every stage of a decoder cut uniformly.

    The first ``num_layers % num_stages`` stages get one layer more. Stage 0 begins with the
    embeddings, the multimodal encoders' names and `extra_module_fqns`; the last stage ends with the
    norm and the head; the rotary embedding stands last on every stage.

    Args:
        num_stages: Number of stages, 1 to `num_layers`.
        num_layers: Number of decoder layers.
        include_embeddings: Whether stage 0 lists ``embed_tokens``.
        include_lm_head: Whether the last stage lists the head.
        include_rotary_emb: Whether every stage lists ``rotary_emb``.
        include_multimodal_encoders: Whether stage 0 lists the names that vision and audio encoders
            and their projectors have in known models.
        extra_module_fqns: Further full names for stage 0, taken as they are.
        fqn_prefix: What stands before every name except the head's and the extra ones.
        lm_head_fqn: The full name of the head.

    Returns:
        One list of names per stage.

    Raises:
        PipelineConfigError: If a size is below 1 or there are more stages than layers.
        TypeError: If a number is no integer, a name is no string, or `extra_module_fqns` is one.
        OverflowError: If the lists would hold more than 16,777,216 layers.

    Example:
        >>> generate_hf_model_fqn_per_model_part(2, 3, include_multimodal_encoders=False)[0]
        ['model.embed_tokens', 'model.layers.0', 'model.layers.1', 'model.rotary_emb']
        >>> generate_hf_model_fqn_per_model_part(2, 3, include_rotary_emb=False)[1]
        ['model.layers.2', 'model.norm', 'lm_head']
    """
    return partition.generate_hf_model_fqn_per_model_part(
        num_stages,
        num_layers,
        include_embeddings,
        include_lm_head,
        include_rotary_emb,
        include_multimodal_encoders,
        extra_module_fqns,
        fqn_prefix,
        lm_head_fqn,
    )


def calculate_virtual_stages(
    num_layers: int,
    layers_per_stage: int | None,
    pp_size: int,
    is_single_stage_schedule: bool,
    round_to_pp_multiple: Literal["up", "down"] | None = None,
) -> tuple[int, int]:
    """Computes how many stages a pipeline has, over all ranks and on each.

    Args:
        num_layers: Number of decoder layers, at least 1.
        layers_per_stage: Layers per stage; None takes one stage per rank for single-stage schedules
            and two for the others.
        pp_size: Number of ranks in the pipeline, at least 1.
        is_single_stage_schedule: Whether the schedule runs exactly one stage per rank (1F1B,
            GPipe); the others need at least two.
        round_to_pp_multiple: What to do when ``ceil(num_layers / layers_per_stage)`` is no multiple
            of `pp_size`: round it "up" or "down" to one, or None for an error.

    Returns:
        ``(num_virtual_stages, stages_per_rank)``, a named tuple.

    Raises:
        PipelineConfigError: If a size is below 1, the count is not divisible by `pp_size`, does not
            fit the schedule, is zero after rounding or larger than the number of layers, or
            `round_to_pp_multiple` is unknown. The message says what to pass instead.
        TypeError: If a number is no integer.
        OverflowError: If a number does not fit in 64 bits.

    Example:
        >>> num_virtual_stages, stages_per_rank = calculate_virtual_stages(
        ...     num_layers=32, layers_per_stage=4, pp_size=4, is_single_stage_schedule=False
        ... )
        >>> num_virtual_stages, stages_per_rank
        (8, 2)
    """
    return partition.calculate_virtual_stages(
        num_layers, layers_per_stage, pp_size, is_single_stage_schedule, round_to_pp_multiple
    )


def _get_hidden_and_vocab_size(model_config: Any) -> tuple[int, int]:
    """Reads the width of the hidden states and of the logits from a model's config.

    Args:
        model_config: A config of transformers or any object with its attributes. `hidden_size` and
            `vocab_size` are each looked for at the top level first, then in ``text_config``; a
            config's ``attribute_map`` is followed (GPT-2's ``n_embd``).

    Returns:
        ``(hidden_size, vocab_size)`` in elements, a named tuple.

    Raises:
        PipelineConfigError: If a size is in neither place, or no positive integer.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(vocab_size=9, text_config=SimpleNamespace(hidden_size=64))
        >>> tuple(_get_hidden_and_vocab_size(config))
        (64, 9)
    """
    return tensor_shapes.hidden_and_vocab_size(model_config)


def _precompute_stage_shapes(
    stages: list[PipelineStage],
    model_config: Any,
    microbatch_size: int,
    seq_len: int,
    tensor_dtype: torch.dtype | None = None,
) -> int:
    """Gives every local stage static input and output metadata, on the meta device.

    The first step then needs no serial shape inference along the pipeline. Stage 0 takes int64
    ``[microbatch_size, seq_len]``, the others ``[microbatch_size, seq_len, hidden_size]``; a stage
    with an ``lm_head`` gives ``[microbatch_size, seq_len, vocab_size]``, the others hidden states.
    Stages that know their own boundary, and models with a ``get_pipeline_stage_metas`` hook, say
    themselves what crosses.

    Args:
        stages: The stages of this rank.
        model_config: The model's config, for the widths.
        microbatch_size: Sequences per microbatch.
        seq_len: Tokens per sequence.
        tensor_dtype: Dtype of what is passed on; None takes the stage's first parameter's, and
            bfloat16 for a stage without parameters.

    Returns:
        The largest number of tokens in a local stage's primary output.

    Raises:
        PipelineConfigError: If a size is below 1 or the config lacks a width.

    Example:
        >>> tokens = _precompute_stage_shapes(stages, config, 2, 4096)  # doctest: +SKIP
    """
    from hfpp.runtime.stage_shapes import precompute_stage_shapes

    return precompute_stage_shapes(stages, model_config, microbatch_size, seq_len, tensor_dtype)


def reset_pp_stage_shapes(
    schedule: _PipelineSchedule,
    stages: list[PipelineStage],
    model_config: Any,
    microbatch_size: int,
    seq_len: int,
    tensor_dtype: torch.dtype | None = None,
) -> int:
    """Makes a schedule ready for another sequence length.

    Clears what torch fixed on the first step (metadata, buffers, initialised flags) and computes
    the new shapes. Gradients accumulated so far stay, those of FSDP modules included.

    Args:
        schedule: What `build_pipeline_schedule` or `pipeline_model` returned.
        stages: The stages of this rank.
        model_config: The model's config, for the widths.
        microbatch_size: Sequences per microbatch.
        seq_len: The new number of tokens per sequence.
        tensor_dtype: As in `_precompute_stage_shapes`.

    Returns:
        The largest number of tokens in a local stage's primary output.

    Raises:
        PipelineConfigError: If a size is below 1 or the config lacks a width.

    Example:
        >>> reset_pp_stage_shapes(schedule, stages, config, 2, seq_len=8192)  # doctest: +SKIP
        16384
    """
    from hfpp.runtime.stage_shapes import reset_pp_stage_shapes as reset

    return reset(schedule, stages, model_config, microbatch_size, seq_len, tensor_dtype)


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
    pipeline_parallel_schedule_csv: str | PathLike[str] | None = None,
) -> tuple[list[PipelineStage], list[nn.Module]]:
    """Splits a model into this rank's pipeline stages, which run the model's own forward.

    The model is left as it was and nothing is copied: a stage's parameters are the model's own
    tensors under the model's own names (FQNs), layer indices included. Meta-device models work.

    Args:
        model: The whole model, the same on every rank.
        pp_mesh: The mesh that holds the pipeline's axis.
        pp_axis_name: The name of that axis.
        pp_schedule: The schedule's name, which decides on the placement of the stages; None where
            `pipeline_parallel_schedule_csv` is given.
        device: Where the stages run.
        module_names_per_stage: The module names of every stage; checked before anything is built.
            None cuts the layers uniformly.
        layers_per_stage: Layers per stage where no names are given, as in
            `calculate_virtual_stages`.
        patch_inner_model: With both this and `patch_causal_lm_model` False, the stages' forward is
            left alone: the model copes with missing modules by itself.
        patch_causal_lm_model: See `patch_inner_model`.
        round_to_pp_multiple: As in `calculate_virtual_stages`.
        pipeline_parallel_schedule_csv: A schedule file, from which placement and stages per rank
            are read.

    Returns:
        ``(stages, model_parts)`` of this rank, in ascending order of stages. A stage returns a
        tensor or a tuple of tensors.

    Raises:
        PipelineConfigError: If the names do not cover the model exactly once and in order, the
            stages do not fit the schedule, or the model cannot be split exactly.
        FileNotFoundError: If there is no such CSV file.

    Example:
        >>> stages, parts = split_model_into_stages(  # doctest: +SKIP
        ...     model, mesh["pp"], "pp", "Interleaved1F1B", device, layers_per_stage=4
        ... )
    """
    from hfpp.runtime.split_model import split_model_into_stages as split

    return split(
        model,
        pp_mesh,
        pp_axis_name,
        pp_schedule,
        device,
        module_names_per_stage,
        layers_per_stage,
        patch_inner_model,
        patch_causal_lm_model,
        round_to_pp_multiple,
        pipeline_parallel_schedule_csv=pipeline_parallel_schedule_csv,
    )


def build_pipeline_schedule(
    pipeline_parallel_schedule_csv: str | PathLike[str] | None,
    pipeline_parallel_schedule: str | None,
    microbatch_size: int,
    local_batch_size: int,
    stages: list[PipelineStage],
    loss_fn: Callable[..., torch.Tensor] | None,
    scale_grads: bool = False,
) -> _PipelineSchedule:
    """Builds the schedule that runs this rank's stages.

    Args:
        pipeline_parallel_schedule_csv: A schedule file with one row of actions per rank; it is
            verified before it runs. None takes the schedule by its name.
        pipeline_parallel_schedule: 1F1B, GPipe, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble,
            ZBVZeroBubble, DualPipeV, ZBH2, VHalf, VMin, VLimited or, with a limit on a rank's
            activations, VLimited-12, in any case, or an alias of one. May be
            None with a CSV.
        microbatch_size: Sequences per microbatch.
        local_batch_size: Sequences per step of this pipeline: a positive multiple of
            `microbatch_size`.
        stages: The stages of this rank.
        loss_fn: Called on the last stage as ``loss_fn(output, target)``, per microbatch; with
            ``config.output_router_logits=True``, the model's auxiliary loss is added to it.
        scale_grads: Whether gradients are the mean over the microbatches instead of the sum, also
            when several steps accumulate.

    Returns:
        A torch schedule with ``step`` and ``eval``.

    Raises:
        PipelineConfigError: If the schedule is unknown or cannot run with these stages and this
            number of microbatches, or the CSV is no correct schedule.
        FileNotFoundError: If there is no such CSV file.

    Example:
        >>> schedule = build_pipeline_schedule(  # doctest: +SKIP
        ...     None, "1F1B", microbatch_size=1, local_batch_size=8, stages=stages, loss_fn=loss
        ... )
    """
    from hfpp.runtime.build_schedule import build_pipeline_schedule as build

    schedule: _PipelineSchedule = build(
        pipeline_parallel_schedule_csv,
        pipeline_parallel_schedule,
        microbatch_size,
        local_batch_size,
        stages,
        loss_fn,
        scale_grads,
    )
    return schedule


def scale_grads_by_divisor(stages: list[PipelineStage], divisor: float) -> None:
    """Divides the gradients of all local stages in place, without recording it.

    Args:
        stages: The stages of this rank; a parameter that two of them share is divided once.
        divisor: What to divide by, such as the number of tokens in the batch.

    Raises:
        PipelineConfigError: If `divisor` is zero or not finite.

    Example:
        >>> scale_grads_by_divisor(stages, num_tokens)  # doctest: +SKIP
    """
    from hfpp.runtime.gradients import scale_grads_by_divisor as scale

    scale(stages, divisor)


def clip_grad_norm_(
    parameters: torch.Tensor | nn.Module | Iterable[torch.Tensor] | Iterable[nn.Module],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    pp_group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Clips the gradients of the whole model by their norm over all stages and shards.

    Every parameter counts once: shards of FSDP2 add up, and of a tied pair only the owner counts.
    Every rank of the pipeline must call it.

    Args:
        parameters: This rank's model parts, one part, or plain parameters.
        max_norm: The largest norm to leave; infinity only measures.
        norm_type: The p of the norm; infinity for the largest absolute value.
        error_if_nonfinite: Whether an infinite or NaN norm is an error, on every rank.
        foreach: As in ``torch.nn.utils.clip_grad_norm_``.
        pp_group: The ranks of this pipeline; None takes the group that the parts were made for.

    Returns:
        The norm before clipping, a scalar, the same on every rank.

    Raises:
        PipelineConfigError: If `max_norm` or `norm_type` is out of range, or the parts belong to
            different pipelines.
        RuntimeError: If the norm is not finite and `error_if_nonfinite` is set.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([weight], max_norm=1.0).item()
        5.0
    """
    from hfpp.runtime.gradients import clip_grad_norm_ as clip

    return clip(parameters, max_norm, norm_type, error_if_nonfinite, foreach, pp_group=pp_group)


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items: int | float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes the cross-entropy of every token given the ones before it, in nats.

    Args:
        logits: ``[batch, seq, vocab]``; position t predicts label t + 1.
        labels: ``[batch, seq]``, integers, the input ids themselves: hfpp shifts them. -100 is
            ignored.
        num_items: What the summed loss is divided by, such as the number of targets of the whole
            batch, so that microbatches of different counts add up to the batch's mean. None divides
            by this microbatch's own number of targets.

    Returns:
        A scalar; 0 with zero gradients where there is no target.

    Raises:
        PipelineConfigError: If the shapes do not belong together, the labels are no integers, or
            `num_items` is not positive.

    Example:
        >>> import torch
        >>> labels = torch.ones(2, 4, dtype=torch.int64)
        >>> round(causal_lm_loss(torch.zeros(2, 4, 8), labels).item(), 4)  # ln 8
        2.0794
    """
    from hfpp.runtime.loss import causal_lm_loss as loss

    return loss(logits, labels, num_items)


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
    parallelize_fn: ParallelizeFnProtocol | None = None,
    module_fqns_per_model_part: list[list[str]] | None = None,
    patch_inner_model: bool = True,
    patch_causal_lm_model: bool = True,
    scale_grads: bool = False,
    round_to_pp_multiple: Literal["up", "down"] | None = None,
    patch_stage_backward_maybe_with_nosync: bool = False,
    seq_len: int | None = None,
    reduce_grad_per_microbatch: bool = False,
    tensor_dtype: torch.dtype | None = None,
    verify: Literal["logits", "grads"] | None = None,
    plan: PipelinePlan | str | PathLike[str] | None = None,
    partition: PartitionSpec | str | Sequence[int] | Sequence[Sequence[str]] | None = None,
    costs: ModelCosts | None = None,
) -> Pipeline:
    """Turns a model into a pipeline: splits it, parallelizes the parts and builds the schedule.

    Everything that can be checked is checked before the first collective, and then that all ranks
    agree on the model and the settings. What `requires_grad` says on the first step counts: stages
    before the first one that trains something run no backward and are sent no gradients.

    With ``config.output_router_logits=True``, a mixture of experts trains on its routers' auxiliary
    loss too: the losses are those of ``loss_fn`` plus what the model itself would add to each
    microbatch's, and ``schedule.aux_losses`` has the values without their coefficient, a scalar per
    microbatch, on the last stage's rank. The logits of every router, ``[tokens, experts]`` per
    microbatch and layer, then cross every cut after it, and their gradients come back.

    Args:
        model: The whole model, the same on every rank; it is left as it was, but its tensors on
            this rank's stages move to `device` with their parts.
        world_mesh: The mesh of the job, with the pipeline's axis.
        moe_mesh: The mesh of expert parallelism, handed to `parallelize_fn`.
        pp_axis_name: The pipeline's axis of `world_mesh`.
        dp_axis_names: The data-parallel axes, handed to `parallelize_fn` like the axes that follow.
        cp_axis_name: The context-parallel axis.
        tp_axis_name: The tensor-parallel axis.
        ep_axis_name: The expert-parallel axis.
        ep_shard_axis_names: The axes over which experts are sharded.
        layers_per_stage: Layers per stage, as in `calculate_virtual_stages`.
        pipeline_parallel_schedule_csv: A schedule file, as in `build_pipeline_schedule`.
        pipeline_parallel_schedule: A schedule's name, as in `build_pipeline_schedule`.
        microbatch_size: Sequences per microbatch; None takes the plan's.
        local_batch_size: Sequences per step of this pipeline; None takes the plan's.
        device: Where the stages run.
        loss_fn: Called on the last stage as ``loss_fn(output, target)``.
        parallelize_fn: Called on every local part: see `ParallelizeFnProtocol`.
        module_fqns_per_model_part: The module names of every stage; None cuts uniformly.
        patch_inner_model: As in `split_model_into_stages`.
        patch_causal_lm_model: As in `split_model_into_stages`.
        scale_grads: As in `build_pipeline_schedule`.
        round_to_pp_multiple: As in `calculate_virtual_stages`.
        patch_stage_backward_maybe_with_nosync: Accepted for code that sets it; FSDP2 stages reduce
            their gradients once per step with and without it.
        seq_len: Tokens per sequence; given, the shapes are static from the first step on.
        reduce_grad_per_microbatch: Whether FSDP2 stages reduce their gradients after every
            microbatch, which frees the unsharded ones, instead of once per step.
        tensor_dtype: Dtype of what crosses between stages, as in `_precompute_stage_shapes`.
        verify: What to compare with the unsplit model before anything is built, as `check_model`
            does: "logits", or "grads" for these and every gradient. A transformers model is checked
            as a small random twin with as many stages as the schedule has, but at most 8; any other
            model as it is. None checks nothing.
        plan: A plan that `hfpp plan --out` wrote, or a `PipelinePlan`: it sets the schedule, the
            partition, the batch sizes and the sequence length. What is given beside it must agree,
            and so must the model and the pipeline's, tensor and context parallel sizes of the mesh.
            Another number of replicas than planned is a warning: each runs the planned pipeline.
        partition: Where to cut, in any spelling of `hfpp.plan.partitioning.grammar`: "uniform",
            "balanced" (the slowest rank as fast as can be), "7,8,9,8", "Et*3|(t*4|)*2tL" and
            others; None cuts uniformly. Counts and layouts say how many stages there are.
        costs: What "balanced" goes by, as `hfpp profile` measures it; None estimates it from the
            model's config, or else from its parameters.

    Returns:
        A named tuple ``(schedule, model_parts, has_first_stage, has_last_stage, stages)``.

    Raises:
        PipelineConfigError: If the settings cannot work together, the ranks disagree, `verify`
            finds a difference, or the plan is for another model or mesh.
        FileNotFoundError: If there is no such CSV or plan file.

    Example:
        >>> schedule, parts, has_first, has_last, stages = pipeline_model(  # doctest: +SKIP
        ...     model, mesh, None, pp_axis_name="pp", dp_axis_names=("dp",), layers_per_stage=None,
        ...     pipeline_parallel_schedule_csv=None, pipeline_parallel_schedule="1F1B",
        ...     microbatch_size=1, local_batch_size=8, device=device, loss_fn=causal_lm_loss,
        ... )
    """
    from hfpp.runtime.pipeline import pipeline_model as pipeline

    check: Callable[[nn.Module, int], None] | None = None
    if verify is not None:
        from hfpp.check.twin import verify_twin

        check = partial(verify_twin, verify)
    return pipeline(
        model,
        world_mesh,
        moe_mesh,
        pp_axis_name=pp_axis_name,
        dp_axis_names=dp_axis_names,
        cp_axis_name=cp_axis_name,
        tp_axis_name=tp_axis_name,
        ep_axis_name=ep_axis_name,
        ep_shard_axis_names=ep_shard_axis_names,
        layers_per_stage=layers_per_stage,
        pipeline_parallel_schedule_csv=pipeline_parallel_schedule_csv,
        pipeline_parallel_schedule=pipeline_parallel_schedule,
        microbatch_size=microbatch_size,
        local_batch_size=local_batch_size,
        device=device,
        loss_fn=loss_fn,
        parallelize_fn=parallelize_fn,
        module_fqns_per_model_part=module_fqns_per_model_part,
        patch_inner_model=patch_inner_model,
        patch_causal_lm_model=patch_causal_lm_model,
        scale_grads=scale_grads,
        round_to_pp_multiple=round_to_pp_multiple,
        patch_stage_backward_maybe_with_nosync=patch_stage_backward_maybe_with_nosync,
        seq_len=seq_len,
        reduce_grad_per_microbatch=reduce_grad_per_microbatch,
        tensor_dtype=tensor_dtype,
        verify=check,
        plan=plan,
        partition=partition,
        costs=costs,
    )


def check_model(
    model: nn.Module | PretrainedConfig | str | PathLike[str],
    *,
    pp_sizes: Sequence[int] = (2, 4),
    tokens: int = 21,
    full: bool = False,
    trust_remote_code: bool = False,
) -> CheckReport:
    """Compares a model's pipeline with the unsplit model: logits, gradients, parameters.

    The stages run one after the other in this process, each without anything of the model that it
    does not hold, on plain, padded, packed and long batches of random tokens. A transformers model
    is made small first: its own class, with a small config of the same kind and random weights.

    Args:
        model: A module, which is left as it was; a transformers config; the path of a config.json
            or of a folder with one; or "module:function", a function that returns one of the first
            two.
        pp_sizes: The numbers of stages to check.
        tokens: Tokens per sequence; one kind of batch is longer. A small model is compared with at
            most 32, and the cuts are described for as many as given.
        full: Whether to check a transformers model as large as it is. Other models always are; it
            takes about 4 plus the number of sizes times the model in float64 as memory.
        trust_remote_code: Whether the Python code that a folder brings for its model may run.

    Returns:
        A report: ``report.exact``, ``report.sizes`` with results, reasons, cuts and stages,
        ``report.to_dict()`` for JSON, and ``str(report)`` to read.

    Raises:
        PipelineConfigError: If there is no such model, or an argument is out of range. A model that
            cannot be cut is no error but a report that says why.

    Example:
        >>> from transformers import LlamaConfig
        >>> report = check_model(LlamaConfig(), pp_sizes=(2,))
        >>> report.exact, report.sizes[0].cuts[0].layer
        (True, 16)
    """
    from hfpp.check.model_check import check_model as check

    return check(
        model, pp_sizes=pp_sizes, tokens=tokens, full=full, trust_remote_code=trust_remote_code
    )
