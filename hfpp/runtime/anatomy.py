"""A live model's parts and what crosses each possible cut, read off one hollow run."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hfpp.errors import PipelineConfigError
from hfpp.runtime.anatomy_cache import AnatomyCache
from hfpp.runtime.auxiliary_term import (
    AuxiliaryTerm,
    asks_for_auxiliary_loss,
    find_auxiliary_term,
    flagged_configs,
)
from hfpp.runtime.emission import Emission, Source, find_emissions
from hfpp.runtime.paths import Key, Path
from hfpp.runtime.skeleton import meta_skeleton
from hfpp.runtime.trace import Call, Trace, Value, run_hollow

IDS = "input ids"
"""Key of the slot that carries the token ids themselves."""

_ROWS = (3, 5, 7, 2, 11)
_ROUND_ROWS = (8, 24, 40, 56)  # where several rows are one sample, such as one per codebook
_MOST_RESIZED = 8  # runs of other sizes that an anatomy holds: each has a graph of its own
_ONCE_PER_CALL = "as nn.ModuleList([layer] * calls) does with one set of weights"


@dataclass(frozen=True, slots=True)
class Slot:
    """One value that crosses a cut.

    ``key`` is equal at two cuts that the same value crosses. ``uses``: (layer, path in the call's
    ``(args, kwargs)``) of every layer from the cut on that takes the value; none for the token ids.
    ``read_outside``: whether the model's code between the layers reads the first layer's argument
    again, as a loop does that adds residuals or collects states by itself.
    ``source``: where a layer gives out a value that is read outside of the layers.
    """

    key: Any
    shape: tuple[int, ...]
    dtype: torch.dtype
    uses: tuple[tuple[int, Path], ...]
    read_outside: bool = False
    source: Source | None = None

    @property
    def is_floating(self) -> bool:
        """True where a gradient comes back."""
        return self.dtype.is_floating_point or self.dtype.is_complex


@dataclass(frozen=True, slots=True)
class LayerCall:
    """How the model calls one layer: where the hidden state goes in, and the result's structure."""

    hidden_path: Path
    hidden_shape: tuple[int, ...]
    output: Any


@dataclass(frozen=True, slots=True)
class TensorLike:
    """What is left of a recorded tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


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
    _facts: _Facts
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
            self._resized[key] = _run(self.model_name, skeleton, key[0], key[1], self.auxiliary)
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
        if not any(first <= node for node, _ in facts.outer_edges):
            return read
        reached = graph.reach(self._output_nodes, {*first_uses, *emitted})
        for node, parent in facts.outer_edges:
            behind = parent >= first and parent not in first_uses
            if node < first or node not in reached or behind or parent in emitted:
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


@dataclass(slots=True)
class _Facts:
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


_KNOWN = AnatomyCache()
"""Of the whole process: an anatomy is a function of what the model is made of."""


def find_anatomy(model: nn.Module) -> Anatomy:
    """Take ``model`` apart; its weights are neither read nor copied.

    A model of the same code, config and structure as one before is not run again.

    Raises:
        PipelineConfigError: naming the model class, if no list of layers is found or the forward
            cannot be followed.
    """
    return _KNOWN.find(model, _take_apart)


class _ForwardFailedError(PipelineConfigError):
    """The model's own code raised an error in the hollow run."""


def forget_anatomies() -> None:
    """Give back the memory of the anatomies that `find_anatomy` remembers."""
    _KNOWN.clear()


def _take_apart(model: nn.Module) -> Anatomy:
    name, skeleton = type(model).__name__, meta_skeleton(model)
    try:
        return _run_at(name, skeleton, *_run_sizes(model, _ROWS))
    except _ForwardFailedError as error:
        try:
            return _run_at(name, skeleton, *_run_sizes(model, _ROUND_ROWS))
        except PipelineConfigError:
            raise error from None


def _run_at(name: str, skeleton: nn.Module, batch: int, seq: int) -> Anatomy:
    return _run(name, skeleton, batch, seq, _auxiliary_term(skeleton, batch, seq))


