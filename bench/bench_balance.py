"""Balanced partitions: time to find them, gap to a bound, and what they gain in real steps."""

import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import measure
import torch
import torch.distributed as dist
from measure import Target, seconds, take_turns
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(measure.ROOT))  # for the tests' processes and their sleeping model

from hfpp import causal_lm_loss, pipeline_model
from hfpp.plan.costs import ModelCosts
from hfpp.plan.partition import uniform_offsets
from hfpp.plan.partitioning.balance import balance_layers, balanced_partition
from hfpp.plan.placement import Placement
from hfpp.plan.schedules import compute_table, find_schedule
from hfpp.plan.schedules.simulator import simulate
from hfpp.profile.measure import profile_model
from tests.ranks import run_ranks
from tests.sleeping_model import VOCABULARY, SleepingModel, sleeping_costs

SCHEDULE = "1F1B"
MICROBATCHES = 8
MICROBATCH_SIZE, SEQ_LEN = 1, 128
ROUNDS = 15
PARTITIONS = ("uniform", "balanced")
SLEEPING = [0.02] * 12, 0.08  # the head is worth four layers
# The head is worth several layers: narrow layers and many words.
CONFIG = LlamaConfig(
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=4,
    vocab_size=32_000,
    use_cache=False,
)

NOTE = """\
The balancer finds contiguous partitions whose slowest rank is as fast as can be. Its times are
medians, and in brackets the 10th and 90th percentiles; the gap is between what was found and a
bound that no partition can be better than. Steps are those of real pipelines over gloo, the two
partitions in turns within one run; the first turn is not counted, and medians are compared. The
prediction is the simulator's, from costs that `hfpp profile` measures (two ranks that compute, each
on a core of its own, with one thread) or that are given (four ranks whose layers sleep). The C
library keeps the memory that was freed, as PyTorch does on a GPU: without that, first touches of
new pages for the logits take a tenth of a step and more, and vary."""

KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


# ---- the balancer


def chain_in_python(layers: Sequence[float], num_stages: int) -> tuple[float, list[int]]:
    """One stage per rank, by the textbook's recurrence: every stage, end and begin."""
    sums = [0.0]
    for layer in layers:
        sums.append(sums[-1] + layer)
    best, origins = list(sums), []
    for stage in range(1, num_stages):
        after, origin = [float("inf")] * len(sums), [0] * len(sums)
        for end in range(stage + 1, len(sums)):
            for begin in range(end - 1, stage - 1, -1):
                slowest = max(best[begin], sums[end] - sums[begin])
                if slowest < after[end]:
                    after[end], origin[end] = slowest, begin
                if sums[end] - sums[begin] >= after[end]:
                    break  # longer stages are slower still
        best = after
        origins.append(origin)
    offsets = [len(layers)]
    for origin in reversed(origins):
        offsets.append(origin[offsets[-1]])
    return best[-1], [0, *reversed(offsets)]


def layers_of(kind: str, count: int) -> list[float]:
    """Times as models have them, with an embedding and a heavy head; sums of them are exact."""
    draw = random.Random(count)
    layers = {
        "equal": [1.0] * count,
        "dense, then experts": [0.75] * 3 + [1.0] * (count - 3),
        "hybrid": [(1.75 if i % 8 == 4 else 1.0) + (0.5 if i % 2 else 0) for i in range(count)],
        "windows": [1.25 if i % 6 == 5 else 1.0 for i in range(count)],
        "measured one by one": [draw.randrange(900, 1100) / 1024 for _ in range(count)],
    }[kind]
    return [layers[0] + 0.25, *layers[1:-1], layers[-1] + 3.75]


KINDS = ("equal", "dense, then experts", "hybrid", "windows", "measured one by one")
LAYOUTS = ((64, 64, "loop"), (32, 64, "loop"), (32, 64, "v"), (16, 64, "loop"), (8, 64, "loop"))


