"""What `hfpp show` is asked to draw: a schedule by name or from a file, a plan, a recorded run."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpp.errors import PipelineConfigError
from hfpp.plan.partitioning.grammar import parse_partition
from hfpp.plan.plan_file import read_plan
from hfpp.plan.render.chrome_trace import Take
from hfpp.plan.render.planned import planned
from hfpp.plan.render.recorded import Comparison, compared, middle_take, table_of
from hfpp.plan.render.trace_file import is_trace, trace_takes
from hfpp.plan.schedules import SCHEDULES, compute_table, find_schedule, read_csv
from hfpp.plan.schedules.schedule_json import read_json
from hfpp.plan.schedules.simulator import Link, uniform_costs
from hfpp.plan.strict_json import read_json_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hfpp.plan.costs import ModelCosts, UnitCost
    from hfpp.plan.partitioning.spec import PartitionSpec
    from hfpp.plan.pipeline_plan import PipelinePlan
    from hfpp.plan.schedules.actions import ScheduleTable

__all__ = ["Costing", "Subject", "find_subject"]

_PP, _MICROBATCHES, _PER_RANK = 4, 8, 2  # where only a name is given
_LARGEST = 32 << 20  # bytes of a JSON file; Python makes some 30 times as much of it


@dataclass(frozen=True, kw_only=True)
class Costing:
    """What actions and messages cost in a picture.

    Attributes:
        times: of a forward, a whole backward and its weights' part (None: half) of every stage,
            without a unit; None: not given.
        model: what the parts of a model cost, in seconds; None: not given.
        about: of what these were measured, as the file has it.
        partition: of the model; None: the plan's own, else balanced.
        link: between ranks, in the unit of the costs.
        boundary_bytes: of what crosses from stage to stage; None: as the model's costs say.
        overlap: whether messages cross beside computations.
    """

    times: tuple[float, float, float | None] | None = None
    model: ModelCosts | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    partition: PartitionSpec | None = None
    link: Link = field(default_factory=Link)
    boundary_bytes: int | None = None
    overlap: bool = True

    def of(self, plan: PipelinePlan | None) -> Costing:
        """The same for a plan: what it computes again costs time.

        Raises:
            PipelineConfigError: the costs are those of other microbatches, or it computes again
                what was not measured.
        """
        if plan is None or self.model is None:
            return self
        for name in ("microbatch_size", "seq_len"):
            planned, measured = getattr(plan, name), self.about.get(name)
            if measured is not None and measured != planned:
                raise PipelineConfigError(
                    f"--costs were measured with {name} {measured}, but the plan has {planned}: "
                    f"measure with hfpp profile --microbatch-size {plan.microbatch_size} --seq-len "
                    f"{plan.seq_len}"
                )
        if plan.recompute == "selective":
            raise PipelineConfigError(
                "--costs are those of whole layers, and of the plan's selective recomputation "
                "nothing was measured: leave out --costs"
            )
        return (
            self if plan.recompute == "none" else replace(self, model=self.model.computed_again())
        )

    def stages(
        self, table: ScheduleTable, offsets: Sequence[int] | None
    ) -> tuple[UnitCost, ...] | None:
        """The costs of each stage; None where none are given.

        Args:
            table: the schedule.
            offsets: which layers each stage has; None: the partition decides.

        Raises:
            PipelineConfigError: the partition does not fit the model and the stages.
        """
        if self.model is not None:
            if offsets is None or self.partition is not None:
                partition = self.partition or parse_partition("balanced")
                offsets = partition.offsets(
                    num_layers=len(self.model.layers),
                    num_stages=table.num_stages,
                    pp_size=table.pp_size,
                    placement=table.placement,
                    costs=self.model,
                )
            return self.model.stages(offsets)
        if self.times is not None:
            forward, backward, weight = self.times
            return uniform_costs(
                table.num_stages, forward=forward, backward=backward, weight=weight
            )
        return None

    @property
    def messages(self) -> dict[str, Any]:
        """What `planned` is told of messages."""
        of_model = 0 if self.model is None else self.model.boundary_bytes
        size = of_model if self.boundary_bytes is None else self.boundary_bytes
        return {"link": self.link, "boundary_bytes": size, "overlap": self.overlap}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One of a table and the steps of a recorded run.

    Attributes:
        what: as it was asked for.
        table: the actions; None for a recorded run.
        plan: that the table is of, if any.
        takes: the recorded steps; empty for a table.
    """

    what: str
    table: ScheduleTable | None = None
    plan: PipelinePlan | None = None
    takes: tuple[Take, ...] = ()

    @property
    def _offsets(self) -> tuple[int, ...] | None:
        return None if self.plan is None else self.plan.offsets

    def take(self, costing: Costing, *, step: int | None = None) -> Take:
        """What is drawn: a simulated step, or a recorded one.

        Args:
            costing: of a simulated step; without costs, a forward takes 1 and a backward 2.
            step: of a recorded run.

        Raises:
            PipelineConfigError: no such step; the table cannot run; the costs do not fit it.
        """
        if self.table is None:
            return middle_take(self.takes, step=step)
        costing = costing.of(self.plan)
        costs = costing.stages(self.table, self._offsets)
        unit = "" if costing.model is None else "s"
        costs = uniform_costs(self.table.num_stages) if costs is None else costs
        return Take(planned(self.table, costs, unit=unit, **costing.messages))

    def against(self, what: str, costing: Costing, *, step: int | None = None) -> Comparison:
        """A recorded step and its plan.

        Args:
            what: the plan, as for `find_subject`; empty: the recorded actions themselves.
            costing: of the plan; without costs, computations take their recorded median times.
            step: as for `take`.

        Raises:
            PipelineConfigError: this is no recorded run, or the plan is no plan of it.
        """
        if not self.takes:
            raise PipelineConfigError(
                f"--against compares a recorded run with a plan, and {self.what} is no recorded "
                "run: give the trace.json of hfpp train --trace first, and the plan after --against"
            )
        take = middle_take(self.takes, step=step)
        plan = Subject(what="") if not what else _plan_of(what, take)
        table = plan.table
        if table is not None and sorted(_actions(table)) != sorted(
            str(bar.action) for row in take.timeline.bars for bar in row
        ):
            raise PipelineConfigError(
                f"--against ({what}) has other computations than {self.what}, which ran "
                f"{take.timeline.num_stages} stages and {take.timeline.n_microbatches} "
                "microbatches: give the schedule that was run, or --against alone"
            )
        table = table_of(take.timeline) if table is None else table
        costing = costing.of(plan.plan)
        costs = costing.stages(table, plan._offsets)
        return compared(self.takes, table, step=step, costs=costs, **costing.messages)


