"""Check what a user names: the model itself, or a small twin of a transformers model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hfpp.check.inputs import ALL_KINDS, Batch, Kind
from hfpp.check.instance import TOKENS, check_instance
from hfpp.check.report import CheckReport
from hfpp.check.shrink import shrink_config
from hfpp.check.sources import Source, find_source
from hfpp.errors import PipelineConfigError

_FEWEST_LAYERS = 4  # of a twin
_TWIN_TOKENS = 32  # at most: twice as many are all the positions that it has


def check_class(
    model_class: Callable[[Any], nn.Module],
    config: Any,
    *,
    pp_sizes: Sequence[int] = (2, 3, 4),
    kinds: Sequence[Kind] = ALL_KINDS,
    more: Sequence[Batch] = (),
) -> CheckReport:
    """Compare a random model of a small config, built as it is, with its stages.

    Args:
        model_class: builds the model.
        config: what it is built from.
        pp_sizes: numbers of stages.
        kinds: of batches.
        more: batches to run beside those.

    Raises:
        Exception: whatever building the model raises.
    """
    model = _random(model_class, config)
    return check_instance(model, pp_sizes=pp_sizes, kinds=kinds, more=more)


def check_model(
    model: Any,
    *,
    pp_sizes: Sequence[int] = (2, 4),
    tokens: int = TOKENS,
    full: bool = False,
    kinds: Sequence[Kind] = ALL_KINDS,
    gradients: bool = True,
    trust_remote_code: bool = False,
) -> CheckReport:
    """Check a model: see `hfpp.functional.check_model`."""
    _check_arguments(pp_sizes, tokens)
    source = find_source(model, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"pp_sizes": pp_sizes, "kinds": kinds, "gradients": gradients}
    if source.config is None or full:
        filled = _filled(source)
        return check_instance(filled, tokens=tokens, whole=filled, **options)
    return check_instance(
        _twin(source, max(pp_sizes)),
        tokens=min(tokens, _TWIN_TOKENS),
        layout_tokens=tokens,
        is_shrunk=True,
        whole=source.build_bare() if source.model is None else source.model,
        **options,
    )


def model_or_twin(model: nn.Module, *, layers: int) -> tuple[nn.Module, bool]:
    """A small twin of a transformers model, any other model itself; and whether it is a twin.

    Raises:
        PipelineConfigError: if there is neither.
    """
    source = find_source(model)
    return (_filled(source), False) if source.config is None else (_twin(source, layers), True)


def _twin(source: Source, layers: int) -> nn.Module:
    small = shrink_config(source.config, layers=max(_FEWEST_LAYERS, layers))
    return _random(source.build, small)


def _check_arguments(pp_sizes: Sequence[int], tokens: int) -> None:
    if not pp_sizes or any(type(size) is not int or size < 1 for size in pp_sizes):
        raise PipelineConfigError(
            f"pp_sizes ({pp_sizes!r}) must be positive numbers of stages, such as (2, 4)."
        )
    if type(tokens) is not int or tokens < 8:
        raise PipelineConfigError(f"tokens ({tokens!r}) must be a number of at least 8.")


def _filled(source: Source) -> nn.Module:
    """The model at its full size, with weights."""
    model = source.model
    if model is None or (source.config is not None and _has_meta(model)):
        return _random(source.build, copy.deepcopy(source.config))
    if _has_meta(model):
        raise PipelineConfigError(
            f"{type(model).__name__} has parameters on the meta device, and no transformers config "
            f"to build a small twin of: give it weights, such as model.to_empty(device='cpu') and "
            f"random numbers."
        )
    return model


def _has_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _random(make: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return make(config)
