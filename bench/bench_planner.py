"""The planner: how long it takes at scale, and how good its choice is against all plans, run."""

import json
import subprocess
import sys
import time

import measure
from measure import ROOT, Target

sys.path.insert(0, str(ROOT))  # for what the tests measure with

from tests.ranks import run_ranks
from tests.runtime.chosen_plans import (
    Job,
    Rounds,
    chosen_plan,
    every_plan,
    is_same,
    measured_costs,
    seconds_of_plans,
)

CONFIGS = ROOT / "tests" / "plan" / "configs"
LARGE = (
    ("llama-3.1-405b", ("--tp", "8")),
    ("deepseek-v3", ("--ep", "8", "--global-batch", "10240", "--seq-len", "4096")),
)
WITHIN = 1.15
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
COMPUTING = {
    "hidden_size": 320,
    "intermediate_size": 896,
    "num_attention_heads": 4,
    "vocab_size": 8_000,
}
JOBS = {
    "5 layers that sleep 3 ms and more, a head of two": Job(
        config={**TINY, "num_hidden_layers": 5}, seq_len=8, batch=8, sleeps=(0.001, 0.002)
    ),
    "5 layers that compute, a head of two": Job(
        config={**COMPUTING, "num_hidden_layers": 5}, seq_len=96, batch=8
    ),
}
NOTE = """\
Planning is the whole process, `hfpp plan CONFIG --gpus 10240`, its start included; memory is the \
most that it held.

The choice is that of the planner with costs from `hfpp profile`, measured on both of two gloo \
processes at once. All plans are then run by `pipeline_model(plan=...)`: every schedule with one \
or two stages per rank, microbatches of 1, 2 and 4 sequences, and every partition. They take \
turns; a plan's time is the least of its rounds, as what else the machine does can only slow it \
down. After the first rounds the fastest and the chosen run some more."""

_SCRIPT = """
import re, sys, time
from pathlib import Path
from hfpp.cli import main
start = time.perf_counter()
code = main(sys.argv[1:])
most = int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(most / 1024, time.process_time(), file=sys.stderr)
sys.exit(code)
"""


def scale_rows(targets: list[Target]) -> str:
    rows = []
    for name, options in LARGE:
        command = [sys.executable, "-c", _SCRIPT, "plan", str(CONFIGS / f"{name}.json")]
        command += ["--gpus", "10240", "--json", *options]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - start
        mib, cpu = map(float, done.stderr.split())
        best = json.loads(done.stdout)["plans"][0]
        plan = best["plan"]
        rows.append(
            (
                f"{name} {' '.join(options)}",
                f"{seconds:.1f} s",
                f"{cpu:.1f} s",
                f"{mib:.0f} MiB",
                f"{plan['schedule']['name']}, pp {plan['pp_size']} x "
                f"{plan['schedule']['stages_per_rank']}, recompute {plan['recompute']}",
                f"{best['step_time']:.1f} s, bubble {best['bubble']:.1%}",
            )
        )
        met = seconds < 10 and mib < 500
        measured = f"{seconds:.1f} s, {mib:.0f} MiB"
        targets.append(Target(f"plan {name} on 10,240 GPUs", "10 s, 500 MB", measured, met))
    header = ("model", "seconds", "of processor", "memory", "best plan", "predicted")
    return measure.table(header, rows)


def choice_rows(targets: list[Target]) -> str:
    rows = []
    for what, job in JOBS.items():
        costs = run_ranks(measured_costs, 2, args=(job,), timeout_s=600)[0]
        plans, choice = every_plan(job), chosen_plan(job, costs)
        chosen = next(index for index, plan in enumerate(plans) if is_same(plan, choice))
        first, seconds = run_ranks(
            seconds_of_plans,
            2,
            args=(job, plans, chosen, Rounds(all=3, last=20, finalists=8), 0.0),
            timeout_s=3000,
        )[0]
        best = min(range(len(plans)), key=seconds.__getitem__)
        ratio = seconds[chosen] / seconds[best]
        ranks = sorted(first)
        assert choice.prediction is not None
        rows.append(
            (
                what,
                str(len(plans)),
                f"{ranks[0]:.3f} to {ranks[-1]:.3f} s, median {ranks[len(ranks) // 2]:.3f} s",
                f"{choice.schedule}, microbatches of {choice.microbatch_size}, {choice.offsets}",
                f"{choice.prediction.step_time:.3f} s",
                f"{seconds[chosen]:.3f} s",
                f"{plans[best].schedule}, {plans[best].microbatch_size}, {plans[best].offsets}",
                f"{seconds[best]:.3f} s",
            )
        )
        targets.append(Target(f"choice, {what}", "within 15 %", f"{ratio - 1:.1%}", ratio < WITHIN))
    header = ("job", "plans", "all, run", "chosen", "predicted", "run", "best", "run")
    return measure.table(header, rows)


def main() -> int:
    targets: list[Target] = []
    groups = [
        ("Planning for 10,240 GPUs", scale_rows(targets)),
        ("The chosen plan against all", choice_rows(targets)),
    ]
    sections = [
        "# The planner, measured",
        measure.provenance(["hfpp", "torch", "transformers"]),
        NOTE,
        measure.targets_table(targets),
        *(f"## {title}\n\n{body}" for title, body in groups),
    ]
    return measure.report("planner", "\n\n".join(sections), targets)


if __name__ == "__main__":
    sys.exit(main())
