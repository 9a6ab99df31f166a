"""How a model adds the routers' auxiliary loss to its own: read off a run of its code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfpp.errors import PipelineConfigError
from hfpp.runtime.paths import Key, Path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfpp.runtime.trace import Graph, Trace, Value

FLAG = "output_router_logits"
"""What models call the setting, in their config and among their forward's arguments."""

_SCALINGS = frozenset(("mul", "mul_", "div", "div_"))
_COPIES = frozenset(("_to_copy", "clone", "detach"))


@dataclass(frozen=True, slots=True)
class AuxiliaryTerm:
    """What a model adds to its loss besides the loss of its logits: coefficient times value.

    Attributes:
        path: where the value is in the forward's result.
        coefficient: what the value was multiplied by when the model was split.
        places: the attributes, seen from the model, that hold this number and are named like it.
    """

    path: Path
    coefficient: float
    places: tuple[tuple[str, ...], ...]

    def value_in(self, name: str, result: list[Value]) -> Value:
        """The value in the result of a run of the model class ``name`` without labels."""
        found = next((value for value in result if value.path == self.path), None)
        if found is None:
            raise _not_followed(name, "without labels it does not return it")
        return found

    def coefficient_of(self, stage: nn.Module) -> float:
        """The coefficient now.

        Raises:
            PipelineConfigError: if it was changed in one of its places only.
        """
        if not self.places:
            return self.coefficient
        now = {".".join(place): reduce(getattr, place, stage) for place in self.places}
        values: set[Any] = set(now.values())
        if len(values) > 1:
            raise PipelineConfigError(
                f"the coefficient of the auxiliary loss differs between {now} of a stage of "
                f"{type(stage).__name__}: which one counts cannot be known. Set all of them alike."
            )
        return float(values.pop())


def flagged_configs(model: nn.Module) -> tuple[Any, ...]:
    """The configs of ``model`` that may ask for the routers' auxiliary loss."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    configs = (config,) if text is config else (config, text)
    return tuple(c for c in configs if c is not None)


def asks_for_auxiliary_loss(configs: Sequence[Any]) -> bool:
    """Whether one of a model's configs does."""
    return any(getattr(config, FLAG, False) for config in configs)


def find_auxiliary_term(
    model: nn.Module, trace_with: Callable[[Mapping[str, torch.Tensor]], Trace], ids: torch.Tensor
) -> AuxiliaryTerm | None:
    """Read off a run with labels what the model adds to its loss besides that of its logits.

    Args:
        model: without weights, with `output_router_logits` set.
        trace_with: runs it hollow with further inputs.
        ids: the token ids of the run, int64 [batch, seq].

    Returns:
        The term; None for a model that, in spite of the setting, adds none or has no loss.

    Raises:
        PipelineConfigError: naming the model class, if its code does not show a plain sum of its
            loss and a number times a value that it returns.
    """
    name = type(model).__name__
    takes_labels = "labels" in inspect.signature(type(model).forward).parameters
    trace = _trace_with_labels(model, trace_with, ids) if takes_labels else trace_with({})
    results = {value.path: value for value in trace.result}
    total = results.pop((Key("loss"),), None)
    others = [path for path, value in results.items() if value.is_floating and not value.shape]
    if not takes_labels and not others:
        return None
    if total is None:
        raise _not_followed(name, "it returns no 'loss' by that name for labels")
    graph, labels = trace.graph, trace.input_nodes["labels"]
    logits = results.get((Key("logits"),))
    stops = () if logits is None else (logits.node,)
    extra = []
    for term in _summands(graph, total.node):
        reached = graph.reach([term], stops)
        if labels not in reached:
            extra.append(term)
        elif any(graph.kinds[node] == "param" for node in reached):
            raise _not_followed(name, "its loss depends on its weights other than by its logits")
        elif graph.labels[term] in _SCALINGS and graph.factors.get(term):
            raise _not_followed(name, "it scales the loss of its logits")
    if not extra and not others:
        return None
    if not extra:
        raise _not_followed(name, f"it returns a scalar ({others[0]}) that is not in its loss")
    if len(extra) > 1:
        raise _not_followed(name, f"it adds {len(extra)} values to its loss")
    factors, value = _product(graph, extra[0], results)
    if value is None or len(factors) > 1:
        raise _not_followed(name, "what it adds to its loss is no number times a returned value")
    places = tuple(_places(model, factors[0])) if factors else ()
    if factors and not places:
        raise _not_followed(
            name, f"the factor {factors[0]} of what it adds to its loss is in no attribute"
        )
    return AuxiliaryTerm(value.path, factors[0] if factors else 1.0, places)


def _trace_with_labels(
    model: nn.Module, trace_with: Callable[[Mapping[str, torch.Tensor]], Trace], ids: torch.Tensor
) -> Trace:
    failure: Exception | None = None
    for labels in (ids.clone(), ids[:, 0].clone() % 2):  # of every token, or of every sequence
        try:
            return trace_with({"labels": labels})
        except Exception as error:
            failure = failure or error
    raise _not_followed(
        type(model).__name__,
        f"its forward failed with labels ({type(failure).__name__}: {failure})",
    ) from failure


def _not_followed(model_name: str, why: str) -> PipelineConfigError:
    return PipelineConfigError(
        f"{model_name} has config.{FLAG}=True, but how it adds the routers' auxiliary "
        f"loss to its loss cannot be followed: {why}. Set config.{FLAG}=False to train without it."
    )


def _summands(graph: Graph, node: int) -> Iterator[int]:
    plain = graph.labels[node] in ("add", "add_") and not graph.factors.get(node)
    if plain and len(graph.parents[node]) == 2:
        for parent in graph.parents[node]:
            yield from _summands(graph, parent)
    else:
        yield node


def _product(
    graph: Graph, node: int, results: Mapping[Path, Value]
) -> tuple[list[float], Value | None]:
    """The numbers that multiply a returned value to make ``node``, and that value."""
    returned = {value.node: value for value in results.values()}
    factors: list[float] = []
    while node not in returned:
        numbers = graph.factors.get(node, ())
        if len(graph.parents[node]) != 1:
            return factors, None
        if graph.labels[node] in ("mul", "mul_") and len(numbers) == 1:
            factors.append(numbers[0])
        elif graph.labels[node] not in _COPIES:
            return factors, None
        node = graph.parents[node][0]
    return factors, returned[node]


def _places(model: nn.Module, number: float) -> Iterator[tuple[str, ...]]:
    """Attributes of the model and of its config, at any depth, that may hold a coefficient."""
    owners: list[tuple[tuple[str, ...], Any]] = [((), model)]
    seen: set[int] = set()
    while owners:
        path, owner = owners.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        for name, value in vars(owner).items():
            named = "coef" in name or "loss" in name
            if hasattr(value, "to_dict") and not isinstance(value, nn.Module | type):
                owners.append(((*path, name), value))
            elif named and type(value) in (int, float) and value == number:
                yield (*path, name)
