"""Splitting a model: CPU time and memory, against a copy of the model from which parts are cut."""

import argparse
import copy
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import measure
import torch
from forks import give_back_memory, in_a_fork, least_to_most
from measure import Target, Timing, seconds
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from hfpp.plan.partition import uniform_offsets
from hfpp.runtime.anatomy import Anatomy
from hfpp.runtime.find_anatomy import find_anatomy, forget_anatomies
from hfpp.runtime.ownership import find_ownership
from hfpp.runtime.split_model import build_stages

NUM_STAGES = 4
RANK_STAGE = 1  # the rank that is measured holds this one
ROUNDS = 7
MEMORY_ROUNDS = 3
MB = 1e6

SMALL = LlamaConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    vocab_size=64_000,
)
LARGE = LlamaConfig(
    hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16
)
META = {
    "Llama 70B, 80 layers, 16 stages": (
        LlamaForCausalLM,
        LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128_256,
        ),
    ),
    "DeepSeek-V3, 61 layers of 256 experts, 16 stages": (DeepseekV3ForCausalLM, DeepseekV3Config()),
}
META_STAGES = 16

NOTE = """\
CPU time is `time.process_time` with one thread: medians, and in brackets the least and the most.
The competitors take turns in one process, on one model, after one turn that is not counted. Memory
is the highest resident size above what the process had with the model alone, each run in a fork of
its own. The copy is what pipelines usually do for every stage of a rank: `copy.deepcopy` of the
whole model, then foreign layers, embedding, norm and head are cut out of it. Splitting on the meta
device is measured in forks of its own too, building the model not included."""


# ---- the competitors


def anatomy_and_split(model: nn.Module, stage_ids: list[int]) -> list[nn.Module]:
    """What hfpp does with a model that it has not seen."""
    forget_anatomies()
    return split(model, find_anatomy(model), stage_ids)


def split(
    model: nn.Module, anatomy: Anatomy, stage_ids: list[int], num_stages: int = NUM_STAGES
) -> list[nn.Module]:
    """What hfpp does once the anatomy is known."""
    offsets = uniform_offsets(num_stages, anatomy.num_layers).row()
    return build_stages(model, anatomy, find_ownership(model, anatomy, offsets), stage_ids)


def copy_and_prune(model: nn.Module, stage_ids: list[int]) -> list[nn.Module]:
    """One whole copy per stage, from which the foreign modules are cut."""
    offsets = uniform_offsets(NUM_STAGES, len(model.model.layers)).row()
    stages = []
    for stage in stage_ids:
        part = copy.deepcopy(model)
        kept = range(offsets[stage], offsets[stage + 1])
        layers = {str(i): layer for i, layer in enumerate(part.model.layers) if i in kept}
        part.model.layers = nn.ModuleDict(layers)
        if stage > 0:
            part.model.embed_tokens = None
        if stage < NUM_STAGES - 1:
            part.model.norm = part.lm_head = None
        stages.append(part)
    return stages


# ---- measuring


