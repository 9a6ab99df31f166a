"""Clipping by one norm over stages, shards and replicas; dividing gradients."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from hfpp import PipelineConfigError, causal_lm_loss, clip_grad_norm_, pipeline_model
from hfpp.functional import scale_grads_by_divisor
from tests.ranks import run_ranks

NORM_TYPES = (2.0, 1.0, 3.5, math.inf)
MAX_NORM = 0.05  # small: clipping changes every gradient
BATCH, SEQ = 8, 6


def with_grads(shapes, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for parameter in parameters:
        grad = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        parameter.grad = grad.to(dtype)
    return parameters


# One process


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=5),
    norm_type=st.sampled_from(NORM_TYPES),
    max_norm=st.sampled_from([0.0, 0.5, 100.0, math.inf]),
    foreach=st.sampled_from([None, True, False]),
    seed=st.integers(0, 50),
)
def test_alone_it_is_torchs_clip_grad_norm(shapes, norm_type, max_norm, foreach, seed):
    mine, theirs = with_grads(shapes, seed), with_grads(shapes, seed)
    kept = [p for p in theirs if p.numel()]  # torch has no largest value of nothing
    expected = torch.nn.utils.clip_grad_norm_(kept, max_norm, norm_type)
    norm = clip_grad_norm_(iter(mine), max_norm, norm_type, foreach=foreach)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1e19, 1e-30])
def test_the_sum_of_squares_may_leave_the_range_of_float32(dtype, value):
    parameters = with_grads([()] * 64, dtype=dtype)
    for parameter in parameters:
        parameter.grad.fill_(value)
    expected = 8 * parameters[0].grad.item()
    assert clip_grad_norm_(parameters, math.inf).item() == pytest.approx(expected, rel=1e-6)


def test_types_mix_and_a_shared_parameter_counts_and_scales_once():
    (double,), (half,) = with_grads([(4,)]), with_grads([(4,)], dtype=torch.bfloat16)
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    before = double.grad.clone()
    expected = math.hypot(double.grad.norm(), half.grad.double().norm())
    norm = clip_grad_norm_([double, half, frozen, double], 0.5)
    assert norm.item() == pytest.approx(expected, rel=1e-7)
    torch.testing.assert_close(double.grad, before * 0.5 / (expected + 1e-6), rtol=1e-6, atol=0)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())])
def test_modules_are_taken_alone_and_in_lists(module):
    module(torch.ones(1, 2)).sum().backward()
    expected = clip_grad_norm_(list(module.parameters()), math.inf)
    assert clip_grad_norm_(module, math.inf) == clip_grad_norm_([module], math.inf) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_a_norm_that_is_not_finite(value, norm_type):
    (parameter,) = with_grads([(3,)])
    parameter.grad[1] = value
    with pytest.raises(RuntimeError, match="nothing was clipped"):
        clip_grad_norm_(parameter, 1.0, norm_type, error_if_nonfinite=True)
    assert parameter.grad[0].isfinite()
    assert not clip_grad_norm_(parameter, 1.0, norm_type).isfinite()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([], -1.0), r"max_norm \(-1.0\)"),
        (([], math.nan), r"max_norm \(nan\)"),
        (([], 1.0, 0.0), r"norm_type \(0.0\)"),
        (([], 1.0, math.nan), r"norm_type \(nan\)"),
        ((["weight"], 1.0), "parameters holds a str"),
    ],
)
def test_clipping_errors_name_the_argument(arguments, named):
    with pytest.raises(PipelineConfigError, match=named):
        clip_grad_norm_(*arguments)


def test_scale_grads_by_divisor_divides_each_gradient_once():
    shared = nn.Linear(2, 2)
    parts = [nn.Sequential(shared, nn.Linear(2, 1)), nn.Sequential(shared)]
    parts[0](torch.ones(1, 2)).sum().backward()
    parts[0][1].bias.grad = None
    before = {name: p.grad for name, p in parts[0].named_parameters() if p.grad is not None}
    before = {name: grad.clone() for name, grad in before.items()}
    assert scale_grads_by_divisor([SimpleNamespace(submod=part) for part in parts], 4) is None
    for name, grad in before.items():
        torch.testing.assert_close(parts[0].get_parameter(name).grad, grad / 4)
    assert parts[0][1].bias.grad is None


@pytest.mark.parametrize("divisor", [0, 0.0, math.inf, math.nan, True])
def test_scale_grads_by_divisor_refuses(divisor):
    with pytest.raises(PipelineConfigError, match=r"divisor \("):
        scale_grads_by_divisor([], divisor)


# Real pipelines of a model with tied embeddings, two replicas of two stages per mesh


def tied_llama():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).double()


def token_ids():
    return torch.randint(31, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))


def plain_result(norm_type):
    """The whole model's norm and clipped gradients, by torch."""
    model = tied_llama()
    ids = token_ids()
    causal_lm_loss(model(ids).logits, ids).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, norm_type)
    return norm.item(), {name: p.grad for name, p in model.named_parameters()}


def shard(model, world_mesh, moe_mesh, **_):
    for layer in model.model.layers:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=world_mesh["dp"], reshard_after_forward=False)
    fully_shard(model, mesh=world_mesh["dp"], reshard_after_forward=False)


