"""The only file that touches private parts of torch.distributed.pipelining (torch 2.11 to 2.15).

Public methods that hfpp overrides, such as a stage's backward, are overridden where they belong.

Everything is found by what is there, not by version numbers. What differs between versions:

========== ========================================================================================
2.11       metadata in `inputs_meta` and `_outputs_meta`; eval and train share what eval made
2.12-2.13  metadata in `_user_meta`, a vote on static or dynamic before the first step; making the
           stages ready drops the gradients of FSDP modules (and does so up to 2.15)
2.14       inputs may be given in microbatches; buffers are kept aside during dynamic inference
2.15       forward state in `_forward_chunk_states`; sends and reductions have waits of their own
========== ========================================================================================
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import _backward
from torch.distributed.pipelining import _utils as _pipelining_utils
from torch.distributed.pipelining import schedules as _schedules
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from hfpp.plan.schedules.actions import Action, ActionKind, ScheduleTable
from hfpp.plan.schedules.lowering import lower
from hfpp.runtime.lazy_rows import LazyRows

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.pipelining import PipelineStage

__all__ = [
    "PreparedSchedule",
    "TorchSchedule",
    "clear_run",
    "compiled_alike",
    "drop_input_gradients",
    "drop_microbatch",
    "forget_infrastructure",
    "forget_initialization",
    "forward",
    "hand_over",
    "has_static_metadata",
    "infers_from_real_inputs",
    "initialize",
    "is_compiled_by_wrapping",
    "is_compiled_in_place",
    "is_forward_initialized",
    "is_initialized",
    "is_intercepted",
    "load_table",
    "local_stages",
    "lowering_options",
    "merge_outputs",
    "ranks_agreed_on_static",
    "other_infrastructure",
    "receive",
    "runtime_class",
    "schedule_class",
    "send",
    "restore_metadata",
    "set_loss_function",
    "set_static_gradients",
    "set_static_metadata",
    "show_order",
    "static_metadata",
    "takes_one_stage",
    "told_outputs",
    "split_batch",
    "uncompiled",
    "uncompiled_itself",
    "undisturbed",
    "unseen_writing",
]

TorchSchedule = _schedules._PipelineSchedule
"""The common base of torch's schedule classes."""
if TYPE_CHECKING:
    _Base = TorchSchedule
else:
    _Base = object

_FLAGS = (
    "_stage_forward_initialized",  # of schedules with one stage per rank
    "_stage_backward_initialized",
    "_stages_forward_initialized",  # of those with several
    "_stages_backward_initialized",
    "_stage_initialized",
    "_stages_initialized",
)


# Schedules


def schedule_class(name: str) -> type[TorchSchedule]:
    """Torch's class of a schedule; what runs any table where torch has no schedule of the name."""
    try:
        return cast("type[TorchSchedule]", get_schedule_class(name))
    except ValueError:
        return runtime_class()


def runtime_class() -> type[TorchSchedule]:
    """Torch's class that runs any table of actions."""
    return _schedules._PipelineScheduleRuntime


def takes_one_stage(torch_class: type[TorchSchedule]) -> bool:
    """Whether a class runs one stage, in an order that is in its code, and no table."""
    return issubclass(torch_class, PipelineScheduleSingle)


def load_table(
    schedule: TorchSchedule, table: ScheduleTable, remake: Callable[[], ScheduleTable]
) -> None:
    """Gives a schedule that has just been made what each rank runs.

    This rank's actions are there at once, those of the others when someone looks at them, and no
    table of all ranks stays in memory until then.

    Args:
        schedule: over this rank's stages.
        table: one that can run. Where it spells out communication, what FSDP and this version of
            torch need besides is added, else the communication too.
        remake: makes the table once more.
    """
    target = cast("Any", schedule)
    stages = local_stages(schedule)
    rank, remade = stages[0].group_rank, cache(remake)
    all_rows = cache(lambda: _rows_to_run(remade()))
    target.pipeline_order_with_comms = LazyRows(table.pp_size, lambda rank: all_rows()(rank))
    target.pipeline_order_with_comms[rank] = _rows_to_run(table)(rank)
    if not table.has_communication:
        target.pipeline_order = LazyRows(table.pp_size, lambda rank: _torch_row(remade(), rank))
    target.stage_index_to_group_rank = dict(enumerate(table.stage_to_rank))
    for stage in stages:
        stage.stage_index_to_group_rank = target.stage_index_to_group_rank


