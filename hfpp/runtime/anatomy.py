"""A live model's parts and what crosses each possible cut, read off one hollow run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hfpp.errors import PipelineConfigError
from hfpp.runtime.auxiliary_term import AuxiliaryTerm
from hfpp.runtime.crossing import IDS, LayerCall, Slot, TensorLike
from hfpp.runtime.emission import Emission, Source
from hfpp.runtime.facts import Facts
from hfpp.runtime.paths import Path
from hfpp.runtime.trace import Call, Trace, Value

_MOST_RESIZED = 8  # runs of other sizes that an anatomy holds: each has a graph of its own


@dataclass(slots=True)
class Anatomy:
    """The parts of one model class with one config.

    Attributes:
        model_name: class name, for errors.
        layers_name: FQN of the list of layers.
        num_layers: its length.
        calls: how each called layer is called, by index.
        batch: batch size of the run, int; found in no size of the model.
        seq: sequence length of the run, int; found in no size of the model.
        dtype: floating dtype that the model had in the run.
        output: shape and dtype of the primary output (the logits, else the hidden state).
        ids_name: name of the forward's first argument.
        skeleton: the model without weights.
        flagged: whether the config asked for the routers' auxiliary loss.
        auxiliary: what the model adds to its loss besides that of its output; None for nothing.
        emissions: how what that is made from leaves the layers.
        returned: where the model's result has each of these values, by key.
        text: the same model's anatomy for token ids alone, where this one is for further arguments.
        kinds: what is known for further arguments, by their names and types (``input_kinds``).
    """

    model_name: str
    layers_name: str
    num_layers: int
    calls: dict[int, LayerCall]
    batch: int
    seq: int
    dtype: torch.dtype
    output: TensorLike
    ids_name: str
    skeleton: nn.Module
    flagged: bool
    auxiliary: AuxiliaryTerm | None
    emissions: tuple[Emission, ...]
    returned: Mapping[Any, tuple[Path, ...]]
    _output_nodes: tuple[int, ...]
    _trace: Trace
    _layer_calls: dict[int, Call]
    _facts: Facts
    _rerun: Callable[[nn.Module, int, int, AuxiliaryTerm | None], Anatomy]
    text: Anatomy | None = None
    kinds: dict[Any, Any] = field(default_factory=dict)
    _slots: dict[int, tuple[Slot, ...]] = field(default_factory=dict)
    _resized: dict[tuple[int, int, torch.dtype], Anatomy] = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> Anatomy:
        return self  # never changed once made; copies of a stage share it

    def slots(self, cut: int) -> tuple[Slot, ...]:
        """What crosses before layer ``cut``, the hidden state first.

        Raises:
            PipelineConfigError: if the model's forward cannot be cut there.
        """
        if cut not in self._slots:
            self._slots[cut] = self._find_slots(cut)
        return self._slots[cut]

    def size(self) -> int:
        """Nodes of the graph and modules of the skeleton: what an anatomy's memory grows with."""
        return len(self._trace.graph) + sum(1 for _ in self.skeleton.modules())

    def first_called(self, cut: int) -> int:
        """The first layer from ``cut`` on that the forward calls.

        Raises:
            PipelineConfigError: if it calls none.
        """
        if cut in self.calls:
            return cut
        order = sorted(self.calls)
        if not order or cut > order[-1]:
            raise PipelineConfigError(
                f"{self.model_name} does not call layer {cut} of {self.layers_name!r} or a later "
                f"one: begin the stage at one of {order}."
            )
        return next(index for index in order if index > cut)

    def unused_parameters(self) -> set[str]:
        """FQNs outside of the layer list that this forward does not use, such as encoders'."""
        prefix = f"{self.layers_name}."
        names = {n for n, _ in self.skeleton.named_parameters() if not n.startswith(prefix)}
        return names - self.outer_parameters(0, self.num_layers)

    def parameters_reached(self, start: int, stop: int) -> set[str]:
        """FQNs that a stage of layers ``start`` to ``stop - 1`` uses, inside and outside of layers.

        The first stage includes the model's way in, the last its way out. A module that is
        registered under several names shows with the first of them.
        """
        graph = self._trace.graph
        incoming = self._slots_before(start)
        known = {slot.key for slot in incoming}
        if stop >= self.num_layers:
            outputs = list(self._output_nodes)
        else:
            outputs = [s.key[0] for s in self.slots(stop) if s.key not in known and s.key != IDS]
        stops = {slot.key[0] for slot in incoming if slot.key != IDS}
        reached = graph.reach(outputs, stops)
        return {graph.labels[node] for node in reached if graph.kinds[node] == "param"}

    def outer_parameters(self, start: int, stop: int) -> set[str]:
        """Those of ``parameters_reached`` that are outside of the layer list."""
        prefix = f"{self.layers_name}."
        reached = self.parameters_reached(start, stop)
        return {name for name in reached if not name.startswith(prefix)}

    def slot_metas(
        self, cut: int, batch: int, seq: int, dtype: torch.dtype | None
    ) -> tuple[TensorLike, ...]:
        """Shapes and dtypes of ``slots(cut)`` for other sizes, and for a model cast to ``dtype``.

        One hidden state grows with batch and sequence. Anything beside it may grow otherwise (a
        window, a top-k), so it is read off a run of just these sizes.
        """
        exact = len(self.slots(cut)) > 1
        at = self._at_sizes(batch, seq, dtype, exact=exact)
        sizes = at._size_map(batch, seq)
        return tuple(
            TensorLike(tuple(sizes.get(n, n) for n in slot.shape), slot.dtype)
            for slot in at.slots(cut)
        )

    def output_meta(self, batch: int, seq: int, dtype: torch.dtype | None) -> TensorLike:
        """Shape and dtype of the model's output for other sizes."""
        at = self._at_sizes(batch, seq, dtype, exact=False)
        sizes = at._size_map(batch, seq)
        return TensorLike(tuple(sizes.get(n, n) for n in at.output.shape), at.output.dtype)

    @property
    def trace(self) -> Trace:
        """The run that this was read off."""
        return self._trace

    def layer_of_nodes(self) -> list[int]:
        """For every node of the run the layer it was made in; -1 outside of all."""
        return self._facts.layer

    def is_computed(self, node: int) -> bool:
        """Whether a node depends on parameters or layers, and so is real on no other stage."""
        return self._facts.computed[node]

    def sizes_from(self, hidden: torch.Tensor, cut: int) -> tuple[int, int]:
        """Batch size and sequence length, read off the hidden state received at ``cut``."""
        shape = self.slots(cut)[0].shape
        return hidden.shape[shape.index(self.batch)], hidden.shape[shape.index(self.seq)]

    def _size_map(self, batch: int, seq: int) -> dict[int, int]:
        if (batch, seq) == (self.batch, self.seq):
            return {}
        return {self.batch: batch, self.seq: seq, self.batch * self.seq: batch * seq}

    def in_dtype(self, dtype: torch.dtype | None) -> Anatomy:
        """The same for the model cast to ``dtype``; None: as it was."""
        return self._at_sizes(self.batch, self.seq, dtype, exact=False)

    def _at_sizes(self, batch: int, seq: int, dtype: torch.dtype | None, *, exact: bool) -> Anatomy:
        dtype = dtype or self.dtype
        if dtype == self.dtype and (not exact or (batch, seq) == (self.batch, self.seq)):
            return self
        key = (batch, seq, dtype) if exact else (self.batch, self.seq, dtype)
        if key not in self._resized:
            skeleton = self.skeleton
            if dtype != self.dtype:
                skeleton = copy.deepcopy(skeleton).to(dtype)
            while len(self._resized) >= _MOST_RESIZED:
                del self._resized[next(iter(self._resized))]
            self._resized[key] = self._rerun(skeleton, key[0], key[1], self.auxiliary)
        return self._resized[key]

    def _slots_before(self, start: int) -> tuple[Slot, ...]:
        return self.slots(start) if start > 0 else ()

    def _find_slots(self, cut: int) -> tuple[Slot, ...]:
        facts, order = self._facts, sorted(self._layer_calls)
        wanted, cut = cut, self.first_called(cut)
        hidden = _at(self._layer_calls[cut].inputs, self.calls[cut].hidden_path)
        found: dict[Any, Value] = {hidden.key: hidden}
        uses: dict[Any, list[tuple[int, Path]]] = {hidden.key: []}
        for layer in order:
            if layer < cut:
                continue
            for value in self._layer_calls[layer].inputs:
                crosses = facts.computed[value.node] and facts.level[value.node] < cut
                if crosses and self._is_made_again(cut, value.node):
                    continue
                if crosses or value.key == hidden.key:
                    found.setdefault(value.key, value)
                    uses.setdefault(value.key, []).append((layer, value.path))
        first_uses: dict[int, int] = {}
        for key, places in uses.items():
            first_uses.setdefault(found[key].node, places[0][0])
        sources: dict[Any, Source] = {}
        for emission in self.emissions:
            if emission.layer < cut:
                for value in emission.values:
                    found.setdefault(value.key, value)
                    source = Source(emission.layer, emission.module, value.path)
                    sources.setdefault(value.key, source)
        emitted = {found[key].node for key in sources}
        read = self._read_outside(cut, first_uses, emitted)
        slots = [
            Slot(
                key,
                value.shape,
                value.dtype,
                tuple(uses.get(key, ())),
                value.node in read,
                sources.get(key),
            )
            for key, value in found.items()
        ]
        shape = slots[0].shape
        if self.text is not None:  # further arguments come with the ids, on every stage
            ids_cross = any(slot.key == IDS for slot in self.text.slots(wanted))
        else:
            ids_cross = facts.reads_ids or self.batch not in shape or self.seq not in shape
        if ids_cross:
            slots.append(Slot(IDS, (self.batch, self.seq), torch.int64, ()))
        return tuple(slots)

    def _is_made_again(self, cut: int, node: int) -> bool:
        """Whether a stage makes a value by itself, from the arguments of its first layer.

        A loop that collects states makes it between the layers, after the first was called.
        """
        call = self._layer_calls[cut]
        if node < call.first_node:
            return False
        made_from = self._trace.graph.reach([node], {value.node for value in call.inputs})
        return not any(n < call.first_node and self._facts.flows[n] for n in made_from)

    def _read_outside(self, cut: int, first_uses: Mapping[int, int], emitted: set[int]) -> set[int]:
        """Received values that code between or after the layers behind the cut reads, by node.

        A layer's argument can be written where that code looks for it, once the layer is called. Of
        anything else no stage but its own knows more than that it exists.

        Args:
            cut: the first layer behind the cut.
            first_uses: the values that cross, each with the first layer behind the cut that takes
                it.
            emitted: the values that hollow layers give out again.

        Raises:
            PipelineConfigError: for anything else.
        """
        graph, facts, first = self._trace.graph, self._facts, self._layer_calls[cut].first_node
        read = set[int]()
        edges = [
            (node, parent)
            for node, parent in facts.outer_edges
            if node >= first and (parent < first or parent in first_uses) and parent not in emitted
        ]
        if not edges:
            return read  # as nearly always: the graph need not be walked for every cut
        reached = graph.reach(self._output_nodes, {*first_uses, *emitted})
        for node, parent in edges:
            if node not in reached:
                continue
            layer = first_uses.get(parent)
            if layer is None or node < self._layer_calls[layer].first_node:
                raise PipelineConfigError(
                    f"{self.model_name} cannot be cut before layer {cut} of "
                    f"{self.layers_name!r}: its forward uses a value made before that layer "
                    f"outside of the layers ({graph.labels[node]} reads the result of "
                    f"{graph.labels[parent]}). Keep the layers on one stage (pipeline size 1), "
                    f"or cut elsewhere."
                )
            read.add(parent)
        return read


def _at(values: list[Value], path: Path) -> Value:
    return next(value for value in values if value.path == path)