def _actions(table: ScheduleTable) -> list[str]:
    return [
        str(leaf)
        for rank in range(table.pp_size)
        for step in table.steps(rank)
        for leaf in step.action.leaves
        if leaf.kind.is_compute
    ]


def _plan_of(what: str, take: Take) -> Subject:
    line = take.timeline
    if _is_file(what):
        return find_subject(what)
    fixed = find_schedule(what, argument="--against").stages_per_rank
    return find_subject(
        what,
        pp=line.pp_size,
        microbatches=line.n_microbatches,
        per_rank=fixed or line.num_stages // line.pp_size,
    )


def find_subject(
    what: str,
    *,
    pp: int | None = None,
    microbatches: int | None = None,
    per_rank: int | None = None,
) -> Subject:
    """Finds what is to be drawn.

    Args:
        what: the name of a schedule, or a file: CSV, or JSON of a schedule, a plan or a trace.
        pp: ranks of a schedule by name; None: 4.
        microbatches: of a schedule by name; None: 8.
        per_rank: stages on each rank of a schedule by name; None: what it fixes, else 2.

    Raises:
        FileNotFoundError: no such file.
        PipelineConfigError: no such schedule, a file that is none of these, or sizes that a file
            says itself.
    """
    if not _is_file(what):
        spec = find_schedule(what, argument="SCHEDULE")
        table = compute_table(
            spec,
            pp_size=_PP if pp is None else pp,
            n_microbatches=_MICROBATCHES if microbatches is None else microbatches,
            stages_per_rank=(spec.stages_per_rank or _PER_RANK) if per_rank is None else per_rank,
        )
        return Subject(what=what, table=table)
    for name, size in (("pp", pp), ("microbatches", microbatches), ("stages-per-rank", per_rank)):
        if size is not None:
            raise PipelineConfigError(
                f"--{name} ({size}) is for a schedule by name ({', '.join(SCHEDULES)}), and {what} "
                "is a file, which has its own sizes: leave it out"
            )
    if Path(what).suffix.lower() != ".json":
        return Subject(what=what, table=read_csv(what))
    document = read_json_file(what, what="a schedule, a plan or a trace of hfpp", largest=_LARGEST)
    if is_trace(document):
        return Subject(what=what, takes=tuple(trace_takes(document)))
    if isinstance(document.value, dict) and document.value.get("format") == "hfpp plan":
        plan = read_plan(what)
        return Subject(what=what, table=plan.table(), plan=plan)
    return Subject(what=what, table=read_json(what))


def _is_file(what: str) -> bool:
    return os.sep in what or Path(what).suffix.lower() in (".csv", ".json") or Path(what).is_file()
