"""Costs from shapes: what grows with what, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from hfpp.errors import PipelineConfigError
from hfpp.plan.costs import ModelCosts
from hfpp.plan.estimates.analytic_costs import model_costs
from hfpp.plan.estimates.hardware import HARDWARE, Hardware, find_hardware
from hfpp.plan.estimates.operations import layer_operations
from hfpp.plan.estimates.workload import Workload
from hfpp.plan.model.shape import ModelShape
from tests.plan.model.test_shape import DEEPSEEK_V3, LLAMA_405B, MIXTRAL, QWEN3_235B

H100 = HARDWARE["H100"]
# No memory traffic, no network: products alone.
PRODUCTS = Hardware(
    name="products",
    flops=1e12,
    memory_bandwidth=1e30,
    memory_bytes=1 << 40,
    node_bandwidth=1e30,
    network_bandwidth=1e30,
    latency=1e-30,
    efficiency=1.0,
)


def costs(config: dict[str, Any], hardware: Hardware = H100, **changes: Any) -> ModelCosts:
    settings: dict[str, Any] = {"microbatch_size": 1, "seq_len": 4096, **changes}
    return model_costs(ModelShape.from_config(config), hardware=hardware, **settings)


@pytest.mark.parametrize("config", [LLAMA_405B, DEEPSEEK_V3, MIXTRAL, QWEN3_235B])
def test_a_step_costs_six_flops_per_active_parameter_and_token(config: dict[str, Any]) -> None:
    """Attention's scores apart: short sequences have few."""
    shape = ModelShape.from_config(config)
    found = costs(config, PRODUCTS, seq_len=16)
    seconds = sum(layer.seconds for layer in found.layers) + found.head.seconds
    assert seconds * 1e12 == pytest.approx(6 * shape.active_parameters * 16, rel=0.01)


def test_parts_of_a_backward() -> None:
    layer = costs(LLAMA_405B, PRODUCTS).layers[0]
    shape = ModelShape.from_config(LLAMA_405B)
    work = Workload(microbatch_size=1, seq_len=4096)
    mixer = sum(op.flops for op in layer_operations(shape.layers[0], work) if op.kind == "mixer")
    pairs = 4096 * 4097 / 2
    assert mixer == 2 * pairs * 128 * (128 + 128)
    assert layer.backward_weight * 1e12 == pytest.approx(layer.forward * 1e12 - mixer)
    assert layer.backward_input * 1e12 == pytest.approx(layer.forward * 1e12 + 1.5 * mixer)
    selective = costs(LLAMA_405B, PRODUCTS, recompute="selective").layers[0]
    assert selective.backward_input * 1e12 == pytest.approx(layer.backward_input * 1e12 + mixer)
    full = costs(LLAMA_405B, PRODUCTS, recompute="full").layers[0]
    assert full.backward == pytest.approx(layer.backward + layer.forward)
    assert full.backward_weight == full.weight_bytes == 0  # torch would compute it again for each
    assert full.activation_bytes == 4096 * 16384 * 2
    assert full.activation_bytes < layer.activation_bytes / 10


def test_what_is_shared_among_ranks() -> None:
    whole, shared = costs(LLAMA_405B), costs(LLAMA_405B, tp=8)
    assert shared.layers[0].parameters == pytest.approx(whole.layers[0].parameters / 8, rel=1e-3)
    assert shared.layers[0].activation_bytes == whole.layers[0].activation_bytes // 8
    assert shared.boundary_bytes == whole.boundary_bytes // 8
    assert whole.layers[0].seconds / 8 < shared.layers[0].seconds < whole.layers[0].seconds / 3
    experts = costs(DEEPSEEK_V3, ep=64).layers[-1]
    routed = 256 * 3 * 7168 * 2048
    assert costs(DEEPSEEK_V3).layers[-1].parameters - experts.parameters == routed * 63 // 64
    halves = costs(LLAMA_405B, cp=2)
    assert halves.layers[0].parameters == whole.layers[0].parameters
    assert halves.layers[0].activation_bytes == whole.layers[0].activation_bytes // 2


def test_windows_shorten_attention() -> None:
    window = {**MIXTRAL, "model_type": "mistral", "num_local_experts": None}
    full = costs(window, PRODUCTS, seq_len=65536)
    short = costs({**window, "sliding_window": 4096}, PRODUCTS, seq_len=65536)
    assert short.layers[0].seconds < full.layers[0].seconds / 2


def test_an_embedding_is_no_product() -> None:
    found = costs(LLAMA_405B)
    assert 0 < found.embedding.forward < found.head.forward / 100
    assert found.embedding.parameters == found.head.parameters - 16384 == 128256 * 16384


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp": 3}, "tp .3. must divide the number of attention heads .128."),
        ({"ep": 3}, "ep .3. must divide the number of experts .256."),
        ({"cp": 3}, "cp .3. must divide seq_len .4096."),
        ({"seq_len": 0}, "seq_len .0. must be an integer of at least 1"),
        ({"microbatch_size": 1.5}, "microbatch_size .1.5. must be an integer"),
        ({"dtype": "int4"}, "dtype .'int4'. must be one of float64"),
        ({"recompute": "some"}, "recompute .'some'. must be one of none, selective, full"),
        ({"attention": "fast"}, "attention .'fast'. must be one of flash"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineConfigError, match=message):
        costs(DEEPSEEK_V3, **changes)


def test_hardware() -> None:
    assert find_hardware("h200").memory_bandwidth == 4.8e12
    with pytest.raises(PipelineConfigError, match="must be one of A100, H100, H200, B200"):
        find_hardware("TPU")
    with pytest.raises(PipelineConfigError, match=r"efficiency \(1.5\) must be between 0 and 1"):
        Hardware(
            name="mine",
            flops=1e12,
            memory_bandwidth=1e12,
            memory_bytes=1,
            node_bandwidth=1e9,
            network_bandwidth=1e9,
            efficiency=1.5,
        )
