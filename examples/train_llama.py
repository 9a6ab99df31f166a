"""Train a small Llama on English prose, with a new sequence length at every step.

    torchrun --nproc-per-node 2 examples/train_llama.py

Every rank of the job is a rank of the pipeline. The input embedding and the head are tied: they lie
on different ranks, and their gradients are summed by every step.
"""

import argparse
import os
import random
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import hfpp

BATCH, MICROBATCH = 8, 1
LENGTHS = (64, 96, 128)
LEARNING_RATE = 2e-3


def make_config() -> LlamaConfig:
    """Eight layers over bytes, embedding and head tied."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )


def load_text() -> torch.Tensor:
    """The prose of Python's own documentation as bytes, int64 [length]."""
    return torch.tensor(list("\n\n".join(topics[name] for name in sorted(topics)).encode()))


def get_batch(text: torch.Tensor, step: int) -> torch.Tensor:
    """Bytes of the text, int64 [BATCH, length]: the same on every rank."""
    draw = random.Random(step)
    length = draw.choice(LENGTHS)
    starts = [draw.randrange(len(text) - length) for _ in range(BATCH)]
    return torch.stack([text[start : start + length] for start in starts])


def mean_over_ranks(losses: list[torch.Tensor], device: torch.device) -> float:
    """The sum of the microbatches' losses, on every rank; only the last stage's rank has some."""
    total = torch.zeros((), device=device)
    for loss in losses:
        total += loss.detach()
    dist.all_reduce(total)
    return total.item() / (BATCH // MICROBATCH)


def main() -> None:
    """One rank's part of the training."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--schedule", default="Interleaved1F1B")
    given = parser.parse_args()

    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("pp",))

    torch.manual_seed(0)  # the same model on every rank
    config = make_config()
    model = LlamaForCausalLM(config)
    schedule, parts, has_first, has_last, stages = hfpp.pipeline_model(
        model,
        mesh,
        None,
        pp_axis_name="pp",
        dp_axis_names=(),
        layers_per_stage=None,
        pipeline_parallel_schedule_csv=None,
        pipeline_parallel_schedule=given.schedule,
        microbatch_size=MICROBATCH,
        local_batch_size=BATCH,
        device=device,
        loss_fn=hfpp.causal_lm_loss,
        parallelize_fn=lambda part, *_, **__: part.to(device),
        scale_grads=True,
        seq_len=LENGTHS[0],
    )
    del model  # frees the weights that this rank does not own
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)

    text = load_text()
    length = LENGTHS[0]
    for step in range(given.steps):
        ids = get_batch(text, step).to(device)
        if ids.shape[1] != length:
            length = ids.shape[1]
            hfpp.reset_pp_stage_shapes(schedule, stages, config, MICROBATCH, seq_len=length)
        inputs = (ids,) if has_first else ()
        losses: list[torch.Tensor] = []
        target = ids if has_last else None
        schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        norm = hfpp.clip_grad_norm_(parts, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = mean_over_ranks(losses, device)
        if dist.get_rank() == 0:
            print(f"step {step + 1:2d}, length {length:3d}: loss {loss:.4f}, norm {norm:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
