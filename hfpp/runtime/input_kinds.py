"""Forwards that take more than token ids: their anatomy, and what later stages can do without."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hfpp.errors import PipelineConfigError
from hfpp.runtime.anatomy import Anatomy
from hfpp.runtime.crossing import TensorLike
from hfpp.runtime.find_anatomy import anatomy_for
from hfpp.runtime.paths import map_tensors, walk_tensors
from hfpp.runtime.trace import HollowRun

if TYPE_CHECKING:
    from hfpp.runtime.ownership import Ownership
    from hfpp.runtime.trace import Call

TEXT_ARGUMENTS = frozenset(("attention_mask", "position_ids", "cache_position", "labels"))
"""What every stage makes of these does not change what crosses a cut."""

Signature = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class InputKind:
    """What the forward is like for arguments of some names and types.

    Attributes:
        anatomy: of the forward with them.
        lean_from: the first layer from which the forward takes the same way without ``media``.
        media: names of the floating arguments beyond the text's that it can do without there.
        further: names of all arguments beyond the text's, for errors.
    """

    anatomy: Anatomy
    lean_from: int
    media: frozenset[str]
    further: frozenset[str]

    def dropped(self, start: int) -> frozenset[str]:
        """What a stage that begins with layer ``start`` has no use for."""
        return self.media if start >= self.lean_from else frozenset()


def further_arguments(kwargs: Mapping[str, Any], ids_name: str) -> dict[str, Any]:
    """The keyword arguments that make a forward more than one over text: with tensors in them."""
    return {
        name: value
        for name, value in kwargs.items()
        if name != ids_name
        and name not in TEXT_ARGUMENTS
        and next(walk_tensors(value), None) is not None
    }


def find_kind(
    text: Anatomy,
    ids: torch.Tensor,
    kwargs: Mapping[str, Any],
    dtype: torch.dtype | None,
    *,
    exact: bool = False,
) -> InputKind:
    """What the forward is like with ``kwargs``: known by their names and types, or found.

    Args:
        text: the model's anatomy for token ids alone, which remembers the kinds.
        ids: token ids of a microbatch, int64 [batch, seq].
        kwargs: keyword arguments of that microbatch.
        dtype: what the model computes in; None: what it was split in.
        exact: whether the shapes have to be the same as well, for sizes of what crosses a cut.

    Raises:
        PipelineConfigError: if the forward fails on them or cannot be followed.
    """
    further = further_arguments(kwargs, text.ids_name)
    key: Signature = (_types(further), dtype)
    sizes: Signature = (tuple(ids.shape), _shapes(kwargs))
    if exact or text.kinds.get(key) is _SIZED:
        key = (*key, sizes)
    kind = text.kinds.get(key)
    if kind is None:
        kind = _find(text, ids, kwargs, further, dtype)
        remember(text.kinds, (*key[:2], sizes), kind)
        if len(key) == 2:
            remember(text.kinds, key, _SIZED if _depends_on_sizes(kind.anatomy) else kind)
    assert isinstance(kind, InputKind)
    return kind


_SIZED = "known by its sizes"
_KEPT = 64


def remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Keep ``value`` under ``key``, and forget the oldest beyond a number: sizes may never end."""
    known[key] = value
    if len(known) > _KEPT:
        del known[next(iter(known))]


def check_kind(kind: InputKind, ownership: Ownership) -> None:
    """Refuse what the pipeline's cuts make impossible: every rank comes to the same verdict.

    Raises:
        PipelineConfigError: naming the model, if the forward cannot be cut so with these arguments
            or a stage would need another's parameters.
    """
    anatomy = kind.anatomy
    for stage, layers in enumerate(ownership.layers):
        if stage > 0:
            try:
                anatomy.slots(layers.start)
            except PipelineConfigError as error:
                raise PipelineConfigError(
                    f"{error} That holds for batches with {', '.join(sorted(kind.further))}; the "
                    f"cuts that they allow are before the layers {_possible_cuts(anatomy)}."
                ) from error
    for stage, layers in enumerate(ownership.layers):
        needed = anatomy.outer_parameters(layers.start, layers.stop)
        missing = sorted(needed - ownership.outer[stage])
        if missing:
            raise PipelineConfigError(
                f"{anatomy.model_name} with {', '.join(sorted(kind.further))} uses {missing[0]!r} "
                f"on stage {stage}, which does not hold it: list its module in that stage's names, "
                f"or leave the names out."
            )


