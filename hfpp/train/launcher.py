"""Runs a training job from its options: in processes of its own, or as a rank of torchrun's."""

from __future__ import annotations

import os
import tempfile
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from hfpp.errors import PipelineConfigError
from hfpp.train.errors import TrainingError
from hfpp.train.inputs import RunInputs, prepare_inputs
from hfpp.train.model_folder import read_model_folder
from hfpp.train.output import RunFolder
from hfpp.train.processes import available_cores, ended_by_signals, run_processes
from hfpp.train.report import Reporter
from hfpp.train.torchrun import TorchrunRank
from hfpp.train.verify import compare_runs, reference_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hfpp.train.events import RunShape, StepMetrics, StepTrace
    from hfpp.train.options import TrainOptions

__all__ = ["run_training"]

# What the processes of a run import: seconds for each of them, so it is done once for all. Nothing
# of hfpp.runtime: the plain model of --verify is trained in a process that never had it.
_PRELOADED = (
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
)


def run_training(options: TrainOptions) -> None:
    """Trains as the options say.

    Started plainly, it makes one gloo process per rank and watches them; started by torchrun, this
    process is a rank of that job. Nothing is written or started before everything that can be
    checked has been.

    A script that calls this, or `hfpp.cli.main`, does so under `if __name__ == "__main__":`, as the
    new processes import the script.

    Raises:
        PipelineConfigError: a configuration that cannot work.
        TrainingError: a rank failed, or the curves of `--verify` differ.
    """
    rank = TorchrunRank.from_environment()
    if rank is None:
        _in_local_processes(options)
    else:
        _as_torchrun_rank(options, rank)


def _in_local_processes(options: TrainOptions) -> None:
    folder = RunFolder(options.out)
    folder.check(force=options.force)
    with ended_by_signals(), tempfile.TemporaryDirectory(prefix="hfpp-train-") as scratch:
        inputs = _prepare(options, Path(scratch))
        folder.create()
        work = partial(
            _train_as_local_rank,
            options=options,
            inputs=inputs,
            store=Path(scratch) / "store",
            threads=_threads_per_rank(options.pp),
        )
        with Reporter(options, inputs, folder) as reporter:
            run_processes(
                work,
                options.pp,
                name="rank",
                on_event=reporter.handle,
                log_folder=folder.logs,
                preload=_PRELOADED,
            )
            _conclude(options, inputs, folder, reporter, device="cpu")


def _prepare(options: TrainOptions, scratch: Path) -> RunInputs:
    if options.model is None:
        return prepare_inputs(options, scratch)
    read_model_folder(options.model)  # what is wrong there is told at once
    # Reading a model takes torch and transformers: not here, but where they are loaded anyway.
    outcomes: list[RunInputs | PipelineConfigError] = []
    run_processes(
        partial(_prepare_in_process, options=options, folder=scratch),
        1,
        name="preparation",
        on_event=outcomes.append,
        log_folder=scratch,
        preload=_PRELOADED,
    )
    (outcome,) = outcomes
    if isinstance(outcome, PipelineConfigError):
        raise outcome
    return outcome


def _prepare_in_process(
    _index: int,
    report: Callable[[RunInputs | PipelineConfigError], None],
    *,
    options: TrainOptions,
    folder: Path,
) -> None:
    try:
        report(prepare_inputs(options, folder))
    except PipelineConfigError as error:
        report(error)


def _train_as_local_rank(
    index: int,
    report: Callable[[RunShape | StepMetrics | StepTrace], None],
    *,
    options: TrainOptions,
    inputs: RunInputs,
    store: Path,
    threads: int,
) -> None:
    # In the rank's process: the one that watches needs no torch.
    from hfpp.train.ranks import train_as_local_rank

    train_as_local_rank(options, inputs, report, rank=index, store=store, threads=threads)


def _as_torchrun_rank(options: TrainOptions, rank: TorchrunRank) -> None:
    rank.check(options)
    folder = RunFolder(options.out)
    if rank.rank == 0:
        folder.check(force=options.force)
    with (
        ended_by_signals(),
        _one_line_per_failure(rank),
        tempfile.TemporaryDirectory(prefix="hfpp-train-") as scratch,
    ):
        inputs = prepare_inputs(options, Path(scratch))
        from hfpp.train.ranks import train_as_torchrun_rank

        if rank.rank != 0:
            train_as_torchrun_rank(options, inputs, lambda _: None, rank=rank)
            return
        folder.create()
        with Reporter(options, inputs, folder) as reporter:
            device = train_as_torchrun_rank(options, inputs, reporter.handle, rank=rank)
            _conclude(options, inputs, folder, reporter, device=str(device))


@contextmanager
def _one_line_per_failure(rank: TorchrunRank) -> Iterator[None]:
    """Within it, what needs a traceback becomes a line that names the rank and a file with it."""
    try:
        yield
    except (PipelineConfigError, TrainingError):
        raise
    except Exception as error:
        # Not in --out, which belongs to the first rank and may lie on another machine.
        number, path = tempfile.mkstemp(prefix=f"hfpp-rank-{rank.rank}-", suffix=".log")
        with os.fdopen(number, "w", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        what = shorten(f"{type(error).__name__}: {error}", 500)
        raise TrainingError(
            f"rank {rank.rank} of {rank.world_size} failed with {what}; the traceback is in {path}."
        ) from error


def _conclude(
    options: TrainOptions, inputs: RunInputs, folder: RunFolder, reporter: Reporter, *, device: str
) -> None:
    """Writes the results; with --verify, after the plain model was trained as well.

    Raises:
        TrainingError: the two curves differ.
    """
    if not options.verify:
        reporter.finish(None)
        return
    reporter.begin_reference()
    run_processes(
        reference_run(options, inputs, device=device, threads=available_cores()),
        1,
        name="plain model",
        on_event=reporter.handle_reference,
        log_folder=folder.logs,
        preload=_PRELOADED,
    )
    verdicts = compare_runs(reporter.steps, reporter.reference_steps, options.dtype)
    reporter.finish(verdicts)
    for verdict in verdicts:
        if not verdict.holds:
            raise TrainingError(
                f"--verify: the pipeline's {verdict.curve} differs from the plain model's by "
                f"{verdict.largest_difference:.2e} (relative, step {verdict.step}); it must stay "
                f"below {verdict.tolerance:.0e}. The curves are in {folder.metrics} and "
                f"{folder.summary}."
            )


def _threads_per_rank(ranks: int) -> int:
    """What the user set, else the cores divided over the ranks."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else max(1, available_cores() // ranks)
