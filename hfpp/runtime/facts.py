"""What follows from the data flow of a hollow run, value by value."""

from __future__ import annotations

from dataclasses import dataclass

from hfpp.errors import PipelineConfigError
from hfpp.runtime.trace import Trace


@dataclass(slots=True)
class Facts:
    """What follows from the graph, per node.

    Attributes:
        layer: the layer it was made in; -1 outside of all.
        level: the latest layer that it depends on; -1 for none.
        computed: whether it depends on parameters or layers.
        flows: whether a later stage could not redo it.
        outer_edges: operators outside of the layers, each with a parent that flows.
        reads_ids: whether the model's own code needs the values of the ids on every stage.
    """

    layer: list[int]
    level: list[int]
    computed: list[bool]
    flows: list[bool]
    outer_edges: list[tuple[int, int]]
    reads_ids: bool


def find_facts(name: str, trace: Trace, layers_name: str, ids_name: str) -> Facts:
    """Read the facts off ``trace``.

    Args:
        name: the model's class, for errors.
        trace: of a hollow run.
        layers_name: FQN of the list of layers.
        ids_name: name of the argument that took the token ids.

    Raises:
        PipelineConfigError: if the model's code branches on a computed value outside of the layers.
    """
    graph = trace.graph
    inside: list[int] = []
    for call in trace.calls:
        own = call.index if call.list_name == layers_name else -1
        inside.append(own if own >= 0 or call.parent < 0 else inside[call.parent])
    size = len(graph)
    layer = [
        inside[c] if c >= 0 and k == "op" else -1
        for c, k in zip(graph.calls, graph.kinds, strict=True)
    ]
    level, param, ids, given = [-1] * size, [False] * size, [False] * size, [False] * size
    for node in range(size):
        parents = graph.parents[node]
        level[node] = max([layer[node], *(level[p] for p in parents)])
        param[node] = graph.kinds[node] == "param" or any(param[p] for p in parents)
        ids[node] = node == trace.input_nodes[ids_name] or any(ids[p] for p in parents)
        given[node] = graph.kinds[node] == "input" or any(given[p] for p in parents)
    computed = [level[n] >= 0 or param[n] for n in range(size)]
    flows = [level[n] >= 0 or (param[n] and given[n]) for n in range(size)]

    def ids_only(node: int) -> bool:
        return ids[node] and not computed[node]

    arguments = (
        value.node for call in trace.calls if call.list_name == layers_name for value in call.inputs
    )
    reads = [node for node, call in trace.reads if call < 0 or inside[call] < 0]
    for node in reads:
        if flows[node]:
            raise PipelineConfigError(
                f"{name} cannot be split: its forward branches in Python on the value of a "
                f"computed tensor ({graph.labels[node]}) outside of the layers, which only one "
                f"stage would know. Keep the layers on one stage (pipeline size 1)."
            )
    outside_use = any(
        layer[node] < 0
        and computed[node]
        and any(ids_only(p) for p in graph.parents[node])
        and node > min(c.first_node for c in trace.calls if c.list_name == layers_name)
        for node in range(size)
    )
    reads_ids = any(map(ids_only, arguments)) or any(map(ids_only, reads)) or outside_use
    outer_edges = [
        (node, parent)
        for node in range(size)
        if layer[node] < 0 and graph.kinds[node] == "op"
        for parent in graph.parents[node]
        if flows[parent]
    ]
    return Facts(layer, level, computed, flows, outer_edges, reads_ids)
