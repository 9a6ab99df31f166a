"""Static shapes of stages, and their reset for another length, without losing gradients."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from hfpp.errors import PipelineConfigError
from hfpp.plan.placement import Placement
from hfpp.plan.schedules import SCHEDULES
from hfpp.runtime.build_schedule import build_pipeline_schedule
from hfpp.runtime.split_model import split_model_into_stages
from hfpp.runtime.stage_shapes import precompute_stage_shapes, reset_pp_stage_shapes
from tests.ranks import run_ranks
from tests.reference.torch_orders import TORCH_NAMES
from tests.runtime.plain_stages import (
    HIDDEN,
    SEQ,
    VOCAB,
    Config,
    Model,
    assert_gradients,
    batch,
    local_parts,
    local_stages,
    mean_loss,
    reference,
)

N, MICROBATCH = 4, 2
ROWS = N * MICROBATCH


class Stage:
    """What torch's stages of 2.12 and later have and the function touches."""

    def __init__(self, submod: nn.Module, *, is_first: bool = False, is_last: bool = False) -> None:
        self.submod, self.is_first, self.is_last = submod, is_first, is_last


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Catches the metas on their way to torch: (inputs, outputs) of each stage."""
    found: list[tuple[Any, Any]] = []

    def record(stage: object, inputs: Any, outputs: Any) -> bool:
        found.append((inputs, outputs))
        return True

    monkeypatch.setattr("hfpp.runtime.torch_compat.set_static_metadata", record)
    return found


def described(tensors: tuple[torch.Tensor, ...]) -> list[tuple[tuple[int, ...], torch.dtype, bool]]:
    assert all(tensor.is_meta for tensor in tensors)
    return [(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors]


def test_default_shapes_of_first_middle_and_last_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    found = recorded(monkeypatch)
    stages = [
        Stage(Model(range(3)).bfloat16(), is_first=True),
        Stage(Model(range(3, 5)).double()),
        Stage(Model(range(5, 8)), is_last=True),
    ]
    assert precompute_stage_shapes(stages, Config(), 2, 7) == 14  # type: ignore[arg-type]
    (first_in, first_out), (middle_in, middle_out), (last_in, last_out) = found
    assert described(first_in) == [((2, 7), torch.int64, False)]
    assert described(first_out) == [((2, 7, HIDDEN), torch.bfloat16, True)]
    assert described(middle_in) == [((2, 7, HIDDEN), torch.float64, True)]
    assert described(middle_out) == [((2, 7, HIDDEN), torch.float64, True)]
    assert described(last_in) == [((2, 7, HIDDEN), torch.float32, True)]
    assert described(last_out) == [((2, 7, VOCAB), torch.float32, True)]


def test_dtype_is_the_given_one_and_bfloat16_without_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = recorded(monkeypatch)
    precompute_stage_shapes([Stage(nn.Identity())], Config(), 1, 2)  # type: ignore[list-item]
    precompute_stage_shapes([Stage(Model(range(3, 4)))], Config(), 1, 2, torch.float16)  # type: ignore[list-item]
    assert [outputs[0].dtype for _, outputs in found] == [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("flag", "width"), [(True, HIDDEN), (False, VOCAB), (1, VOCAB)])
def test_a_head_counts_unless_the_stage_returns_hidden_states(
    monkeypatch: pytest.MonkeyPatch, flag: Any, width: int
) -> None:
    found = recorded(monkeypatch)
    module = Model(range(7, 8))
    module._pp_return_hidden_states = flag
    precompute_stage_shapes([Stage(module, is_last=True)], Config(), 2, 3)  # type: ignore[list-item]
    assert tuple(found[0][1][0].shape) == (2, 3, width)


class _Hooked(nn.Module):
    """A model that sends two values, flat over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def get_pipeline_stage_metas(self, **given: Any) -> Any:
        self.calls.append(given)
        tokens = given["microbatch_size"] * given["seq_len"]
        hidden = torch.empty(tokens + 1, HIDDEN, dtype=given["dtype"], device="meta")
        index = torch.empty(tokens, dtype=torch.int32, device="meta")
        return hidden, (hidden, index)


def test_the_models_hook_gives_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = recorded(monkeypatch)
    module = _Hooked()
    count = precompute_stage_shapes([Stage(module)], object(), 2, 3, torch.float32)  # type: ignore[list-item]
    assert count == 7  # [tokens, hidden] counts its first dimension
    assert module.calls == [
        {"is_first": False, "microbatch_size": 2, "seq_len": 3, "dtype": torch.float32}
    ]
    inputs, outputs = found[0]
    assert described(inputs) == [((7, HIDDEN), torch.float32, True)]
    assert described(outputs) == [
        ((7, HIDDEN), torch.float32, True),
        ((6,), torch.int32, False),
    ]


