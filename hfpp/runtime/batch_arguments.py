"""Before a step: every rank cuts the keyword arguments alike and knows what they make cross."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from hfpp.errors import PipelineConfigError
from hfpp.runtime import torch_compat as compat
from hfpp.runtime.compiled import nothing_left
from hfpp.runtime.input_kinds import InputKind, check_kind, feature_lengths, find_kind, remember
from hfpp.runtime.input_kinds import further_arguments as further_of
from hfpp.runtime.paths import walk_tensors
from hfpp.runtime.split_keywords import split_keywords
from hfpp.runtime.stage_boundary import boundary_of, cast_dtype, unwrapped

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage

    from hfpp.runtime.anatomy import Anatomy
    from hfpp.runtime.crossing import TensorLike
    from hfpp.runtime.stage_boundary import StageBoundary

Crossing = tuple[tuple[tuple[tuple[int, ...], torch.dtype], ...], ...]
"""Shapes and dtypes of what crosses each cut."""


class BatchArguments:
    """One rank's view of the batches that its schedule is given.

    Args:
        schedule: whose stages.
    """

    def __init__(self, schedule: compat.TorchSchedule) -> None:
        self._schedule = schedule
        self._crossing: Crossing | None = None  # where it is not what token ids alone give
        self._before: list[tuple[Any, Any]] = []  # the stages' metadata and builders for ids alone
        self._given: bool | None = None  # whether the stages were told their shapes
        self._checked: dict[int, tuple[InputKind, bool]] = {}  # and whether other values cross

    def microbatches(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int | None
    ) -> list[dict[str, Any]]:
        """Cut the keyword arguments of a batch.

        All ranks of the pipeline call it for the same batch: where it has more than token ids and
        their masks, they compare what they were given, and the first stage's ids go to all.

        Args:
            args: positional arguments of the first stage; none on other ranks.
            kwargs: keyword arguments, the same on all ranks.
            rows: of the batch, where the caller knows; None elsewhere.

        Raises:
            PipelineConfigError: an argument that cannot be cut, that ranks disagree on, or that the
                model's cuts do not allow: the same on every rank.
        """
        stages = compat.local_stages(self._schedule)
        if self._given is None:
            self._given = all(map(compat.has_static_metadata, stages))
        n = compat.microbatch_count(self._schedule)
        module = stages[0].submod
        boundary = boundary_of(module) if isinstance(module, nn.Module) else None
        model = unwrapped(module) if isinstance(module, nn.Module) else module
        anatomy = None if boundary is None else boundary.anatomy
        ids_name = getattr(model, "_hfpp_ids_name", "input_ids")
        ids = kwargs.get(ids_name, args[0] if args else None)
        further = further_of(kwargs, ids_name)
        alone = stages[0].group_size == 1
        if not alone and (further or getattr(model, "_hfpp_takes_media", False)):
            ids = _shared_ids(stages[0], args, kwargs, ids_name, wanted=bool(further))
        ids = ids if isinstance(ids, torch.Tensor) and ids.dim() >= 2 else None
        split = split_keywords(
            kwargs,
            n,
            batch=_batch(args, kwargs, ids, rows),
            ids=ids,
            model=model,
            features=lambda modality, given: feature_lengths(anatomy, modality, given),
        )
        if not further or anatomy is None or boundary is None or stages[0].num_stages == 1:
            if anatomy is not None:
                self._fit(stages, None, None, None)
            return split
        if ids is None:
            raise PipelineConfigError(
                f"{', '.join(sorted(further))} came without token ids: pass them to step on the "
                f"rank of the first stage."
            )
        for index, rows_of_ids in enumerate(ids.tensor_split(n)):
            split[index][ids_name] = rows_of_ids
        self._prepare(stages, boundary, anatomy, split, cast_dtype(model))
        return split

    def shapes_were_reset(self) -> None:
        """Others have told the stages their shapes anew: those for token ids alone."""
        for stage, (_, builder) in zip(
            compat.local_stages(self._schedule), self._before, strict=False
        ):
            stage.dw_builder = builder
        self._crossing, self._before, self._given = None, [], True

    def autocast_changed(self) -> None:
        """The stages are about to be set up anew: for token ids alone, by what they were told."""
        stages = compat.local_stages(self._schedule)
        if self._given is not None:
            self._fit(stages, None, None, None)
        self._given = None

    def _prepare(
        self,
        stages: Sequence[PipelineStage],
        boundary: StageBoundary,
        anatomy: Anatomy,
        split: list[dict[str, Any]],
        dtype: torch.dtype | None,
    ) -> None:
        """Every kind of microbatch can be cut here, and what crosses is the same for all."""
        ownership = boundary.ownership
        assert ownership is not None
        cuts = [layers.start for layers in ownership.layers[1:]]
        crossings: list[Crossing | None] = []
        exact = dtype if dtype is not None else anatomy.dtype
        for keywords in split:
            ids = keywords[anatomy.ids_name]
            if not further_of(keywords, anatomy.ids_name):
                crossings.append(None)
                continue
            found = find_kind(anatomy, ids, keywords, dtype)
            if id(found) not in self._checked:
                check_kind(found, ownership)
                remember(self._checked, id(found), (found, _differs(found.anatomy, cuts)))
            if self._checked[id(found)][1]:
                found = find_kind(anatomy, ids, keywords, dtype, exact=True)
                crossings.append(_crossing(found.anatomy, cuts))
            elif self._given or compat.infers_from_real_inputs(stages[0]):
                crossings.append(None)
            else:
                sizes = (ids.shape[0], ids.shape[1], exact)
                crossings.append(_usual(anatomy, cuts, *sizes))
        odd = next((i for i, found in enumerate(crossings) if found != crossings[0]), None)
        if odd is not None:
            raise PipelineConfigError(
                f"microbatch {odd} makes other values cross between the stages of "
                f"{anatomy.model_name} than microbatch 0 ({_shown(crossings[odd])}; "
                f"{_shown(crossings[0])}), but the shapes of all microbatches of a step must be "
                f"the same: give every microbatch media of the same padded size."
            )
        ids = split[0][anatomy.ids_name]
        output = anatomy.output_meta(ids.shape[0], ids.shape[1], exact)
        self._fit(stages, crossings[0], ids, output)

    def _fit(
        self,
        stages: Sequence[PipelineStage],
        crossing: Crossing | None,
        ids: torch.Tensor | None,
        output: TensorLike | None,
    ) -> None:
        """Set the stages up for what crosses; the same on all ranks, for the same batch."""
        if crossing == self._crossing:
            return
        kind = stages[0].device.type
        if crossing is not None and torch.is_autocast_enabled(kind):
            raise PipelineConfigError(
                "what crosses the cuts for these media is told to the stages beforehand, and "
                "torch.autocast changes its types: cast the model instead, as by "
                "model.to(torch.bfloat16) before pipeline_model, and step without autocast."
            )
        if self._crossing is None:
            self._before = [
                (compat.static_metadata(s) if self._given else None, s.dw_builder) for s in stages
            ]
        for stage, (metadata, builder) in zip(stages, self._before, strict=True):
            compat.forget_infrastructure(stage)
            compat.restore_metadata(stage, metadata)
            stage.dw_builder = builder
            if crossing is not None and ids is not None and output is not None:
                _set_crossing(stage, crossing, ids, output)
        compat.forget_initialization(self._schedule)
        self._crossing = crossing


def _set_crossing(
    stage: PipelineStage, crossing: Crossing, ids: torch.Tensor, output: TensorLike
) -> None:
    ends = [] if stage.is_first else [crossing[stage.stage_index - 1]]
    ends += [] if stage.is_last else [crossing[stage.stage_index]]
    if any(sum(dtype.is_floating_point for _, dtype in end) > 1 for end in ends):
        stage.dw_builder = nothing_left  # see split_model
    taken = ((tuple(ids.shape), ids.dtype),)
    given = ((output.shape, output.dtype),)
    inputs = taken if stage.is_first else crossing[stage.stage_index - 1]
    outputs = given if stage.is_last else crossing[stage.stage_index]
    compat.set_static_metadata(stage, _metas(inputs), _metas(outputs))


def _metas(
    crossing: tuple[tuple[tuple[int, ...], torch.dtype], ...],
) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)
        for shape, dtype in crossing
    )


def _crossing(anatomy: Anatomy, cuts: Sequence[int]) -> Crossing:
    return tuple(tuple((s.shape, s.dtype) for s in anatomy.slots(cut)) for cut in cuts)


def _differs(anatomy: Anatomy, cuts: Sequence[int]) -> bool:
    """Whether other values or shapes cross than for token ids alone."""
    assert anatomy.text is not None
    sizes = (anatomy.batch, anatomy.seq, anatomy.dtype)
    return _usual(anatomy.text, cuts, *sizes) != _crossing(anatomy, cuts)


def _usual(
    text: Anatomy, cuts: Sequence[int], batch: int, seq: int, dtype: torch.dtype
) -> Crossing:
    """What crosses for token ids alone."""
    metas = [text.slot_metas(cut, batch, seq, dtype) for cut in cuts]
    return tuple(tuple((meta.shape, meta.dtype) for meta in each) for each in metas)


def _shown(crossing: Crossing | None) -> str:
    if crossing is None:
        return "the hidden state only"
    return f"shapes {[list(shape) for shape, _ in crossing[0]]}"


def _batch(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], ids: torch.Tensor | None, rows: int | None
) -> int | None:
    if ids is not None:
        return ids.shape[0]
    first = args[0] if args else kwargs.get("attention_mask")
    if isinstance(first, torch.Tensor) and first.dim():
        return first.shape[0]
    return rows


def _shared_ids(
    stage: PipelineStage,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    ids_name: str,
    *,
    wanted: bool,
) -> Any:
    """The token ids of the whole batch on every rank, once the keyword arguments are compared."""
    mine = {
        name: [(list(t.shape), str(t.dtype)) for _, t in walk_tensors(value)]
        for name, value in kwargs.items()
        if value is not None
    }
    ids = args[0] if args else None
    told = (list(ids.shape), ids.dtype) if isinstance(ids, torch.Tensor) else None
    everyone: list[Any] = [None] * stage.group_size
    dist.all_gather_object(everyone, (mine, told), group=stage.group)
    _compare([theirs for theirs, _ in everyone])
    if ids_name in kwargs:
        return kwargs[ids_name]
    source = stage.stage_index_to_group_rank[0]
    shape_and_dtype = everyone[source][1]
    if not wanted or shape_and_dtype is None:
        return ids
    if stage.group_rank == source:
        assert isinstance(ids, torch.Tensor)
        sent = ids.detach().to(stage.device).contiguous()
    else:
        shape, dtype = shape_and_dtype
        sent = torch.empty(shape, dtype=dtype, device=stage.device)
    root = source if stage.group is None else dist.get_global_rank(stage.group, source)
    dist.broadcast(sent, root, group=stage.group)
    return sent


def _compare(everyone: list[dict[str, Any]]) -> None:
    for rank, theirs in enumerate(everyone):
        for name in sorted({*theirs, *everyone[0]}):
            if theirs.get(name) != everyone[0].get(name):
                raise PipelineConfigError(
                    f"the ranks of the pipeline pass different keyword arguments: {name} is "
                    f"{_told(everyone[0], name)} on rank 0 and {_told(theirs, name)} on rank "
                    f"{rank}. Pass the same on every rank: each stage runs the model's forward "
                    f"with them"
                )


def _told(arguments: Mapping[str, Any], name: str) -> str:
    if name not in arguments:
        return "missing"
    tensors = [f"{shape} {dtype}" for shape, dtype in arguments[name]]
    return ", ".join(tensors[:3]) + (", ..." if len(tensors) > 3 else "") if tensors else "given"
