"""Values that leave a layer other than into the next one, such as the logits of its router.

They leave in the layer's result or through a forward hook on one of its modules. A stage that makes
them sends them along. On a later stage that reads them, the hollow layer gives them out again in
the same way and order, so that the model's own code collects them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from hfpp.errors import PipelineConfigError
from hfpp.runtime.paths import Path, map_tensors

if TYPE_CHECKING:
    from hfpp.runtime.trace import Call, Trace, Value


class Source(NamedTuple):
    """Where a layer makes a value: ``path`` in what its ``module`` returns ("": the layer)."""

    layer: int
    module: str
    path: Path


@dataclass(frozen=True, slots=True)
class Emission:
    """How one module of a layer gives values out, by its hooks or in the layer's result.

    Attributes:
        layer: index of the layer.
        module: FQN within the layer; empty for the layer itself.
        hooked: whether the module's own forward hooks get its result.
        output: its result, None in the place of every tensor.
        values: the values that are read outside of the layers.
    """

    layer: int
    module: str
    hooked: bool
    output: Any
    values: tuple[Value, ...]


def find_emissions(
    name: str,
    trace: Trace,
    layers_name: str,
    layer_calls: Mapping[int, Call],
    layer_of: Sequence[int],
    reader: int,
) -> tuple[Emission, ...]:
    """How what the node ``reader`` was made from left the layers, in the order of the run.

    Each of these values crosses every later cut, and a gradient of its size comes back: with a
    router's logits, ``[tokens, experts]`` per layer and microbatch.

    Args:
        name: the model's class, for errors.
        trace: with taps.
        layers_name: FQN of the list of layers.
        layer_calls: the calls of its elements, by index.
        layer_of: by node, the layer it was made in; -1 outside of all.
        reader: a node outside of the layers.

    Raises:
        PipelineConfigError: naming the class, if a value left in another way.
    """
    graph = trace.graph
    made = [node for node in range(len(graph)) if layer_of[node] >= 0]
    outside = graph.reach([reader], made)
    wanted = {p for node in outside for p in graph.parents[node] if layer_of[p] >= 0}
    returned = {value.key for value in trace.result}
    found: list[Emission] = []

    def note(layer: int, module: str, hooked: bool, output: Any, values: Sequence[Value]) -> None:
        own = tuple(v for v in values if v.node in wanted and v.key in returned)
        if own:
            bare = map_tensors(lambda _: None, output)
            found.append(Emission(layer, module, hooked, bare, own))

    for tap in trace.taps:
        layer = _layer_at(trace, tap.call, layers_name)
        whole = f"{layers_name}.{layer}"
        if f"{tap.module_name}.".startswith(f"{whole}."):
            note(layer, tap.module_name[len(whole) + 1 :], True, tap.output, tap.values)
    for layer, call in layer_calls.items():
        note(layer, "", False, call.output, call.outputs)
    covered = {value.node for emission in found for value in emission.values}
    once = {(e.layer, e.module, e.hooked) for e in found}
    if not wanted <= covered or len(once) < len(found):
        raise PipelineConfigError(
            f"{name} cannot be split with its routers' auxiliary loss: not all that the loss is "
            f"made from leaves the layers in their results or by forward hooks and is returned by "
            f"the model. Set config.output_router_logits=False to train without it."
        )
    return tuple(found)


def _layer_at(trace: Trace, call: int, layers_name: str) -> int:
    while call >= 0 and trace.calls[call].list_name != layers_name:
        call = trace.calls[call].parent
    return trace.calls[call].index if call >= 0 else -1
