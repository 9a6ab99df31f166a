"""A stage survives what users do to it: the same as the unsplit model, treated the same way."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hfpp import PipelineConfigError
from hfpp.runtime import stage_module
from hfpp.runtime.stage_boundary import boundary_of
from tests.models import padding_mask, relative_error
from tests.ranks import RankError, run_ranks
from tests.runtime.real_pipelines import (
    MICROBATCHES,
    ROWS,
    SCHEDULES,
    SEQ,
    SINGLE,
    TOLERANCE,
    batches,
    build,
    data_and_pipeline_mesh,
    loss,
    split,
    step,
    tiny_llama,
    unsplit_gradients,
    wrong_gradients,
)


def run_chain(stages: list[nn.Module], *values: Any, **kwargs: Any) -> Any:
    for stage in stages:
        result = stage(*values, **kwargs)
        values = result if isinstance(result, tuple) else (result,)
    return values[0]


def foreign_layers(stage: nn.Module) -> list[Any]:
    return [layer for layer in stage.model.layers if not list(layer.parameters())]


def same_gradients(stages: list[nn.Module], model: nn.Module) -> None:
    seen = 0
    wanted = dict(model.named_parameters())
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert relative_error(parameter.grad, wanted[name].grad) < TOLERANCE, name
            seen += 1
    assert seen == len(wanted)


# Casts and devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_reaches_weights_stand_ins_and_hollow_layers(dtype):
    """The mask that eager attention adds has the dtype of what a hollow embedding gave."""
    model = tiny_llama(attn_implementation="eager").float()
    plain = copy.deepcopy(model).to(dtype)
    stages = [stage.to(dtype) for stage in split(model, 4)]
    ids, masks = batches()[0], {"attention_mask": padding_mask(ROWS, SEQ)}
    wanted, found = plain(ids, **masks).logits, run_chain(stages, ids, **masks)
    assert found.dtype == dtype
    assert torch.equal(found, wanted)
    loss(wanted, ids).backward()
    loss(found, ids).backward()
    same_gradients(stages, plain)
    for stage in stages:
        assert stage.dtype == dtype
        assert stage.model.embed_tokens.weight.dtype == dtype
        assert stage.lm_head.weight.dtype == dtype
        assert len(foreign_layers(stage)) == 3
        for layer in foreign_layers(stage):
            assert layer.self_attn.q_proj.weight.dtype == dtype
            assert layer.self_attn.q_proj.weight.is_meta


def test_one_stages_cast_leaves_the_others_alone():
    first, second = split(tiny_llama(), 4, [0, 1])  # the last layer is foreign to both
    first.to(torch.bfloat16)
    assert first.model.layers[3].mlp.up_proj.weight.dtype == torch.bfloat16
    assert second.model.layers[3].mlp.up_proj.weight.dtype == torch.float64
    assert second.model.embed_tokens.weight.dtype == torch.float64


def test_to_the_meta_device_and_back_with_loaded_weights():
    model = tiny_llama()
    saved, ids = copy.deepcopy(model), batches()[0]
    stages = [stage.to(device="meta") for stage in split(model, 4)]
    for stage in stages:
        assert {tensor.device.type for tensor in stage.parameters()} == {"meta"}
        stage.to_empty(device="cpu")
        stage.load_state_dict(saved.state_dict(), strict=False)
        for name, buffer in stage.named_buffers():  # not in the state dict
            buffer.copy_(saved.get_buffer(name))
    assert torch.equal(run_chain(stages, ids), saved(ids).logits)


# State dicts


def buffered_model() -> Any:
    """With persistent buffers inside and outside of the layers."""
    model = tiny_llama()
    model.model.register_buffer("seen", torch.tensor([3.0]))
    for index, layer in enumerate(model.model.layers):
        layer.register_buffer("steps", torch.tensor([float(index)]))
    return model


@pytest.mark.parametrize("make", [buffered_model, lambda: tiny_llama(tie_word_embeddings=True)])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_state_dicts_have_the_unsplit_names_and_round_trip(make, num_stages):
    model = make()
    full = copy.deepcopy(model.state_dict())
    owned: list[str] = []
    for index, stage in enumerate(split(model, num_stages)):
        mine = stage.state_dict()
        layers = range(index * 4 // num_stages, (index + 1) * 4 // num_stages)
        ends = {0: ["model.embed_tokens."], num_stages - 1: ["model.norm.", "lm_head."]}
        prefixes = (*(f"model.layers.{i}." for i in layers), *ends.get(index, []), "model.seen")
        assert set(mine) == {name for name in full if name.startswith(prefixes)}
        assert {name for name, _ in stage.named_buffers()} == {
            name
            for name, _ in model.named_buffers()
            if name.startswith((*prefixes, "model.rotary_emb."))
        }
        with torch.no_grad():
            for tensor in (*stage.parameters(), *stage.buffers()):
                tensor.zero_()
        report = stage.load_state_dict(full, strict=False)
        assert report.missing_keys == []
        assert set(report.unexpected_keys) == set(full) - set(mine)
        assert all(torch.equal(stage.state_dict()[name], full[name]) for name in mine)
        with pytest.raises(RuntimeError, match="Unexpected key"):
            stage.load_state_dict(full)
        owned += mine
    assert set(owned) == set(full)
    assert len(owned) - len(full) == (num_stages - 1) * ("model.seen" in full)


# Modes


def test_train_and_eval_reach_the_stage_and_its_layers():
    model = tiny_llama(attention_dropout=0.5)
    ids, stages = batches()[0], split(model, 4)
    torch.manual_seed(1)
    one, other = run_chain(stages, ids), run_chain(stages, ids)
    assert not torch.equal(one, other)  # dropout is on
    for stage in stages:
        stage.eval()
        assert not any(module.training for module in stage.modules())
    wanted = copy.deepcopy(model).eval()(ids).logits
    assert torch.equal(run_chain(stages, ids), wanted)
    for stage in stages:
        stage.train()
        assert all(module.training for module in stage.modules())
    assert not torch.equal(run_chain(stages, ids), wanted)


# Copies


def test_copies_share_no_state():
    """A copy runs in the middle of the original's forward: each takes what it was given itself."""
    model = tiny_llama()
    stage = split(model, 4, [1])[0]
    twin = copy.deepcopy(stage)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    mine, other = torch.randn(2, ROWS, SEQ, 32, dtype=torch.float64).unbind()
    alone, alone_twin = stage(mine), twin(other)
    assert not torch.equal(alone, stage(other))
    within = []
    stage.model.rotary_emb.register_forward_hook(lambda *_: within.append(twin(other)))
    assert torch.equal(stage(mine), alone)
    assert torch.equal(within[0], alone_twin)
    within[0].sum().backward()
    assert all(parameter.grad is None for parameter in stage.parameters())
    assert all(parameter.grad is not None for parameter in twin.parameters())
    assert boundary_of(twin) is boundary_of(stage)


