"""Schedules as tables: made, lowered, read and written, verified, simulated."""

from hfpp.plan.schedules.actions import Action, ActionKind, ScheduleTable, parse_action
from hfpp.plan.schedules.lowering import lower
from hfpp.plan.schedules.named import (
    SCHEDULES,
    ScheduleSpec,
    check_microbatches,
    compute_table,
    find_schedule,
    forward_table,
    least_activation_limit,
    rank_actions,
)
from hfpp.plan.schedules.schedule_csv import read_csv, write_csv
from hfpp.plan.schedules.schedule_json import read_json, write_json
from hfpp.plan.schedules.simulator import Link, Simulation, simulate, uniform_costs
from hfpp.plan.schedules.verifier import peak_activations, verify

__all__ = [
    "SCHEDULES",
    "Action",
    "ActionKind",
    "Link",
    "ScheduleSpec",
    "ScheduleTable",
    "Simulation",
    "check_microbatches",
    "compute_table",
    "find_schedule",
    "forward_table",
    "least_activation_limit",
    "lower",
    "parse_action",
    "peak_activations",
    "rank_actions",
    "read_csv",
    "read_json",
    "simulate",
    "uniform_costs",
    "verify",
    "write_csv",
    "write_json",
]
