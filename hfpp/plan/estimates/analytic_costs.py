"""Seconds and bytes of a model's parts, from its shape and what the hardware can do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from hfpp.errors import PipelineConfigError
from hfpp.plan.costs import ModelCosts, UnitCost
from hfpp.plan.estimates.activations import head_bytes, layer_bytes, split_backward_bytes
from hfpp.plan.estimates.local_parameters import (
    embedding_parameters,
    head_parameters,
    layer_parameters,
)
from hfpp.plan.estimates.operations import (
    Operation,
    embedding_operations,
    head_operations,
    layer_operations,
)
from hfpp.plan.estimates.traffic import layer_traffic
from hfpp.plan.estimates.workload import Workload
from hfpp.plan.model.layer_shape import Attention, Experts, LayerShape

if TYPE_CHECKING:
    from hfpp.plan.estimates.hardware import Hardware
    from hfpp.plan.model.shape import ModelShape

__all__ = ["model_costs", "workload_costs"]


def model_costs(
    shape: ModelShape,
    *,
    microbatch_size: int,
    seq_len: int,
    hardware: Hardware,
    dtype: str | None = None,
    tp: int = 1,
    ep: int = 1,
    cp: int = 1,
    recompute: Literal["none", "selective", "full"] = "none",
    attention: Literal["flash", "sdpa", "eager"] = "flash",
) -> ModelCosts:
    """What the parts of a model cost each rank of their stage, per microbatch.

    Each group of operations takes as long as its FLOPs or its memory traffic, whichever is longer;
    what tensor, expert and context parallelism send is added. Routing is taken as balanced.

    Args:
        shape: the model.
        microbatch_size: sequences.
        seq_len: tokens per sequence.
        hardware: what each rank runs on.
        dtype: of weights and activations; None: the config's, else bfloat16.
        tp: ranks that share each matrix (with sequence parallelism between them).
        ep: ranks that share the experts.
        cp: ranks that share each sequence.
        recompute: what is computed again for the backward; its time is the backward's. Whole
            layers are not split into inputs and weights then: autograd would compute them again
            for each.
        attention: the kernels of attention.

    Returns:
        Seconds, parameters and bytes of embedding, layers and head, as one rank has them.

    Raises:
        PipelineConfigError: a size below 1, an unknown choice, or more ranks than there is to
            share.

    Example:
        >>> from hfpp.plan.estimates.hardware import HARDWARE
        >>> from hfpp.plan.model.shape import ModelShape
        >>> shape = ModelShape.from_config(
        ...     {
        ...         "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        ...         "num_hidden_layers": 32, "num_attention_heads": 32,
        ...         "num_key_value_heads": 8, "vocab_size": 128256,
        ...     }
        ... )
        >>> costs = model_costs(shape, microbatch_size=1, seq_len=8192, hardware=HARDWARE["H100"])
        >>> round(costs.head.seconds / costs.layers[0].seconds, 1)
        2.7
    """
    work = Workload(
        microbatch_size=microbatch_size,
        seq_len=seq_len,
        dtype=(shape.dtype or "bfloat16") if dtype is None else dtype,
        tp=tp,
        ep=ep,
        cp=cp,
        recompute=recompute,
        attention=attention,
    )
    return workload_costs(shape, work, hardware)


def workload_costs(shape: ModelShape, work: Workload, hardware: Hardware) -> ModelCosts:
    """What `model_costs` returns, for a workload.

    Raises:
        PipelineConfigError: more ranks than there is to share.
    """
    _check_shares(shape, work)
    logits = work.tokens / work.tp * shape.vocab_size * work.width
    made: dict[int, UnitCost] = {}
    for layer in shape.layers:
        if id(layer) not in made:
            made[id(layer)] = _layer_cost(layer, work, hardware)
    costs = ModelCosts(
        embedding=_unit(
            embedding_operations(shape, work),
            hardware,
            parameters=embedding_parameters(shape, work),
            activation_bytes=round(work.tokens * 8),  # the ids
        ),
        layers=tuple(made[id(layer)] for layer in shape.layers),
        head=_unit(
            head_operations(shape, work),
            hardware,
            parameters=head_parameters(shape, work),
            activation_bytes=head_bytes(shape, work),
            weight_bytes=head_bytes(shape, work) + round(logits),
        ),
        boundary_bytes=round(work.tokens / work.tp * shape.hidden_size * work.width),
        source="analytic",
    )
    return costs.in_one_piece() if work.has_whole_backwards else costs


def _check_shares(shape: ModelShape, work: Workload) -> None:
    for layer in shape.layers:
        for mixer in layer.mixers:
            if isinstance(mixer, Attention) and mixer.heads % work.tp:
                raise PipelineConfigError(
                    f"tp ({work.tp}) must divide the number of attention heads ({mixer.heads}): "
                    "use fewer ranks"
                )
        for part in layer.feed_forwards:
            if isinstance(part, Experts) and part.count % work.ep:
                raise PipelineConfigError(
                    f"ep ({work.ep}) must divide the number of experts ({part.count}): use fewer "
                    "ranks"
                )
    if work.seq_len % work.cp:
        raise PipelineConfigError(
            f"cp ({work.cp}) must divide seq_len ({work.seq_len}): use fewer ranks"
        )


def _layer_cost(layer: LayerShape, work: Workload, hardware: Hardware) -> UnitCost:
    operations = list(layer_operations(layer, work))
    again = [op for op in operations if work.recompute == "full" or op.kind == "mixer"]
    sent = _sent_seconds(layer, work, hardware)
    kept = layer_bytes(layer, work)
    return _unit(
        operations,
        hardware,
        again=again if work.recompute != "none" else (),
        sent=sent,
        sent_again=sent if work.recompute == "full" else 0.0,
        parameters=layer_parameters(layer, work),
        activation_bytes=kept,
        weight_bytes=kept + split_backward_bytes(layer, work),  # torch frees nothing in between
    )


def _unit(
    operations: Iterable[Operation],
    hardware: Hardware,
    *,
    again: Iterable[Operation] = (),
    sent: float = 0.0,
    sent_again: float = 0.0,
    parameters: int,
    activation_bytes: int,
    weight_bytes: int = 0,
) -> UnitCost:
    peak = hardware.flops * hardware.efficiency
    rate = hardware.memory_bandwidth * hardware.bandwidth_efficiency

    def seconds(flops: float, moved: float) -> float:
        return max(flops / peak, moved / rate)

    operations = list(operations)
    forward = sum(seconds(op.flops, op.bytes_moved) for op in operations)
    repeated = sum(seconds(op.flops, op.bytes_moved) for op in again)
    backward = sum(seconds(op.backward_flops, op.backward_bytes) for op in operations)
    weight = sum(seconds(op.weight_flops, op.weight_bytes) for op in operations)
    return UnitCost(
        forward=forward + sent,
        backward_input=backward + repeated + sent + sent_again,
        backward_weight=weight,
        parameters=parameters,
        activation_bytes=activation_bytes,
        weight_bytes=weight_bytes,
    )


def _sent_seconds(layer: LayerShape, work: Workload, hardware: Hardware) -> float:
    """What a layer's forward sends within its stage, as long as it takes; the backward as much."""
    near = hardware.node_bandwidth * hardware.bandwidth_efficiency
    far = hardware.network_bandwidth * hardware.bandwidth_efficiency
    widths = (work.tp, work.ep * work.tp, work.cp * work.tp)  # tensor ranks are neighbours
    total = 0.0
    for sent, ranks in zip(layer_traffic(layer, work), widths, strict=True):
        rate = near if ranks <= hardware.gpus_per_node else far
        total += sent.nbytes / rate + sent.messages * hardware.latency
    return total