def _auxiliary_term(skeleton: nn.Module, batch: int, seq: int) -> AuxiliaryTerm | None:
    if not asks_for_auxiliary_loss(flagged_configs(skeleton)):
        return None
    ids_name, ids = first_argument(skeleton), _plain_ids(skeleton, batch, seq)

    def trace_with(more: Mapping[str, torch.Tensor]) -> Trace:
        return run_hollow(skeleton, {ids_name: ids, **more}, forward_constants(skeleton))

    return find_auxiliary_term(skeleton, trace_with, ids)


def anatomy_for(
    text: Anatomy, skeleton: nn.Module, inputs: Mapping[str, Any], plain: Mapping[str, Any]
) -> Anatomy:
    """The anatomy of a forward that takes more than token ids; its layers are those of ``text``.

    Args:
        text: the model's anatomy for token ids alone.
        skeleton: the model without weights, in the dtype that it runs in.
        inputs: real CPU tensors, or containers of them, by argument name; the ids among them.
        plain: other keyword arguments.

    Raises:
        PipelineConfigError: if the forward fails on them or cannot be followed.
    """
    name = text.model_name
    named = [f"{key} {_shape_of(value)}" for key, value in inputs.items()]
    try:
        constants = {**plain, **forward_constants(skeleton)}
        with_taps = text.auxiliary is not None
        trace = run_hollow(skeleton, inputs, constants, keep_arguments=True, with_taps=with_taps)
    except Exception as error:
        raise PipelineConfigError(
            f"{name} cannot be split: its forward failed without weights on the first microbatch's "
            f"{', '.join(named)} ({type(error).__name__}: {error}). Check that the model runs on "
            f"just these rows of the batch."
        ) from error
    batch, seq = inputs[text.ids_name].shape[:2]
    return _read_off(name, skeleton, trace, (batch, seq), text.auxiliary, text)


def _check_calls(name: str, layers_name: str, trace: Trace) -> None:
    """The layers that token ids alone showed, also with further arguments."""
    calls = [call for call in trace.calls if call.list_name == layers_name]
    indices = [call.index for call in calls]
    if not calls or sorted(set(indices)) != indices:
        raise PipelineConfigError(
            f"{name} cannot be split: with these arguments its forward calls the layers of "
            f"{layers_name!r} in the order {_shortened(indices)}; a stage needs each layer once, "
            f"in order."
        )
    odd = [call.index for call in calls if _hidden_of(call) is None]
    if odd:
        raise PipelineConfigError(
            f"{name} cannot be split: with these arguments layer {odd[0]} of {layers_name!r} "
            f"returns no hidden state in the shape that it takes."
        )


def _shape_of(value: Any) -> Any:
    return list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _run(
    name: str, skeleton: nn.Module, batch: int, seq: int, auxiliary: AuxiliaryTerm | None
) -> Anatomy:
    ids_name = first_argument(skeleton)
    inputs = {ids_name: _plain_ids(skeleton, batch, seq)}
    constants, with_taps = forward_constants(skeleton), auxiliary is not None
    try:
        trace = run_hollow(skeleton, inputs, constants, with_taps=with_taps)
    except Exception as error:
        raise _ForwardFailedError(
            f"{name} cannot be split: its forward failed on {ids_name} of shape [{batch}, {seq}] "
            f"without weights ({type(error).__name__}: {error}). Check that "
            f"model({ids_name}=...) runs with no other argument."
        ) from error
    return _read_off(name, skeleton, trace, (batch, seq), auxiliary)


def _read_off(
    name: str,
    skeleton: nn.Module,
    trace: Trace,
    sizes: tuple[int, int],
    auxiliary: AuxiliaryTerm | None,
    text: Anatomy | None = None,
) -> Anatomy:
    batch, seq = sizes
    ids_name = first_argument(skeleton)
    layers_name = _find_layers(name, skeleton, trace) if text is None else text.layers_name
    layer_calls = {call.index: call for call in trace.calls if call.list_name == layers_name}
    if text is not None:
        _check_calls(name, layers_name, trace)
    output = _primary_output(name, trace.result)
    dtypes = [p.dtype for p in skeleton.parameters() if p.is_floating_point()]
    facts = _find_facts(name, trace, layers_name, ids_name)
    emissions: tuple[Emission, ...] = ()
    output_nodes = [output.node]
    if auxiliary is not None:
        output_nodes.append(auxiliary.value_in(name, trace.result).node)
        emissions = find_emissions(
            name, trace, layers_name, layer_calls, facts.layer, output_nodes[-1]
        )
    return Anatomy(
        model_name=name,
        layers_name=layers_name,
        num_layers=len(_as_list(skeleton.get_submodule(layers_name))),
        calls={index: _layer_call(call) for index, call in layer_calls.items()},
        batch=batch,
        seq=seq,
        dtype=dtypes[0],
        output=TensorLike(output.shape, output.dtype),
        ids_name=ids_name,
        skeleton=skeleton,
        flagged=asks_for_auxiliary_loss(flagged_configs(skeleton)),
        auxiliary=auxiliary,
        emissions=emissions,
        returned=_by_key(trace.result, emissions),
        _output_nodes=tuple(output_nodes),
        _trace=trace,
        _layer_calls=layer_calls,
        _facts=facts,
        text=text,
    )


