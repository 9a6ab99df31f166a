"""Predicted memory of a model of half a billion parameters against the live bytes of real runs."""

import sys
from pathlib import Path

import measure
from measure import ROOT, Target

sys.path.insert(0, str(ROOT))  # for what the tests measure with

from tests.ranks import run_ranks
from tests.runtime.measured_memory import Case, measure_all, predict

WITHIN = 0.10
QWEN2_HALF_BILLION = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "use_cache": False,
}
SIZES = {"dtype": "float32", "rows": 1, "seq_len": 64, "n_microbatches": 4}
CASES = (
    Case("qwen2", QWEN2_HALF_BILLION, "1F1B", (0, 15, 24), **SIZES),
    Case("qwen2", QWEN2_HALF_BILLION, "Interleaved1F1B", (0, 7, 14, 20, 24), **SIZES),
    Case("qwen2", QWEN2_HALF_BILLION, "ZBVZeroBubble", (0, 5, 12, 19, 24), **SIZES),
)
NOTE = """\
Two gloo ranks, float32, microbatches of one sequence of 64 tokens, four per step, uneven
partitions. Live bytes are counted in the second step: every storage that an operation makes until
it is freed, beside parameters, gradients and receive buffers. Optimizer states are left out."""


def mb(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def main() -> int:
    rows, targets = [], []
    for case in CASES:
        ranks = run_ranks(measure_all, case.pp_size, args=((case,),), timeout_s=900)
        worst = 0.0
        for rank, ((real, stages),) in enumerate(ranks):
            found = predict(case, rank, stages, case.schedule)
            moving = found.activations + found.logits + found.receive_buffers
            counted = real.activations + real.receive_buffers
            off = moving / counted - 1
            total = found.total / real.total - 1
            exact = (found.parameters, found.gradients) == (real.parameters, real.gradients)
            worst = max(worst, abs(off), abs(total), 0.0 if exact else 1.0)
            rows.append(
                (
                    f"{case.schedule}, rank {rank}",
                    mb(real.parameters),
                    mb(real.gradients),
                    "yes" if exact else "NO",
                    mb(counted),
                    mb(moving),
                    f"{off:+.1%}",
                    f"{total:+.1%}",
                )
            )
        name = f"memory under {case.schedule}"
        targets.append(Target(name, "within 10 %", f"{worst:.1%} at worst", worst <= WITHIN))
    header = (
        "run",
        "parameters, MB",
        "gradients, MB",
        "predicted exactly",
        "live besides, MB",
        "predicted, MB",
        "off",
        "whole off",
    )
    text = "\n\n".join(
        (
            "# Memory, predicted and counted",
            measure.provenance(("torch", "transformers")),
            NOTE,
            measure.table(header, rows),
            measure.targets_table(targets),
        )
    )
    return measure.report(Path(__file__).stem.removeprefix("bench_"), text, targets)


if __name__ == "__main__":
    raise SystemExit(main())
