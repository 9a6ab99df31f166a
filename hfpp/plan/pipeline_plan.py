"""A plan: all that the pipeline of a model is told, and what it is expected to cost."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from hfpp._core import __version__
from hfpp.errors import PipelineConfigError
from hfpp.plan.placement import stage_ids_this_rank
from hfpp.plan.schedules import (
    ScheduleTable,
    check_microbatches,
    compute_table,
    find_schedule,
    verify,
)

if TYPE_CHECKING:
    from hfpp.plan.placement import Placement
    from hfpp.plan.prediction import MemoryParts, Prediction

__all__ = ["RECOMPUTE", "ModelFingerprint", "ParallelSizes", "PipelinePlan", "RankPlan"]

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
"""What is computed again for the backward instead of being kept."""

LARGEST_WORLD = 1 << 24  # of ranks
LARGEST_WIDTH = 1 << 40
LARGEST_COUNT = 1 << 28  # of microbatches and stages: what a table can number


def _check_size(name: str, value: int, most: int = LARGEST_COUNT) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise PipelineConfigError(
            f"{name} ({value!r}) must be an integer from 1 to {most}: use {name}=1 or more"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFingerprint:
    """What a live model must have for a plan to be its.

    Attributes:
        model_type: of its config; empty where it has none.
        num_layers: decoder layers.
        hidden_size: width of the hidden states; None, here and below, where it is not known.
        vocab_size: width of the logits.
        parameters: how many, tied ones once.
        is_tied: whether the head's matrix is the embedding's.
    """

    model_type: str
    num_layers: int
    hidden_size: int | None
    vocab_size: int | None
    parameters: int | None
    is_tied: bool | None

    def __post_init__(self) -> None:
        _check_size("num_layers", self.num_layers)
        for name, most in (
            ("hidden_size", LARGEST_WIDTH),
            ("vocab_size", LARGEST_WIDTH),
            ("parameters", 1 << 53),
        ):
            if getattr(self, name) is not None:
                _check_size(name, getattr(self, name), most)

    def differences(self, live: ModelFingerprint) -> list[str]:
        """What a live model has otherwise, in words; what one of them does not know is equal."""
        found = []
        for name, words in (
            ("model_type", "model_type {}"),
            ("num_layers", "{} layers"),
            ("hidden_size", "hidden_size {}"),
            ("vocab_size", "vocab_size {}"),
            ("parameters", "{} parameters"),
        ):
            planned, present = getattr(self, name), getattr(live, name)
            if planned != present and not {planned, present} & {None, ""}:
                found.append(f"{words.format(present)} instead of {planned}")
        if self.is_tied != live.is_tied and None not in (self.is_tied, live.is_tied):
            found.append(
                "tied embedding and head instead of separate ones"
                if live.is_tied
                else "separate embedding and head instead of tied ones"
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSizes:
    """The sizes of all ways in which a job is parallel, the pipeline's aside.

    Attributes:
        dp: replicas of the pipeline.
        tp: ranks that share every matrix.
        cp: ranks that share every sequence.
        ep: ranks that share the experts; they are ranks of the other three ways.
    """

    dp: int = 1
    tp: int = 1
    cp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "cp", "ep"):
            _check_size(name, getattr(self, name), LARGEST_WORLD)
        if self.dp * self.tp * self.cp % self.ep:
            raise PipelineConfigError(
                f"ep ({self.ep}) must divide dp ({self.dp}) x tp ({self.tp}) x cp ({self.cp}), "
                "over whose ranks the experts lie: use ep=1 or a divisor"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """One rank's part of a plan.

    Attributes:
        rank: in the pipeline.
        stages: the rank's stages, ascending.
        layers: the layers of each of them.
        has_first_stage: whether it has the embedding.
        has_last_stage: whether it has the head and the loss.
        memory: bytes that it is expected to need; None where nothing is predicted.
    """

    rank: int
    stages: tuple[int, ...]
    layers: tuple[range, ...]
    has_first_stage: bool
    has_last_stage: bool
    memory: MemoryParts | None


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """A pipeline of a model, for all ranks; plain data that goes to JSON and back.

    Attributes:
        model: the model that it is for.
        pp_size: ranks of the pipeline.
        schedule: its name; of a table of one's own, how messages call it.
        stages_per_rank: stages of each rank.
        n_microbatches: microbatches of one step of one pipeline.
        microbatch_size: sequences of one of them.
        seq_len: tokens of a sequence.
        offsets: stage s has the layers ``offsets[s]`` to ``offsets[s + 1] - 1``.
        recompute: what is computed again for the backward: none, selective (the attention and
            what else is cheap for its bytes) or full (whole layers).
        parallel: sizes of the other ways in which the job is parallel.
        own_table: the actions, where the schedule is none that hfpp makes by name.
        prediction: what it is expected to cost; None where nothing is predicted.
        hfpp_version: of the hfpp that made the plan.

    Example:
        >>> plan = PipelinePlan(
        ...     model=ModelFingerprint(
        ...         model_type="llama", num_layers=5, hidden_size=64, vocab_size=1000,
        ...         parameters=None, is_tied=False,
        ...     ),
        ...     pp_size=2, schedule="1F1B", n_microbatches=4, microbatch_size=1, seq_len=128,
        ...     offsets=(0, 3, 5),
        ... )
        >>> plan.of_rank(1).layers, plan.local_batch_size
        ((range(3, 5),), 4)
    """

    model: ModelFingerprint
    pp_size: int
    schedule: str
    stages_per_rank: int = 1
    n_microbatches: int
    microbatch_size: int
    seq_len: int
    offsets: tuple[int, ...]
    recompute: Recompute = "none"
    parallel: ParallelSizes = ParallelSizes()
    own_table: ScheduleTable | None = None
    prediction: Prediction | None = None
    hfpp_version: str = __version__

    def __post_init__(self) -> None:
        _check_size("pp_size", self.pp_size, LARGEST_WORLD)
        for name in ("stages_per_rank", "n_microbatches", "microbatch_size", "seq_len"):
            _check_size(name, getattr(self, name))
        if self.recompute not in RECOMPUTE:
            raise PipelineConfigError(
                f"recompute ({self.recompute!r}) must be one of {', '.join(RECOMPUTE)}: "
                "use recompute='none'"
            )
        self._check_offsets()
        if self.own_table is None:
            self._check_schedule()
        else:
            self._check_table(self.own_table)
        if self.prediction is not None and len(self.prediction.memory) != self.pp_size:
            raise PipelineConfigError(
                f"prediction has the memory of {len(self.prediction.memory)} ranks, but pp_size is "
                f"{self.pp_size}: give one entry per rank"
            )

    def _check_offsets(self) -> None:
        offsets, layers = self.offsets, self.model.num_layers
        if (
            len(offsets) != self.num_stages + 1
            or offsets[0] != 0
            or offsets[-1] != layers
            or any(a >= b for a, b in itertools.pairwise(offsets))
        ):
            shown = str(list(offsets)) if len(offsets) <= 20 else f"{len(offsets)} numbers"
            raise PipelineConfigError(
                f"offsets ({shown}) must be {self.num_stages + 1} numbers (pp_size "
                f"({self.pp_size}) x stages_per_rank ({self.stages_per_rank}) + 1) that rise from "
                f"0 to the number of layers ({layers}): give every stage at least one layer"
            )

    def _check_schedule(self) -> None:
        spec = find_schedule(self.schedule, argument="schedule")
        if spec.stages_per_rank not in (None, self.stages_per_rank):
            raise PipelineConfigError(
                f"stages_per_rank ({self.stages_per_rank}) must be {spec.stages_per_rank} for "
                f"{spec.name}: use stages_per_rank={spec.stages_per_rank}"
            )
        check_microbatches(
            spec,
            pp_size=self.pp_size,
            num_stages=self.num_stages,
            n_microbatches=self.n_microbatches,
        )

    def _check_table(self, table: ScheduleTable) -> None:
        verify(table)
        for name in ("pp_size", "stages_per_rank", "n_microbatches"):
            planned, present = getattr(self, name), getattr(table, name)
            if planned != present:
                raise PipelineConfigError(
                    f"{name} ({planned}) must be that of the table {table.name} ({present}): use "
                    f"{name}={present}"
                )
        _ = table.placement  # refuses what is neither loop nor v

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.pp_size * self.stages_per_rank

    @property
    def local_batch_size(self) -> int:
        """Sequences of one step of one pipeline."""
        return self.n_microbatches * self.microbatch_size

    @property
    def global_batch_size(self) -> int:
        """Sequences of one step of all replicas."""
        return self.local_batch_size * self.parallel.dp

    @property
    def gpus(self) -> int:
        """Ranks of the whole job."""
        return self.pp_size * self.parallel.dp * self.parallel.tp * self.parallel.cp

    @property
    def placement(self) -> Placement:
        """How the stages lie on the ranks."""
        if self.own_table is not None:
            return self.own_table.placement
        return find_schedule(self.schedule, argument="schedule").placement

    def table(self) -> ScheduleTable:
        """The compute actions of all ranks."""
        if self.own_table is not None:
            return self.own_table
        return compute_table(
            find_schedule(self.schedule, argument="schedule"),
            pp_size=self.pp_size,
            n_microbatches=self.n_microbatches,
            stages_per_rank=self.stages_per_rank,
        )

    def of_rank(self, rank: int) -> RankPlan:
        """One rank's part.

        Args:
            rank: in the pipeline, 0 to ``pp_size - 1``.

        Raises:
            PipelineConfigError: no such rank.
        """
        stages = stage_ids_this_rank(rank, self.pp_size, self.num_stages, self.placement.value)
        return RankPlan(
            rank=rank,
            stages=stages,
            layers=tuple(range(self.offsets[s], self.offsets[s + 1]) for s in stages),
            has_first_stage=0 in stages,
            has_last_stage=self.num_stages - 1 in stages,
            memory=None if self.prediction is None else self.prediction.memory[rank],
        )