def _possible_cuts(anatomy: Anatomy) -> list[int]:
    possible = []
    for layer in sorted(anatomy.calls)[1:]:
        try:
            anatomy.slots(layer)
        except PipelineConfigError:
            continue
        possible.append(layer)
    return possible


def feature_lengths(
    text: Anatomy | None, modality: str, arguments: Mapping[str, Any]
) -> list[int] | None:
    """How many tokens the model makes of each row of its media; None where it cannot be asked.

    Args:
        text: the model's anatomy for token ids alone.
        modality: of which the model gives the features, as in ``get_image_features``.
        arguments: of that modality.
    """
    if text is None:
        return None
    if not any(name.endswith("sizes") for name in arguments):
        return _ask(text, modality, arguments)  # without sizes it may depend on the pixels
    key: Signature = ("features", modality, _shapes(arguments), _small_values(arguments))
    if key not in text.kinds:
        remember(text.kinds, key, _ask(text, modality, arguments))
    found: list[int] | None = text.kinds[key]
    return found


def _ask(text: Anatomy, modality: str, arguments: Mapping[str, Any]) -> list[int] | None:
    name = f"get_{modality}_features"
    asked = next((m for m in text.skeleton.modules() if hasattr(m, name)), None)
    if asked is None:
        return None
    method = getattr(asked, name)
    known = inspect.signature(method).parameters
    given = {k: map_tensors(_on_cpu, v) for k, v in arguments.items() if k in known}
    leaves = [("param", n, p) for n, p in text.skeleton.named_parameters()]
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), HollowRun(leaves):
            result = method(**given)
    except Exception:  # whatever the model's code says to these arguments alone
        return None
    result = getattr(result, "pooler_output", result)
    if isinstance(result, torch.Tensor):
        return [result.shape[1]] * result.shape[0] if result.dim() == 3 else None
    if isinstance(result, list | tuple) and all(isinstance(r, torch.Tensor) for r in result):
        return [r.shape[0] if r.dim() == 2 else r.shape[0] * r.shape[1] for r in result]
    return None


def _small_values(arguments: Mapping[str, Any]) -> Signature:
    """The values of what says sizes; pixels and their masks are told by their shapes."""
    return tuple(
        (name, tuple(t.flatten().tolist()))
        for name in sorted(arguments)
        for _, t in walk_tensors(arguments[name])
        if not t.is_floating_point()
    )