def test_a_torch_without_static_shapes_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hfpp"):
        count = precompute_stage_shapes([Stage(Model(range(2)), is_first=True)], Config(), 3, 5)  # type: ignore[list-item]
    assert count == 15
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "inferred on the first step" in caplog.text


def test_a_stage_of_torch_2_11_is_told_its_own_way() -> None:
    stage = SimpleNamespace(
        submod=Model(range(2)), is_first=True, is_last=False, inputs_meta=None, _outputs_meta=None
    )

    def configure(outputs: Any) -> None:
        assert stage._outputs_meta is None
        stage._outputs_meta = outputs

    stage._configure_outputs_meta = configure
    assert precompute_stage_shapes([stage], Config(), 2, 5) == 10  # type: ignore[list-item]
    assert precompute_stage_shapes([stage], Config(), 2, 9) == 18  # type: ignore[list-item]
    assert tuple(stage.inputs_meta[0].shape) == (2, 9)
    assert tuple(stage._outputs_meta[0].shape) == (2, 9, HIDDEN)


@pytest.mark.parametrize("size", [(0, 5), (2, 0), (True, 5), (2, 1.5)])
def test_sizes_are_checked(size: tuple[Any, Any]) -> None:
    name = "microbatch_size" if size[1] == 5 else "seq_len"
    with pytest.raises(PipelineConfigError, match=name):
        precompute_stage_shapes([], Config(), *size)


def test_no_stages_count_the_batch() -> None:
    assert precompute_stage_shapes([], Config(), 2, 5) == 10


def _llama_metas(rank: int, pp_size: int, dtype: torch.dtype | None) -> list[tuple[Any, Any]]:
    """What the stages of a split model say of themselves; with a config that says nothing."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    ).bfloat16()
    mesh = init_device_mesh("cpu", (pp_size,), mesh_dim_names=("pp",))
    stages, _ = split_model_into_stages(model, mesh, "pp", "ZBVZeroBubble", torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        found = recorded(patch)
        assert precompute_stage_shapes(stages, object(), 2, 7, dtype) == 14
    return [(described(inputs), described(outputs)) for inputs, outputs in found]


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_split_models_give_their_own_shapes(dtype: torch.dtype | None) -> None:
    (first, last), (second, third) = run_ranks(_llama_metas, 2, args=(dtype,))
    hidden = [((2, 7, 16), dtype or torch.bfloat16, True)]
    assert first == ([((2, 7), torch.int64, False)], hidden)
    assert second == third == (hidden, hidden)
    assert last == (hidden, [((2, 7, VOCAB), dtype or torch.bfloat16, True)])


# Over real ranks


def _indices(name: str, rank: int, pp_size: int) -> tuple[list[int], int]:
    spec = SCHEDULES[name]
    num_stages = pp_size * (spec.stages_per_rank or 2)
    if spec.placement is Placement.V:
        return [rank, num_stages - 1 - rank], num_stages
    return list(range(rank, num_stages, pp_size)), num_stages


def _step(schedule: Any, stages: list[PipelineStage], data: Any) -> list[float]:
    ids, target, shift = data
    args = (ids,) if any(stage.is_first for stage in stages) else ()
    losses: list[torch.Tensor] = []
    schedule.step(*args, target=target, losses=losses, shift=shift)
    return [loss.item() for loss in losses]


def _two_lengths(rank: int, pp_size: int, name: str, static: bool) -> int:
    data = [batch(ROWS, seed=1), batch(ROWS, seed=2, seq=SEQ + 6), batch(ROWS, seed=3, seq=2)]
    expected = reference(data, N)
    indices, num_stages = _indices(name, rank, pp_size)
    stages = local_stages(indices, num_stages, static=(MICROBATCH, SEQ) if static else None)
    schedule = build_pipeline_schedule(None, name, MICROBATCH, ROWS, stages, mean_loss)
    losses = _step(schedule, stages, data[0])
    for item in data[1:]:
        length = item[0].shape[1]
        count = reset_pp_stage_shapes(schedule, stages, Config(), MICROBATCH, length)
        assert count == MICROBATCH * length
        losses += _step(schedule, stages, item)
    if any(stage.is_last for stage in stages):
        assert losses == pytest.approx(expected.losses, rel=1e-9)
    return assert_gradients(stages, expected.gradients)


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", [*TORCH_NAMES, "ZBH2"])
def test_reset_between_lengths_keeps_gradients(name: str, static: bool) -> None:
    assert sum(run_ranks(_two_lengths, 2, args=(name, static))) == 35


@pytest.mark.parametrize("name", ["1F1B", "InterleavedZeroBubble"])
def test_reset_over_four_ranks(name: str) -> None:
    assert sum(run_ranks(_two_lengths, 4, args=(name, True))) == 35


def _a_failed_reset(rank: int, pp_size: int) -> None:
    data = batch(ROWS, seed=1)
    indices, num_stages = _indices("1F1B", rank, pp_size)
    stages = local_stages(indices, num_stages, static=(MICROBATCH, SEQ))
    schedule = build_pipeline_schedule(None, "1F1B", MICROBATCH, ROWS, stages, mean_loss)
    _step(schedule, stages, data)
    with pytest.raises(PipelineConfigError, match="seq_len"):
        reset_pp_stage_shapes(schedule, stages, Config(), MICROBATCH, 0)
    with pytest.raises(ValueError, match="hidden_size"):
        reset_pp_stage_shapes(schedule, stages, object(), MICROBATCH, 9)
    _step(schedule, stages, data)  # as before
    assert_gradients(stages, reference([data, data], N).gradients)


def test_a_reset_that_fails_leaves_the_schedule_as_it_was() -> None:
    run_ranks(_a_failed_reset, 2)


def _static_needs_no_inference(rank: int, pp_size: int, name: str, static: bool) -> int:
    """How often the stages' forwards run in one step beyond once per microbatch."""
    indices, num_stages = _indices(name, rank, pp_size)
    stages = local_stages(indices, num_stages, static=(MICROBATCH, SEQ) if static else None)
    schedule = build_pipeline_schedule(None, name, MICROBATCH, ROWS, stages, mean_loss)
    calls = [0]
    for stage in stages:
        stage.submod.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    _step(schedule, stages, batch(ROWS, seed=1))
    return calls[0] - N * len(stages)


