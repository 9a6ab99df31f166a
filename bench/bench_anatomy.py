"""The anatomy of large models on the meta device: CPU time and memory, and found again."""

import logging
import statistics
import sys
import time
import warnings
from typing import Any, NamedTuple

import measure
import torch
from forks import in_a_fork, least_to_most
from measure import Target, seconds
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hfpp.runtime.anatomy import Anatomy
from hfpp.runtime.find_anatomy import find_anatomy

ROUNDS = 3
LIMIT_SECONDS, LIMIT_BYTES = 15, 1e9
MB = 1e6


class Expert(nn.Module):
    """A gated feed-forward layer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class ExpertList(nn.Module):
    """A layer that calls each of its experts in a loop, as code before fused experts does."""

    def __init__(self, width: int, inner: int, experts: int, top: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(experts))
        self.top = top

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden).flatten(0, -2)
        weights, chosen = self.router(x).softmax(-1).topk(self.top)
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            total.index_add_(0, token, expert(x[token]) * weights[token, place, None])
        return hidden + total.view(hidden.shape)


class LoopedExperts(nn.Module):
    """61 layers of 256 expert modules in plain torch: 47,000 parameters, none of them fused."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        width, layers = config["width"], config["layers"]
        self.tokens = nn.Embedding(config["vocab"], width)
        self.layers = nn.ModuleList(
            ExpertList(width, config["inner"], config["experts"], config["top"])
            for _ in range(layers)
        )
        self.head = nn.Linear(width, config["vocab"], bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


class Case(NamedTuple):
    """A model to take apart, and whether a promise is made for it."""

    name: str
    model_class: Any
    config: Any
    promised: bool
    rounds: int = ROUNDS


def llama(width: int, inner: int, layers: int, heads: int) -> LlamaConfig:
    """A Llama 3 of some size."""
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128_256,
    )


CASES = (
    Case("Llama 70B, 80 layers", LlamaForCausalLM, llama(8192, 28672, 80, 64), True),
    Case("Llama 405B, 126 layers", LlamaForCausalLM, llama(16384, 53248, 126, 128), False),
    Case("DeepSeek-V3, 61 layers of 256 experts", DeepseekV3ForCausalLM, DeepseekV3Config(), True),
    Case(
        "Qwen3 MoE, 61 layers of 256 experts",
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            hidden_size=4096,
            intermediate_size=12288,
            moe_intermediate_size=1536,
            num_hidden_layers=61,
            num_attention_heads=64,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=256,
            num_experts_per_tok=8,
            vocab_size=151_936,
        ),
        True,
    ),
    Case(
        "1T MoE, 61 layers of 384 experts",
        DeepseekV3ForCausalLM,
        DeepseekV3Config(
            vocab_size=163_840,
            n_routed_experts=384,
            num_attention_heads=64,
            num_key_value_heads=64,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        False,
    ),
    Case(
        "plain torch, 61 layers that loop over 256 expert modules",
        LoopedExperts,
        {"width": 7168, "inner": 2048, "layers": 61, "experts": 256, "top": 8, "vocab": 129_280},
        False,
        rounds=1,
    ),
)

NOTE = """\
The anatomy and what crosses all cuts, of models on the meta device, whose making is not included.
CPU time is `time.process_time` with one thread: medians, and in brackets the least and the most.
Every run is a fork of one process that has imported torch and transformers. Cold is the first
anatomy of such a process, and memory its highest resident size above that with the model alone.
Hot is the next, of a model of other vocabulary; again is one more of the first config, whose
anatomy is found and not made. An anatomy of too many nodes is not kept, and made again."""


def make(case: Case, **changes: Any) -> nn.Module:
    """The model of a case on the meta device."""
    config = case.config
    if changes:
        plain = config if isinstance(config, dict) else config.to_dict()
        merged = {**plain, **changes}
        config = merged if isinstance(config, dict) else type(config)(**merged)
    with torch.device("meta"):
        return case.model_class(config)  # type: ignore[no-any-return]


def anatomy_of(model: nn.Module) -> tuple[Anatomy, int]:
    """The anatomy, and how many values cross all cuts."""
    anatomy = find_anatomy(model)
    return anatomy, sum(len(anatomy.slots(cut)) for cut in range(1, anatomy.num_layers))


class Facts(NamedTuple):
    """Seconds of CPU time, and sizes."""

    cold: float
    hot: float
    again: float
    parameters: int
    nodes: int


def cold(model: nn.Module) -> Facts:
    """The first anatomy in this process."""
    start = time.process_time()
    anatomy, crossing = anatomy_of(model)
    took = time.process_time() - start
    assert crossing >= anatomy.num_layers - 1
    parameters = sum(p.numel() for p in model.parameters())
    return Facts(took, 0.0, 0.0, parameters, anatomy.size())


def all_three(case: Case, model: nn.Module) -> Facts:
    """The first, one of another config, and the first config's again."""
    first = cold(model)
    name = "vocab" if isinstance(case.config, dict) else "vocab_size"
    vocab = case.config["vocab"] if isinstance(case.config, dict) else case.config.vocab_size
    times = []
    for other in (make(case, **{name: vocab + 64}), make(case)):
        start = time.process_time()
        anatomy_of(other)
        times.append(time.process_time() - start)
    return first._replace(hot=times[0], again=times[1])


def rows(targets: list[Target]) -> str:
    """One row per case; every run in a fork."""
    table = []
    for case in CASES:
        costs = [in_a_fork(lambda c=case: make(c), cold) for _ in range(case.rounds)]
        facts = [
            in_a_fork(lambda c=case: make(c), lambda m, c=case: all_three(c, m)).facts
            for _ in range(case.rounds)
        ]
        first = least_to_most([cost.facts.cold for cost in costs])
        memory = statistics.median(cost.extra for cost in costs)
        table.append(
            (
                case.name,
                f"{facts[0].parameters / 1e9:,.1f}B",
                str(first),
                str(least_to_most([f.hot for f in facts])),
                str(least_to_most([f.again for f in facts])),
                f"{memory / MB:,.0f} MB",
                f"{facts[0].nodes:,}",
            )
        )
        if case.promised:
            met = first.median < LIMIT_SECONDS and memory < LIMIT_BYTES
            measured = f"{seconds(first.median)}, {memory / MB:,.0f} MB"
            targets.append(Target(case.name, "under 15 s and 1 GB", measured, met))
    header = ("model", "parameters", "cold", "hot", "again", "memory", "nodes and modules")
    return measure.table(header, table)


def main() -> int:
    torch.set_num_threads(1)  # the clock counts all threads; and a fork has only one
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    targets: list[Target] = []
    body = rows(targets)
    sections = [
        "# The anatomy of large models, measured",
        measure.provenance(["hfpp", "torch", "transformers"]),
        NOTE,
        measure.targets_table(targets),
        body,
    ]
    return measure.report("anatomy", "\n\n".join(sections), targets)


if __name__ == "__main__":
    sys.exit(main())
