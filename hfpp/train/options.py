"""What `hfpp train` can be told, and every rule about it that needs no torch to check."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hfpp.errors import PipelineConfigError
from hfpp.plan.costs import ModelCosts
from hfpp.plan.costs_file import read_costs
from hfpp.plan.partitioning.grammar import parse_partition
from hfpp.plan.partitioning.spec import PartitionSpec
from hfpp.plan.schedules import ScheduleSpec, check_microbatches, find_schedule
from hfpp.train.errors import OptionError

__all__ = ["RunDtype", "TrainOptions"]

# Stages per rank of schedules that leave the number open: hfpp's default for them.
_USUAL_STAGES_PER_RANK = 2


class RunDtype(StrEnum):
    """The type of parameters, activations and gradients of a run."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """One training run, as asked for; constructing it checks all that it can by itself.

    Attributes:
        model: folder with a `config.json`, and safetensors to start from if it has any; None for a
            small Llama.
        text: UTF-8 file to train on; None for the prose of Python's own `pydoc_data.topics`.
        pp: ranks of one pipeline.
        schedule: name or alias of a schedule.
        partition: where the model is cut, in any spelling of `hfpp.plan.partitioning.grammar`.
        costs: file of `hfpp profile` that `balanced` goes by; None estimates them.
        microbatch_size: sequences per microbatch.
        batch_size: sequences per step, over all data-parallel replicas.
        seq_len: tokens per sequence.
        steps: optimizer steps.
        lr: peak learning rate of AdamW, reached after the warm-up.
        warmup_steps: steps over which the learning rate rises linearly.
        dtype: type of parameters, activations and gradients.
        seed: of the initial weights and of the order of the data.
        max_grad_norm: gradients are clipped to this norm; 0 leaves them as they are.
        out: folder for the results.
        force: replace the results of an earlier run in `out`.
        verify: train the plain model too, and compare every step's loss and gradient norm.
        trace: record so many of the last steps; 0 records none.
    """

    model: Path | None = None
    text: Path | None = None
    pp: int = 2
    schedule: str = "Interleaved1F1B"
    partition: str = "balanced"
    costs: Path | None = None
    microbatch_size: int = 2
    batch_size: int = 16
    seq_len: int = 128
    steps: int = 90
    lr: float = 1e-3
    warmup_steps: int = 10
    dtype: RunDtype = RunDtype.FLOAT32
    seed: int = 0
    max_grad_norm: float = 1.0
    out: Path = Path("hfpp-train")
    force: bool = False
    verify: bool = False
    trace: int = 0

    def __post_init__(self) -> None:
        """Checks every option by itself, and those that must fit each other."""
        for name, least in (
            ("pp", 1),
            ("microbatch_size", 1),
            ("batch_size", 1),
            ("seq_len", 2),
            ("steps", 1),
            ("warmup_steps", 0),
            ("seed", 0),
            ("trace", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"{_flag(name)} ({value}) must be an integer, at least {least}.")
        if self.seed >= 2**63:
            raise OptionError(f"--seed ({self.seed}) must be below 2**63.")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise OptionError(f"--lr ({self.lr}) must be a positive, finite number.")
        if not (self.max_grad_norm >= 0 and math.isfinite(self.max_grad_norm)):
            raise OptionError(
                f"--max-grad-norm ({self.max_grad_norm}) must be a finite number, not negative: "
                "0 turns clipping off."
            )
        if self.batch_size % self.microbatch_size:
            raise OptionError(
                f"--batch-size ({self.batch_size}) must be divisible by --microbatch-size "
                f"({self.microbatch_size}): use --batch-size "
                f"{-(-self.batch_size // self.microbatch_size) * self.microbatch_size}, or "
                "--microbatch-size 1."
            )
        if self.verify and self.dtype is RunDtype.BFLOAT16:
            raise OptionError(
                f"--verify compares curves to a few parts in a million, which --dtype {self.dtype} "
                "cannot hold: use --dtype float32 or float64."
            )
        self._check_stages()
        self.check_schedule(replicas=1)

    @property
    def schedule_spec(self) -> ScheduleSpec:
        """The schedule that is meant."""
        try:
            return find_schedule(self.schedule, argument="--schedule")
        except PipelineConfigError as error:
            raise OptionError(str(error)) from None

    @property
    def partition_spec(self) -> PartitionSpec:
        """The partition that is meant."""
        try:
            return parse_partition(self.partition, argument="--partition")
        except PipelineConfigError as error:
            raise OptionError(str(error)) from None

    @property
    def stages_per_rank(self) -> int:
        """Stages that each rank holds."""
        given = self.partition_spec.num_stages
        if given is not None:
            return given // self.pp
        return self.schedule_spec.stages_per_rank or _USUAL_STAGES_PER_RANK

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.pp * self.stages_per_rank

    def _check_stages(self) -> None:
        """A partition with a number of stages of its own must have one that the schedule takes."""
        given, wanted = self.partition_spec.num_stages, self.schedule_spec.stages_per_rank
        if given is None:
            return
        each, rest = divmod(given, self.pp)
        if rest or (each != wanted and (wanted is not None or each < _USUAL_STAGES_PER_RANK)):
            rule = "2 or more" if wanted is None else str(wanted)
            right = self.pp * (wanted or max(_USUAL_STAGES_PER_RANK, each))
            raise OptionError(
                f"--partition ({_short(self.partition)}) has {given} stages, but --schedule "
                f"{self.schedule} with --pp {self.pp} needs {rule} on each of the {self.pp} ranks: "
                f"write a partition of {right} stages, or balanced."
            )

    def n_microbatches(self, replicas: int) -> int:
        """Microbatches per step in each of `replicas` data-parallel pipelines."""
        return self.batch_size // (self.microbatch_size * replicas)

    def check_schedule(self, *, replicas: int) -> None:
        """Checks that the batch feeds that many pipelines, and the schedule its microbatches.

        Raises:
            OptionError: it does not; the message has sizes that work.
        """
        share = self.microbatch_size * replicas
        if self.batch_size % share:
            raise OptionError(
                f"--batch-size ({self.batch_size}) must be divisible by --microbatch-size "
                f"({self.microbatch_size}) times the {replicas} data-parallel pipelines: use "
                f"--batch-size {-(-self.batch_size // share) * share}."
            )
        count = self.n_microbatches(replicas)
        if self._can_run(count):
            return
        # All counts below the number of stages work, or none does.
        fewer = range(count - 1, self.num_stages - 1, -1)
        more = range(max(count + 1, self.num_stages), count + self.num_stages + 1)
        nearest = [next(filter(self._can_run, counts), None) for counts in (fewer, more)]
        fitting = [n for n in nearest if n is not None]
        each = f" for each of the {replicas} data-parallel pipelines" if replicas > 1 else ""
        raise OptionError(
            f"--schedule {self.schedule} with --pp {self.pp} cannot run the {count} microbatches "
            f"that --batch-size ({self.batch_size}) and --microbatch-size "
            f"({self.microbatch_size}) make{each}, but {' or '.join(map(str, fitting))}: use "
            f"{' or '.join(f'--batch-size {n * share}' for n in fitting)}."
        )

    def _can_run(self, n_microbatches: int) -> bool:
        try:
            check_microbatches(
                self.schedule_spec,
                pp_size=self.pp,
                num_stages=self.num_stages,
                n_microbatches=n_microbatches,
            )
        except PipelineConfigError:
            return False
        return True

    def check_layers(self, num_layers: int) -> None:
        """Checks that the model has a layer for every stage, and those that the options are for.

        Raises:
            OptionError: it has fewer layers than stages, or none, or another number than the
                partition or the costs.
        """
        if num_layers < 1:
            raise OptionError(
                f"--model ({self.model}) has {num_layers} layers, and every stage needs one: give "
                "a configuration with layers."
            )
        counts = self.partition_spec.counts
        if counts and sum(counts) != num_layers:
            raise OptionError(
                f"--partition ({_short(self.partition)}) gives its {len(counts)} stages "
                f"{sum(counts)} layers, but the model has {num_layers}: make the counts sum to "
                f"{num_layers}."
            )
        if self.costs is not None:
            measured = len(_costs_in(self.costs).layers)
            if measured != num_layers:
                raise OptionError(
                    f"--costs ({self.costs}) are of {measured} layers, but the model has "
                    f"{num_layers}: profile this model."
                )
        if self.num_stages > num_layers:
            fitting = num_layers // self.stages_per_rank
            remedy = f"use --pp {fitting} or less" if fitting else "use --pp 1 --schedule 1F1B"
            raise OptionError(
                f"--pp ({self.pp}) with --schedule {self.schedule} makes {self.num_stages} stages, "
                f"but the model has {num_layers} layers, and every stage needs one: {remedy}."
            )


def _costs_in(file: Path) -> ModelCosts:
    try:
        return read_costs(file)
    except (PipelineConfigError, OSError) as error:
        raise OptionError(f"--costs: {error}") from None


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