def show_order(schedule: TorchSchedule, pp_size: int, make: Callable[[], ScheduleTable]) -> None:
    """Gives a schedule that runs without a table one to look at, made when someone looks."""

    @cache
    def reduced() -> ScheduleTable:
        return lower(make(), communication=False, unshard=False, **lowering_options())

    rows = LazyRows(pp_size, lambda rank: _torch_row(reduced(), rank))
    cast("Any", schedule).pipeline_order = rows


def lowering_options() -> dict[str, bool]:
    """How this torch lowers a table, as options of `hfpp.plan.schedules.lowering.lower`."""
    unshard = inspect.signature(_schedules._add_unshard_reshard).parameters
    return {
        "wait_send": hasattr(_schedules, "_add_wait_send"),
        "wait_reduce_grad": "WAIT_REDUCE_GRAD" in _TYPES,
        "ordered_reshard": "unshard_lookahead" in unshard,
    }


def _rows_to_run(table: ScheduleTable) -> Callable[[int], list[Any]]:
    """Makes the row of any rank with all that this version of torch needs."""
    if not table.has_communication:
        lowered = lower(table, **lowering_options())
        return lambda rank: _torch_row(lowered, rank)
    has_waits = table.has(ActionKind.WAIT_SEND_FORWARD, ActionKind.WAIT_SEND_BACKWARD)
    add_waits = None if has_waits else getattr(_schedules, "_add_wait_send", None)

    def supplemented(rank: int) -> list[Any]:
        row = [_torch_action(action) for action in _supplemented(table, rank)]
        return add_waits({rank: row})[rank] if add_waits else row

    return supplemented


_TYPES = {kind.value: kind for kind in _schedules._ComputationType}


def _torch_row(table: ScheduleTable, rank: int) -> list[Any]:
    return [None if action is None else _torch_action(action) for action in table.row(rank)]


def _torch_action(action: Action) -> _schedules._Action:
    parts = tuple(map(_torch_action, action.parts)) or None
    return _schedules._Action(action.stage, _TYPES[action.kind], action.microbatch, parts)


def _supplemented(table: ScheduleTable, rank: int) -> Iterator[Action]:
    """A rank's actions that a file spells out, and what it may lack for torch.

    Files written by another version of torch have no waits, or waits that this one does not know.
    """
    actions = [action for action in table.row(rank) if action is not None]
    kinds = {(action.stage, action.kind) for action in actions}
    pending = dict.fromkeys(table.stages_by_rank[rank], table.n_microbatches)
    unshard = [s for s in pending if (s, ActionKind.UNSHARD) not in kinds]
    reduce = {s for s in pending if (s, ActionKind.REDUCE_GRAD) not in kinds}
    wait = ActionKind.WAIT_REDUCE_GRAD in _TYPES
    wait_written = any(kind is ActionKind.WAIT_REDUCE_GRAD for _, kind in kinds)

    yield from (Action(stage, ActionKind.UNSHARD) for stage in unshard)
    for action in actions:
        if action.kind not in _TYPES:
            continue
        yield action
        reduced = [action.stage] if action.kind is ActionKind.REDUCE_GRAD else []
        for leaf in action.leaves:
            if leaf.kind in (ActionKind.FULL_BACKWARD, ActionKind.BACKWARD_WEIGHT):
                pending[leaf.stage] -= 1
                if pending[leaf.stage] == 0 and leaf.stage in reduce:
                    yield Action(leaf.stage, ActionKind.REDUCE_GRAD)
                    reduced.append(leaf.stage)
        if wait and not (wait_written and action.kind is ActionKind.REDUCE_GRAD):
            yield from (Action(stage, ActionKind.WAIT_REDUCE_GRAD) for stage in reduced)
    yield from (Action(stage, ActionKind.RESHARD) for stage in unshard)


def local_stages(schedule: TorchSchedule) -> list[PipelineStage]:
    """The stages that a schedule runs on this rank, in ascending order."""
    if isinstance(schedule, PipelineScheduleSingle):
        return [cast("PipelineStage", schedule._stage)]
    stages = cast("list[PipelineStage]", cast("Any", schedule)._stages)
    return sorted(stages, key=lambda stage: stage.stage_index)


