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

    from hfpp.train.events import RunShape, StepMetrics
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
        """Writes what the run was and how it ended; infinity and NaN, which JSON lacks, as null."""
        text = json.dumps(_finite(summary), indent=2, allow_nan=False)
        self.summary.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
