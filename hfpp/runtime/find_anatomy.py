"""A live model is taken apart: one hollow run, found again for models of the same make."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from hfpp.errors import PipelineConfigError
from hfpp.runtime.anatomy import Anatomy
from hfpp.runtime.anatomy_cache import AnatomyCache
from hfpp.runtime.auxiliary_term import (
    AuxiliaryTerm,
    asks_for_auxiliary_loss,
    find_auxiliary_term,
    flagged_configs,
)
from hfpp.runtime.crossing import TensorLike
from hfpp.runtime.emission import Emission, find_emissions
from hfpp.runtime.facts import find_facts
from hfpp.runtime.layer_list import (
    check_calls,
    describe_call,
    find_layers,
    list_of_layers,
    primary_value,
)
from hfpp.runtime.model_inputs import (
    ROUND_ROWS,
    ROWS,
    first_argument,
    forward_constants,
    plain_ids,
    run_sizes,
)
from hfpp.runtime.paths import Path
from hfpp.runtime.skeleton import meta_skeleton
from hfpp.runtime.trace import Trace, Value, run_hollow

_KNOWN = AnatomyCache()
"""Of the whole process: an anatomy is a function of what the model is made of."""


def find_anatomy(model: nn.Module) -> Anatomy:
    """Take ``model`` apart; its weights are neither read nor copied.

    A model of the same code, config and structure as one before is not run again, if all its code
    is torch's, transformers' or peft's: what other code reads is not known.

    Raises:
        PipelineConfigError: naming the model class, if no list of layers is found or the forward
            cannot be followed.
    """
    return _KNOWN.find(model, _take_apart)


def forget_anatomies() -> None:
    """Give back the memory of the anatomies that `find_anatomy` remembers."""
    _KNOWN.clear()


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


class _ForwardFailedError(PipelineConfigError):
    """The model's own code raised an error in the hollow run."""


def _take_apart(model: nn.Module) -> Anatomy:
    name, skeleton = type(model).__name__, meta_skeleton(model)
    try:
        return _run_at(name, skeleton, *run_sizes(model, ROWS))
    except _ForwardFailedError as error:
        try:
            return _run_at(name, skeleton, *run_sizes(model, ROUND_ROWS))
        except PipelineConfigError:
            raise error from None


def _run_at(name: str, skeleton: nn.Module, batch: int, seq: int) -> Anatomy:
    return _run(name, skeleton, batch, seq, _auxiliary_term(skeleton, batch, seq))


def _auxiliary_term(skeleton: nn.Module, batch: int, seq: int) -> AuxiliaryTerm | None:
    if not asks_for_auxiliary_loss(flagged_configs(skeleton)):
        return None
    ids_name, ids = first_argument(skeleton), plain_ids(skeleton, batch, seq)

    def trace_with(more: Mapping[str, torch.Tensor]) -> Trace:
        return run_hollow(skeleton, {ids_name: ids, **more}, forward_constants(skeleton))

    return find_auxiliary_term(skeleton, trace_with, ids)


def _run(
    name: str, skeleton: nn.Module, batch: int, seq: int, auxiliary: AuxiliaryTerm | None
) -> Anatomy:
    ids_name = first_argument(skeleton)
    inputs = {ids_name: plain_ids(skeleton, batch, seq)}
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
    layers_name = find_layers(name, skeleton, trace) if text is None else text.layers_name
    layer_calls = {call.index: call for call in trace.calls if call.list_name == layers_name}
    if text is not None:
        check_calls(name, layers_name, trace)
    output = primary_value(name, trace.result)
    dtypes = [p.dtype for p in skeleton.parameters() if p.is_floating_point()]
    facts = find_facts(name, trace, layers_name, ids_name)
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
        num_layers=len(list_of_layers(skeleton.get_submodule(layers_name))),
        calls={index: describe_call(call) for index, call in layer_calls.items()},
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
        _rerun=partial(_run, name),
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


def _shape_of(value: Any) -> Any:
    return list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
