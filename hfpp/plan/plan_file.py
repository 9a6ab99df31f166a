"""Plans as JSON files, in and out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hfpp.errors import PipelineConfigError
from hfpp.plan.pipeline_plan import (
    LARGEST_COUNT,
    LARGEST_WIDTH,
    LARGEST_WORLD,
    RECOMPUTE,
    ModelFingerprint,
    ParallelSizes,
    PipelinePlan,
    Recompute,
)
from hfpp.plan.prediction import MemoryParts, NetworkParts, Prediction, TimeParts
from hfpp.plan.schedules.actions import Action, ScheduleTable, parse_action
from hfpp.plan.strict_json import JsonValue, read_json_file

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["plan_as_json", "read_plan", "write_plan"]

_FORMAT = "hfpp plan"
_VERSION = 1
_LARGEST_FILE = 4 << 20  # bytes; what Python makes of a malicious one is some 30 times as much


def plan_as_json(plan: PipelinePlan) -> dict[str, Any]:
    """The plan as what `json` writes; `read_plan` takes it back from a file."""
    schedule: dict[str, Any] = {
        "name": plan.schedule,
        "stages_per_rank": plan.stages_per_rank,
        "placement": plan.placement.value,
    }
    if plan.own_table is not None:
        schedule["rows"] = [
            ",".join("" if action is None else str(action) for action in row)
            for row in plan.own_table.rows
        ]
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "hfpp_version": plan.hfpp_version,
        "model": asdict(plan.model),
        "pp_size": plan.pp_size,
        "parallel": asdict(plan.parallel),
        "schedule": schedule,
        "n_microbatches": plan.n_microbatches,
        "microbatch_size": plan.microbatch_size,
        "seq_len": plan.seq_len,
        "offsets": list(plan.offsets),
        "recompute": plan.recompute,
        "prediction": None if plan.prediction is None else asdict(plan.prediction),
    }


def write_plan(plan: PipelinePlan, path: str | PathLike[str]) -> None:
    """Writes a plan as JSON; `read_plan` reads it back.

    Raises:
        PipelineConfigError: its table has more actions than a plan file may hold.
    """
    text = json.dumps(plan_as_json(plan), indent=1, allow_nan=False) + "\n"
    if len(text) > _LARGEST_FILE:
        raise PipelineConfigError(
            f"the plan's table {plan.schedule} takes {len(text) >> 20} MiB as JSON, and a plan "
            f"file has at most {_LARGEST_FILE >> 20} MiB: write the table as a CSV file instead"
        )
    Path(path).write_text(text, encoding="utf-8")


def read_plan(path: str | PathLike[str]) -> PipelinePlan:
    """Reads a plan that `write_plan` wrote, or somebody by hand; nothing unknown is ignored.

    Args:
        path: of the JSON file.

    Raises:
        FileNotFoundError: no such file.
        PipelineConfigError: no plan; the message has the file, and line and column where it is no
            JSON, or the path of the member that is wrong.
    """
    document = read_json_file(path, what="a plan file", largest=_LARGEST_FILE)
    if isinstance(document.value, dict) and document.value.get("format") != _FORMAT:
        raise PipelineConfigError(
            f'{document.at("format")} must be "{_FORMAT}": give a file that hfpp plan --out wrote'
        )
    optional = ("parallel", "recompute", "prediction")
    top = document.fields(
        (
            "format",
            "version",
            "hfpp_version",
            "model",
            "pp_size",
            "schedule",
            "n_microbatches",
            "microbatch_size",
            "seq_len",
            "offsets",
        ),
        optional=optional,
    )
    if type(top["version"].value) is not int or top["version"].value != _VERSION:
        top["version"].fail(f"must be {_VERSION}, the version that this hfpp reads: plan anew")
    given = document.value
    schedule, rows = _schedule(top["schedule"])
    parts: dict[str, Any] = {
        "hfpp_version": top["hfpp_version"].text(),
        "model": _model(top["model"]),
        "pp_size": top["pp_size"].integer(minimum=1, maximum=LARGEST_WORLD),
        "schedule": schedule["name"].text(),
        "stages_per_rank": schedule["stages_per_rank"].integer(minimum=1, maximum=LARGEST_COUNT),
        "n_microbatches": top["n_microbatches"].integer(minimum=1, maximum=LARGEST_COUNT),
        "microbatch_size": top["microbatch_size"].integer(minimum=1, maximum=LARGEST_COUNT),
        "seq_len": top["seq_len"].integer(minimum=1, maximum=LARGEST_COUNT),
        "offsets": tuple(o.integer() for o in top["offsets"].items(most=LARGEST_COUNT)),
    }
    if "parallel" in given:
        parts["parallel"] = _parallel(top["parallel"])
    if "recompute" in given:
        parts["recompute"] = cast("Recompute", top["recompute"].one_of(RECOMPUTE))
    if "prediction" in given:
        parts["prediction"] = top["prediction"].optional(_prediction)
    if rows is not None:
        parts["own_table"] = _table(rows, parts["schedule"])
    try:
        plan = PipelinePlan(**parts)
    except PipelineConfigError as error:
        raise PipelineConfigError(f"{document.at()}: {error}") from None
    if schedule["placement"].value != plan.placement.value:
        schedule["placement"].fail(f"must be {plan.placement.value!r}, as {plan.schedule} has it")
    return plan


def _schedule(value: JsonValue) -> tuple[Any, JsonValue | None]:
    members = value.fields(("name", "stages_per_rank", "placement"), optional=("rows",))
    return members, members["rows"] if "rows" in value.value else None


def _table(rows: JsonValue, name: str) -> ScheduleTable:
    actions: list[list[Action | None]] = []
    for row in rows.items(most=LARGEST_WORLD):
        if not isinstance(row.value, str):
            row.fail("must be a string of actions such as '0F0,0B0'")
        actions.append([])
        for column, text in enumerate(row.value.split(",")):
            try:
                actions[-1].append(parse_action(text))
            except PipelineConfigError as error:
                raise PipelineConfigError(f"{row.at()}, action {column}: {error}") from None
    return ScheduleTable.from_rows(name, actions)


def _model(value: JsonValue) -> ModelFingerprint:
    names = ("model_type", "num_layers", "hidden_size", "vocab_size", "parameters", "is_tied")
    member = value.fields(names)
    return ModelFingerprint(
        model_type=member["model_type"].text(),
        num_layers=member["num_layers"].integer(minimum=1, maximum=LARGEST_COUNT),
        hidden_size=member["hidden_size"].optional(_width),
        vocab_size=member["vocab_size"].optional(_width),
        parameters=member["parameters"].optional(lambda v: v.integer(minimum=1)),
        is_tied=member["is_tied"].optional(JsonValue.flag),
    )


def _width(value: JsonValue) -> int:
    return value.integer(minimum=1, maximum=LARGEST_WIDTH)


def _parallel(value: JsonValue) -> ParallelSizes:
    names = ("dp", "tp", "cp", "ep")
    member = value.fields(names)
    sizes = {name: member[name].integer(minimum=1, maximum=LARGEST_WORLD) for name in names}
    try:
        return ParallelSizes(**sizes)
    except PipelineConfigError as error:
        raise PipelineConfigError(f"{value.at()}: {error}") from None


def _prediction(value: JsonValue) -> Prediction:
    member = value.fields(
        ("time", "memory", "network", "idle_share", "tokens_per_second", "source")
    )
    if not 0 <= member["idle_share"].number() <= 1:
        member["idle_share"].fail("must be from 0 to 1")
    memory = member["memory"].items(most=LARGEST_WORLD)
    if not memory:
        member["memory"].fail("must have an entry per rank")
    return Prediction(
        time=TimeParts(**_numbers(member["time"], TimeParts)),
        memory=tuple(MemoryParts(**_integers(part, MemoryParts)) for part in memory),
        network=NetworkParts(**_integers(member["network"], NetworkParts)),
        idle_share=member["idle_share"].number(),
        tokens_per_second=member["tokens_per_second"].number(),
        source=member["source"].one_of(("analytic", "measured")),
    )


def _numbers(value: JsonValue, kind: type[TimeParts]) -> dict[str, float]:
    names = tuple(kind.__dataclass_fields__)
    member = value.fields(names)
    return {name: member[name].number() for name in names}


def _integers(value: JsonValue, kind: type[MemoryParts | NetworkParts]) -> dict[str, int]:
    names = tuple(kind.__dataclass_fields__)
    member = value.fields(names)
    return {name: member[name].integer() for name in names}
