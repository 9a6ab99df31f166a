"""Runs a training job from its options: in processes of its own, or as a rank of torchrun's."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hfpp.train.errors import TrainingError
from hfpp.train.inputs import prepare_inputs
from hfpp.train.output import RunFolder
from hfpp.train.processes import available_cores, ended_by_signals, run_processes
from hfpp.train.report import Reporter
from hfpp.train.torchrun import TorchrunRank
from hfpp.train.verify import compare_runs, reference_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from hfpp.train.events import RunShape, StepMetrics
    from hfpp.train.inputs import RunInputs
    from hfpp.train.options import TrainOptions

__all__ = ["run_training"]

# What the processes of a run import: seconds for each of them, so it is done once for all.
_PRELOADED = (
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "hfpp.train.ranks",
)


def run_training(options: TrainOptions) -> None:
    """Trains as the options say.

    Started plainly, it makes one gloo process per rank and watches them; started by torchrun, this
    process is a rank of that job. Nothing is written or started before everything that can be
    checked has been.

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
        inputs = prepare_inputs(options, Path(scratch))
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


def _train_as_local_rank(
    index: int,
    report: Callable[[RunShape | StepMetrics], None],
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
    with tempfile.TemporaryDirectory(prefix="hfpp-train-") as scratch:
        inputs = prepare_inputs(options, Path(scratch))
        from hfpp.train.ranks import train_as_torchrun_rank

        if rank.rank != 0:
            train_as_torchrun_rank(options, inputs, lambda _: None, rank=rank)
            return
        folder.create()
        with Reporter(options, inputs, folder) as reporter:
            device = train_as_torchrun_rank(options, inputs, reporter.handle, rank=rank)
            _conclude(options, inputs, folder, reporter, device=str(device))


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