# What is left of the unsplit model


@pytest.mark.parametrize("index", range(4))
def test_no_foreign_tensor_is_read(index):
    model = buffered_model()
    values = [batches()[0]]
    for stage in split(copy.deepcopy(model), 4):
        values.append(stage(values[-1]).detach())
    stage = split(model, 4, [index])[0]
    kept = {id(tensor) for tensor in (*stage.parameters(), *stage.buffers())}
    gone = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in kept]
    assert len(gone) > 27
    with torch.no_grad():
        for tensor in gone:
            tensor.fill_(float("nan"))
    assert torch.equal(stage(values[index]), values[index + 1])


def quiet_torch() -> None:
    """Torch logs the whole schedule for every error, also for those that a test expects."""
    logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def drop_the_model(rank: int, world_size: int) -> dict[str, float]:
    mesh = data_and_pipeline_mesh(world_size)
    before = resident_bytes()
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01)
    whole = resident_bytes()
    parts = build(model, mesh, "1F1B", copy_model=False).model_parts
    kept = {id(p) for part in parts for p in part.parameters()}
    foreign = [weakref.ref(p) for p in model.parameters() if id(p) not in kept]
    split = resident_bytes()
    del model
    gc.collect()
    return {
        "of the model": (whole - before) / 2**20,
        "for the split": (split - whole) / 2**20,
        "left": (resident_bytes() - before) / 2**20,
        "foreign alive": sum(ref() is not None for ref in foreign),
        "foreign": len(foreign),
    }


