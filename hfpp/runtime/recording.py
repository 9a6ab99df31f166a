"""Records when a rank computes and sends during a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hfpp.plan.render.recorded import Computed, RankRecord, Sent
from hfpp.plan.schedules.actions import Action, ActionKind
from hfpp.runtime import torch_compat as compat
from hfpp.runtime.clocks import clock_offset
from hfpp.runtime.controlled_schedule import add_step_context

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage

__all__ = ["StepRecorder"]

_WRAPPED = (
    "forward_one_chunk",
    "backward_one_chunk",
    "backward_weight_one_chunk",
    "get_fwd_send_ops",
    "get_bwd_send_ops",
)


class _HostClock:
    """Times of computations that are done when their call returns: those of the CPU."""

    now = staticmethod(time.perf_counter)

    def start(self) -> None:
        """Nothing to wait for."""

    def mark(self) -> float:
        """This moment."""
        return self.now()

    def seconds(self, mark: float) -> float:
        """A mark on this process's clock."""
        return mark


class _DeviceClock:
    """Times of computations that a device runs later: events in its queue, read after the step.

    Nothing waits within the step, so that it runs as it would unrecorded. An event that follows a
    receive is reached when the message is there.
    """

    now = staticmethod(time.perf_counter)

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first: Any = None
        self._first_seconds = 0.0

    def start(self) -> None:
        """Ties the device's clock to the process's: once the device has nothing to do."""
        torch.accelerator.synchronize(self._device)
        self._first_seconds = self.now()
        self._first = self.mark()

    def mark(self) -> Any:
        """The moment at which the device comes to this."""
        event = torch.Event(self._device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self._device))
        return event

    def seconds(self, mark: Any) -> float:
        """A mark on this process's clock; waits for it."""
        mark.synchronize()
        return self._first_seconds + float(self._first.elapsed_time(mark)) / 1e3


class StepRecorder:
    """Records the steps of a schedule; add one before the first step that is to be recorded.

    Within a step the stages' methods are wrapped, on the stages themselves and for that step only:
    a schedule without a recorder runs as if there were none. On the CPU a computation's times are
    those of its call; elsewhere they are events of the device's queue.

    The loss counts to the forward that it follows. A send is recorded where its operations are
    made, which is when its data is ready; when it arrives is seen by what takes it.
    """

    def __init__(self, schedule: Any, device: torch.device) -> None:
        self._schedule = schedule
        self._stages = compat.local_stages(schedule)
        self._clock = _HostClock() if device.type == "cpu" else _DeviceClock(device)
        self._device = device
        self._computed: list[tuple[Action, Any, Any]] = []
        self._sent: list[tuple[Action, int, Any, int]] = []
        add_step_context(schedule, self._around_step)

    def record(self) -> RankRecord:
        """What this rank did in the latest step, on its own clock."""
        seconds: Callable[[Any], float] = self._clock.seconds
        return RankRecord(
            tuple(Computed(a, seconds(start), seconds(end)) for a, start, end in self._computed),
            tuple(Sent(a, target, seconds(mark), size) for a, target, mark, size in self._sent),
        )

    def gather(self) -> list[RankRecord]:
        """What every rank of the pipeline did, on the clock of its first; all call it.

        Returns:
            By rank of the pipeline; the same on all.
        """
        stage = self._stages[0]
        mine = self.record()
        if stage.group_size == 1:
            return [mine]
        group = dist.group.WORLD if stage.group is None else stage.group
        assert group is not None
        offset = clock_offset(group, self._device, now=self._clock.now)
        moved = RankRecord(
            tuple(c._replace(start=c.start + offset, end=c.end + offset) for c in mine.computed),
            tuple(s._replace(time=s.time + offset) for s in mine.sent),
        )
        everyone: list[Any] = [None] * stage.group_size
        dist.all_gather_object(everyone, moved, group=stage.group)
        return everyone

    @contextmanager
    def _around_step(self) -> Iterator[None]:
        self._computed, self._sent = [], []
        loss_fn = compat.loss_function(self._schedule)
        self._clock.start()
        for stage in self._stages:
            self._wrap(stage)
        compat.set_loss_function(self._schedule, loss_fn and partial(self._loss, loss_fn))
        try:
            yield
        finally:
            compat.set_loss_function(self._schedule, loss_fn)
            for stage in self._stages:
                for name in _WRAPPED:
                    delattr(stage, name)

    def _wrap(self, stage: PipelineStage) -> None:
        forward, backward, weight, send_forward, send_backward = (
            getattr(stage, name) for name in _WRAPPED
        )
        index, rank_of = stage.stage_index, stage.stage_index_to_group_rank

        def compute(run: Callable[..., Any], kind: ActionKind, *args: Any, **kwargs: Any) -> Any:
            start = self._clock.mark()
            result = run(*args, **kwargs)
            self._computed.append((Action(index, kind, args[0]), start, self._clock.mark()))
            return result

        def compute_backward(*args: Any, **kwargs: Any) -> Any:
            whole = kwargs.get("full_backward", True)
            kind = ActionKind.FULL_BACKWARD if whole else ActionKind.BACKWARD_INPUT
            return compute(backward, kind, *args, **kwargs)

        def send(make: Callable[..., Any], kind: ActionKind, step: int, microbatch: int) -> Any:
            operations = make(microbatch)
            if operations:
                size = sum(op.tensor.nbytes for op in operations)
                action = Action(index, kind, microbatch)
                self._sent.append((action, rank_of[index + step], self._clock.mark(), size))
            return operations

        for name, wrapper in zip(
            _WRAPPED,
            (
                partial(compute, forward, ActionKind.FORWARD),
                compute_backward,
                partial(compute, weight, ActionKind.BACKWARD_WEIGHT),
                partial(send, send_forward, ActionKind.SEND_FORWARD, 1),
                partial(send, send_backward, ActionKind.SEND_BACKWARD, -1),
            ),
            strict=True,
        ):
            setattr(stage, name, wrapper)

    def _loss(self, loss_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loss = loss_fn(*args, **kwargs)
        if self._computed:
            action, start, _ = self._computed[-1]
            self._computed[-1] = (action, start, self._clock.mark())
        return loss