def _by_key(result: list[Value], emissions: tuple[Emission, ...]) -> dict[Any, tuple[Path, ...]]:
    emitted = {value.key for emission in emissions for value in emission.values}
    found: dict[Any, tuple[Path, ...]] = {}
    for value in result:
        if value.key in emitted:
            found[value.key] = (*found.get(value.key, ()), value.path)
    return found


def forward_constants(model: nn.Module) -> dict[str, Any]:
    """Arguments that every stage's own forward gets: no key-value cache while training."""
    return {"use_cache": False} if "use_cache" in _argument_names(model) else {}


def first_argument(model: nn.Module) -> str:
    """Name of the argument that takes the token ids."""
    names = _argument_names(model)
    if not names:
        raise PipelineConfigError(
            f"{type(model).__name__}.forward takes no argument: a pipeline needs one for the input."
        )
    return "input_ids" if "input_ids" in names else names[0]


def _argument_names(model: nn.Module) -> list[str]:
    """What the forward takes by name, also through wrappers that hand on whatever they are given.

    Such a wrapper has ``**kwargs`` and the model as its only child.
    """
    names: list[str] = []
    module: nn.Module | None = model
    while module is not None:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names += [p.name for p in parameters if p.kind not in variable]
        hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        children = list(module.children())
        module = children[0] if hands_on and len(children) == 1 else None
    return names


def _run_sizes(model: nn.Module, rows: tuple[int, ...]) -> tuple[int, int]:
    """A batch size and a sequence length that, like their product, are no size of the model."""
    taken = {size for parameter in model.parameters() for size in parameter.shape}
    config = getattr(model, "config", None)
    values: dict[str, Any] = getattr(config, "to_dict", dict)()
    taken |= {v for v in values.values() if isinstance(v, int)}
    sizes = ((batch, seq) for seq in (13, *range(8, 40)) for batch in rows)
    free = (s for s in sizes if taken.isdisjoint((*s, s[0] * s[1])) and s[0] != s[1])
    found = next(free, None)
    if found is None:
        raise PipelineConfigError(
            f"{type(model).__name__} cannot be split: no batch size of {list(rows)} and sequence "
            f"length up to 39 differs from all sizes of the model, which tells them apart."
        )
    return found