class PreparedSchedule(_Base):
    """Comes before a schedule class of torch in the bases: made without torch's work on tables.

    It is also there when torch readies its stages: at every step, also when they are ready already.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._is_made = False
        super().__init__(*args, **kwargs)
        self._is_made = True

    # What torch's constructors call to find the actions of all ranks, which takes them minutes for
    # hundreds of ranks: `load_table` and `show_order` give them. A torch that calls other methods
    # for it does its work, and what it found is replaced.

    def _get_pipeline_order(self) -> Any:
        return cast("Any", super())._get_pipeline_order() if self._is_made else {}

    def _calculate_single_rank_operations(self, rank: int) -> Any:
        if self._is_made:
            return cast("Any", super())._calculate_single_rank_operations(rank)
        return []

    def _add_bubbles_to_actions(self, *args: Any) -> Any:
        return cast("Any", super())._add_bubbles_to_actions(*args) if self._is_made else {}

    def _prepare_schedule_with_comms(self, *args: Any, **kwargs: Any) -> None:
        if self._is_made:
            cast("Any", super())._prepare_schedule_with_comms(*args, **kwargs)

    def preparing(self) -> AbstractContextManager[None]:
        """What surrounds that."""
        return nullcontext()

    def keyword_microbatches(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The keyword arguments of a batch, cut into microbatches."""
        raise NotImplementedError

    def shapes_were_reset(self) -> None:
        """Told when the stages were given new shapes."""

    def _split_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[list[Any], list[Any]]:
        keywords = self.keyword_microbatches(args, kwargs or {})
        arguments, _ = cast("Any", super())._split_inputs(args, {})
        return list(arguments), keywords

    def _initialize_stage(self, *args: Any, **kwargs: Any) -> None:
        with self.preparing():
            cast("Any", super())._initialize_stage(*args, **kwargs)

    def _initialize_stages(self, *args: Any, **kwargs: Any) -> None:
        with self.preparing():
            cast("Any", super())._initialize_stages(*args, **kwargs)