def test_dropping_the_model_frees_what_the_rank_does_not_own():
    for mib in run_ranks(drop_the_model, 2):
        assert mib["of the model"] > 240
        assert mib["for the split"] < 30
        assert mib["foreign"] >= 18
        assert mib["foreign alive"] == 0
        assert mib["left"] < mib["of the model"] / 2 + 30


class Adapter(nn.Module):
    """What a LoRA library puts in a linear layer's place."""

    def __init__(self, base: nn.Linear, name: str) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(sum(name.encode()))
        self.base = base
        self.down = nn.Parameter(torch.randn(base.in_features, 2, generator=draw).double())
        self.up = nn.Parameter(torch.randn(2, base.out_features, generator=draw).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down @ self.up


def adapt(module: nn.Module) -> set[str]:
    found = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and "_proj" in n]
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for name in found:
        parent, _, own_name = name.rpartition(".")
        linear = module.get_submodule(name)
        setattr(module.get_submodule(parent), own_name, Adapter(linear, name))
    return set(found)


def test_adapters_find_own_layers_only_and_train():
    model = tiny_llama()
    stages = split(copy.deepcopy(model), 4)
    names = [adapt(stage) for stage in stages]
    assert set.union(*names) == adapt(model)
    assert sum(map(len, names)) == 4 * 7
    assert all(name.startswith(f"model.layers.{i}.") for i in range(4) for name in names[i])
    ids = batches()[0]
    loss(run_chain(stages, ids), ids).backward()
    loss(model(ids).logits, ids).backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    got = {n: p.grad for s in stages for n, p in s.named_parameters() if p.requires_grad}
    assert set(got) == set(wanted)
    assert max(relative_error(got[name], wanted[name]) for name in wanted) < TOLERANCE


# Checkpointing


def hf_default(part: Any) -> None:
    part.gradient_checkpointing_enable()


def hf_not_reentrant(part: Any) -> None:
    part.gradient_checkpointing_enable({"use_reentrant": False})


def hf_reentrant(part: Any) -> None:
    part.gradient_checkpointing_enable({"use_reentrant": True})


def wrap_own_layers(part: Any, impl: CheckpointImpl = CheckpointImpl.NO_REENTRANT) -> None:
    for index, layer in enumerate(part.model.layers):
        if list(layer.parameters()):
            part.model.layers[index] = checkpoint_wrapper(layer, checkpoint_impl=impl)


def wrap_every_layer(part: Any) -> None:
    """The foreign ones too: they are decoder layers like the others."""
    apply_activation_checkpointing(part, check_fn=lambda m: isinstance(m, LlamaDecoderLayer))


def count_calls(part: nn.Module) -> list[str]:
    """Fills up with the names of the part's MLPs as they are called."""
    calls: list[str] = []
    for name, module in part.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    return calls


@contextmanager
def what_a_hook_would_inject():
    """The planted fault: a replayed layer gets what the stage received last."""
    right = stage_module._with_received
    last: dict[int, Any] = {}

    def wrong(layer: nn.Module, args: Any, kwargs: Any) -> Any:
        running = layer.__dict__["_hfpp_role"].running
        if running.received is not None:
            last[id(running)] = running.received
            return right(layer, args, kwargs)
        running.received = last[id(running)]
        try:
            return right(layer, args, kwargs)
        finally:
            running.received = None

    stage_module._with_received = wrong
    try:
        yield
    finally:
        stage_module._with_received = right


