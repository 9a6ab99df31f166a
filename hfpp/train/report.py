"""What a run shows in the terminal and leaves in its folder."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict
from importlib.metadata import version
from statistics import mean, median
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from hfpp.train.events import RunShape, StepMetrics, StepTrace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from rich.progress import TaskID

    from hfpp.train.inputs import RunInputs
    from hfpp.train.options import TrainOptions
    from hfpp.train.output import RunFolder
    from hfpp.train.verify import Verdict

__all__ = ["Reporter"]

_LAST_STEPS = 10  # the final loss is also given as the mean over these
_LINES = 12  # of progress, where no bar can be drawn


class Reporter:
    """Takes a run's events in order; a context manager, as it may draw a progress bar."""

    def __init__(
        self,
        options: TrainOptions,
        inputs: RunInputs,
        folder: RunFolder,
        console: Console | None = None,
    ) -> None:
        self._options = options
        self._inputs = inputs
        self._folder = folder
        self._console = console or Console(file=sys.stdout, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._description = ""
        self._shape: RunShape | None = None
        self._steps: list[StepMetrics] = []
        self._traces: list[StepTrace] = []
        self._reference: list[tuple[float, float]] = []

    def __enter__(self) -> Self:
        """Shows what is about to start."""
        options, inputs = self._options, self._inputs
        self._console.print(
            f"[bold]hfpp train[/]: {inputs.model_name} on {inputs.text_name} "
            f"({inputs.num_tokens:,} tokens), {options.schedule_spec.name}, --pp {options.pp}",
            soft_wrap=True,
        )
        self._console.print(f"{self._start()}; tokenizer: {inputs.tokenizer_name}", soft_wrap=True)
        if inputs.set_to_zero:
            entries = ", ".join(inputs.set_to_zero)
            self._console.print(f"dropout is off, set to 0: {entries}", soft_wrap=True)
        self._progress.start()
        self._begin("starting", total=None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the terminal back."""
        self._progress.stop()

    @property
    def steps(self) -> list[StepMetrics]:
        """Every step so far."""
        return self._steps

    @property
    def reference_steps(self) -> list[tuple[float, float]]:
        """Every step of the plain model so far: its loss and the norm of its gradients."""
        return self._reference

    def handle(self, event: RunShape | StepMetrics | StepTrace) -> None:
        """Takes one event of the ranks."""
        if isinstance(event, RunShape):
            self._shape = event
            self._console.print(_stage_table(event))
            self._folder.draw_schedule(self._options, event)
            self._begin("training", total=self._options.steps)
            return
        if isinstance(event, StepTrace):
            self._traces.append(event)
            return
        self._steps.append(event)
        self._folder.append_metrics(event)
        self._advance(event.step, f"loss {event.loss:.4f}  {event.tokens_per_second:,.0f} tokens/s")

    def begin_reference(self) -> None:
        """The plain model is about to be trained."""
        self._begin("plain model", total=self._options.steps)

    def handle_reference(self, step: tuple[float, float]) -> None:
        """Takes one step of the plain model: its loss and the norm of its gradients."""
        self._reference.append(step)
        self._advance(len(self._reference), f"loss {step[0]:.4f}")

    def finish(self, verdicts: Sequence[Verdict] | None) -> None:
        """Shows the result and writes pictures and summary."""
        self._progress.stop()
        self._folder.draw_loss(
            [step.loss for step in self._steps],
            None if verdicts is None else [loss for loss, _ in self._reference],
        )
        summary = self._summary(verdicts)
        self._folder.write_summary(summary)
        result = summary["result"]
        self._console.print(
            f"loss {result['first_loss']:.4f} -> {result['final_loss']:.4f} nats per token "
            f"({result['final_nats_per_byte']:.4f} per byte), "
            f"median {result['median_tokens_per_second']:,.0f} tokens/s",
            soft_wrap=True,
        )
        for verdict in verdicts or ():
            word = "[green]equal[/]" if verdict.holds else "[red]NOT equal[/]"
            self._console.print(
                f"verify: {verdict.curve} {word} to the plain model's: largest relative "
                f"difference {verdict.largest_difference:.2e} (step {verdict.step}), "
                f"allowed below {verdict.tolerance:.0e}",
                soft_wrap=True,
            )
        self._finish_trace()
        self._console.print(
            f"results are in {self._folder.path}; the trained weights are not saved", soft_wrap=True
        )

    def _finish_trace(self) -> None:
        if not self._traces:
            return
        assert self._shape is not None
        comparison = self._folder.write_trace(self._options, self._shape, self._traces)
        recorded, planned = comparison.recorded.timeline.end, comparison.planned.end
        self._console.print(
            f"trace: {len(self._traces)} of {len(self._steps)} steps; step "
            f"{comparison.recorded.step} took {1e3 * recorded:.1f} ms in the pipeline, and with "
            f"the same computations, nothing in their way, {1e3 * planned:.1f} ms were planned",
            soft_wrap=True,
        )

    def _start(self) -> str:
        weights = self._inputs.weights_folder
        if weights is None:
            return f"starts from random weights (--seed {self._options.seed})"
        return f"starts from the checkpoint in {weights}"

    def _begin(self, description: str, *, total: int | None) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(description, total=total, note="")
        self._description = description

    def _advance(self, step: int, note: str) -> None:
        assert self._task is not None
        self._progress.update(self._task, completed=step, note=note)
        steps = self._options.steps
        if self._progress.disable and (step % max(1, steps // _LINES) == 0 or step == steps):
            self._console.print(f"{self._description} {step}/{steps}  {note}", soft_wrap=True)

    def _summary(self, verdicts: Sequence[Verdict] | None) -> dict[str, Any]:
        assert self._shape is not None
        losses = [step.loss for step in self._steps]
        nats_per_byte = self._inputs.num_tokens / self._inputs.num_bytes
        last = mean(losses[-_LAST_STEPS:])
        shape = asdict(self._shape)
        for row in shape["stages"]:
            row["layers"] = [row["layers"].start, row["layers"].stop]
        return {
            "options": {
                name: value if isinstance(value, int | float | None) else str(value)
                for name, value in asdict(self._options).items()
            },
            "text": self._inputs.text_name,
            "model": self._inputs.model_name,
            "start": self._start(),
            "tokenizer": self._inputs.tokenizer_name,
            "set_to_zero": self._inputs.set_to_zero,
            "weights_saved": False,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("hfpp", "torch", "transformers")},
            },
            "pipeline": shape,
            "result": {
                "steps": len(losses),
                "first_loss": losses[0],
                "final_loss": losses[-1],
                f"mean_loss_of_last_{_LAST_STEPS}": last,
                "final_nats_per_byte": losses[-1] * nats_per_byte,
                "median_tokens_per_second": median(m.tokens_per_second for m in self._steps),
                "seconds": sum(m.seconds for m in self._steps),
            },
            "verify": None
            if verdicts is None
            else {
                "holds": all(verdict.holds for verdict in verdicts),
                "curves": [asdict(verdict) for verdict in verdicts],
                "plain_losses": [loss for loss, _ in self._reference],
                "plain_grad_norms": [norm for _, norm in self._reference],
            },
        }


def _stage_table(shape: RunShape) -> Table:
    table = Table(
        title=f"{len(shape.stages)} stages on {shape.world_size} ranks ({shape.device}), "
        f"{shape.n_microbatches} microbatches"
        + (f", {shape.replicas} data-parallel replicas" if shape.replicas > 1 else "")
    )
    for column in ("stage", "rank", "layers", "parameters", "bytes"):
        table.add_column(column, justify="right")
    for row in shape.stages:
        layers = f"{row.layers.start}-{row.layers.stop - 1}" if len(row.layers) else "none"
        table.add_row(
            str(row.stage),
            ", ".join(map(str, row.ranks)),
            layers,
            f"{row.parameters:,}",
            f"{row.bytes:,}",
        )
    total = (sum(row.parameters for row in shape.stages), sum(row.bytes for row in shape.stages))
    table.add_section()
    table.add_row("all", "", "", f"{total[0]:,}", f"{total[1]:,}")
    return table
