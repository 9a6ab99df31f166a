"""Run a model's forward without its weights and record which value was made from which.

A hollow run executes the model's own Python code. Whatever depends on the weights has a shape and a
dtype but no data (it lives on the meta device); whatever depends on the inputs alone is real, so
masks, ``.all()``, ``.item()`` and Python loops over them work as always. Every operator becomes a
node of a data-flow graph, which sees integer, frozen and no-gradient flows that autograd loses.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hfpp.runtime.paths import Path, map_tensors, tensors_in, walk_tensors

aten = torch.ops.aten
_CPU = torch.device("cpu")
_META = torch.device("meta")

# Only the shape of their tensor arguments matters: no data flows.
_SHAPE_ONLY = frozenset(
    (
        aten.zeros_like,
        aten.ones_like,
        aten.full_like,
        aten.empty_like,
        aten.rand_like,
        aten.randn_like,
        aten.new_zeros,
        aten.new_ones,
        aten.new_empty,
        aten.new_full,
        aten.new_empty_strided,
    )
)
# Made-up results of hollow comparisons and orderings that keep routing code consistent.
_TRUE = frozenset((aten.gt, aten.ge, aten.lt, aten.le, aten.ne))
_IOTA = frozenset((aten.topk, aten.sort, aten.argsort, aten.kthvalue))
_INDEXING = frozenset(
    (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
)


def _storage_key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass(slots=True)
class Graph:
    """Data flow of one run: node ``i`` was made from ``parents[i]``, all with smaller numbers.

    ``kinds``: ``op``, ``param``, ``buffer``, ``input`` or ``const``. ``calls[i]``: index of the
    recorded module call during which node ``i`` was made, -1 outside of all. ``factors``: by node,
    the plain numbers among the operands of an operator with a scalar result.
    """

    parents: list[tuple[int, ...]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    factors: dict[int, tuple[float, ...]] = field(default_factory=dict)

    def add(self, kind: str, label: str, parents: tuple[int, ...], call: int) -> int:
        """Append a node and return its number."""
        self.parents.append(parents)
        self.kinds.append(kind)
        self.labels.append(label)
        self.calls.append(call)
        return len(self.kinds) - 1

    def __len__(self) -> int:
        return len(self.kinds)

    def reach(self, outputs: Iterable[int], stops: Iterable[int]) -> set[int]:
        """All nodes that ``outputs`` were made from, neither ``stops`` nor what lies beyond."""
        seen: set[int] = set()
        barred = set(stops)
        stack = [node for node in outputs if node not in barred]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            stack.extend(p for p in self.parents[node] if p not in seen and p not in barred)
        return seen


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor seen at a call: where, which node made it, and its layout."""

    path: Path
    node: int
    offset: int
    stride: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def key(self) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
        """Equal for two arguments that are the same values."""
        return (self.node, self.offset, self.shape, self.stride)

    @property
    def is_floating(self) -> bool:
        """True where gradients can flow."""
        return self.dtype.is_floating_point or self.dtype.is_complex


