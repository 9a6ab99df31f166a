"""Models of real size are taken apart on the meta device in seconds and without their memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_SECONDS = 15  # of CPU time
MOST_BYTES = 1e9

MEASURE = """
import json, resource, sys, time
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM
from hfpp.runtime.find_anatomy import find_anatomy

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

llama = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, vocab_size=128_256,
)
found = []
for kind, config in ((LlamaForCausalLM, llama), (DeepseekV3ForCausalLM, DeepseekV3Config())):
    before = peak()
    with torch.device("meta"):
        first, second = kind(config), kind(config)
    times = []
    for model in (first, second):
        start = time.process_time()
        anatomy = find_anatomy(model)
        slots = [anatomy.slots(cut) for cut in range(1, anatomy.num_layers)]
        times.append(time.process_time() - start)
    found.append({
        "layers": anatomy.num_layers, "slots": [[s.shape for s in cut] for cut in slots],
        "parameters": sum(p.numel() for p in first.parameters()),
        "seconds": times, "bytes": peak() - before,
    })
json.dump(found, sys.stdout)
"""


def test_a_dense_model_of_70_billion_and_one_of_256_experts() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    llama, deepseek = json.loads(done.stdout)
    assert (llama["layers"], deepseek["layers"]) == (80, 61)
    assert llama["parameters"] > 70e9
    assert deepseek["parameters"] > 670e9
    for found, width in ((llama, 8192), (deepseek, 7168)):
        assert len(found["slots"]) == found["layers"] - 1
        assert all(len(cut) == 1 and cut[0][-1] == width for cut in found["slots"])
        made, again = found["seconds"]
        assert made < MOST_SECONDS
        assert again < made
        assert found["bytes"] < MOST_BYTES
