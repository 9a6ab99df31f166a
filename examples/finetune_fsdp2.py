"""Finetune over a pipeline of two ranks whose stages are sharded with FSDP2, and save the model.

    torchrun --nproc-per-node 4 examples/finetune_fsdp2.py --out checkpoint

`--model FOLDER` takes a local Hugging Face checkpoint; without it a small Qwen3 is made. The
checkpoint (torch.distributed.checkpoint) holds the unsplit model's names: the plain model loads it.
"""

import argparse
import os
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import hfpp

PP, BATCH, MICROBATCH, LENGTH = 2, 8, 1, 64


def load_model(folder: Path | None) -> PreTrainedModel:
    """The checkpoint of a local folder, or a small model with tied embeddings."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=True,
        )
    )


def shard(
    part: nn.Module,
    world_mesh: DeviceMesh,
    moe_mesh: DeviceMesh | None,
    *,
    dp_axis_names: tuple[str, ...],
    **other_axes: object,
) -> None:
    """Shards a stage over its replicas: its own layers one by one, then what is left."""
    mesh = world_mesh[dp_axis_names]
    for layer in part.model.layers:
        if any(True for _ in layer.parameters()):  # layers of other stages have none
            fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    fully_shard(part, mesh=mesh, reshard_after_forward=False)


def main() -> None:
    """One rank's part of the training."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="local folder with a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()

    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    replicas = int(os.environ["WORLD_SIZE"]) // PP
    mesh = init_device_mesh(device.type, (PP, replicas), mesh_dim_names=("pp", "dp"))

    model = load_model(given.model)
    share = BATCH // replicas
    schedule, parts, has_first, has_last, _ = hfpp.pipeline_model(
        model,
        mesh,
        None,
        pp_axis_name="pp",
        dp_axis_names=("dp",),
        layers_per_stage=None,
        pipeline_parallel_schedule_csv=None,
        pipeline_parallel_schedule="1F1B",
        microbatch_size=MICROBATCH,
        local_batch_size=share,
        device=device,
        # The mean over the replica's share; FSDP2 averages over the replicas.
        loss_fn=lambda output, target: hfpp.causal_lm_loss(output, target, share * (LENGTH - 1)),
        parallelize_fn=shard,
        seq_len=LENGTH,
    )
    del model  # frees the weights that this rank does not own
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    # One batch, again and again: enough to see the loss fall.
    text = torch.tensor(list(topics["assert"].encode())[: BATCH * LENGTH])
    ids = text.view(BATCH, LENGTH)[mesh.get_local_rank("dp") :: replicas].to(device)
    inputs = (ids,) if has_first else ()
    target = ids if has_last else None
    for _ in range(given.steps):
        schedule.step(*inputs, target=target, return_outputs=False)
        hfpp.clip_grad_norm_(parts, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    losses: list[torch.Tensor] = []
    schedule.eval(*inputs, target=target, losses=losses)
    loss = sum(losses, torch.zeros((), device=device)) / replicas
    dist.all_reduce(loss)
    if dist.get_rank() == 0:
        print(f"loss after {given.steps} steps: {loss.item():.6f}")

    state: dict[str, torch.Tensor] = {}
    for part in parts:
        state |= get_model_state_dict(part)
    dcp.save(state, checkpoint_id=given.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
