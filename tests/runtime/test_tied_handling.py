"""What people do to tied models before, between and after the steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AlbertConfig, AlbertForMaskedLM

from hfpp import PipelineConfigError
from hfpp.runtime.find_anatomy import find_anatomy
from hfpp.runtime.pipeline import Pipeline
from hfpp.runtime.stage_boundary import own_layers
from hfpp.runtime.tied_weights import _number_of
from tests.models import VOCAB, tiny_model
from tests.ranks import run_ranks
from tests.runtime.real_pipelines import (
    batches,
    build,
    data_and_pipeline_mesh,
    loss,
    split,
    step,
    unsplit_gradients,
    wrong_gradients,
)
from tests.runtime.tied_models import Block, Model, head, tied_model
from tests.runtime.tied_training import LLAMA, bits_of_copies, copies, refusal

ENDS = "(model.embed_tokens.weight of stage 0, lm_head.weight of stage 1)"


def llama(**changes: Any) -> Any:
    return tiny_model("llama", **{**LLAMA, **changes})


def optimizer_of(pipeline: Pipeline, **settings: Any) -> torch.optim.Optimizer:
    parameters = [p for part in pipeline.model_parts for p in part.parameters()]
    return torch.optim.AdamW(parameters, lr=1e-2, **settings)


def against_the_config(rank: int, world_size: int) -> list[str]:
    """The tensors count, not what the config says of them."""
    mesh, steps = data_and_pipeline_mesh(world_size), batches(2)
    tied, untied = llama(tie_word_embeddings=False), llama(tie_word_embeddings=True)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach() * 1.5)
    wrong = []
    for model, number in ((tied, 1), (untied, 0)):
        expected = unsplit_gradients(model, steps)
        for schedule in ("1F1B", "DualPipeV"):
            pipeline = build(model, mesh, schedule)
            assert len({tensor for tensor, _ in copies(pipeline)}) == (
                number if schedule == "1F1B" or rank == 0 else 0
            )
            for ids in steps:
                step(pipeline, mesh, ids)
            wrong += wrong_gradients(pipeline.model_parts, expected)
    return wrong


def test_the_tensors_count_and_not_the_config() -> None:
    assert run_ranks(against_the_config, 2) == [[], []]


def freezing(rank: int, world_size: int) -> list[str]:
    """After the split: on all stages it is followed, on one it is refused everywhere."""
    mesh, (ids, more) = data_and_pipeline_mesh(world_size), batches(2)
    model = llama()
    expected = unsplit_gradients(model, [ids])
    pipeline = build(model, mesh, "1F1B")
    (end,) = copies(pipeline).values()
    step(pipeline, mesh, ids)
    before = {n: p.grad.clone() for n, p in pipeline.model_parts[0].named_parameters()}  # type: ignore[union-attr]
    end.requires_grad_(rank == 0)
    message = refusal(pipeline, mesh, more)
    found = wrong_gradients(pipeline.model_parts, before)
    pipeline.model_parts[0].zero_grad()
    end.requires_grad_(False)
    step(pipeline, mesh, ids)
    found += ["frozen, but has a gradient"] * (end.grad is not None)
    end.requires_grad_(True)
    pipeline.model_parts[0].zero_grad()
    step(pipeline, mesh, ids)
    return [message, *found, *wrong_gradients(pipeline.model_parts, expected)]


def test_freezing_after_the_split() -> None:
    for message, *wrong in run_ranks(freezing, 2):
        assert ENDS in message
        assert "only 1 of 2 are trained" in message
        assert wrong == []


def drifting(rank: int, world_size: int) -> list[str]:
    """By optimizers with other settings, and by weights that are loaded into one part only."""
    mesh, (ids,) = data_and_pipeline_mesh(world_size), batches()
    model = llama()
    messages = []
    pipeline = build(model, mesh, "1F1B")
    optimizer = optimizer_of(pipeline, weight_decay=0.5 if rank == 0 else 0.0)
    step(pipeline, mesh, ids)
    optimizer.step()
    messages.append(refusal(pipeline, mesh, ids))

    pipeline = build(model, mesh, "1F1B")
    step(pipeline, mesh, ids)
    others = llama(seed=1).state_dict()
    (part,) = pipeline.model_parts
    if rank == 1:
        part.load_state_dict(others, strict=False)
    messages.append(refusal(pipeline, mesh, ids))
    part.load_state_dict(others, strict=False)
    part.zero_grad()
    expected = unsplit_gradients(llama(seed=1), [ids])
    step(pipeline, mesh, ids)
    return messages + wrong_gradients([part], expected)


def test_copies_that_drift_apart_are_refused() -> None:
    for by_optimizer, by_loading, *wrong in run_ranks(drifting, 2):
        for message in (by_optimizer, by_loading):
            assert ENDS in message
            assert "their values differ" in message
            assert "weight decay" in message
        assert wrong == []


class Interrupted(Exception):
    """Raised in the middle of a step."""


def interrupted(rank: int, world_size: int) -> list[str]:
    """Rank 0 fails in its third forward, rank 1 in its first loss; tied gradients stay."""
    mesh, (ids,) = data_and_pipeline_mesh(world_size), batches()
    calls = iter(range(100))
    fails = False

    def failing_loss(logits: Tensor, labels: Tensor) -> Tensor:
        if fails:
            raise Interrupted
        return loss(logits, labels)

    def hook(*_: Any) -> None:
        if fails and next(calls) == 2:
            raise Interrupted

    pipeline = build(llama(), mesh, "GPipe", loss_fn=failing_loss)
    if rank == 0:
        pipeline.model_parts[0].register_forward_pre_hook(hook)
    step(pipeline, mesh, ids)
    (end,) = copies(pipeline).values()
    assert end.grad is not None
    before = end.grad.clone()
    fails = True
    with pytest.raises((Interrupted, RuntimeError)) as raised:
        step(pipeline, mesh, ids)
    # What rank 0 has sent arrives as long as rank 0 lives, and its error, which holds the messages.
    dist.barrier()
    return [] if torch.equal(end.grad, before) else [f"the gradient changed by {raised.value!r}"]


def test_a_step_that_raises_leaves_tied_gradients_as_they_were() -> None:
    assert run_ranks(interrupted, 2) == [[], []]


def cast(rank: int, world_size: int) -> list[tuple[list[str], list[str]]]:
    """bfloat16 before the split, float32 after it: wrong gradients, and the copies' bits."""
    mesh, steps = data_and_pipeline_mesh(world_size), batches(2)
    found = []
    for schedule in ("1F1B", "ZBVZeroBubble"):
        for early, late, tolerance in ((torch.bfloat16, None, 0.1), (None, torch.float32, 1e-4)):
            model = llama() if early is None else llama().to(early)
            expected = unsplit_gradients(copy.deepcopy(model).to(late or early), steps)
            pipeline = build(model, mesh, schedule, seq_len=None)
            for part in pipeline.model_parts:
                part.to(late or early)
            optimizer = optimizer_of(pipeline)
            for ids in steps:
                step(pipeline, mesh, ids)
            wrong = wrong_gradients(pipeline.model_parts, expected, tolerance)
            optimizer.step()
            found.append((wrong, list(bits_of_copies(pipeline, optimizer).values())))
    return found