def checkpointed(
    rank: int, world_size: int, cases: list[tuple[Callable[[Any], None], str]], fault: bool = False
) -> list[str]:
    """What is wrong, by case; every layer must have run twice per microbatch."""
    quiet_torch()
    mesh, model = data_and_pipeline_mesh(world_size), tiny_llama()
    expected, ids = unsplit_gradients(model, batches()), batches()[0]
    wrong = []
    for enable, schedule in cases:
        pipeline = build(
            model, mesh, schedule, parallelize_fn=lambda part, *_, f=enable, **__: f(part)
        )
        calls = [count_calls(part) for part in pipeline.model_parts]
        with what_a_hook_would_inject() if fault else nullcontext():
            step(pipeline, mesh, ids)
        found = wrong_gradients(pipeline.model_parts, expected)
        runs = sum(map(len, calls)) / sum(len(set(names)) for names in calls) / MICROBATCHES
        if runs < 2:
            found.append(f"layers ran {runs} times per microbatch")
        wrong += [f"{enable.__name__}, {schedule}, {what}" for what in found]
    return wrong


def test_checkpointing_is_exact():
    """1F1B would not show a replay with another microbatch's input: it has few in flight."""
    cases = [
        (hf_default, "GPipe"),
        (hf_default, "ZBVZeroBubble"),
        (hf_not_reentrant, "DualPipeV"),
        (wrap_own_layers, "GPipe"),
        (wrap_own_layers, "ZBVZeroBubble"),
        (wrap_every_layer, "GPipe"),
        (wrap_every_layer, "InterleavedZeroBubble"),
        (wrap_every_layer, "DualPipeV"),
        (hf_reentrant, "GPipe"),
        (hf_reentrant, "Interleaved1F1B"),
        (hf_reentrant, "ZBVZeroBubble"),  # torch has no split backward for it: it runs whole
        (hf_reentrant, "DualPipeV"),
    ]
    assert run_ranks(checkpointed, 2, args=(cases,)) == [[], []]


def test_a_replay_with_another_microbatch_is_seen():
    wrong = run_ranks(checkpointed, 2, args=([(wrap_own_layers, "GPipe")], True))
    assert any("model.layers.2.self_attn.q_proj.weight: off by" in what for what in wrong[1])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_around_a_layer_is_refused():
    stage = split(tiny_llama(), 2, [1])[0]
    wrap_own_layers(stage, CheckpointImpl.REENTRANT)
    hidden = torch.zeros(1, SEQ, 32, dtype=torch.float64)
    with pytest.raises(PipelineConfigError, match="use_reentrant=False"):
        stage(hidden.requires_grad_())
    with torch.no_grad():
        assert stage(hidden).shape[-1] == stage.config.vocab_size


def test_a_layer_outside_of_its_stage_is_refused():
    stage = split(tiny_llama(), 2, [1])[0]
    hidden = torch.zeros(1, SEQ, 32, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="outside of the stage's forward"):
        stage.model.layers[2](hidden, position_embeddings=(hidden, hidden))
    with pytest.raises(ValueError, match="takes 1 tensors from the stage before, got 2"):
        stage(hidden, hidden)


# Frozen parameters

FROZEN = {
    "the first stage": ("model.embed_tokens.", "model.layers.0.", "model.layers.1."),
    "the middle": ("model.layers.1.", "model.layers.2."),
    "the last stage": ("model.layers.2.", "model.layers.3.", "model.norm.", "lm_head."),
    "all but one layer": (
        "model.embed_tokens.",
        "model.layers.0.",
        "model.layers.1.",
        "model.layers.3.",
        "model.norm.",
        "lm_head.",
    ),
}
FROZEN_CASES = [
    ("the first stage", "before the split", "1F1B"),
    ("the first stage", "before the split", "InterleavedZeroBubble"),
    ("the first stage", "before the split", "ZBVZeroBubble"),
    ("the first stage", "before the split", "DualPipeV"),
    ("the first stage", "after the split", "1F1B"),
    ("the first stage", "after the split", "ZBVZeroBubble"),
    ("the middle", "before the split", "InterleavedZeroBubble"),
    ("the middle", "after the split", "ZBVZeroBubble"),
    ("the last stage", "before the split", "1F1B"),
    ("the last stage", "after the split", "DualPipeV"),
    ("all but one layer", "before the split", "InterleavedZeroBubble"),
    ("all but one layer", "before the split", "ZBVZeroBubble"),
    ("all but one layer", "before the split", "DualPipeV"),
    ("all but one layer", "after the split", "1F1B"),
]