class HollowRun(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The dispatch mode of a hollow run; ``graph`` and ``reads`` are its record.

    Args:
        named_leaves: ``(kind, label, tensor)`` of parameters, buffers and inputs.
    """

    def __init__(self, named_leaves: Iterable[tuple[str, str, torch.Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self.current_call = -1
        self.reads: list[tuple[int, int]] = []  # (node whose value Python read, call)
        self._producer: dict[int, int] = {}
        self._alive: list[Any] = []  # storages are identified by address: none may be reused
        self._unknown: set[int] = set()  # real storages that hollow data was written into
        self._cache: dict[Any, Any] = {}
        for kind, label, tensor in named_leaves:
            if _storage_key(tensor) not in self._producer:
                self._leaf(tensor, kind, label)

    def node_of(self, tensor: torch.Tensor) -> int:
        """The node that last wrote ``tensor``'s storage."""
        node = self._producer.get(_storage_key(tensor))
        return self._leaf(tensor, "const", "const") if node is None else node

    def value_of(self, path: Path, tensor: torch.Tensor) -> Value:
        """Describe ``tensor`` as seen now."""
        return Value(
            path=path,
            node=self.node_of(tensor),
            offset=int(tensor.storage_offset()),
            stride=tuple(tensor.stride()),
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
        )

    def _leaf(self, tensor: torch.Tensor, kind: str, label: str) -> int:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        node = self.graph.add(kind, label, (), self.current_call if kind == "const" else -1)
        self._producer[int(storage._cdata)] = node
        return node

    def _is_hollow(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "meta" or _storage_key(tensor) in self._unknown

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute one operator and record it."""
        kwargs = kwargs or {}
        packet = func.overloadpacket
        tensors = tensors_in(args)
        if kwargs:
            tensors += tensors_in(kwargs)
        if packet in (aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select):
            self.reads.extend((self.node_of(t), self.current_call) for t in tensors)
        result = self._execute(func, packet, args, kwargs, tensors)
        self._record(func, packet, args, kwargs, tensors, result)
        return result

    def _record(
        self,
        func: Any,
        packet: Any,
        args: Any,
        kwargs: Any,
        tensors: list[torch.Tensor],
        result: Any,
    ) -> None:
        if func.is_view:
            return
        used = {_storage_key(t) for t in tensors}
        written = {
            _storage_key(t)
            for index, name in _written_arguments(func)
            for t in tensors_in(args[index] if index < len(args) else kwargs.get(name))
        }
        made = tensors_in(result)
        fresh = [t for t in made if _storage_key(t) not in used]
        if not fresh and not written:
            return
        sources = () if packet in _SHAPE_ONLY else tuple({self.node_of(t): None for t in tensors})
        node = self.graph.add("op", packet.__name__, sources, self.current_call)
        if len(made) == 1 and made[0].dim() == 0:
            numbers = (*args, *kwargs.values())
            self.graph.factors[node] = tuple(n for n in numbers if isinstance(n, int | float))
        for tensor in fresh:
            self._alive.append(tensor.untyped_storage())
            self._producer[_storage_key(tensor)] = node
        for key in written:
            self._producer[key] = node

    def _execute(
        self, func: Any, packet: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]
    ) -> Any:
        if not any(self._is_hollow(t) for t in tensors):
            return _run_real(func, packet, args, kwargs, tensors)
        if func.is_view and tensors[0].device.type != "meta":
            return func(*args, **kwargs)  # a view of a real storage keeps aliasing it
        special = _SPECIAL.get(packet)
        if special is not None:
            return special(args, tensors)
        if packet in _INDEXING:
            args = (args[0], self._plain_indices(args[1]), *args[2:])
        if func.is_view and all(t.device.type == "meta" for t in tensors):
            return func(*args, **kwargs)
        return self._run_on_meta(func, packet, args, kwargs, tensors)

    def _plain_indices(self, indices: Any) -> list[Any]:
        """Boolean masks have no meta kernel: turn them into positions (all, where hollow)."""
        plain: list[Any] = []
        for index in indices:
            if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
                mask = (
                    torch.ones(index.shape, dtype=torch.bool) if self._is_hollow(index) else index
                )
                plain.extend(mask.nonzero(as_tuple=True))
            else:
                plain.append(index)
        return plain

    def _run_on_meta(
        self, func: Any, packet: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]
    ) -> Any:
        written = _written_arguments(func)
        key = None
        if not written and not func.is_view:
            key = _cache_key(func, args, kwargs)
            hit = self._cache.get(key) if key is not None else None
            if hit is not None:
                kind, specs = hit
                outs = [None if spec is None else _empty(*spec) for spec in specs]
                outs = [self._made_up(func, packet, args, kwargs, o) for o in outs]
                return outs[0] if kind is None else kind(outs)
        shadows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def to_meta(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device.type == "meta":
                return tensor
            shadow = _empty(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
            shadows[id(shadow)] = (shadow, tensor)
            return shadow

        meta_args = map_tensors(to_meta, args)
        meta_kwargs = map_tensors(to_meta, kwargs)
        if meta_kwargs.get("device") is not None:
            meta_kwargs = {**meta_kwargs, "device": _META}
        result = func(*meta_args, **meta_kwargs)
        for index, name in written:
            target = meta_args[index] if index < len(meta_args) else meta_kwargs.get(name)
            for tensor in tensors_in(target):
                if id(tensor) in shadows:
                    self._unknown.add(_storage_key(shadows[id(tensor)][1]))
        used = {_storage_key(t) for t in tensors}
        if key is not None:
            self._remember(key, result, used)

        def restore(tensor: torch.Tensor) -> torch.Tensor | None:
            if id(tensor) in shadows:
                return shadows[id(tensor)][1]
            if _storage_key(tensor) in used:
                return tensor
            return self._made_up(func, packet, args, kwargs, tensor)

        return map_tensors(restore, result)

    def _remember(self, key: Any, result: Any, used: set[int]) -> None:
        if isinstance(result, torch.Tensor):
            kind, outs = None, [result]
        elif isinstance(result, tuple | list):
            kind, outs = type(result), list(result)
        else:
            return
        if all(
            o is None
            or (
                isinstance(o, torch.Tensor)
                and o.device.type == "meta"
                and _storage_key(o) not in used
            )
            for o in outs
        ):
            specs = [None if o is None else (tuple(o.shape), o.stride(), o.dtype) for o in outs]
            self._cache[key] = (kind, specs)

    def _made_up(
        self, func: Any, packet: Any, args: Any, kwargs: Any, out: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Integers and booleans that came out of hollow data get consistent values."""
        if out is None or out.is_floating_point() or out.is_complex() or out.device.type != "meta":
            return out
        if packet in _IOTA:
            if out.dim() == 0:
                return torch.zeros((), dtype=out.dtype)
            names = [a.name for a in func._schema.arguments]
            dim = kwargs.get("dim", -1)
            if "dim" in names and names.index("dim") < len(args):
                dim = args[names.index("dim")]
            shape = [1] * out.dim()
            shape[dim] = out.shape[dim]
            iota = torch.arange(out.shape[dim], dtype=out.dtype).reshape(shape)
            return iota.expand(out.shape).contiguous()
        same = packet is aten.eq and len(args) == 2 and args[0] is args[1]
        if packet in _TRUE or same:
            return torch.ones(out.shape, dtype=out.dtype)
        return torch.zeros(out.shape, dtype=out.dtype)


def _empty(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=_META)


def _run_real(func: Any, packet: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type != "cpu":
        kwargs = {**kwargs, "device": _CPU}
    if packet is aten.histc and not tensors[0].is_floating_point():
        return func(tensors[0].float(), *args[1:], **kwargs).to(tensors[0].dtype)
    return func(*args, **kwargs)


def _written_arguments(func: Any) -> list[tuple[int, str]]:
    found = _WRITTEN.get(func)
    if found is None:
        found = _WRITTEN[func] = [
            (index, argument.name)
            for index, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
    return found


_WRITTEN: dict[Any, list[tuple[int, str]]] = {}  # operator schemas never change


def _cache_key(func: Any, args: Any, kwargs: Any) -> Any:
    """What the shapes of an operator's results depend on, or None where that cannot be hashed."""

    def part(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (tuple(value.shape), value.stride(), value.dtype, value.device.type)
        if isinstance(value, list | tuple):
            return tuple(part(item) for item in value)
        if isinstance(value, float):
            return float
        return (type(value), value)

    key = (func, part(args), tuple((name, part(value)) for name, value in kwargs.items()))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _item(_args: Any, tensors: list[torch.Tensor]) -> Any:
    dtype = tensors[0].dtype
    return False if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1


def _grouped_mm(args: Any, _tensors: list[torch.Tensor]) -> torch.Tensor:
    left, right = args[0], args[1]
    rows = left.shape[:-1] if left.dim() == 2 else (left.shape[0], left.shape[1])
    return torch.empty((*rows, right.shape[-1]), dtype=left.dtype, device=_META)


def _masked_select(args: Any, _tensors: list[torch.Tensor]) -> torch.Tensor:
    source, mask = args[0], args[1]
    shape = torch.broadcast_shapes(mask.shape, source.shape)  # type: ignore[no-untyped-call]
    count = mask.expand(shape).sum() if mask.device.type != "meta" else torch.Size(shape).numel()
    return torch.empty((int(count),), dtype=source.dtype, device=_META)


_SPECIAL: Mapping[Any, Callable[[Any, list[torch.Tensor]], Any]] = {
    aten._local_scalar_dense: _item,
    aten.equal: lambda _args, _tensors: False,
    aten._assert_async: lambda _args, _tensors: None,
    aten._assert_scalar: lambda _args, _tensors: None,
    aten._grouped_mm: _grouped_mm,
    aten.masked_select: _masked_select,
    aten.nonzero: lambda _args, tensors: torch.ones(tensors[0].shape, dtype=torch.bool).nonzero(),
}


@dataclass(slots=True)
class Call:
    """One call of a module of a list: arguments, results, and the nodes made meanwhile."""

    list_name: str
    index: int
    parent: int  # number of the enclosing call, -1 outside of all
    first_node: int
    inputs: list[Value]
    outputs: list[Value] = field(default_factory=list)
    output: Any = None
    arguments: Any = None  # (args, kwargs) themselves, where they were asked for
    function: str = ""  # name of the torch.autograd.Function whose forward calls it


@dataclass(frozen=True, slots=True)
class Tap:
    """What a module with forward hooks of its own returned within the recorded call ``call``."""

    module_name: str
    call: int
    output: Any
    values: list[Value]


@dataclass(slots=True)
class Trace:
    """What one hollow run showed; ``taps`` in the order in which the hooks ran."""

    graph: Graph
    calls: list[Call]
    taps: list[Tap]
    result: list[Value]
    reads: list[tuple[int, int]]
    input_nodes: dict[str, int]


def _calling_function() -> str:
    """The torch.autograd.Function in whose forward this is called; empty in none."""
    frame = sys._getframe(1)
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        code = frame.f_code
        # looking at a frame's variables keeps them alive until it ends: only where needed
        if code.co_name != "forward" or not code.co_argcount or code.co_varnames[0] == "self":
            continue
        context = frame.f_locals.get(code.co_varnames[0])
        if isinstance(context, torch.autograd.function.FunctionCtx):
            return type(context).__name__.removesuffix("Backward")
    return ""


def run_hollow(
    skeleton: torch.nn.Module,
    inputs: Mapping[str, Any],
    constants: Mapping[str, Any],
    *,
    keep_arguments: bool = False,
    with_taps: bool = False,
) -> Trace:
    """Run ``skeleton(**inputs, **constants)`` hollow and record the calls of all list elements.

    Args:
        skeleton: a model whose parameters are on the meta device (see ``meta_skeleton``).
        inputs: real CPU tensors, or containers of them, by argument name.
        constants: other keyword arguments.
        keep_arguments: whether the calls keep what they were called with.
        with_taps: whether to record what modules with forward hooks of their own return.
    """
    leaves: list[tuple[str, str, torch.Tensor]] = []
    leaves += [("param", n, p) for n, p in skeleton.named_parameters()]
    leaves += [("buffer", n, b) for n, b in skeleton.named_buffers()]
    leaves += [("input", n, t) for n, v in inputs.items() for _, t in walk_tensors(v)]
    run = HollowRun(leaves)
    calls: list[Call] = []
    taps: list[Tap] = []
    open_calls: list[int] = []
    handles = []
    own_hooks: dict[int, int] = {}
    children: dict[int, list[tuple[str, int, torch.nn.Module]]] = collections.defaultdict(list)
    lists = [
        (name, module)
        for name, module in skeleton.named_modules()
        if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential)
    ]
    for name, module in sorted(lists, key=lambda named: len(named[1]) < 2):  # real lists first
        for index, child in enumerate(module):
            children[id(child)].append((name, index, child))

    def before(list_name: str, index: int) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            values = [run.value_of(path, t) for path, t in walk_tensors((args, kwargs))]
            calls.append(Call(list_name, index, run.current_call, len(run.graph), values))
            calls[-1].function = _calling_function()
            if keep_arguments:
                calls[-1].arguments = (args, dict(kwargs))
            open_calls.append(len(calls) - 1)
            run.current_call = open_calls[-1]

        return hook

    def tap(name: str) -> Any:
        def hook(module: Any, _args: Any, output: Any) -> None:
            # looked up now: hooks that capture outputs are often registered by the forward itself
            if run.current_call >= 0 and len(module._forward_hooks) > own_hooks[id(module)]:
                values = [run.value_of(path, t) for path, t in walk_tensors(output)]
                taps.append(Tap(name, run.current_call, output, values))

        return hook

    def after(_module: Any, _args: Any, _kwargs: Any, output: Any) -> None:
        call = calls[open_calls.pop()]
        run.current_call = open_calls[-1] if open_calls else -1
        call.output = output
        call.outputs = [run.value_of(path, t) for path, t in walk_tensors(output)]

    if with_taps:
        for name, module in skeleton.named_modules():
            handles.append(module.register_forward_hook(tap(name)))
            own_hooks[id(module)] = 2 if id(module) in children else 1
    for entries in children.values():
        name, index, child = entries[0]
        handles.append(child.register_forward_pre_hook(before(name, index), with_kwargs=True))
        handles.append(child.register_forward_hook(after, with_kwargs=True))
    try:
        # compiling is put off: torch would give up for good on code that it meets within a mode
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), run:
            result = skeleton(**inputs, **constants)
            values = [run.value_of(path, t) for path, t in walk_tensors(result)]
    finally:
        for handle in handles:
            handle.remove()
    nodes = {n: run.node_of(t) for n, t in inputs.items() if isinstance(t, torch.Tensor)}
    return Trace(run.graph, calls, taps, values, run.reads, nodes)
