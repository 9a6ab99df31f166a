"""The folder of a run: what lies in it, and that nothing in it is lost."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hfpp.train.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from hfpp.plan.render.recorded import Comparison
    from hfpp.plan.schedules.actions import ScheduleTable
    from hfpp.train.events import RunShape, StepMetrics, StepTrace
    from hfpp.train.options import TrainOptions

__all__ = ["RunFolder"]

_MARK = "Results of `hfpp train`. `--force` replaces them only in a folder with this file.\n"


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
    def trace(self) -> Path:
        """What was recorded of the last steps, in the Trace Event Format, JSON."""
        return self.path / "trace.json"

    @property
    def trace_picture(self) -> Path:
        """A recorded step under the planned one, SVG."""
        return self.path / "trace.svg"

    @property
    def summary(self) -> Path:
        """Options, stages and results, JSON."""
        return self.path / "summary.json"

    @property
    def logs(self) -> Path:
        """What the processes printed, one file each."""
        return self.path / "logs"

    @property
    def marker(self) -> Path:
        """Tells a run's folder from a stranger's."""
        return self.path / ".hfpp-run"

    def check(self, *, force: bool) -> None:
        """Checks that the folder can be written and nothing would be lost; changes nothing.

        Raises:
            OptionError: the folder holds something that no run wrote, or the results of a run and
                `force` is not set; it is no folder, or cannot be written.
        """
        try:
            self.path.stat()
            entries = list(self.path.iterdir())
        except FileNotFoundError:
            self._check_writable(next(p for p in self.path.absolute().parents if p.exists()))
            return
        except NotADirectoryError:
            raise OptionError(
                f"--out ({self.path}) is not a folder, or lies in something that is none: give a "
                "new folder."
            ) from None
        except OSError as error:
            raise self._unwritable(error.strerror) from None
        self._check_writable(self.path)
        if not entries:
            return
        if self.marker.is_symlink() or not self.marker.is_file():
            raise OptionError(
                f"--out ({self.path}) already holds something that no run of hfpp train wrote, so "
                "nothing in it is replaced: give a new folder."
            )
        if not force:
            raise OptionError(
                f"--out ({self.path}) already holds the results of a run: give a new folder, or "
                "--force to replace them."
            )
        if self.logs.is_symlink() or (self.logs.exists() and not self.logs.is_dir()):
            raise OptionError(
                f"--out ({self.path}): {self.logs.name} is not a folder of a run but a link or a "
                "file, which is not replaced: give a new folder."
            )
        for old in self._results():
            if old.is_dir() and not old.is_symlink():
                raise OptionError(
                    f"--out ({self.path}): {old.relative_to(self.path)} is a folder, which is not "
                    "replaced: give a new folder."
                )

    def create(self) -> None:
        """Makes the folder, without the results of an earlier run; other files stay.

        Raises:
            OptionError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.marker.write_text(_MARK, encoding="utf-8")
            self.logs.mkdir(exist_ok=True)
            for old in self._results():
                old.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error.strerror) from None

    def _results(self) -> Iterator[Path]:
        """What a run writes, whether it is there or not."""
        yield from (self.metrics, self.loss_picture, self.schedule_picture, self.summary)
        yield from (self.trace, self.trace_picture)
        yield self.logs / "plain-model-0.log"
        for path in self.logs.glob("rank-*.log"):
            if path.stem.removeprefix("rank-").isdecimal():
                yield path

    def _check_writable(self, folder: Path) -> None:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise self._unwritable(f"no right to write in {folder}")

    def _unwritable(self, reason: str | None) -> OptionError:
        return OptionError(
            f"--out ({self.path}) cannot be written ({reason}): give another folder."
        )

    def append_metrics(self, metrics: StepMetrics) -> None:
        """Adds one step; what is written stays when the run ends early."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(metrics), allow_nan=False) + "\n")

    def draw_schedule(self, options: TrainOptions, shape: RunShape) -> None:
        """Draws what each rank does in one step."""
        from hfpp.plan.render import schedule_svg

        self.schedule_picture.write_text(schedule_svg(_table(options, shape)), encoding="utf-8")

    def write_trace(
        self, options: TrainOptions, shape: RunShape, traces: Sequence[StepTrace]
    ) -> Comparison:
        """Writes the recorded steps, and draws the middle one under the plan.

        Args:
            options: of the run.
            shape: of the run.
            traces: of one step or more.

        Returns:
            The step that is drawn, and what was planned for it: the schedule with the median times
            of the recorded computations.
        """
        from hfpp.plan.render.chrome_trace import chrome_trace
        from hfpp.plan.render.recorded import compared, recorded_takes
        from hfpp.plan.render.svg import comparison_svg

        takes = recorded_takes(
            options.schedule_spec.name, [(trace.step, trace.ranks) for trace in traces]
        )
        self.trace.write_text(json.dumps(chrome_trace(takes), allow_nan=False), encoding="utf-8")
        comparison = compared(takes, _table(options, shape))
        picture = comparison_svg(
            comparison.planned,
            comparison.recorded.timeline,
            title=f"{options.schedule_spec.name}, step {comparison.recorded.step}",
        )
        self.trace_picture.write_text(picture, encoding="utf-8")
        return comparison

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
        """Writes what the run was and how it ended; infinity and NaN, which JSON lacks, as null."""
        text = json.dumps(_finite(summary), indent=2, allow_nan=False)
        self.summary.write_text(text + "\n", encoding="utf-8")


def _table(options: TrainOptions, shape: RunShape) -> ScheduleTable:
    from hfpp.plan.schedules import compute_table

    return compute_table(
        options.schedule_spec,
        pp_size=options.pp,
        stages_per_rank=options.stages_per_rank,
        n_microbatches=shape.n_microbatches,
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