def cpu_times(competitors: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for round_number in range(rounds + 1):
        for name, call in competitors.items():
            give_back_memory()
            start = time.process_time()
            result = call()
            took = time.process_time() - start
            del result
            if round_number:
                times[name].append(took)
    return {name: least_to_most(values) for name, values in times.items()}


def extra_memory(call: Callable[[], list[nn.Module]]) -> float:
    """Bytes beyond the model while the stages are held: the median of some forks."""
    costs = [in_a_fork(lambda: None, lambda _: len(call())) for _ in range(MEMORY_ROUNDS)]
    return statistics.median(cost.extra for cost in costs)


# ---- the groups


def check(model: nn.Module, anatomy: Anatomy) -> None:
    """All competitors keep the same parameters; hfpp's are the model's own tensors."""
    everyone = list(range(NUM_STAGES))
    original = dict(model.named_parameters())
    parts = zip(split(model, anatomy, everyone), copy_and_prune(model, everyone), strict=True)
    for ours, theirs in parts:
        named = dict(ours.named_parameters())
        assert set(named) == {name for name, _ in theirs.named_parameters()}
        assert all(original[name] is parameter for name, parameter in named.items())


def weights_rows(config: LlamaConfig, rounds: int, targets: list[Target]) -> str:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    anatomy = find_anatomy(model)
    check(model, anatomy)
    one, all_of_them = [RANK_STAGE], list(range(NUM_STAGES))
    competitors: dict[str, Callable[[], list[nn.Module]]] = {
        "hfpp, anatomy and one stage": partial(anatomy_and_split, model, one),
        "hfpp, anatomy and all stages": partial(anatomy_and_split, model, all_of_them),
        "hfpp, known anatomy, one stage": partial(split, model, anatomy, one),
        "hfpp, known anatomy, all stages": partial(split, model, anatomy, all_of_them),
        "copy and prune, one stage": partial(copy_and_prune, model, one),
    }
    times = cpu_times(competitors, rounds)
    memory = {name: extra_memory(call) for name, call in competitors.items()}
    copied = times["copy and prune, one stage"]
    rows = [
        (
            name,
            str(times[name]),
            f"{copied.median / times[name].median:.3g}x",
            f"{memory[name] / MB:,.0f} MB",
        )
        for name in competitors
    ]
    label = f"{count / 1e9:.2f}B Llama"
    if config is SMALL:
        targets += _small_targets(label, times, memory)
    text = measure.table(("split", "CPU time", "faster than the copy", "memory"), rows)
    return f"{label}, fp32, {size / 1e9:.2f} GB, {NUM_STAGES} stages.\n\n{text}"


def _small_targets(label: str, times: dict[str, Timing], memory: dict[str, float]) -> list[Target]:
    targets = []
    for name, limit in (
        ("hfpp, anatomy and one stage", 1.0),
        ("hfpp, anatomy and all stages", 1.0),
        ("hfpp, known anatomy, one stage", 0.1),
        ("hfpp, known anatomy, all stages", 0.1),
    ):
        took = times[name].median
        promised = f"under {limit:g} s of CPU time"
        targets.append(Target(f"{label}: {name}", promised, seconds(took), took < limit))
    most = max(extra for name, extra in memory.items() if name.startswith("hfpp"))
    promised = "under 100 MB beyond the model"
    targets.append(
        Target(f"{label}: memory, every way", promised, f"{most / MB:.0f} MB", most < 100 * MB)
    )
    return targets


def meta_rows(targets: list[Target]) -> str:
    rows = []
    for name, (model_class, config) in META.items():

        def make(model_class: Any = model_class, config: Any = config) -> nn.Module:
            with torch.device("meta"):
                return model_class(config)

        def call(model: nn.Module) -> tuple[int, int]:
            everyone = list(range(META_STAGES))
            stages = split(model, find_anatomy(model), everyone, META_STAGES)
            kept = sum(p.numel() for stage in stages for p in stage.parameters())
            return sum(p.numel() for p in model.parameters()), kept

        costs = [in_a_fork(make, call) for _ in range(MEMORY_ROUNDS)]
        count, kept = costs[0].facts
        assert count == kept, (count, kept)
        cpu = least_to_most([cost.cpu for cost in costs])
        extra = statistics.median(cost.extra for cost in costs)
        peak = statistics.median(cost.peak for cost in costs)
        rows.append(
            (
                name,
                f"{count / 1e9:,.1f}B",
                str(cpu),
                f"{extra / MB:,.0f} MB",
                f"{peak / 1e9:.2f} GB",
            )
        )
        measured, met = seconds(cpu.median), cpu.median < 20
        targets.append(Target(f"meta device: {name}", "under 20 s of CPU time", measured, met))
    header = ("model", "parameters", "CPU time", "memory", "peak of the process")
    return measure.table(header, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write bench/results/split.md")
    parser.add_argument("--large", action="store_true", help="1.35B too: 11 GB, a minute more")
    given = parser.parse_args()
    sys.argv[1:] = ["--write"] if given.write else []  # what the report reads
    torch.set_num_threads(1)  # the clock counts all threads; and a fork has only one
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    targets: list[Target] = []
    # On meta first: the forks then have no weights to carry.
    meta = meta_rows(targets)
    groups = [("Weights in memory", weights_rows(SMALL, ROUNDS, targets))]
    if given.large:
        groups.append(("More weights in memory", weights_rows(LARGE, 3, targets)))
    groups.append((f"On the meta device: anatomy and all {META_STAGES} stages", meta))
    sections = [
        "# Splitting a model, measured",
        measure.provenance(["hfpp", "torch", "transformers"]),
        NOTE,
        measure.targets_table(targets),
        *(f"## {title}\n\n{body}" for title, body in groups),
    ]
    return measure.report("split", "\n\n".join(sections), targets)


if __name__ == "__main__":
    sys.exit(main())
