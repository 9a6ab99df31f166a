"""Where a live model is cut: a partition as it was asked for, with the model's own layers."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from hfpp.errors import PipelineConfigError
from hfpp.plan.costs import ModelCosts, UnitCost
from hfpp.plan.estimates.analytic_costs import model_costs
from hfpp.plan.estimates.hardware import HARDWARE, Hardware
from hfpp.plan.model.shape import ModelShape
from hfpp.plan.partitioning.spec import PartitionKind, PartitionSpec
from hfpp.runtime.layer_list import list_of_layers
from hfpp.runtime.recomputed import is_recomputed

if TYPE_CHECKING:
    import torch

    from hfpp.plan.placement import Placement
    from hfpp.runtime.anatomy import Anatomy

__all__ = ["LivePartition", "live_costs"]

logger = logging.getLogger(__name__)

_USUAL_MICROBATCH, _USUAL_SEQ_LEN = 1, 4096
# A core with AVX2, in float32. Only its balance of products and memory traffic matters here.
_CPU = Hardware(
    name="CPU core",
    flops=80e9,
    memory_bandwidth=10e9,
    memory_bytes=16 << 30,
    node_bandwidth=5e9,
    network_bandwidth=1e9,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePartition:
    """A partition for a live model, and what `balanced` goes by.

    Attributes:
        spec: the partition.
        device: where the stages will run.
        costs: of the model, for `balanced`; None takes `live_costs`.
        microbatch_size: sequences, for `balanced` without costs.
        seq_len: tokens per sequence, likewise.
    """

    spec: PartitionSpec
    device: torch.device
    costs: ModelCosts | None = None
    microbatch_size: int | None = None
    seq_len: int | None = None

    def offsets(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        *,
        num_stages: int,
        pp_size: int,
        placement: Placement,
    ) -> tuple[int, ...]:
        """Gives each stage of the model its layers.

        Args:
            model: the whole model.
            anatomy: of the model.
            num_stages: of the pipeline.
            pp_size: its ranks.
            placement: which rank has which stages.

        Raises:
            PipelineConfigError: the partition does not fit the model or the number of stages.
        """
        needed: dict[str, Any] = {}
        if self.spec.kind is PartitionKind.BALANCED:
            needed["costs"] = self.costs or live_costs(
                model,
                anatomy,
                device=self.device,
                microbatch_size=self.microbatch_size,
                seq_len=self.seq_len,
            )
        elif self.spec.kind is PartitionKind.PARAMETERS:
            needed["parameters"] = _with_ends(_layer_parameters(model, anatomy), model, anatomy)
        elif self.spec.kind is PartitionKind.TYPE:
            needed["layer_types"] = [type(layer).__name__ for layer in _layers(model, anatomy)]
        return self.spec.offsets(
            num_layers=anatomy.num_layers,
            num_stages=num_stages,
            pp_size=pp_size,
            placement=placement,
            layers_name=anatomy.layers_name,
            **needed,
        )


def live_costs(
    model: nn.Module,
    anatomy: Anatomy,
    *,
    device: torch.device,
    microbatch_size: int | None = None,
    seq_len: int | None = None,
) -> ModelCosts:
    """What the parts of a live model cost: from its config, or else from its parameters.

    The config tells FLOPs and memory traffic, where its model type is known. Of any other model
    each part is taken to cost what its matrices do: two FLOPs per parameter and token forward, and
    twice that backward; nothing for what stands before the layers.

    Args:
        model: the whole model.
        anatomy: of the model.
        device: where the stages will run; its kind decides what memory traffic costs.
        microbatch_size: sequences; None takes 1.
        seq_len: tokens per sequence; None takes 4096.
    """
    batch, tokens = microbatch_size or _USUAL_MICROBATCH, seq_len or _USUAL_SEQ_LEN
    hardware = _hardware_of(device)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        try:
            shape = ModelShape.from_config(config.to_dict())
            costs = model_costs(
                shape,
                microbatch_size=batch,
                seq_len=tokens,
                hardware=hardware,
                recompute="full" if any(map(is_recomputed, model.modules())) else "none",
            )
        except PipelineConfigError as reason:
            logger.info("costs by parameters, as the config does not tell them: %s", reason)
        else:
            if len(costs.layers) == anatomy.num_layers:
                return costs
    second = 2 * batch * tokens / (hardware.flops * hardware.efficiency)
    outer = dict(model.named_parameters(remove_duplicate=False))
    last = anatomy.num_layers - 1
    head = sum(
        outer[name].numel()
        for name in anatomy.outer_parameters(last, last + 1)
        if name in outer and outer[name].ndim > 1
    )
    return ModelCosts(
        embedding=_by_parameters(0, second),
        layers=tuple(_by_parameters(n, second) for n in _layer_parameters(model, anatomy, 2)),
        head=_by_parameters(head, second),
        boundary_bytes=0,
        source="analytic",
    )


def _by_parameters(count: int, second: float) -> UnitCost:
    time = count * second
    return UnitCost(forward=time, backward_input=time, backward_weight=time, parameters=count)


def _hardware_of(device: torch.device) -> Hardware:
    if device.type == "cpu":
        return _CPU
    if device.type == "cuda":
        import torch

        name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
        return next((h for key, h in HARDWARE.items() if key in name), HARDWARE["H100"])
    return HARDWARE["H100"]


def _layers(model: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    return list(list_of_layers(model.get_submodule(anatomy.layers_name)))


def _layer_parameters(model: nn.Module, anatomy: Anatomy, least_axes: int = 0) -> list[int]:
    return [
        sum(p.numel() for p in layer.parameters() if p.ndim >= least_axes)
        for layer in _layers(model, anatomy)
    ]


def _with_ends(counts: list[int], model: nn.Module, anatomy: Anatomy) -> list[int]:
    """Parameters outside of the layers, on the first or last stage by what their forward uses."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    last = len(counts) - 1
    for layer in {0, last}:
        names = anatomy.outer_parameters(layer, layer + 1)
        counts[layer] += sum(parameters[name].numel() for name in names if name in parameters)
    return counts
