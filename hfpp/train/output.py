"""The folder of a run: what lies in it, and that nothing in it is lost."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hfpp.train.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hfpp.train.events import RunShape, StepMetrics
    from hfpp.train.options import TrainOptions

__all__ = ["RunFolder"]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.path / "metrics.jsonl"

    @property
    def loss_picture(self) -> Path:
        """The loss curve, PNG."""
        return self.path / "loss.png"

    @property
    def schedule_picture(self) -> Path:
        """The schedule as it was run, SVG."""
        return self.path / "schedule.svg"

    @property
    def summary(self) -> Path:
        """Options, stages and results, JSON."""
        return self.path / "summary.json"

    @property
    def logs(self) -> Path:
        """What the processes printed, one file each."""
        return self.path / "logs"

    def check(self, *, force: bool) -> None:
        """Checks that nothing would be lost.

        Raises:
            OptionError: the folder holds something and `force` is not set, or it is no folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OptionError(f"--out ({self.path}) is not a folder: give a new one.")
        if not force and self.path.is_dir() and any(self.path.iterdir()):
            raise OptionError(
                f"--out ({self.path}) already holds something: give a new folder, or --force to "
                "replace the results in it."
            )

    def create(self) -> None:
        """Makes the folder, without the results of an earlier run; other files stay.

        Raises:
            OptionError: it cannot be written.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            for old in (
                self.metrics,
                self.loss_picture,
                self.schedule_picture,
                self.summary,
                *self.logs.glob("*.log"),
            ):
                old.unlink(missing_ok=True)
        except OSError as error:
            raise OptionError(
                f"--out ({self.path}) cannot be written ({error.strerror}): give another folder."
            ) from None

    def append_metrics(self, metrics: StepMetrics) -> None:
        """Adds one step; what is written stays when the run ends early."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(metrics)) + "\n")

    def draw_schedule(self, options: TrainOptions, shape: RunShape) -> None:
        """Draws what each rank does in one step."""
        from hfpp.plan.render import schedule_svg
        from hfpp.plan.schedule import compute_table

        table = compute_table(
            options.schedule_spec,
            pp_size=options.pp,
            stages_per_rank=options.stages_per_rank,
            n_microbatches=shape.n_microbatches,
        )
        self.schedule_picture.write_text(schedule_svg(table), encoding="utf-8")

    def draw_loss(self, losses: Sequence[float], reference: Sequence[float] | None) -> None:
        """Draws the loss curve, and the plain model's over it where there is one."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        axes = figure.subplots()
        axes.plot(range(1, len(losses) + 1), losses, color="#1f6feb", linewidth=2, label="pipeline")
        if reference is not None:
            steps = range(1, len(reference) + 1)
            axes.plot(steps, reference, "--", color="#f0883e", linewidth=1.2, label="plain model")
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        figure.savefig(self.loss_picture)  # a figure without a window draws with Agg

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes what the run was and how it ended."""
        self.summary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
