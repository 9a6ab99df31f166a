"""Costs of a model as a JSON file: what `hfpp profile` writes and plans and partitions read."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hfpp.plan.costs import ModelCosts, UnitCost
from hfpp.plan.strict_json import JsonValue, read_json_file

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["CostsFile", "costs_as_json", "read_costs", "read_costs_file"]

_FORMAT = "hfpp costs 1"
_LARGEST = 8 << 20  # bytes of a file, of some 30,000 layers
_MOST_LAYERS = 1 << 20
_UNIT_FIELDS = tuple(field.name for field in fields(UnitCost))


def costs_as_json(costs: ModelCosts, **about: str | int) -> str:
    """The text of a file of costs.

    Args:
        costs: of the model.
        about: of what and where they were measured; kept in the file for people to read.

    Example:
        >>> layer = UnitCost(forward=1.0, backward_input=1.0, backward_weight=1.0)
        >>> costs = ModelCosts(
        ...     embedding=layer, layers=(layer,), head=layer, boundary_bytes=8, source="measured"
        ... )
        >>> json.loads(costs_as_json(costs, device="CPU"))["about"]
        {'device': 'CPU'}
    """
    return json.dumps(
        {
            "format": _FORMAT,
            "about": about,
            "source": costs.source,
            "boundary_bytes": costs.boundary_bytes,
            "embedding": asdict(costs.embedding),
            "layers": [asdict(layer) for layer in costs.layers],
            "head": asdict(costs.head),
        },
        indent=1,
    )


class CostsFile(NamedTuple):
    """What a file of costs says.

    Attributes:
        costs: of the model.
        about: of what and where they were measured.
    """

    costs: ModelCosts
    about: dict[str, Any]


def read_costs(path: str | PathLike[str]) -> ModelCosts:
    """The costs in a file that `costs_as_json` made: see `read_costs_file`."""
    return read_costs_file(path).costs


def read_costs_file(path: str | PathLike[str]) -> CostsFile:
    """What is in a file that `costs_as_json` made.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: no such file.
        PipelineConfigError: no file of costs, or a wrong value in it; the message has file, line
            and column, or the path of the value.
    """
    document = read_json_file(path, what="a file of costs of hfpp profile", largest=_LARGEST)
    members = document.fields(
        ("format", "about", "source", "boundary_bytes", "embedding", "layers", "head")
    )
    members["format"].one_of((_FORMAT,))
    source: Any = members["source"].one_of(("measured", "analytic"))
    kind: Literal["analytic", "measured"] = source
    costs = ModelCosts(
        embedding=_unit(members["embedding"]),
        layers=tuple(_unit(layer) for layer in members["layers"].items(most=_MOST_LAYERS)),
        head=_unit(members["head"]),
        boundary_bytes=members["boundary_bytes"].integer(),
        source=kind,
    )
    about = members["about"].value
    return CostsFile(costs, about if isinstance(about, dict) else {})


def _unit(value: JsonValue) -> UnitCost:
    members = value.fields(_UNIT_FIELDS)
    return UnitCost(
        forward=members["forward"].number(),
        backward_input=members["backward_input"].number(),
        backward_weight=members["backward_weight"].number(),
        parameters=members["parameters"].integer(),
        activation_bytes=members["activation_bytes"].integer(),
        weight_bytes=members["weight_bytes"].integer(),
        split_backward=members["split_backward"].number(),
    )
