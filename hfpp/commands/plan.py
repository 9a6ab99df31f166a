"""`hfpp plan`: the best pipelines for a model on a cluster."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfpp.commands.option_values import as_options, columns, integer, integers, names
from hfpp.commands.output_files import check_outputs, writing
from hfpp.errors import PipelineConfigError
from hfpp.plan.pipeline_plan import RECOMPUTE
from hfpp.plan.schedules import SCHEDULES

if TYPE_CHECKING:
    from hfpp.plan.costs import ModelCosts
    from hfpp.plan.search.candidates import PlanRequest
    from hfpp.plan.search.cluster import Cluster
    from hfpp.plan.search.cost_sources import Measured
    from hfpp.plan.search.planner import RankedPlan

__all__ = ["add_to", "run"]

_DEFAULT = " (default: %(default)s)"  # argparse fills it in


def run(given: argparse.Namespace) -> int:
    """Finds the best plans, prints them and writes what was asked for."""
    from hfpp.plan.model.shape import ModelShape
    from hfpp.plan.search.planner import find_plans

    _check_files(given)
    try:
        cluster, measured = _cluster(given), _measured(given)
        request = _request(given, measured.dtype)
    except PipelineConfigError as error:
        raise PipelineConfigError(as_options(str(error), _OPTIONS)) from None
    shape = ModelShape.from_config(given.config, dtype=request.dtype)
    try:
        plans = find_plans(shape, cluster, request, measured=measured.costs)
    except PipelineConfigError as error:
        raise PipelineConfigError(as_options(str(error), _OPTIONS)) from None
    written = _write(given, plans, cluster)
    if given.json:
        sys.stdout.write(json.dumps(_as_json(plans, cluster, request), indent=1) + "\n")
    else:
        from hfpp.commands.plan_tables import print_plans

        print_plans(plans, shape, cluster, width=given.width)
    for path in written:
        sys.stderr.write(f"{path} written\n")
    return 0


def _check_files(given: argparse.Namespace) -> None:
    config = Path(given.config)
    check_outputs(
        {"--out": given.out, "--csv": given.csv, "--html": given.html},
        inputs=[config, config / "config.json", *(given.costs or ())],
    )


def _cluster(given: argparse.Namespace) -> Cluster:
    from hfpp.plan.estimates.hardware import find_hardware
    from hfpp.plan.search.cluster import Cluster
    from hfpp.plan.sizes import parse_bandwidth, parse_bytes, parse_flops

    changes: dict[str, Any] = {}
    if given.gpus_per_node is not None:
        changes["gpus_per_node"] = given.gpus_per_node
    if given.memory is not None:
        changes["memory_bytes"] = parse_bytes(given.memory, "memory")
    if given.flops is not None:
        changes["flops"] = float(parse_flops(given.flops, "flops"))
    for name in ("node_bandwidth", "network_bandwidth"):
        text = getattr(given, name)
        if text is not None:
            changes[name] = float(parse_bandwidth(text, name))
    return Cluster(gpus=given.gpus, hardware=replace(find_hardware(given.hardware), **changes))


def _request(given: argparse.Namespace, dtype: str | None) -> PlanRequest:
    from hfpp.plan.search.candidates import PlanRequest

    return PlanRequest(
        global_batch_size=given.global_batch,
        seq_len=given.seq_len,
        tp=given.tp,
        cp=given.cp,
        ep=given.ep,
        schedules=given.schedule,
        pp_sizes=given.pp,
        stages_per_rank=given.stages_per_rank,
        microbatch_sizes=given.microbatch_size,
        recompute=given.recompute,
        sharding=given.sharding,
        dtype=dtype,
        top=given.top,
    )


class _Measured(NamedTuple):
    """What was measured, and in which dtype; without files nothing, and the one asked for."""

    costs: Measured | None
    dtype: str | None


def _measured(given: argparse.Namespace) -> _Measured:
    """The costs of every file, by the size of microbatch that it says.

    Memory is counted in the dtype that times were measured in.
    """
    if given.costs is None:
        return _Measured(None, given.dtype)
    from hfpp.plan.costs_file import read_costs_file
    from hfpp.plan.estimates.workload import DTYPE_BYTES

    found: dict[int, ModelCosts] = {}
    files: dict[int, str] = {}
    dtype = given.dtype
    for path in given.costs:
        try:
            costs, about = read_costs_file(path)
        except (PipelineConfigError, FileNotFoundError) as error:
            raise PipelineConfigError(f"--costs: {error}") from None
        size, seq_len = about.get("microbatch_size"), about.get("seq_len")
        if type(size) is not int or seq_len != given.seq_len:
            raise PipelineConfigError(
                f"--costs ({path}) were measured with --microbatch-size {size} and --seq-len "
                f"{seq_len}, and not for sequences of --seq-len ({given.seq_len}): measure with "
                f"hfpp profile --seq-len {given.seq_len}"
            )
        if size in found:
            raise PipelineConfigError(
                f"--costs: {files[size]} and {path} are both of --microbatch-size {size}: give one "
                "of them"
            )
        measured = about.get("dtype", dtype)
        if dtype is None and measured is not None and measured not in list(DTYPE_BYTES):
            raise PipelineConfigError(
                f"--costs ({path}) were measured in dtype {measured!r}, which is none of "
                f"{', '.join(DTYPE_BYTES)}: measure with hfpp profile"
            )
        if dtype is not None and measured != dtype:
            raise PipelineConfigError(
                f"--costs ({path}) were measured in {measured}, and not in {dtype}: measure all "
                f"with hfpp profile --dtype {dtype}"
            )
        found[size], files[size], dtype = costs, path, measured
    return _Measured(found, dtype)


_OPTIONS = {
    "global_batch_size": "global-batch",
    "pp_sizes": "pp",
    "microbatch_sizes": "microbatch-size",
    **{
        name: name.replace("_", "-")
        for name in (
            "gpus",
            "gpus_per_node",
            "memory",
            "flops",
            "hardware",
            "node_bandwidth",
            "network_bandwidth",
            "seq_len",
            "tp",
            "cp",
            "ep",
            "pp",
            "schedule",
            "stages_per_rank",
            "microbatch_size",
            "recompute",
            "sharding",
            "dtype",
            "top",
        )
    },
}


def _as_json(plans: list[RankedPlan], cluster: Cluster, request: PlanRequest) -> dict[str, Any]:
    from hfpp.plan.plan_file import plan_as_json

    return {
        "cluster": asdict(cluster),
        "request": asdict(request),
        "plans": [
            {
                "plan": plan_as_json(ranked.plan),
                "step_time": ranked.prediction.step_time,
                "tokens_per_second": ranked.prediction.tokens_per_second,
                "bubble": ranked.prediction.time.bubble / ranked.prediction.step_time,
                "peak_memory": ranked.prediction.peak_memory.total,
                "network_bytes": ranked.prediction.network.total,
                "lost_by": ranked.lost_by,
            }
            for ranked in plans
        ],
    }


def _write(given: argparse.Namespace, plans: list[RankedPlan], cluster: Cluster) -> list[Path]:
    written = []
    if given.out is not None:
        from hfpp.plan.plan_file import write_plan

        with writing("--out", given.out):
            write_plan(plans[0].plan, given.out)
        written.append(given.out)
    if given.csv is not None:
        from hfpp.plan.schedules import write_csv

        with writing("--csv", given.csv):
            write_csv(plans[0].plan.table(), given.csv)
        written.append(given.csv)
    if given.html is not None:
        from hfpp.plan.render.plan_page import plan_page

        with writing("--html", given.html):
            given.html.write_text(plan_page(plans, cluster), encoding="utf-8")
        written.append(given.html)
    return written


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    plan = commands.add_parser(
        "plan",
        help="find the best pipelines for a model on a cluster",
        description=(
            "Searches pipeline size, virtual stages, schedule, microbatch size, recomputation and "
            "partition for the plans with most tokens per second that fit into memory. Nothing is "
            "run: costs follow from the model's config.json and the hardware, or from a file that "
            "hfpp profile wrote. Gradients are reduced after the last backward of each rank, while "
            "other ranks still compute, and are not hidden behind its own computations."
        ),
        allow_abbrev=False,
    )
    add = plan.add_argument
    add("config", metavar="CONFIG", help="a model's config.json, or a folder with one")
    cluster = plan.add_argument_group("cluster")
    cluster.add_argument(
        "--gpus", type=integer, metavar="N", required=True, help="devices of the whole job"
    )
    cluster.add_argument(
        "--hardware",
        metavar="NAME",
        default="H100",
        help=f"a known device: A100, H100, H200, B200{_DEFAULT}; what follows changes it",
    )
    for name, metavar, text in (
        ("memory", "SIZE", "of a device, such as 80GiB"),
        ("flops", "RATE", "peak of dense matrix products in bfloat16, such as 989e12"),
        ("node-bandwidth", "RATE", "of a device within its node, one way, such as 450GB/s"),
        ("network-bandwidth", "RATE", "of a device to other nodes, one way, such as 50GB/s"),
    ):
        cluster.add_argument(f"--{name}", metavar=metavar, help=text)
    cluster.add_argument("--gpus-per-node", type=integer, metavar="N", help="devices of a node")
    job = plan.add_argument_group("job")
    for name, default, text in (
        ("global-batch", 2048, "sequences of a step, over all replicas"),
        ("seq-len", 8192, "tokens of a sequence"),
        ("tp", 1, "ranks that share every matrix"),
        ("cp", 1, "ranks that share every sequence"),
        ("ep", 1, "ranks that share the experts, among the replicas"),
    ):
        job.add_argument(
            f"--{name}", type=integer, metavar="N", default=default, help=text + _DEFAULT
        )
    job.add_argument(
        "--sharding",
        choices=("none", "optimizer"),
        default="optimizer",
        help=f"whether replicas divide the optimizer's states among them{_DEFAULT}",
    )
    job.add_argument(
        "--dtype", metavar="NAME", help="of weights (default: the config's, or that of --costs)"
    )
    job.add_argument(
        "--costs",
        type=names,
        metavar="FILE[,FILE]",
        help="costs that hfpp profile measured on one such device, a file per microbatch size",
    )
    choices = plan.add_argument_group("choices, comma-separated (default: all that fit)")
    choices.add_argument(
        "--schedule", type=names, metavar="NAME", default=(), help=", ".join(SCHEDULES)
    )
    for name, text in (
        ("pp", "ranks of a pipeline"),
        ("stages-per-rank", "virtual stages"),
        ("microbatch-size", "sequences of a microbatch"),
    ):
        choices.add_argument(f"--{name}", type=integers, metavar="N", default=(), help=text)
    choices.add_argument(
        "--recompute", type=names, metavar="KIND", default=(), help=", ".join(RECOMPUTE)
    )
    output = plan.add_argument_group("output")
    output.add_argument(
        "--top", type=integer, metavar="N", default=10, help=f"plans to show{_DEFAULT}"
    )
    output.add_argument("--width", type=columns, metavar="COLUMNS", help="of the table")
    output.add_argument("--json", action="store_true", help="print JSON instead of a table")
    output.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the best plan as JSON, for pipeline_model(plan=...)",
    )
    output.add_argument(
        "--csv", type=Path, metavar="FILE", help="write its schedule in torch's format"
    )
    output.add_argument("--html", type=Path, metavar="FILE", help="write a page to look at")
