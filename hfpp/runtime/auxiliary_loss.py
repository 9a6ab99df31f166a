"""The routers' auxiliary loss: how a model adds it to its own loss, and adding it in a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from hfpp.errors import PipelineConfigError
from hfpp.runtime.paths import Key, Path, get_at
from hfpp.runtime.stage_boundary import boundary_of, unwrapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.pipelining import PipelineStage

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


class AuxiliaryLoss(NamedTuple):
    """Of one microbatch: the model's value, a scalar, and what it is multiplied by."""

    value: torch.Tensor
    coefficient: float


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


def check_flag(stage: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Refuse a stage's forward that collects other outputs than the model did when it was split."""
    split_with: bool = stage.__dict__["_hfpp_flag"]
    now = kwargs.get(FLAG)
    if now is None:
        now = asks_for_auxiliary_loss(stage.__dict__["_hfpp_flagged_configs"])
    if bool(now) != split_with:
        raise PipelineConfigError(
            f"{FLAG} is {bool(now)} in this forward of a stage of {type(stage).__name__}, but was "
            f"{split_with} in the model's config when it was split: set config.{FLAG}={bool(now)} "
            f"before splitting, and leave it then."
        )


def check_taken(stage: nn.Module) -> None:
    """Refuse to go on where a forward's auxiliary loss was added to no loss."""
    left: AuxiliaryLoss | None = stage.__dict__["_hfpp_running"].auxiliary
    if left is not None and left.value.requires_grad:
        raise RuntimeError(
            f"the auxiliary loss of the forward before of {type(stage).__name__} was added to no "
            f"loss: use the schedule of hfpp.build_pipeline_schedule, or take it after every "
            f"forward of the last stage with hfpp.runtime.auxiliary_loss.take_auxiliary_loss."
        )


def take_auxiliary_loss(part: nn.Module) -> AuxiliaryLoss | None:
    """The auxiliary loss of the latest forward of the last stage; each can be taken once.

    Args:
        part: a stage, in whatever wraps it.

    Returns:
        The loss, connected to the graph of its forward; None for a stage that has none.
    """
    running = unwrapped(part).__dict__.get("_hfpp_running")
    if running is None:
        return None
    taken: AuxiliaryLoss | None = running.auxiliary
    running.auxiliary = None
    return taken


class AuxiliaryLosses:
    """The auxiliary losses of a batch's microbatches, taken from this rank's last stage.

    ``values``: of the current or latest batch, scalars as the model computes them, in the order of
    the microbatches; empty on other ranks and for models without.
    """

    def __init__(self, stages: Sequence[PipelineStage]) -> None:
        self.values: list[torch.Tensor] = []
        self._last = next((stage for stage in stages if stage.is_last and _has(stage)), None)

    def start(self) -> None:
        """Begin a batch: drop the values of the one before, and what belongs to no batch."""
        self.values = []
        if self._last is not None:
            take_auxiliary_loss(self._last.submod)

    def take(self) -> AuxiliaryLoss | None:
        """Note and give that of the microbatch that the last stage has just run forward."""
        if self._last is None:
            return None
        found = take_auxiliary_loss(self._last.submod)
        if found is None:
            raise RuntimeError("a loss was computed without a forward of the last stage before it.")
        self.values.append(found.value.detach())
        return found

    def add_to(self, loss: torch.Tensor) -> torch.Tensor:
        """``loss`` plus what the model would add to it for the same microbatch."""
        found = self.take()
        if found is None:
            return loss
        return (loss + found.coefficient * found.value.to(loss.device)).to(loss.dtype)


def _has(stage: PipelineStage) -> bool:
    boundary = boundary_of(stage.submod)
    return (
        boundary is not None
        and boundary.anatomy is not None
        and boundary.anatomy.auxiliary is not None
    )


def auxiliary_loss_in(
    stage: nn.Module, term: AuxiliaryTerm, result: Any, expected: Mapping[Path, torch.Tensor]
) -> AuxiliaryLoss:
    """Take the auxiliary loss out of the result of the last stage's forward.

    Args:
        stage: the stage.
        term: what to look for.
        result: what its own forward returned.
        expected: the received router logits, by where the model returns them.

    Raises:
        RuntimeError: if the model's code did not collect just these.
    """
    try:
        value = get_at(result, term.path)
        same = all(get_at(result, path) is tensor for path, tensor in expected.items())
    except (KeyError, IndexError, TypeError):
        value, same = None, False
    if not same or not isinstance(value, torch.Tensor):
        raise RuntimeError(
            f"the forward of {type(stage).__name__} did not collect the router logits that it "
            f"collected when it was split: change nothing that says which outputs it returns."
        )
    return AuxiliaryLoss(value, term.coefficient_of(stage))
