"""A stage's forward and backward against its layers run bare: what the hollow parts cost."""

import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import measure
import torch
from measure import Target
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

from hfpp.plan.partition import uniform_offsets
from hfpp.runtime.find_anatomy import find_anatomy
from hfpp.runtime.ownership import find_ownership
from hfpp.runtime.split_model import build_stages

NUM_STAGES = 4
STAGE = 1  # hollow layers before and after its own


class Case(NamedTuple):
    """A model and the microbatch that one of its stages gets."""

    config: LlamaConfig
    batch: int
    seq: int
    rounds: int


CASES = (
    Case(
        LlamaConfig(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=24,
            num_attention_heads=16,
            vocab_size=8192,
            attn_implementation="sdpa",
        ),
        batch=1,
        seq=512,
        rounds=15,
    ),
    # So little work per layer that what is fixed shows.
    Case(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=96,
            num_attention_heads=4,
            attn_implementation="sdpa",
        ),
        batch=1,
        seq=16,
        rounds=101,
    ),
)

NOTE = """\
One step is a forward and a backward on the hidden states of one microbatch, fp32, one thread, CPU
time. Bare is a loop over the stage's own layers, after the mask and the rotary embedding, which
every stage has to compute. Both take turns; each round gives one difference and one ratio, of which
the table has the medians, and in brackets the 10th and 90th percentiles. Outputs and gradients of
both are equal to the last bit."""


class Paired(NamedTuple):
    """Rounds of two competitors, in seconds of CPU time."""

    stage: list[float]
    bare: list[float]

    @property
    def ratio(self) -> measure.Timing:
        return measure.timing([s / b for s, b in zip(*self, strict=True)])

    @property
    def difference(self) -> float:
        return statistics.median(s - b for s, b in zip(*self, strict=True))


def make_both(
    config: LlamaConfig,
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], nn.Module]:
    """A stage as hfpp makes it, its layers bare, and the stage's module for its gradients."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    anatomy = find_anatomy(model)
    offsets = uniform_offsets(NUM_STAGES, anatomy.num_layers).row()
    ownership = find_ownership(model, anatomy, offsets)
    stage = build_stages(model, anatomy, ownership, [STAGE])[0]
    layers = model.model.layers[offsets[STAGE] : offsets[STAGE + 1]]
    rotary = model.model.rotary_emb

    def run_stage(hidden: Tensor) -> Tensor:
        result = stage(hidden)
        return result[0] if isinstance(result, tuple) else result

    def run_bare(hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1])[None]
        mask = create_causal_mask(
            config=config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        cos_sin = rotary(hidden, position_ids=positions)
        for layer in layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=cos_sin,
                position_ids=positions,
                past_key_values=None,
                use_cache=False,
            )
        return hidden

    return run_stage, run_bare, stage


def step(
    forward: Callable[[Tensor], Tensor], module: nn.Module, hidden: Tensor, gradient: Tensor
) -> tuple[float, list[Tensor]]:
    """CPU seconds of a forward and a backward; then the output and all gradients."""
    module.zero_grad(set_to_none=True)
    leaf = hidden.clone().requires_grad_()
    gc.collect()
    start = time.process_time()
    output = forward(leaf)
    output.backward(gradient)
    took = time.process_time() - start
    assert leaf.grad is not None
    found = [p.grad for p in module.parameters() if p.grad is not None]
    return took, [output.detach(), leaf.grad, *found]


def compare(case: Case) -> Paired:
    """The competitors in turns, who goes first changing with every round."""
    run_stage, run_bare, module = make_both(case.config)
    hidden, gradient = torch.randn(2, case.batch, case.seq, case.config.hidden_size)
    ours = step(run_stage, module, hidden, gradient)[1]
    theirs = step(run_bare, module, hidden, gradient)[1]
    assert len(ours) == len(theirs) > 2
    assert all(map(torch.equal, ours, theirs))
    paired = Paired([], [])
    for number in range(case.rounds):
        competitors = [(run_stage, paired.stage), (run_bare, paired.bare)]
        for forward, times in competitors[:: 1 if number % 2 else -1]:
            times.append(step(forward, module, hidden, gradient)[0])
    return paired


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    targets: list[Target] = []
    rows = []
    for case in CASES:
        paired, config = compare(case), case.config
        own = config.num_hidden_layers // NUM_STAGES
        hollow = config.num_hidden_layers - own
        ratio = paired.ratio
        rows.append(
            (
                f"{own} layers and {hollow} hollow, [{case.batch}, {case.seq}, "
                f"{config.hidden_size}]",
                str(measure.timing(paired.stage)),
                str(measure.timing(paired.bare)),
                f"{1e3 * paired.difference:+.2f} ms",
                f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
            )
        )
        if case is CASES[0]:
            measured = f"{100 * (ratio.median - 1):+.1f} %"
            what = f"hollow parts of a stage, width {config.hidden_size}"
            targets.append(Target(what, "within 3 % of bare layers", measured, ratio.median < 1.03))
    sections = [
        "# A stage's forward and backward, measured",
        measure.provenance(["hfpp", "torch", "transformers"]),
        NOTE,
        measure.targets_table(targets),
        measure.table(
            ("stage and microbatch", "stage", "bare layers", "difference", "ratio"), rows
        ),
    ]
    return measure.report("forward", "\n\n".join(sections), targets)


if __name__ == "__main__":
    sys.exit(main())