def initialize(
    schedule: TorchSchedule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Makes the stages ready to run (what torch does on a first step), if they are not."""
    target = cast("Any", schedule)
    if isinstance(schedule, PipelineScheduleSingle):
        target._initialize_stage(args, kwargs)
    else:
        target._initialize_stages(args, kwargs)


def is_forward_initialized(schedule: TorchSchedule) -> bool:
    """Whether the stages are ready for forwards."""
    return any(getattr(schedule, name, False) for name in _FLAGS if "backward" not in name)


def is_initialized(schedule: TorchSchedule) -> bool:
    """Whether the stages are ready for the steps that this schedule runs now."""
    backward = any(getattr(schedule, name, False) for name in _FLAGS if "backward" in name)
    return is_forward_initialized(schedule) and backward == schedule._has_backward


def forget_initialization(schedule: object) -> None:
    """Makes the schedule prepare its stages anew on its next step."""
    for name in _FLAGS:
        if hasattr(schedule, name):
            setattr(schedule, name, False)


@contextmanager
def undisturbed(stages: Sequence[PipelineStage]) -> Iterator[None]:
    """Keeps gradients and buffers while torch makes stages ready.

    torch drops the gradients of FSDP modules there (also those that earlier steps accumulated), and
    dynamic inference runs real forwards, which may write into buffers.
    """
    parameters = {
        parameter
        for stage in stages
        for module in stage.submod.modules()
        if isinstance(module, FSDPModule)
        for parameter in cast("nn.Module", module).parameters()
    }
    gradients = {parameter: parameter.grad for parameter in parameters}
    buffers = [
        (buffer, buffer.detach().clone())
        for stage in stages
        if not has_static_metadata(stage) and not hasattr(stage, "_pre_metadata_inference_backup")
        for buffer in stage.submod.buffers()
    ]
    try:
        with _no_messages_to_self(stages):
            yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def _no_messages_to_self(stages: Sequence[PipelineStage]) -> Iterator[None]:
    """Keeps torch 2.11 from greeting neighbouring stages that live on the same rank.

    gloo cannot send to itself: without this, V schedules and pipelines of size 1 fail on the CPU.
    """

    def others(stage: PipelineStage, greet: Callable[[], list[Any]]) -> list[Any]:
        return [op for op in greet() if op.group_peer != stage.group_rank]

    name = "_get_init_p2p_neighbors_ops"
    changed = [stage for stage in stages if hasattr(stage, name)]
    for stage in changed:
        setattr(stage, name, partial(others, stage, getattr(stage, name)))
    try:
        yield
    finally:
        for stage in changed:
            delattr(stage, name)


# Stages: what torch knows of their boundaries


def set_static_metadata(
    stage: object, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]
) -> bool:
    """Tells a stage the shapes of its inputs and outputs.

    Args:
        stage: a PipelineStage, or what has its attributes.
        inputs: on the meta device; the ones that get a gradient require it.
        outputs: the same for the outputs.

    Returns:
        False where this version of torch takes no such information.
    """
    target = cast("Any", stage)
    if hasattr(stage, "_user_meta"):
        target._user_meta = _pipelining_utils._StageMeta(
            inputs=_pipelining_utils.extract_tensor_metas(inputs),
            outputs=_pipelining_utils.extract_tensor_metas(outputs),
        )
        return True
    if hasattr(stage, "inputs_meta") and hasattr(stage, "_configure_outputs_meta"):
        target.inputs_meta = inputs
        target._outputs_meta = None  # it refuses to be configured twice
        target._configure_outputs_meta(outputs)
        return True
    return False


def static_metadata(stage: object) -> Any:
    """What a stage was told of its inputs and outputs, for `restore_metadata`."""
    target = cast("Any", stage)
    if hasattr(stage, "_user_meta"):
        return target._user_meta
    return getattr(stage, "inputs_meta", None), getattr(stage, "_outputs_meta", None)


def restore_metadata(stage: object, metadata: Any) -> None:
    """Gives a stage back what `static_metadata` had found; None: it is to infer its shapes."""
    target = cast("Any", stage)
    if hasattr(stage, "_user_meta"):
        target._user_meta = type(target._user_meta)() if metadata is None else metadata
    elif metadata is None:
        _forget_inferred(stage)
    elif hasattr(stage, "inputs_meta"):
        target.inputs_meta, target._outputs_meta = metadata


def told_outputs(stage: object) -> list[tuple[tuple[int, ...], torch.dtype]] | None:
    """Shapes and types of a microbatch's outputs that a stage was told; None where it was not."""
    meta = getattr(stage, "_user_meta", None)
    metas = getattr(stage, "_outputs_meta", None) if meta is None else meta.outputs
    return None if metas is None else [(tuple(one.shape), one.dtype) for one in metas]


def infers_from_real_inputs(stage: object) -> bool:
    """Whether the first stage finds its shapes with the batch itself, not with zeros like it."""
    return hasattr(stage, "_user_meta")


def set_static_gradients(stage: object, *, inputs: bool, outputs: bool) -> None:
    """Corrects which of the shapes that a stage was given have a gradient: none, or as before."""
    meta = getattr(stage, "_user_meta", None)
    for name, needed in (("inputs", inputs), ("outputs", outputs)):
        given = getattr(meta, name, None)
        if given is not None and not needed:
            setattr(meta, name, tuple(replace(one, requires_grad=False) for one in given))


def has_static_metadata(stage: object) -> bool:
    """Whether a stage knows the shapes of its inputs and outputs before it has run."""
    target = cast("Any", stage)
    if hasattr(stage, "_user_meta"):
        return bool(target._user_meta.is_complete_for_forward())
    return getattr(stage, "inputs_meta", None) is not None


def input_shapes(stage: object) -> list[tuple[int, ...]] | None:
    """Shapes of a microbatch's inputs that a stage was given, or inferred on a first step."""
    target = cast("Any", stage)
    if hasattr(stage, "_user_meta"):
        metas = target._user_meta.inputs or target._stage_meta.inputs
    else:
        metas = getattr(stage, "inputs_meta", None)
    return None if metas is None else [tuple(meta.shape) for meta in metas]


def ranks_agreed_on_static(stages: Sequence[PipelineStage], *, given: bool) -> bool:
    """Whether torch, having made the stages ready, took shapes as given rather than inferred them.

    Args:
        stages: this rank's.
        given: whether this rank's stages knew their shapes; the answer where torch takes no vote.
    """
    modes = [getattr(stage, "_inference_mode", None) for stage in stages]
    return given if None in modes else all(mode.value == "static" for mode in modes if mode)


_INFRASTRUCTURE: Mapping[str, Callable[[Any], Any]] = {
    "args_recv_info": lambda _: {},
    "act_send_info": lambda _: {},
    "grad_recv_info": lambda _: {},
    "grad_send_info": lambda _: None,
    "_stage_meta": lambda old: type(old)(),
    "_inference_mode": lambda _: None,
}
"""What stages make on the first step and keep, with what stands there before."""

_INFERRED_IN_PLACE = ("inputs_meta", "_outputs_meta")
"""torch 2.11 writes inferred shapes where given ones stand."""

_RUN_STATE = (
    "fwd_cache",
    "_forward_chunk_states",
    "bwd_cache",
    "backward_state",
    "dw_runner",
    "output_chunks",
)


def forget_infrastructure(stage: object) -> None:
    """Clears what torch locked in on a stage's first step: metadata, buffers, a run's leftovers."""
    for name, fresh in _INFRASTRUCTURE.items():
        if hasattr(stage, name):
            setattr(stage, name, fresh(getattr(stage, name)))
    for name in _RUN_STATE:
        if hasattr(stage, name):
            getattr(stage, name).clear()
    _forget_inferred(stage)


def _forget_inferred(stage: object) -> None:
    for name in _INFERRED_IN_PLACE:
        if hasattr(stage, name):
            setattr(stage, name, None)


@contextmanager
def other_infrastructure(schedule: TorchSchedule, *, infer: bool) -> Iterator[None]:
    """Within it the schedule's stages are as before their first step; after it as they were.

    Args:
        schedule: whose stages.
        infer: whether shapes that torch inferred before are to be inferred anew.
    """
    kept = (*_INFRASTRUCTURE, *_INFERRED_IN_PLACE, "chunks")
    stages = local_stages(schedule)
    before = [{n: getattr(stage, n) for n in kept if hasattr(stage, n)} for stage in stages]
    flags = {name: getattr(schedule, name) for name in _FLAGS if hasattr(schedule, name)}
    for stage in stages:
        for name, fresh in _INFRASTRUCTURE.items():
            if hasattr(stage, name):
                setattr(stage, name, fresh(getattr(stage, name)))
        if infer:
            _forget_inferred(stage)
    forget_initialization(schedule)
    try:
        yield
    finally:
        for stage, values in zip(stages, before, strict=True):
            for name, value in values.items():
                setattr(stage, name, value)
        for name, value in flags.items():
            setattr(schedule, name, value)


# Stages: one microbatch forward


def clear_run(stages: Sequence[PipelineStage]) -> None:
    """Drops what a run leaves on its stages: outputs, and activations that wait for a backward."""
    for stage in stages:
        stage.clear_runtime_states()


def receive(stage: PipelineStage, microbatch: int) -> list[dist.Work]:
    """Starts to receive a microbatch's inputs."""
    return _schedules._batch_p2p(stage.get_fwd_recv_ops(microbatch))


def send(stage: PipelineStage, microbatch: int) -> list[dist.Work]:
    """Starts to send a microbatch's outputs; they live as long as the result."""
    return _schedules._batch_p2p(stage.get_fwd_send_ops(microbatch))


def forward(stage: PipelineStage, microbatch: int, args: Any, kwargs: Any) -> Any:
    """Runs a stage on one microbatch, whose inputs have arrived; returns its module's output."""
    return stage.forward_one_chunk(microbatch, args, kwargs, save_forward_output=False)


def hand_over(output: Any, following: PipelineStage, microbatch: int) -> None:
    """Gives a stage's output to the next stage of the same rank."""
    following.set_local_fwd_input(output, microbatch)


def drop_microbatch(stage: PipelineStage, microbatch: int) -> None:
    """Drops a microbatch's inputs and outputs, which a backward would need."""
    for name in ("fwd_cache", "_forward_chunk_states"):
        getattr(stage, name, {}).pop(microbatch, None)


def drop_input_gradients(stage: PipelineStage, microbatch: int) -> None:
    """Drops the gradients of a microbatch's inputs, if there are any: nobody takes them."""
    stage.bwd_cache.pop(microbatch, None)


# Compiled modules


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None


def is_compiled_by_wrapping(module: nn.Module) -> bool:
    """Whether it is what ``torch.compile(module)`` returns."""
    return "_orig_mod" in module._modules


# Batches


def split_batch(
    schedule: TorchSchedule, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any
) -> tuple[list[Any], list[Any], list[Any] | None]:
    """A batch's positional and keyword arguments and its target, cut into microbatches."""
    target_schedule = cast("Any", schedule)
    if hasattr(schedule, "_get_microbatch_inputs"):
        given = {name: kwargs.pop(name, None) for name in ("arg_mbs", "kwarg_mbs", "target_mbs")}
        args_split, kwargs_split, targets = target_schedule._get_microbatch_inputs(
            args, kwargs, target, **given
        )
    else:
        args_split, kwargs_split = target_schedule._split_inputs(args, kwargs)
        targets = None if target is None else torch.tensor_split(target, microbatch_count(schedule))
    return list(args_split), list(kwargs_split), None if targets is None else list(targets)


def merge_outputs(schedule: TorchSchedule, outputs: list[Any]) -> Any:
    """The microbatches' outputs as one batch."""
    return schedule._merge_outputs(outputs)


def expect_further_reductions(module: FSDPModule) -> None:
    """After a microbatch's reduction: torch 2.15 takes the first one of a step for the last."""
    if hasattr(module, "set_manual_backward_finalization"):
        module.set_manual_backward_finalization(True)


def split_backward(
    output: torch.Tensor,
    gradient: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
) -> Callable[[], object] | None:
    """Runs the inputs' part of a backward as stages of zero-bubble schedules do.

    Args:
        output: of a forward; no view.
        gradient: of the output.
        inputs: that the forward ran on.
        parameters: that it used.

    Returns:
        The weights' part, to be run; None where this torch has it not.
    """
    of_inputs = getattr(_backward, "stage_backward_input", None)
    of_weights = getattr(_backward, "stage_backward_weight", None)
    if of_inputs is None or of_weights is None:
        return None
    _, groups = of_inputs([output], [gradient], list(inputs), iter(parameters))
    return partial(of_weights, iter(parameters), groups)


def microbatch_count(schedule: TorchSchedule) -> int:
    """Microbatches per step."""
    return schedule._n_microbatches


def loss_function(schedule: TorchSchedule) -> Callable[..., torch.Tensor] | None:
    """What the schedule computes its losses with; None where it only runs forward."""
    return schedule._loss_fn


def set_loss_function(schedule: TorchSchedule, loss_fn: Callable[..., torch.Tensor] | None) -> None:
    """Makes the schedule compute its losses with another function."""
    schedule._loss_fn = loss_fn


@contextmanager
def without_backward(schedule: TorchSchedule, stages: Sequence[PipelineStage]) -> Iterator[None]:
    """While a batch runs forward only: nothing is kept for a backward."""
    before = schedule._has_backward
    schedule._has_backward = False
    for stage in stages:
        stage.has_backward = False
    try:
        yield
    finally:
        schedule._has_backward = before


# Code that runs around operators and modules


def is_intercepted() -> bool:
    """Whether a mode sees every operator or a global hook every module; unknown counts as yes."""
    stacks = ("_len_torch_function_stack", "_len_torch_dispatch_stack")
    lengths = [getattr(torch._C, name, lambda: 1)() for name in stacks]
    hooked = getattr(torch.nn.modules.module, "_has_any_global_hook", lambda: True)
    return any(lengths) or bool(hooked())


Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Keep ``function``, and all that it calls, out of what torch.compile compiles around it."""
    return cast("Function", torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def uncompiled_itself(function: Function) -> Function:
    """As ``uncompiled``, but what ``function`` calls is compiled."""
    return cast("Function", torch.compiler.disable(function, recursive=False))  # type: ignore[no-untyped-call]


def unseen_writing(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Within it autograd does not count that ``tensor`` is written: nobody needs the old values."""
    return cast("Any", torch.autograd)._unsafe_preserve_version_counter(tensor)  # type: ignore[no-any-return]


def compiled_alike(compiled: Any, function: Callable[..., Any]) -> Callable[..., Any] | None:
    """``function`` compiled as ``compiled`` was; None where its settings cannot be found."""
    wrapper = getattr(compiled, "__func__", compiled)
    names = getattr(getattr(wrapper, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, getattr(wrapper, "__closure__", None) or (), strict=False))
    context = cells["self"].cell_contents if "self" in cells else None
    if not callable(context) or not hasattr(context, "callback"):
        return None
    return cast("Callable[..., Any]", context(function))