def freeze(module: nn.Module, prefixes: tuple[str, ...]) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(prefixes))


def frozen(rank: int, world_size: int, cases: list[tuple[str, str, str]]) -> list[str]:
    mesh, ids = data_and_pipeline_mesh(world_size), batches()[0]
    models: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    for which, prefixes in FROZEN.items():
        models[which] = tiny_llama()
        freeze(models[which], prefixes)
        expected[which] = unsplit_gradients(models[which], batches())
    wrong = []
    for which, when, schedule in cases:
        early = when == "before the split"
        pipeline = build(
            models[which] if early else tiny_llama(),
            mesh,
            schedule,
            parallelize_fn=lambda part, *_, p=FROZEN[which], **__: freeze(part, p),
            seq_len=SEQ if early else None,
        )
        step(pipeline, mesh, ids)
        found = wrong_gradients(pipeline.model_parts, expected[which])
        wrong += [f"{which} {when}, {schedule}, {what}" for what in found]
    return wrong


def test_frozen_parameters_get_no_gradient_and_the_others_theirs():
    assert run_ranks(frozen, 2, args=(FROZEN_CASES,)) == [[], []]


# Data parallel: two replicas of a pipeline of two ranks


def shard(part: Any, world_mesh: Any, moe_mesh: Any, **_: Any) -> None:
    """As one would without a pipeline: layers first (the foreign ones too), then the whole."""
    for layer in part.model.layers:
        fully_shard(layer, mesh=world_mesh["dp"])
    fully_shard(part, mesh=world_mesh["dp"])


def shard_and_checkpoint(part: Any, world_mesh: Any, moe_mesh: Any, **_: Any) -> nn.Module:
    """The checkpointed layers are sharded; gives the stage back, as some such functions do."""
    wrap_every_layer(part)
    shard(part, world_mesh, moe_mesh)
    return part


def shard_without_the_stage(part: Any, world_mesh: Any, moe_mesh: Any, **_: Any) -> None:
    for layer in part.model.layers:
        fully_shard(layer, mesh=world_mesh["dp"])


def replicate(part: nn.Module, world_mesh: Any, moe_mesh: Any, **_: Any) -> nn.Module:
    return DistributedDataParallel(part, process_group=world_mesh.get_group("dp"))


def data_parallel(
    rank: int,
    world_size: int,
    schedules: list[str],
    parallelize_fn: Callable[..., Any],
    num_layers: int = 4,
    fault: bool = False,
) -> list[str]:
    """What is wrong after two steps, by schedule; the fault frees weights after the forward."""
    quiet_torch()
    mesh, steps = data_and_pipeline_mesh(world_size), batches(2)
    model = tiny_llama(num_hidden_layers=num_layers)
    expected = unsplit_gradients(model, steps, replicas=2)
    wrong = []
    for schedule in schedules:
        is_file = schedule.endswith(".csv")
        pipeline = build(
            model,
            mesh,
            None if is_file else schedule,
            parallelize_fn=parallelize_fn,
            layers_per_stage=1 if num_layers > 4 else None,
            pipeline_parallel_schedule_csv=schedule if is_file else None,
        )
        if fault:
            for part in pipeline.model_parts:
                part.set_reshard_after_forward(True)
        for ids in steps:
            step(pipeline, mesh, ids)
        found = wrong_gradients(pipeline.model_parts, expected)
        wrong += [f"{schedule}, {what}" for what in found]
    return wrong


def test_sharded_stages_accumulate_over_every_schedule():
    """With FSDP2's default, which frees a layer's weights after its forward."""
    assert run_ranks(data_parallel, 4, args=(SCHEDULES, shard)) == [[]] * 4


def test_weights_freed_before_a_late_weight_gradient_are_seen():
    """The planted fault undoes what keeps the weights of such schedules in memory."""
    wrong = run_ranks(data_parallel, 4, args=(["1F1B", "ZBVZeroBubble"], shard, 4, True))
    assert all({what.split(",")[0] for what in found} == {"ZBVZeroBubble"} for found in wrong)


