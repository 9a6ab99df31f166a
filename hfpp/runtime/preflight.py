"""All ranks hold the same model and settings, or all of them say what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from hfpp.errors import PipelineConfigError


def model_facts(model: nn.Module) -> dict[str, str]:
    """What must be equal on all ranks for their stages to fit together, by name."""
    shapes = [
        f"{name} {tuple(p.shape)} {p.dtype}"
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
    seen: dict[int, str] = {}
    tied = [
        f"{name}={seen[id(p)]}"
        for name, p in model.named_parameters(remove_duplicate=False)
        if seen.setdefault(id(p), name) != name
    ]
    facts = {
        "model class": f"{type(model).__module__}.{type(model).__qualname__}",
        "number of parameter tensors": str(len(shapes)),
        "parameter names, shapes and dtypes": _digest(shapes),
        "tied parameters": _digest(tied),
    }
    config = getattr(model, "config", None)
    values: dict[str, Any] = getattr(config, "to_dict", dict)()
    for name, value in values.items():
        if not name.startswith("_") and name != "transformers_version":
            facts[f"config.{name}"] = _short(value)
    adapters: Any = getattr(model, "peft_config", None)
    if isinstance(adapters, Mapping):  # their scale is in no parameter
        facts["adapters"] = _digest({name: _settings(config) for name, config in adapters.items()})
    return facts


def _settings(config: Any) -> dict[str, Any]:
    """An adapter's settings; sets come in another order in every process."""
    values: dict[str, Any] = getattr(config, "to_dict", dict)()
    return {
        name: sorted(map(str, value)) if isinstance(value, set | frozenset) else value
        for name, value in values.items()
    }


def agree(facts: Mapping[str, Any], error: Exception | None, group: dist.ProcessGroup) -> None:
    """Compare ``facts`` over the ranks of ``group``.

    Ranks exchange digests; the facts themselves travel only where two digests differ, so that the
    call costs little in a world of thousands.

    Args:
        facts: names and values that must be equal on all ranks.
        error: what this rank's own checks raised: the others then raise too, instead of waiting.
        group: the ranks.

    Raises:
        PipelineConfigError: on every rank, if any of them had an error or a differing fact. Where
            this rank has an error of its own, that one is raised.
    """
    mine = {name: _short(value) for name, value in facts.items()}
    everyone: list[Any] = [None] * dist.get_world_size(group)
    message = None if error is None else str(error)
    dist.all_gather_object(everyone, (message, _digest(mine)), group=group)
    if error is not None:
        raise error
    for rank, (problem, _) in enumerate(everyone):
        if problem is not None:
            raise PipelineConfigError(f"rank {rank} refused its part of the setup: {problem}")
    odd = next((r for r, (_, digest) in enumerate(everyone) if digest != everyone[0][1]), None)
    if odd is None:
        return
    first, other = _facts_of(0, mine, group), _facts_of(odd, mine, group)
    name = next(n for n in {**first, **other} if first.get(n) != other.get(n))
    raise PipelineConfigError(
        f"the ranks disagree on {name}: rank 0 has {first.get(name)}, rank {odd} has "
        f"{other.get(name)}. Give every rank the same model and settings."
    )


def _facts_of(rank: int, mine: dict[str, str], group: dist.ProcessGroup) -> dict[str, str]:
    box = [mine]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, rank), group=group)
    return box[0]


def _short(value: Any) -> str:
    """The value itself where it is short enough to read in an error, else its digest."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, sort_keys=True)
    return text if len(text) <= 80 else f"{text[:40]}... (sha256 {_digest(text)})"


def _digest(value: Any) -> str:
    text = json.dumps(value, default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