def replicate(model, world_mesh, moe_mesh, **_):
    return DistributedDataParallel(model, process_group=world_mesh.get_group("dp"))


def plain_name(name):
    # The head of the whole model is the embedding: named_parameters() has it once.
    name = name.removeprefix("module.")
    return "model.embed_tokens.weight" if name == "lm_head.weight" else name


def stepped(mesh, schedule, parallelize_fn):
    replica, replicas = mesh.get_local_rank("dp"), mesh["dp"].size()
    ids = token_ids().chunk(replicas)[replica]
    pipeline = pipeline_model(
        tied_llama(),
        mesh,
        None,
        pp_axis_name="pp",
        dp_axis_names=("dp",),
        layers_per_stage=None,
        pipeline_parallel_schedule_csv=None,
        pipeline_parallel_schedule=schedule,
        microbatch_size=1,
        local_batch_size=len(ids),
        device=torch.device("cpu"),
        loss_fn=lambda logits, target: causal_lm_loss(logits, target, len(ids) * (SEQ - 1)),
        parallelize_fn=parallelize_fn,
        seq_len=SEQ,
    )
    pipeline.schedule.step(
        *((ids,) if pipeline.has_first_stage else ()),
        **({"target": ids} if pipeline.has_last_stage else {}),
    )
    if parallelize_fn is None:  # data parallel by hand
        for part in pipeline.model_parts:
            for parameter in part.parameters():
                dist.all_reduce(parameter.grad, group=mesh.get_group("dp"))
                parameter.grad /= replicas
    return pipeline


def check_clipped_pipelines(rank, world_size):
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("pp", "dp"))
    wrong = []
    for schedule, parallelize_fn in (
        ("1F1B", None),
        ("1F1B", shard),
        ("1F1B", replicate),
        ("ZBVZeroBubble", shard),
        ("Interleaved1F1B", shard),
    ):
        pipeline = stepped(mesh, schedule, parallelize_fn)
        before = [p.grad.clone() for part in pipeline.model_parts for p in part.parameters()]
        for norm_type in NORM_TYPES:
            expected, grads = plain_result(norm_type)
            norm = clip_grad_norm_(pipeline.model_parts, MAX_NORM, norm_type)
            case = f"{schedule}, {parallelize_fn}, order {norm_type}"
            if not math.isclose(norm, expected, rel_tol=1e-10):
                wrong.append(f"{case}: norm {norm.item()}, not {expected}")
            for part in pipeline.model_parts:
                for name, parameter in part.named_parameters():
                    grad = parameter.grad
                    whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
                    if not torch.allclose(whole, grads[plain_name(name)], rtol=1e-9, atol=1e-12):
                        wrong.append(f"{case}: gradient of {name}")
            parameters = [p for part in pipeline.model_parts for p in part.parameters()]
            for parameter, grad in zip(parameters, before, strict=True):
                parameter.grad.copy_(grad)
        # The same parameters without their parts: the tied copy cannot be told from its owner.
        twice = clip_grad_norm_(parameters, math.inf, pp_group=mesh.get_group("pp"))
        if twice <= 1.001 * plain_result(2.0)[0]:
            wrong.append(f"{schedule}: counting tied copies twice went unnoticed")
    return wrong


def test_pipelines_clip_like_the_whole_model():
    assert run_ranks(check_clipped_pipelines, 4, timeout_s=120) == [[]] * 4


def plain_parameters_of_two_ranks(rank, world_size):
    """What both ranks see: a rank without gradients, one without parameters, NaN on one of them."""
    group = dist.group.WORLD
    (weight,) = with_grads([(3,)], seed=rank)
    results = {}
    if rank == 1:
        weight.grad = None
    results["no gradients"] = clip_grad_norm_([weight], 1.0, pp_group=group).item()
    results["no parameters"] = clip_grad_norm_(
        [weight] if rank == 0 else [], math.inf, pp_group=group
    ).item()
    weight.grad = torch.full((3,), math.nan if rank == 1 else 2.0, dtype=torch.float64)
    for norm_type in (2.0, math.inf):
        with pytest.raises(RuntimeError, match="is nan"):
            clip_grad_norm_([weight], 1.0, norm_type, error_if_nonfinite=True, pp_group=group)
    weight.grad = torch.full((3,), rank + 2.0, dtype=torch.float64)
    results["largest"] = clip_grad_norm_([weight], 1.0, math.inf, pp_group=group).item()
    results["clipped"] = weight.grad[0].item()
    return results


def test_every_rank_takes_part_and_sees_the_same_norm():
    zero, one = run_ranks(plain_parameters_of_two_ranks, 2)
    (weight,) = with_grads([(3,)], seed=0)
    assert zero["no gradients"] == one["no gradients"] == pytest.approx(weight.grad.norm().item())
    assert zero["no parameters"] == one["no parameters"] == pytest.approx(1.0)  # clipped before
    assert zero["largest"] == one["largest"] == 3.0
    assert zero["clipped"] == pytest.approx(2.0 / 3.0)
    assert one["clipped"] == pytest.approx(1.0)