def _find(
    text: Anatomy,
    ids: torch.Tensor,
    kwargs: Mapping[str, Any],
    further: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> InputKind:
    skeleton = text.in_dtype(dtype).skeleton
    given = {text.ids_name: ids, **kwargs}
    inputs = {k: v for k, v in given.items() if next(walk_tensors(v), None) is not None}
    inputs = {name: map_tensors(_on_cpu, value) for name, value in inputs.items()}
    plain = {name: value for name, value in given.items() if name not in inputs}
    media = frozenset(
        name
        for name, value in further.items()
        if all(tensor.is_floating_point() for _, tensor in walk_tensors(value))
    )
    with (
        torch.autocast("cpu", enabled=False),
        torch.autocast(ids.device.type, enabled=False),
    ):
        full = anatomy_for(text, skeleton, inputs, plain)

        def lean_from(names: frozenset[str]) -> int:
            """The first layer from which the forward is the same without these arguments."""
            rest = {name: value for name, value in inputs.items() if name not in names}
            try:
                lean = anatomy_for(text, skeleton, rest, plain)
            except PipelineConfigError:
                return full.num_layers  # the model insists on them: every stage gets them
            return _same_from(full, lean, names)

        dropped, first = _most_to_drop(media, lean_from, never=full.num_layers)
    for call in full.trace.calls:
        call.arguments = None
    return InputKind(full, first, dropped, frozenset(further))


def _most_to_drop(
    media: frozenset[str], lean_from: Callable[[frozenset[str]], int], never: int
) -> tuple[frozenset[str], int]:
    """What later stages can do without, and from which layer: all of ``media``, else one by one.

    Some that are floating say where tokens are, such as the seconds between a video's frames: each
    layer's positions are made of them. The pixels beside them are none of the later stages' all the
    same.
    """
    first = lean_from(media) if media else never
    if first < never or len(media) < 2:
        return media, first
    dropped: frozenset[str] = frozenset()
    for name in sorted(media):  # every rank must come to the same
        more = dropped | {name}
        found = lean_from(more)
        if found < never:
            dropped, first = more, found
    return dropped, first


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu")


def _same_from(full: Anatomy, lean: Anatomy, media: frozenset[str]) -> int:
    """The first layer from which both runs are the same in all that no stage hands on.

    Values that depend on the inputs alone are real in both runs: they must be equal, and not made
    from the media. Operators between the layers must be the same.
    """
    never = full.num_layers
    indices = sorted(full.calls)
    if sorted(lean.calls) != indices or any(
        full.calls[i].hidden_path != lean.calls[i].hidden_path for i in indices
    ):
        return never
    theirs = _own_calls(lean)
    between = _operators_after(full), _operators_after(lean)
    from_media = _made_from(full, media)
    first = never
    for index, call in reversed(_own_calls(full).items()):
        other = theirs[index]
        if between[0][index] != between[1][index]:
            break
        if not _same_arguments(full, call, lean, other, from_media):
            break
        first = index
    return first


def _own_calls(anatomy: Anatomy) -> dict[int, Call]:
    calls = anatomy.trace.calls
    return {call.index: call for call in calls if call.list_name == anatomy.layers_name}


def _operators_after(anatomy: Anatomy) -> dict[int, list[str]]:
    """For every called layer the operators outside of the layers between it and the next one."""
    graph, layer = anatomy.trace.graph, anatomy.layer_of_nodes()
    starts = {call.first_node: index for index, call in _own_calls(anatomy).items()}
    found: dict[int, list[str]] = {index: [] for index in starts.values()}
    current = None
    for node in range(len(graph)):
        current = starts.get(node, current)
        if current is not None and layer[node] < 0 and graph.kinds[node] == "op":
            found[current].append(graph.labels[node])
    return found


def _made_from(anatomy: Anatomy, names: Iterable[str]) -> list[bool]:
    graph, wanted = anatomy.trace.graph, set(names)
    made: list[bool] = []
    for node in range(len(graph)):
        is_one = graph.kinds[node] == "input" and graph.labels[node] in wanted
        made.append(is_one or any(made[parent] for parent in graph.parents[node]))
    return made


def _same_arguments(
    full: Anatomy, call: Call, lean: Anatomy, other: Call, from_media: list[bool]
) -> bool:
    if _plain(call.arguments) != _plain(other.arguments):
        return False
    mine = dict(walk_tensors(call.arguments))
    theirs = dict(walk_tensors(other.arguments))
    nodes = {value.path: value.node for value in other.inputs}
    for value in call.inputs:
        if full.is_computed(value.node):
            continue  # received, or made by the stage itself
        one, two = mine[value.path], theirs[value.path]
        if from_media[value.node] or lean.is_computed(nodes[value.path]):
            return False
        if one.shape != two.shape or one.dtype != two.dtype or not torch.equal(one, two):
            return False
    return True


def _plain(value: Any) -> Any:
    """The structure of arguments with their plain values; tensors are compared one by one."""
    if isinstance(value, torch.Tensor):
        return torch.Tensor
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    known = value is None or isinstance(value, bool | int | float | str)
    return value if known else type(value)


def _types(arguments: Mapping[str, Any]) -> Signature:
    def kind(value: Any) -> Any:
        tensors = [tensor for _, tensor in walk_tensors(value)]
        is_one = isinstance(value, torch.Tensor)
        shapes = sorted({(t.dim(), str(t.dtype)) for t in tensors})
        return (is_one, tuple(shapes))

    return tuple((name, kind(arguments[name])) for name in sorted(arguments))


def _shapes(arguments: Mapping[str, Any]) -> Signature:
    return tuple(
        (name, tuple((path, tuple(t.shape), t.dtype) for path, t in walk_tensors(arguments[name])))
        for name in sorted(arguments)
    )


def _depends_on_sizes(anatomy: Anatomy) -> bool:
    """Whether the layers return tensors beside the hidden state, whose shapes are as recorded."""

    def has_tensor(value: Any) -> bool:
        if isinstance(value, Mapping):
            return any(map(has_tensor, value.values()))
        if isinstance(value, list | tuple):
            return any(map(has_tensor, value))
        return isinstance(value, TensorLike)

    return any(has_tensor(call.output) for call in anatomy.calls.values())
