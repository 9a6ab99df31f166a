"""A page about plans: one HTML file that loads nothing from outside."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from hfpp.plan.render import schedule_html
from hfpp.plan.render.page_bars import Bar, legend, partition_picture, stacked_bars
from hfpp.plan.sizes import (
    bytes_as_text,
    count_as_text,
    parameters_as_text,
    seconds_as_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hfpp.plan.pipeline_plan import PipelinePlan
    from hfpp.plan.search.cluster import Cluster
    from hfpp.plan.search.planner import RankedPlan

__all__ = ["plan_page"]

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#222;background:#fff;max-width:1060px;
 margin:2em auto;padding:0 1em}
h1{font-size:1.5em;margin-bottom:.2em}h2{font-size:1.15em;margin:1.8em 0 .4em}
p{margin:.4em 0}table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.25em .7em;text-align:right;border-bottom:1px solid #e2e2e2;white-space:nowrap}
th:nth-child(2),td:nth-child(2){text-align:left}tr.plan td{border-bottom:0;padding-top:.5em}
td.why{text-align:left;color:#666;padding-top:0}tr.best td{background:#eef5ea}
.wide{overflow-x:auto}.key{margin-right:1.2em;font-size:13px;white-space:nowrap}
.key i{display:inline-block;width:.9em;height:.9em;margin-right:.4em;vertical-align:-1px}
.quiet{color:#666;font-size:13px}
"""


def plan_page(plans: Sequence[RankedPlan], cluster: Cluster) -> str:
    """The page.

    Args:
        plans: best first.
        cluster: the devices.

    Returns:
        An HTML document with the plans, what their time and memory are made of, and the schedule
        and the partition of the best.
    """
    best, hardware = plans[0], cluster.hardware
    plan, figures = best.plan, best.prediction
    model, sizes = plan.model, plan.parallel
    parameters = (
        "" if model.parameters is None else f"{parameters_as_text(model.parameters)} parameters, "
    )
    title = f"{model.model_type or 'model'} on {cluster.gpus} x {hardware.name}"
    return "".join(
        (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n",
            f"<h1>{escape(title)}</h1>\n",
            f"<p>{parameters}{model.num_layers} layers; batch {plan.global_batch_size} x "
            f"{plan.seq_len} tokens; tp {sizes.tp}, cp {sizes.cp}, ep {sizes.ep}; "
            f"{bytes_as_text(hardware.memory_bytes)} per device; costs {figures.source}.</p>\n",
            f"<p><b>{escape(_words(plan))}</b>: {seconds_as_text(figures.step_time)} per step, "
            f"{count_as_text(figures.tokens_per_second)} tokens per second, at most "
            f"{bytes_as_text(figures.peak_memory.total)} of memory.</p>\n",
            f'<h2>Plans</h2>\n<div class="wide">{_table(plans)}</div>\n',
            f"<h2>What a step is made of</h2>\n{_times(plans)}\n",
            f"<h2>What fills the fullest rank</h2>\n{_memories(plans, cluster)}\n",
            f"<h2>Memory of every rank of the best plan</h2>\n{_ranks(best, cluster)}\n",
            f"<h2>Its partition</h2>\n{_partition(best)}\n",
            f"<h2>Its schedule</h2>\n{_schedule(best)}\n",
            f'<p class="quiet">Made by hfpp {escape(plan.hfpp_version)}. Nothing here was run.'
            "</p>\n</body></html>\n",
        )
    )


def _words(plan: PipelinePlan) -> str:
    stages = "1 stage" if plan.stages_per_rank == 1 else f"{plan.stages_per_rank} stages"
    return (
        f"{plan.schedule}, {plan.pp_size} ranks with {stages} each, {plan.parallel.dp} replicas, "
        f"{plan.n_microbatches} microbatches of {plan.microbatch_size}, recompute {plan.recompute}"
    )


def _table(plans: Sequence[RankedPlan]) -> str:
    heads = ["", "schedule", "pp", "stages", "dp", "microbatches", "recompute", "step", "bubble"]
    heads += ["tokens/s", "memory", "sent"]
    rows = [f"<tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>\n"]
    for place, ranked in enumerate(plans, start=1):
        plan, figures = ranked.plan, ranked.prediction
        cells = (
            place,
            plan.schedule,
            plan.pp_size,
            plan.stages_per_rank,
            plan.parallel.dp,
            f"{plan.n_microbatches} x {plan.microbatch_size}",
            plan.recompute,
            seconds_as_text(figures.step_time),
            f"{figures.time.bubble / figures.step_time:.1%}",
            count_as_text(figures.tokens_per_second),
            bytes_as_text(figures.peak_memory.total),
            bytes_as_text(figures.network.total),
        )
        kind = "plan" if ranked.lost_by else "best"
        rows.append(f'<tr class="{kind}">')
        rows += (f"<td>{escape(str(cell))}</td>" for cell in cells)
        rows.append("</tr>\n")
        if ranked.lost_by:
            why = f'<td class="why" colspan="{len(heads) - 1}">{escape(ranked.lost_by)}</td>'
            rows.append(f'<tr><td class="why"></td>{why}</tr>\n')
    return f"<table>{''.join(rows)}</table>"


def _label(place: int, ranked: RankedPlan) -> str:
    plan = ranked.plan
    return f"{place} {plan.schedule} {plan.pp_size} x {plan.stages_per_rank}"


def _named(parts: Iterable[str]) -> list[str]:
    return [name.replace("_", " ") for name in parts]


def _times(plans: Sequence[RankedPlan]) -> str:
    bars = [
        Bar(_label(place, ranked), ranked.prediction.time.parts())
        for place, ranked in enumerate(plans, start=1)
    ]
    return f"<p>{legend(_named(bars[0].parts))}</p>{stacked_bars(bars, seconds_as_text)}"


def _memories(plans: Sequence[RankedPlan], cluster: Cluster) -> str:
    bars = [
        Bar(_label(place, ranked), ranked.prediction.peak_memory.parts())
        for place, ranked in enumerate(plans, start=1)
    ]
    picture = stacked_bars(bars, bytes_as_text, limit=cluster.hardware.memory_bytes)
    return f"<p>{legend(_named(bars[0].parts))}</p>{picture}"


def _ranks(best: RankedPlan, cluster: Cluster) -> str:
    bars = [
        Bar(f"rank {rank}", memory.parts()) for rank, memory in enumerate(best.prediction.memory)
    ]
    return stacked_bars(bars, bytes_as_text, limit=cluster.hardware.memory_bytes)


def _partition(best: RankedPlan) -> str:
    plan = best.plan
    ranks = []
    for rank in range(plan.pp_size):
        own = plan.of_rank(rank)
        ranks.append(
            [
                (stage, layers, best.stages[stage].seconds)
                for stage, layers in zip(own.stages, own.layers, strict=True)
            ]
        )
    picture = partition_picture(ranks, ends=("embedding", "head"), num_layers=plan.model.num_layers)
    return (
        "<p class=quiet>A row per rank; boxes are its stages, as long as they compute for one "
        f"microbatch, with their numbers of layers.</p>{picture}"
    )


def _schedule(best: RankedPlan) -> str:
    return schedule_html(
        best.plan.table(), costs=best.stages, link=best.link, boundary_bytes=best.boundary_bytes
    )