def test_weights_of_other_dtypes() -> None:
    ranks = run_ranks(cast, 2)
    for cases in zip(*ranks, strict=True):
        assert [wrong for wrong, _ in cases] == [[], []]
        bits = [digest for _, digests in cases for digest in digests]
        assert len(bits) == 2
        assert len(set(bits)) == 1


def in_buckets(rank: int, world_size: int) -> list[str]:
    """Gradients that are views of buckets, which DistributedDataParallel overwrites.

    It makes the buckets anew on the second step: only the third one writes over earlier gradients.
    """
    mesh, steps = data_and_pipeline_mesh(world_size), batches(3)
    model = llama()
    expected = unsplit_gradients(model, steps, replicas=2)

    def wrap(part: nn.Module, world_mesh: DeviceMesh, *_: Any, **__: Any) -> nn.Module:
        group = world_mesh["dp"].get_group()
        return DistributedDataParallel(part, process_group=group, gradient_as_bucket_view=True)

    pipeline = build(model, mesh, "1F1B", parallelize_fn=wrap)
    for ids in steps:
        step(pipeline, mesh, ids)
    return wrong_gradients(pipeline.model_parts, expected)


def test_gradients_in_buckets_add_up_over_three_steps() -> None:
    assert run_ranks(in_buckets, 4) == [[]] * 4