def _plain_ids(model: nn.Module, batch: int, seq: int) -> torch.Tensor:
    """Token ids, int64 [batch, seq], that are nobody's special token."""
    values: dict[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    special = {
        v
        for k, v in values.items()
        if k.endswith(("token_id", "_token_index")) and isinstance(v, int)
    }
    plain = [i for i in range(len(special) + 8) if i not in special][:7]
    ids = torch.tensor(plain, dtype=torch.int64)
    return ids.repeat(batch * seq // len(plain) + 1)[: batch * seq].reshape(batch, seq).clone()


def _as_list(module: nn.Module) -> nn.ModuleList | nn.Sequential:
    assert isinstance(module, nn.ModuleList | nn.Sequential)
    return module


def _hidden_of(call: Call) -> Value | None:
    """The argument that the layer hands on: floating, of the shape of a floating result."""
    shapes = {v.shape for v in call.outputs if v.is_floating}
    candidates = [v for v in call.inputs if v.is_floating and len(v.shape) >= 2]
    named = [v for v in candidates if v.path == (1, Key("hidden_states"))]
    return next((v for v in named + candidates if v.shape in shapes), None)


def _find_layers(name: str, skeleton: nn.Module, trace: Trace) -> str:
    """The outermost list whose elements map a hidden state to a hidden state, largest first."""
    counts: dict[str, list[int]] = {}
    for call in trace.calls:
        if _hidden_of(call) is not None:
            counts.setdefault(call.list_name, []).append(call.index)
    lists = [n for n, indices in counts.items() if len(set(indices)) >= 2]
    outermost = [n for n in lists if not any(n.startswith(f"{o}.") for o in lists if o != n)]
    if not outermost:
        again = next((n for n, indices in counts.items() if len(indices) > 1), None)
        remedy = ""
        if again is not None:
            layer = f"{again}.{counts[again][0]}"
            remedy = f" Register {layer}, which it calls again, once per call, {_ONCE_PER_CALL}."
        raise PipelineConfigError(
            f"{name} cannot be split: no nn.ModuleList or nn.Sequential of two or more layers is "
            f"called with a hidden state that it returns in the same shape.{remedy}"
        )

    def size(list_name: str) -> int:
        return sum(p.numel() for p in skeleton.get_submodule(list_name).parameters())

    best = max(outermost, key=size)
    indices = counts[best]
    if sorted(set(indices)) != indices:
        raise PipelineConfigError(
            f"{name} cannot be split: its forward calls the layers of {best!r} in the order "
            f"{_shortened(indices)}; a stage needs each layer once, in order. Register a layer "
            f"that is called again once per call, {_ONCE_PER_CALL}, in the order of the calls."
        )
    function = next((c.function for c in trace.calls if c.list_name == best and c.function), "")
    if function:
        raise PipelineConfigError(
            f"{name} cannot be split: its forward calls the layers of {best!r} within a "
            f"torch.autograd.Function ({function}), which computes their gradients by itself, all "
            f"at once. Keep the layers on one stage (pipeline size 1)."
        )
    return best


def _shortened(indices: list[int]) -> str:
    return str(indices) if len(indices) <= 16 else f"{str(indices[:16])[:-1]}, ...]"


class Hidden:
    """Marks the hidden state's place in a layer's result."""


def _layer_call(call: Call) -> LayerCall:
    hidden = _hidden_of(call)
    assert hidden is not None
    found = False

    def describe(value: Any) -> Any:
        nonlocal found
        if isinstance(value, torch.Tensor):
            if not found and value.is_floating_point() and tuple(value.shape) == hidden.shape:
                found = True
                return Hidden()
            return TensorLike(tuple(value.shape), value.dtype)
        if isinstance(value, Mapping) and hasattr(value, "to_tuple"):
            return type(value)(**{k: describe(v) for k, v in value.items()})
        if isinstance(value, dict):
            return {k: describe(v) for k, v in value.items()}
        if isinstance(value, list):
            return [describe(item) for item in value]
        if isinstance(value, tuple):
            items = [describe(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return value

    return LayerCall(hidden.path, hidden.shape, describe(call.output))


def _primary_output(name: str, result: list[Value]) -> Value:
    """The tensor that the forward is called for, by the same rule as ``stage_module``."""
    paths = {value.path: value for value in result}
    for path in ((), (Key("logits"),), (Key("last_hidden_state"),)):
        if path in paths:
            return paths[path]
    top = [value for value in result if len(value.path) == 1]
    named = [step.name for value in top for step in value.path if isinstance(step, Key)]
    if len(named) > 1:
        raise several_outputs(name, named)
    if not top:
        raise PipelineConfigError(
            f"{name} cannot be split: its forward returns no tensor at its top level."
        )
    return top[0]


def several_outputs(name: str, outputs: Sequence[str]) -> PipelineConfigError:
    """What to say of a model that names several results, none of them the one that is meant."""
    return PipelineConfigError(
        f"{name} returns several tensors ({', '.join(outputs)}), but a pipeline returns "
        f"one: wrap the model in a module whose forward joins them, as torch.stack does, or names "
        f"the one that the loss takes 'logits'."
    )


def _at(values: list[Value], path: Path) -> Value:
    return next(value for value in values if value.path == path)


def _find_facts(name: str, trace: Trace, layers_name: str, ids_name: str) -> _Facts:
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
                f"stage would know."
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
    return _Facts(layer, level, computed, flows, outer_edges, reads_ids)