def test_sharded_and_checkpointed():
    schedules = ["GPipe", "InterleavedZeroBubble", "DualPipeV"]
    assert run_ranks(data_parallel, 4, args=(schedules, shard_and_checkpoint)) == [[]] * 4


def test_more_sharded_stages_than_are_kept_in_memory():
    """With four stages on a rank, torch frees some of them between a forward and its backward."""
    assert run_ranks(data_parallel, 4, args=(["InterleavedZeroBubble"], shard, 8)) == [[]] * 4


@pytest.fixture
def late_weights(tmp_path):
    """A schedule file with one stage per rank that computes the weights' gradients at the end."""
    microbatches = range(MICROBATCHES)
    rows = [[f"{stage}{kind}{i}" for kind in "FIW" for i in microbatches] for stage in range(2)]
    path = tmp_path / "late_weights.csv"
    path.write_text("\n".join(",".join(row) for row in rows))
    return str(path)


def test_a_schedule_file_with_late_weights(late_weights):
    assert run_ranks(data_parallel, 4, args=([late_weights], shard)) == [[]] * 4
    with pytest.raises(RankError, match="does not see gradients that the schedule computes apart"):
        run_ranks(data_parallel, 4, args=([late_weights], replicate))


POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard_in_bfloat16(part: Any, world_mesh: Any, moe_mesh: Any, **_: Any) -> None:
    for layer in part.model.layers:
        fully_shard(layer, mesh=world_mesh["dp"], mp_policy=POLICY)
    fully_shard(part, mesh=world_mesh["dp"], mp_policy=POLICY)


def mixed_precision(rank: int, world_size: int) -> list[str]:
    """Outputs that differ from those of the unsplit model, sharded in the same way."""
    mesh = data_and_pipeline_mesh(world_size)
    replica, replicas = mesh.get_local_rank("dp"), mesh["dp"].size()
    model = tiny_llama(attn_implementation="eager").float()
    plain = copy.deepcopy(model)
    shard_in_bfloat16(plain, mesh, None)
    ids = batches()[0].chunk(replicas)[replica]
    mask = padding_mask(ROWS, SEQ, side="left").chunk(replicas)[replica]
    rows = zip(ids.chunk(MICROBATCHES), mask.chunk(MICROBATCHES), strict=True)
    wanted = torch.cat([plain(x, attention_mask=m).logits for x, m in rows])
    wrong = []
    for schedule in ("1F1B", "ZBVZeroBubble"):
        pipeline = build(
            model,
            mesh,
            schedule,
            parallelize_fn=shard_in_bfloat16,
            tensor_dtype=torch.bfloat16,
        )
        found = pipeline.schedule.step(
            *((ids,) if pipeline.has_first_stage else ()),
            target=ids if pipeline.has_last_stage else None,
            attention_mask=mask,
        )
        if pipeline.has_last_stage and not torch.equal(found, wanted):
            wrong.append(f"{schedule}: off by {relative_error(found, wanted):.1e}")
    return wrong


def test_mixed_precision_reaches_the_masks():
    """The unsplit model makes its mask in bfloat16: -inf, cast from float32, would give NaN."""
    assert run_ranks(mixed_precision, 4) == [[]] * 4


def test_replicated_stages():
    assert run_ranks(data_parallel, 4, args=(SINGLE, replicate)) == [[]] * 4


@pytest.mark.parametrize(
    ("schedule", "parallelize_fn", "remedy"),
    [
        ("Interleaved1F1B", replicate, r"use fully_shard \(FSDP2\)"),
        ("ZBVZeroBubble", shard_without_the_stage, "call fully_shard on the stage too"),
    ],
)
def test_wrappers_that_lose_gradients_are_refused(schedule, parallelize_fn, remedy):
    with pytest.raises(RankError, match=rf"PipelineConfigError: [\s\S]*{remedy}"):
        run_ranks(data_parallel, 4, args=([schedule], parallelize_fn))