def balancer_rows(count: int, targets: list[Target]) -> str:
    rows = []
    slowest_chain, widest_gap = 0.0, 0.0
    for kind in KINDS:
        layers = layers_of(kind, count)
        for ranks, stages, style in LAYOUTS:

            def call(
                layers: list[float] = layers, ranks: int = ranks, stages: int = stages,
                style: str = style,
            ):  # fmt: skip
                return balance_layers(
                    layers, pp_size=ranks, num_stages=stages, placement=Placement(style)
                )

            found = call()
            time_of = take_turns({"balance": call}, budget=0.5)["balance"]
            widest_gap = max(widest_gap, found.gap)
            if ranks == stages:
                slowest_chain = max(slowest_chain, time_of.median)
                assert found.slowest == chain_in_python(layers, stages)[0]
                assert found.proven_optimal
            rows.append(
                (
                    kind,
                    f"{ranks} ranks, {stages} stages, {style}",
                    str(time_of),
                    "optimal" if found.proven_optimal else f"{100 * found.gap:.2f} %",
                )
            )
    targets.append(
        Target(
            f"{count:,} layers x 64 stages, one per rank: optimal",
            "under 10 ms",
            seconds(slowest_chain),
            slowest_chain < 0.01,
        )
    )
    targets.append(
        Target(
            f"{count:,} layers x 64 stages, up to 8 per rank: gap to the bound",
            "1 % or less",
            f"{100 * widest_gap:.2f} %",
            widest_gap <= 0.01,
        )
    )
    return measure.table(("layers", "pipeline", "time", "gap to the bound"), rows)


def python_row() -> str:
    layers = layers_of("measured one by one", 1000)
    times = take_turns(
        {
            "native": lambda: balance_layers(layers, pp_size=64, num_stages=64),
            "Python": lambda: chain_in_python(layers, 64),
        }
    )
    ratio = measure.ratio(times["Python"], times["native"])
    rows = [(name, str(value)) for name, value in times.items()]
    body = measure.table(("competitor", "time"), rows)
    return f"{body}\n\nThe native one is {ratio:,.0f} times faster."


# ---- steps