class OwnForward(Model):
    """Copes with missing modules by itself; its head is the embedding, and its blocks are one."""

    _pp_keep_self_forward = True

    def __init__(self) -> None:
        super().__init__([Block(), Block()] * 2)
        self.head = self.tokens  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or what the next stage takes."""
        x = x if self.tokens is None else self.tokens(x)
        blocks: Any = self.blocks
        for block in blocks.values() if isinstance(blocks, nn.ModuleDict) else blocks:
            x = block(x)
        return x if self.head is None else nn.functional.linear(x, self.head.weight)


def own_forwards(rank: int, world_size: int) -> list[str]:
    mesh, steps = data_and_pipeline_mesh(world_size), batches(2)
    torch.manual_seed(0)
    model = OwnForward().double()
    expected = unsplit_gradients(model, steps)
    wrong = []
    for schedule, ends in (("1F1B", (0, 2, 4)), ("ZBVZeroBubble", (0, 1, 2, 3, 4))):
        names = [[f"blocks.{i}" for i in range(*span)] for span in pairwise(ends)]
        names[0].insert(0, "tokens")
        names[-1].append("head")
        pipeline = build(
            model, mesh, schedule, module_fqns_per_model_part=names, copy_model=True, seq_len=None
        )
        found = {name for part in pipeline.model_parts for name, _ in part.named_children()}
        if schedule == "1F1B":
            assert found == {"blocks", "tokens" if rank == 0 else "head"}
        for ids in steps:
            step(pipeline, mesh, ids)
        wrong += wrong_gradients(pipeline.model_parts, expected)
    return wrong


def test_own_forwards_over_modules_with_several_names() -> None:
    assert run_ranks(own_forwards, 2) == [[], []]


def sharded_apart(rank: int, world_size: int) -> list[str]:
    """One layer at two places of a stage: one group of shards is right, two are refused."""
    mesh, steps = data_and_pipeline_mesh(world_size), batches(2)
    model = tied_model("one layer")
    expected = unsplit_gradients(model, steps, replicas=2)

    def together(part: nn.Module, world_mesh: DeviceMesh, *_: Any, **__: Any) -> None:
        fully_shard(own_layers(part), mesh=world_mesh["dp"])
        fully_shard(part, mesh=world_mesh["dp"])

    def apart(part: nn.Module, world_mesh: DeviceMesh, *_: Any, **__: Any) -> None:
        for layer in own_layers(part):
            fully_shard(layer, mesh=world_mesh["dp"])
        fully_shard(part, mesh=world_mesh["dp"])

    pipeline = build(model, mesh, "1F1B", parallelize_fn=together)
    for ids in steps:
        step(pipeline, mesh, ids)
    wrong = wrong_gradients(pipeline.model_parts, expected)
    with pytest.raises(PipelineConfigError) as caught:
        build(model, mesh, "1F1B", parallelize_fn=apart)
    return [str(caught.value), *wrong]


def test_shards_of_a_layer_at_two_places() -> None:
    for message, *wrong in run_ranks(sharded_apart, 4):
        assert "blocks.0.norm.weight = blocks.1.norm.weight of stage 0" in message
        assert "fully_shard([" in message
        assert wrong == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex128])
@pytest.mark.parametrize("size", [0, 1, 3, 16])
def test_the_number_of_a_tensor_follows_every_bit(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randn(size + 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    for part in (tensor[1:], tensor[:-1].clone()):  # the first is not aligned
        assert torch.equal(_number_of(part), _number_of(part.clone()))
        for index in range(part.nbytes):
            other = part.clone()
            other.view(torch.uint8)[index] ^= 1
            assert not torch.equal(_number_of(part), _number_of(other))


@pytest.mark.parametrize("family", ["llama", "zamba2"])
def test_parts_together_have_the_state_dict_of_the_model(family: str) -> None:
    model = tiny_model(family, tie_word_embeddings=True)
    merged: dict[str, Tensor] = {}
    parts = split(model, 2)
    for part in parts:
        for name, tensor in part.state_dict().items():
            assert torch.equal(merged.setdefault(name, tensor), tensor)
    wanted = model.state_dict()
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in wanted.items())


def test_tie_weights_of_a_part_ties_what_it_holds_itself() -> None:
    """transformers ties by names of the whole model, of which a part lacks some."""
    model = tiny_model("zamba2", num_hidden_layers=4, layers_block_type=["hybrid"] * 4)
    for part in split(model, 2):
        one: dict[int, set[str]] = {}
        for name, parameter in part.named_parameters(remove_duplicate=False):
            one.setdefault(id(parameter), set()).add(name)
        apart = copy.deepcopy(part).to_empty(device="meta").to_empty(device="cpu")
        assert len(list(apart.parameters())) > len(one)
        apart.tie_weights()  # type: ignore[operator]
        again: dict[int, set[str]] = {}
        for name, parameter in apart.named_parameters(remove_duplicate=False):
            again.setdefault(id(parameter), set()).add(name)
        assert sorted(map(sorted, again.values())) == sorted(map(sorted, one.values()))


def shared_memory() -> Model:
    model = Model()
    model.head.weight = nn.Parameter(model.tokens.weight.data)
    return model


def shared_data() -> Model:
    model = Model()
    model.head.weight.data = model.tokens.weight.data
    return model


def halves_of_one() -> Model:
    """Two parameters in one storage that have no element in common are no trouble."""
    model = Model()
    both = torch.randn(2 * VOCAB, model.head.weight.shape[1])
    model.tokens.weight, model.head.weight = map(nn.Parameter, both.split(VOCAB))
    return model


@pytest.mark.parametrize("make", [shared_memory, shared_data])
def test_two_parameters_over_one_memory_are_refused(make: Callable[[], Model]) -> None:
    model = make()
    with pytest.raises(PipelineConfigError) as caught:
        split(model, 2)
    message = str(caught.value)
    assert "tokens.weight (on stages [0]) and head.weight (on stages [1]) of Model" in message
    assert "model.head.weight = model.tokens.weight" in message
    assert len(split(model, 1)) == 1
    assert len(split(model.requires_grad_(False), 2)) == 2
    assert len(split(halves_of_one(), 2)) == 2
    assert len(split(head(), 2)) == 2


class InALoop(Model):
    """Calls its two layers in turn, four times."""

    def hidden(self, x: Tensor) -> Tensor:
        """The hidden state after eight calls."""
        for number in range(8):
            x = self.blocks[number % 2](x)
        return x


def test_layers_that_are_called_again_are_refused_by_name() -> None:
    config = AlbertConfig(
        vocab_size=VOCAB,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
    )
    for model, name in (
        (AlbertForMaskedLM(config), "albert.encoder.albert_layer_groups.0"),
        (InALoop(), "'blocks' in the order [0, 1, 0, 1, 0, 1, 0, 1]"),
    ):
        with pytest.raises(PipelineConfigError) as caught:
            find_anatomy(model)
        assert type(model).__name__ in str(caught.value)
        assert name in str(caught.value)
        assert "nn.ModuleList([layer] * calls)" in str(caught.value)
