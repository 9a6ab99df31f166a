"""torch's schedules with hfpp's `step` and `eval`: subclasses, one per class of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from hfpp.errors import PipelineConfigError
from hfpp.runtime import torch_compat as compat
from hfpp.runtime.auxiliary_loss import AuxiliaryLosses
from hfpp.runtime.batch_arguments import BatchArguments
from hfpp.runtime.forward_only import forward_actions, run_forward
from hfpp.runtime.needed_gradients import agree_on_gradients, check_nothing_thawed

if TYPE_CHECKING:
    from hfpp.plan.schedules.actions import Action

__all__ = ["ControlledSchedule", "StepContext", "add_step_context", "controlled"]

_OWN_KEYWORDS = frozenset(
    ("return_outputs", "loss_kwargs", "arg_mbs", "kwarg_mbs", "target_mbs", "losses")
)  # of step itself, and so no arguments of the model

StepContext = Callable[[], AbstractContextManager[None]]
"""Makes a context manager for one step."""


class ControlledSchedule(compat.PreparedSchedule):
    """What hfpp adds to a schedule of torch; comes before torch's class in the bases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_contexts: list[StepContext] = []
        self._forward_actions: list[Action] | None = None
        self._keywords_agreed = False
        self._arguments = BatchArguments(cast("compat.TorchSchedule", self))
        self._rows: int | None = None  # of the batch, where its target tells
        self.auxiliary = AuxiliaryLosses(())
        self._autocast: torch.dtype | None = None  # that the stages are set up for
        self._told: list[Any] = []  # what the stages were told of their shapes, while under it
        self._static = False  # whether torch took the stages' shapes as given and inferred none

    @property
    def aux_losses(self) -> list[torch.Tensor]:
        """The auxiliary losses of the routers, of each microbatch of the latest step or eval.

        Scalars as the model computes them, without the coefficient with which they are part of the
        losses. Empty on ranks without the last stage, and for models that compute none.
        """
        return self.auxiliary.values

    def step(
        self,
        *args: Any,
        target: Any = None,
        losses: list[Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs a batch forward and backward, as torch does; without a loss_fn forward only.

        Args:
            *args: inputs of the model, on the rank of the first stage.
            target: what the loss is computed against, on the rank of the last stage.
            losses: emptied and filled with the loss of each microbatch there.
            **kwargs: torch's options, and what goes to every stage. With `return_outputs=False` the
                outputs of a microbatch are freed after its backward; else those of all are kept to
                the end of the step, and joined.

        Returns:
            The outputs of the batch on the rank of the last stage; None elsewhere.
        """
        if compat.loss_function(self) is None:
            return self.eval(*args, target=target, losses=losses, **kwargs)
        if target is None and kwargs.get("target_mbs") is None and self._has_last_stage():
            raise PipelineConfigError(
                "target is None, but this rank holds the last stage and computes the loss: pass "
                "target to step, or call eval for a forward without a loss"
            )
        self._check_batch(args, target)
        self._rows = _rows(target)
        self._check_shapes(args)
        self._agree_on_keywords(kwargs)
        self._fit_autocast()
        self._agree_on_gradients()
        self.auxiliary.start()
        with ExitStack() as contexts:
            for make in self._step_contexts:
                contexts.enter_context(make())
            return cast("Any", super()).step(*args, target=target, losses=losses, **kwargs)

    def eval(
        self,
        *args: Any,
        target: Any = None,
        losses: list[Any] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs a batch forward only, without gradients, keeping nothing for a backward.

        Args:
            *args: inputs of the model, on the rank of the first stage.
            target: with one (and a loss_fn), losses are computed; None: outputs only.
            losses: emptied and, on the rank of the last stage, filled with each microbatch's loss.
            return_outputs: whether the last stage's rank collects and returns the outputs.
            loss_kwargs: further arguments of the loss.
            **kwargs: go to every stage.

        Returns:
            The outputs of the batch on the rank of the last stage; None elsewhere.
        """
        self._check_batch(args, target)
        self._rows = _rows(target)
        self._agree_on_keywords(kwargs)
        self._fit_autocast()
        arguments, keywords, targets = compat.split_batch(self, args, kwargs, target)
        stages = compat.local_stages(self)
        outputs: list[Any] = []
        found: list[Any] = []

        def on_output(microbatch: int, output: Any) -> None:
            if return_outputs:
                outputs.append(output)
            if targets is not None and loss_fn is not None:
                found.append(loss_fn(output, targets[microbatch], **(loss_kwargs or {})))
            else:
                self.auxiliary.take()

        loss_fn = compat.loss_function(self)
        self.auxiliary.start()
        with ExitStack() as contexts:
            ready = compat.is_initialized(self)
            static = self._static if ready else all(map(compat.has_static_metadata, stages))
            if static:
                self._check_shapes(args)
            if not (ready and static):
                # Shapes that were inferred in training need not be those of this batch.
                contexts.enter_context(compat.other_infrastructure(self, infer=not static))
            contexts.enter_context(compat.without_backward(self, stages))
            try:
                compat.clear_run(stages)
                if not compat.is_forward_initialized(self):
                    with torch.no_grad():
                        compat.initialize(self, arguments[0], keywords[0])
                run_forward(self._actions(), stages, arguments, keywords, on_output)
            finally:
                compat.clear_run(stages)
        if losses is not None and self._has_last_stage():
            losses[:] = found
        return compat.merge_outputs(self, outputs) if outputs else None

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Around torch's making the stages ready; only before the first step is there any."""
        if compat.is_initialized(self):
            yield
            return
        stages = compat.local_stages(self)
        given = all(map(compat.has_static_metadata, stages))
        with compat.undisturbed(stages):
            yield
        self.auxiliary.start()  # inferring shapes runs forwards too
        self._static = compat.ranks_agreed_on_static(stages, given=given)

    def keyword_microbatches(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The keyword arguments of a batch, cut where its samples are: in training and in eval."""
        return self._arguments.microbatches(args, kwargs, self._rows)

    def shapes_were_reset(self) -> None:
        """The stages have new shapes, for batches of token ids alone and without autocast."""
        self._autocast = None
        self._arguments.shapes_were_reset()

    def _has_last_stage(self) -> bool:
        return any(stage.is_last for stage in compat.local_stages(self))

    def _actions(self) -> list[Action]:
        if self._forward_actions is None:
            stage = compat.local_stages(self)[0]
            self._forward_actions = forward_actions(
                stage.stage_index_to_group_rank, stage.group_rank, compat.microbatch_count(self)
            )
        return self._forward_actions

    def _check_batch(self, args: tuple[Any, ...], target: Any) -> None:
        """A batch that cannot be cut evenly would send microbatches of unequal shapes."""
        n = compat.microbatch_count(self)
        named = [(f"args[{i}]", value) for i, value in enumerate(args)] + [("target", target)]
        for name, value in named:
            if not isinstance(value, torch.Tensor):
                continue
            rows = value.shape[0] if value.dim() else 0
            if rows == 0 or rows % n:
                raise PipelineConfigError(
                    f"{name} has {rows} rows, which cannot be cut into {n} equal microbatches: "
                    f"pass a multiple of {n} rows, or build the schedule for another "
                    "local_batch_size or microbatch_size"
                )

    def _agree_on_keywords(self, kwargs: dict[str, Any]) -> None:
        """On the first batch: a mask that only some stages get gives wrong results in silence."""
        stage = compat.local_stages(self)[0]
        if self._keywords_agreed or stage.group_size == 1:
            return
        self._keywords_agreed = True
        mine = sorted(k for k, v in kwargs.items() if v is not None and k not in _OWN_KEYWORDS)
        everyone: list[Any] = [None] * stage.group_size
        dist.all_gather_object(everyone, mine, group=stage.group)
        odd = next((r for r, theirs in enumerate(everyone) if theirs != everyone[0]), None)
        if odd is not None:
            raise PipelineConfigError(
                f"the ranks of the pipeline pass different keyword arguments: rank 0 passes "
                f"{everyone[0]}, rank {odd} passes {everyone[odd]}. Pass the same on every rank: "
                f"each stage runs the model's forward with them"
            )

    def _fit_autocast(self) -> None:
        """Under autocast values cross in other types, which torch finds by running the stages."""
        stages = compat.local_stages(self)
        kind = stages[0].device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if dtype == self._autocast:
            return
        self._arguments.autocast_changed()
        if self._autocast is None:
            known = [compat.has_static_metadata(s) for s in stages]
            self._told = [
                compat.static_metadata(s) if k else None for s, k in zip(stages, known, strict=True)
            ]
        for stage, told in zip(stages, self._told, strict=True):
            compat.forget_infrastructure(stage)
            compat.restore_metadata(stage, told if dtype is None else None)
        compat.forget_initialization(self)
        self._autocast = dtype

    def _agree_on_gradients(self) -> None:
        """Before torch makes the stages ready; what changed since must still do."""
        stages = compat.local_stages(self)
        if not compat.is_initialized(self):
            agree_on_gradients(stages)
        check_nothing_thawed(stages)

    def _check_shapes(self, args: tuple[Any, ...]) -> None:
        """Other shapes than the known ones would arrive garbled at the next stage."""
        stage = compat.local_stages(self)[0]
        known = compat.input_shapes(stage)
        if not stage.is_first or stage.num_stages == 1 or known is None:
            return
        for index, (value, shape) in enumerate(zip(args, known, strict=False)):
            if not isinstance(value, torch.Tensor):
                continue
            found = (value.shape[0] // compat.microbatch_count(self), *value.shape[1:])
            if found != shape:
                raise PipelineConfigError(
                    f"args[{index}] has microbatches of shape {list(found)}, but the stages are "
                    f"set up for {list(shape)}: call reset_pp_stage_shapes for the new sizes on "
                    f"every rank first, or pass {list(shape)}"
                )


def _rows(target: Any) -> int | None:
    return target.shape[0] if isinstance(target, torch.Tensor) and target.dim() else None


@cache
def controlled(torch_class: type[compat.TorchSchedule]) -> type[Any]:
    """The subclass of a schedule class of torch that hfpp builds; it keeps the class's name."""
    return type(
        torch_class.__name__,
        (ControlledSchedule, torch_class),
        {"__doc__": torch_class.__doc__, "__module__": __name__},
    )


def add_step_context(schedule: object, factory: StepContext) -> None:
    """Makes every `step` of a schedule run inside a context; `eval` does not.

    Args:
        schedule: from `build_pipeline_schedule`.
        factory: called once per step; what it returns is entered before the step, in the order in
            which contexts were added, and left after it.
    """
    if not isinstance(schedule, ControlledSchedule):
        raise PipelineConfigError(
            f"schedule must come from build_pipeline_schedule, not {type(schedule).__name__}"
        )
    schedule._step_contexts.append(factory)
