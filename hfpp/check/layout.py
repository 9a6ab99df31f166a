"""What crosses each cut of a model, and what each stage owns, in words and bytes."""

from __future__ import annotations

import torch
from torch import nn

from hfpp.check.compare import argument_name
from hfpp.check.report import Crossing, Cut, StagePart
from hfpp.runtime.anatomy import Anatomy
from hfpp.runtime.crossing import IDS, Slot
from hfpp.runtime.ownership import Ownership
from hfpp.runtime.split_model import uniform_ownership


def describe_layout(
    model: nn.Module, anatomy: Anatomy, num_stages: int, *, rows: int, tokens: int
) -> tuple[tuple[Cut, ...], tuple[StagePart, ...]]:
    """The cuts and stages of ``model`` for microbatches of ``[rows, tokens]``.

    Raises:
        PipelineConfigError: if it cannot be cut so.
    """
    ownership = uniform_ownership(model, anatomy, num_stages)
    cuts = tuple(_cut(anatomy, layers.start, rows, tokens) for layers in ownership.layers[1:])
    return cuts, _stages(model, anatomy, ownership)


def _cut(anatomy: Anatomy, layer: int, rows: int, tokens: int) -> Cut:
    slots = anatomy.slots(layer)
    metas = anatomy.slot_metas(layer, rows, tokens, None)
    return Cut(
        layer=layer,
        crossings=tuple(
            Crossing(
                description=_describe(anatomy, slot, position),
                shape=meta.shape,
                dtype=str(meta.dtype).removeprefix("torch."),
                num_bytes=torch.Size(meta.shape).numel() * meta.dtype.itemsize,
            )
            for position, (slot, meta) in enumerate(zip(slots, metas, strict=True))
        ),
    )


def _describe(anatomy: Anatomy, slot: Slot, position: int) -> str:
    if slot.key == IDS:
        return "token ids"
    if position == 0:
        return "hidden state"
    if not slot.uses:
        assert slot.source is not None
        return f"router logits of layer {slot.source.layer} ({slot.source.module or 'its result'})"
    layer, path = slot.uses[0]
    module = anatomy.skeleton.get_submodule(f"{anatomy.layers_name}.{layer}")
    others = len({index for index, _ in slot.uses}) - 1
    more = f" and {others} more" if others else ""
    return f"{argument_name(module, path)} of layer {layer}{more}"


def _stages(model: nn.Module, anatomy: Anatomy, ownership: Ownership) -> tuple[StagePart, ...]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{anatomy.layers_name}."
    parts = []
    for index, layers in enumerate(ownership.layers):
        held = [
            name
            for name in parameters
            if name in ownership.outer[index]
            or (name.startswith(prefix) and int(name[len(prefix) :].split(".")[0]) in layers)
        ]
        copies = ownership.copies(index)
        own = [name for name in held if name not in copies]
        tensors = {id(parameters[name]): parameters[name] for name in own}.values()
        parts.append(
            StagePart(
                index=index,
                first_layer=layers.start,
                num_layers=len(layers),
                parameters=tuple(own),
                num_parameters=sum(t.numel() for t in tensors),
                num_bytes=sum(t.numel() * t.element_size() for t in tensors),
                copies=tuple(name for name in held if name in copies),
            )
        )
    return tuple(parts)