def test_static_shapes_run_no_extra_forward() -> None:
    assert run_ranks(_static_needs_no_inference, 2, args=("Interleaved1F1B", True)) == [0, 0]
    assert run_ranks(_static_needs_no_inference, 2, args=("Interleaved1F1B", False)) == [2, 2]


def _fsdp(rank: int, world_size: int, name: str, static: bool) -> int:
    """2 x 2: pipeline by data parallel; lengths, an eval and accumulation in between."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    pp_rank, dp_rank = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    indices, num_stages = _indices(name, pp_rank, 2)
    stages = []
    for index, part in local_parts(indices, num_stages).items():
        for layer in part.layers.values():
            fully_shard(layer, mesh=mesh["dp"], reshard_after_forward=False)
        fully_shard(part, mesh=mesh["dp"], reshard_after_forward=False)
        group = mesh.get_group("pp")
        stages.append(PipelineStage(part, index, num_stages, torch.device("cpu"), group=group))
    if static:
        precompute_stage_shapes(stages, Config(), MICROBATCH, SEQ)
    schedule = build_pipeline_schedule(None, name, MICROBATCH, ROWS, stages, mean_loss)

    def data(seed: int, seq: int) -> list[Any]:
        return [batch(ROWS, seed=10 * seed + dp, seq=seq) for dp in range(2)]

    steps = [data(1, SEQ), data(2, SEQ), data(3, SEQ + 6)]
    _step(schedule, stages, steps[0][dp_rank])
    ids, target, shift = steps[0][dp_rank]
    schedule.eval(*((ids,) if stages[0].is_first else ()), target=target, shift=shift)
    _step(schedule, stages, steps[1][dp_rank])
    reset_pp_stage_shapes(schedule, stages, Config(), MICROBATCH, SEQ + 6)
    _step(schedule, stages, steps[2][dp_rank])

    expected = reference([item for pair in steps for item in pair], N).gradients
    count = 0
    for stage in stages:
        for parameter_name, parameter in stage.submod.named_parameters():
            gradient = parameter.grad
            assert isinstance(gradient, DTensor), parameter_name
            wanted = expected[parameter_name] / 2  # FSDP averages over its ranks
            error = (gradient.full_tensor() - wanted).norm() / wanted.norm()
            assert error < 1e-9, f"stage {stage.stage_index}: {parameter_name} off by {error:.3g}"
            count += 1
    return count


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_fsdp_gradients_survive_reset_and_eval(name: str, static: bool) -> None:
    assert sum(run_ranks(_fsdp, 4, args=(name, static))) == 2 * 35