def step_times(
    rank: int, world_size: int, make: Callable[[], nn.Module], costs: ModelCosts, vocabulary: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of every step with each partition, in turns; and this rank's CPU time of them."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "pp"))
    torch.manual_seed(0)
    ids = torch.randint(vocabulary, (MICROBATCHES * MICROBATCH_SIZE, SEQ_LEN))
    targets = ids.shape[0] * (SEQ_LEN - 1)
    pipelines = {
        name: pipeline_model(
            make(),
            mesh,
            None,
            pp_axis_name="pp",
            dp_axis_names=("dp",),
            layers_per_stage=None,
            pipeline_parallel_schedule_csv=None,
            pipeline_parallel_schedule=SCHEDULE,
            microbatch_size=MICROBATCH_SIZE,
            local_batch_size=ids.shape[0],
            device=torch.device("cpu"),
            loss_fn=lambda logits, labels: causal_lm_loss(logits, labels, num_items=targets),
            seq_len=SEQ_LEN,
            partition=name,
            costs=costs,
        )
        for name in PARTITIONS
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pipelines}
    for _ in range(1 + ROUNDS):
        for name, pipeline in pipelines.items():
            for part in pipeline.model_parts:
                part.zero_grad()
            dist.barrier()
            started, computed = time.perf_counter(), time.process_time()
            pipeline.schedule.step(
                *((ids,) if pipeline.has_first_stage else ()),
                target=ids if pipeline.has_last_stage else None,
                return_outputs=False,
            )
            computed = time.process_time() - computed
            dist.barrier()
            times[name].append((time.perf_counter() - started, computed))
    return {name: taken[1:] for name, taken in times.items()}


def large_vocabulary() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


def sleeping() -> nn.Module:
    return SleepingModel(*SLEEPING)


def profiled(rank: int, _world_size: int) -> ModelCosts:
    """The costs with as many processes at work as in the run: they share caches and memory."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    model = large_vocabulary()
    dist.barrier()
    return profile_model(
        model, microbatch_size=MICROBATCH_SIZE, seq_len=SEQ_LEN, loss_fn=loss, repeats=15
    )


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return causal_lm_loss(logits, labels)


def step_rows(targets: list[Target]) -> str:
    rows = []
    for title, ranks, make, costs, vocabulary in (
        (
            "2 ranks that compute",
            2,
            large_vocabulary,
            run_ranks(profiled, 2, timeout_s=600)[0],
            CONFIG.vocab_size,
        ),
        ("4 ranks that sleep", 4, sleeping, sleeping_costs(*SLEEPING), VOCABULARY),
    ):
        layers = len(costs.layers)
        cuts = {
            "uniform": uniform_offsets(ranks, layers).row(),
            "balanced": balanced_partition(costs, pp_size=ranks).offsets,
        }
        table = compute_table(find_schedule(SCHEDULE), pp_size=ranks, n_microbatches=MICROBATCHES)
        predicted = {
            name: simulate(table, costs.stages(offsets)).step_time for name, offsets in cuts.items()
        }
        arguments = (make, costs, vocabulary)
        by_rank = run_ranks(step_times, ranks, args=arguments, timeout_s=1200)
        taken = {name: [wall for wall, _ in by_rank[0][name]] for name in cuts}
        medians = {name: statistics.median(times) for name, times in taken.items()}
        busiest = {
            name: max(statistics.median(cpu for _, cpu in rank[name]) for rank in by_rank)
            for name in cuts
        }
        heads = costs.head.seconds / statistics.median(unit.seconds for unit in costs.layers)
        for name, offsets in cuts.items():
            counts = ", ".join(str(b - a) for a, b in itertools.pairwise(offsets))
            rows.append(
                (
                    f"{title}, head of {heads:.1f} layers",
                    f"{name}: {counts}",
                    seconds(predicted[name]),
                    f"{seconds(medians[name])} ({seconds(min(taken[name]))} to "
                    f"{seconds(max(taken[name]))})",
                    seconds(busiest[name]),
                )
            )
        gain = 1 - medians["balanced"] / medians["uniform"]
        expected = 1 - predicted["balanced"] / predicted["uniform"]
        targets.append(
            Target(
                f"{title}: faster steps than with the uniform partition",
                f"by {100 * 0.8 * expected:.1f} % (0.8 of the predicted {100 * expected:.1f} %)",
                f"{100 * gain:.1f} %",
                gain >= 0.8 * expected > 0,
            )
        )
    return measure.table(
        ("run", "layers per stage", "predicted", "measured", "CPU time of the busiest rank"), rows
    )


def main() -> int:
    os.environ.update(KEEP_FREED_MEMORY)  # for the ranks: the library reads it when they start
    targets: list[Target] = []
    groups = [
        ("1,000 layers", balancer_rows(1000, targets)),
        ("126 layers", balancer_rows_of_a_model()),
        ("1,000 layers on 64 ranks, against Python", python_row()),
        (f"Steps of {MICROBATCHES} microbatches, {SCHEDULE}", step_rows(targets)),
    ]
    sections = [
        "# Balanced partitions, measured",
        measure.provenance(["hfpp", "torch", "transformers"]),
        NOTE,
        measure.targets_table(targets),
        *(f"## {title}\n\n{body}" for title, body in groups),
    ]
    return measure.report("balance", "\n\n".join(sections), targets)


def balancer_rows_of_a_model() -> str:
    """As many layers as a large model has: for information, no promise."""
    rows = []
    for kind in KINDS:
        layers = layers_of(kind, 126)
        for ranks, per_rank, style in (
            (16, 1, "loop"),
            (16, 2, "loop"),
            (16, 2, "v"),
            (16, 3, "loop"),
        ):
            started = time.perf_counter()
            found = balance_layers(
                layers, pp_size=ranks, num_stages=ranks * per_rank, placement=Placement(style)
            )
            took = time.perf_counter() - started
            gap = "optimal" if found.proven_optimal else f"{100 * found.gap:.2f} %"
            rows.append((kind, f"{ranks} ranks x {per_rank}, {style}", seconds(took), gap))
    return measure.table(("layers", "pipeline", "time", "gap to the bound"), rows)


if __name__ == "__main__":
    sys.exit(main())
