"""`hfpp show`: a schedule, a plan or a recorded run as a picture."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hfpp.commands.option_values import as_options, columns, integer, number
from hfpp.commands.output_files import check_outputs, writing
from hfpp.errors import PipelineConfigError

if TYPE_CHECKING:
    from hfpp.plan.render.subject import Costing

__all__ = ["add_to", "run"]

_MOST = 1e100  # of a time, so that a schedule of them takes a finite one
_MOST_BYTES = 1 << 50
_OPTIONS = {
    "pp_size": "pp",
    "n_microbatches": "microbatches",
    "stages_per_rank": "stages-per-rank",
}
_DEFAULT = " (default: %(default)s)"  # argparse fills it in


def run(given: argparse.Namespace) -> int:
    """Draws in the terminal, and into the files that were asked for."""
    from hfpp.commands.terminal import print_timelines
    from hfpp.plan.render.chrome_trace import Take, chrome_trace
    from hfpp.plan.render.subject import find_subject
    from hfpp.plan.render.svg import comparison_svg, timeline_svg

    inputs = [path for path in (given.what, given.against, given.costs) if path]
    check_outputs({"--svg": given.svg, "--trace": given.trace}, inputs=inputs)
    sizes = {"pp": given.pp, "microbatches": given.microbatches, "per_rank": given.stages_per_rank}
    try:
        subject = find_subject(given.what, **sizes)
    except PipelineConfigError as error:
        raise PipelineConfigError(as_options(str(error), _OPTIONS)) from None
    costing = _costing(given)
    if given.against is None:
        if given.step is not None and not subject.takes:
            raise PipelineConfigError(
                f"--step ({given.step}) chooses a step of a recorded run, and {given.what} is "
                "none: leave it out"
            )
        take = subject.take(costing, step=given.step)
        takes, name = [take], take.timeline.name
        picture = timeline_svg(take.timeline)
    else:
        comparison = subject.against(given.against, costing, step=given.step)
        plan = Take(comparison.planned, "planned", comparison.recorded.step)
        takes = [plan, comparison.recorded._replace(label="recorded", start=0.0)]
        name = comparison.planned.name
        picture = comparison_svg(comparison.planned, comparison.recorded.timeline)
    print_timelines(name, takes, width=given.width)
    if given.svg is not None:
        with writing("--svg", given.svg):
            given.svg.write_text(picture, encoding="utf-8")
        sys.stdout.write(f"{given.svg} written\n")
    if given.trace is not None:
        text = json.dumps(chrome_trace(takes), allow_nan=False, separators=(",", ":"))
        with writing("--trace", given.trace):
            given.trace.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{given.trace} written: open it in ui.perfetto.dev\n")
    return 0


def _costing(given: argparse.Namespace) -> Costing:
    from hfpp.plan.costs_file import read_costs_file
    from hfpp.plan.partitioning.grammar import parse_partition
    from hfpp.plan.render.subject import Costing
    from hfpp.plan.schedules.simulator import Link

    _check_numbers(given)
    if given.partition is not None and given.costs is None:
        raise PipelineConfigError(
            f"--partition ({given.partition}) says which layers of the model a stage has, but "
            "there is no model: give its --costs too"
        )
    measured = None
    if given.costs is not None:
        try:
            measured = read_costs_file(given.costs)
        except (PipelineConfigError, FileNotFoundError) as error:
            raise PipelineConfigError(f"--costs: {error}") from None
    return Costing(
        times=_times(given),
        model=None if measured is None else measured.costs,
        about={} if measured is None else measured.about,
        partition=None
        if given.partition is None
        else parse_partition(given.partition, argument="--partition"),
        link=Link(latency=given.latency, bandwidth=given.bandwidth),
        boundary_bytes=given.boundary_bytes,
        overlap=not given.no_overlap,
    )


def _check_numbers(given: argparse.Namespace) -> None:
    """Numbers of which a picture can be drawn; each is refused under its own option."""
    for name in ("forward", "backward", "weight", "latency"):
        value = getattr(given, name)
        if value is not None and not 0 <= value <= _MOST:  # nor is NaN
            raise PipelineConfigError(
                f"--{name} ({value}) must be a number from 0 to {_MOST:g}: use --{name} 1"
            )
    if not given.bandwidth >= 1 / _MOST:
        raise PipelineConfigError(
            f"--bandwidth ({given.bandwidth}) must be a number from {1 / _MOST:g}: leave it out "
            "where the size of messages does not matter"
        )
    size = given.boundary_bytes
    if size is not None and not 0 <= size <= _MOST_BYTES:
        shown = size if abs(size) < 1 << 64 else "a number of more than 64 bits"
        raise PipelineConfigError(
            f"--boundary-bytes ({shown}) must be an integer from 0 to {_MOST_BYTES}: leave it out "
            "where messages take no time"
        )


def _times(given: argparse.Namespace) -> tuple[float, float, float | None] | None:
    if given.forward is None and given.backward is None and given.weight is None:
        return None
    if given.costs is not None:
        raise PipelineConfigError(
            f"--costs ({given.costs}) has the times of every layer: leave out --forward, "
            "--backward and --weight"
        )
    forward = 1.0 if given.forward is None else given.forward
    backward = 2 * forward if given.backward is None else given.backward
    if given.weight is not None and given.weight > backward:
        raise PipelineConfigError(
            f"--weight ({given.weight}) must be at most --backward ({backward}), which it is a "
            "part of: leave it out for a half of it"
        )
    return forward, backward, given.weight


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    show = commands.add_parser(
        "show",
        help="draw a schedule, a plan or a recorded run",
        description=(
            "Draws what each rank of a pipeline does when: forwards, backwards, messages on their "
            "way, idle time, and how many activations each rank holds. In the terminal, with "
            "--svg as a picture, with --trace as a trace for ui.perfetto.dev or chrome://tracing. "
            "Without costs a forward takes 1, a backward 2, half of it for the weights' gradients, "
            "and messages no time."
        ),
        allow_abbrev=False,
    )
    add = show.add_argument
    add(
        "what",
        metavar="SCHEDULE",
        help="a schedule by name, a CSV file in torch's format, or a JSON file: a schedule, a plan "
        "of hfpp plan, or the trace of hfpp train --trace",
    )
    for name, text in (
        ("pp", "ranks, for a schedule by name (default: 4)"),
        ("microbatches", "microbatches, likewise (default: 8)"),
        ("stages-per-rank", "stages on each rank, likewise (default: the schedule's, or 2)"),
    ):
        add(f"--{name}", type=integer, metavar="N", help=text)
    for name, text in (
        ("forward", "time of a stage's forward (default: 1)"),
        ("backward", "time of a stage's backward (default: twice the forward)"),
        ("weight", "the part of it that makes the weights' gradients (default: half)"),
    ):
        add(f"--{name}", type=number, metavar="TIME", help=text)
    add(
        "--costs",
        type=Path,
        metavar="FILE",
        help="what the layers of a model cost, as hfpp profile writes it: times in seconds, sizes "
        "of messages, and live activations in bytes",
    )
    add(
        "--partition",
        metavar="PARTITION",
        help="which of these layers each stage has (default: the plan's own, else balanced)",
    )
    add(
        "--latency",
        type=number,
        metavar="TIME",
        default=0.0,
        help=f"of every message, in the unit of the costs{_DEFAULT}",
    )
    add(
        "--bandwidth",
        type=number,
        metavar="BYTES",
        default=math.inf,
        help=f"between two ranks, bytes per unit of time{_DEFAULT}",
    )
    add(
        "--boundary-bytes",
        type=integer,
        metavar="BYTES",
        help="of one microbatch that cross from stage to stage (default: as --costs has it, else "
        "0)",
    )
    add(
        "--no-overlap",
        action="store_true",
        help="a rank that sends or receives computes nothing meanwhile",
    )
    add(
        "--against",
        metavar="PLAN",
        nargs="?",
        const="",
        help="draw a recorded run under a plan: a schedule by name or a file, or if none is given "
        "the same computations with nothing in their way; without costs each takes the median of "
        "its recorded times",
    )
    add(
        "--step",
        type=integer,
        metavar="N",
        help="which step of a recorded run (default: the one whose time is the median)",
    )
    add("--svg", type=Path, metavar="FILE", help="draw into an SVG file too")
    add("--trace", type=Path, metavar="FILE", help="write a trace (JSON) too")
    add("--width", type=columns, metavar="COLUMNS", help="of the drawing (default: the terminal's)")
