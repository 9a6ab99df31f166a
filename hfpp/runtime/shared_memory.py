"""Two parameters over the same memory: tied in a way that no split can keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from hfpp.errors import PipelineConfigError


@dataclass(frozen=True, slots=True)
class _Extent:
    """The elements of its storage that a parameter lies in, from the first to after the last."""

    start: int
    stop: int
    name: str
    stages: frozenset[int]
    trained: bool


def refuse_shared_memory(model: nn.Module, holders: Mapping[str, Sequence[int]]) -> None:
    """Refuse parameters that overlap in memory and are not on one and the same stage.

    An optimizer's step for one of them changes the other; on other stages it would not.

    Args:
        model: the live model.
        holders: the stages of every FQN.

    Raises:
        PipelineConfigError: naming both, unless neither is trained.
    """
    for extents in _extents(model, holders):
        active: list[_Extent] = []
        for extent in sorted(extents, key=lambda e: e.start):
            active = [other for other in active if other.stop > extent.start]
            for other in active:
                alone = len(other.stages | extent.stages) == 1
                if not alone and (other.trained or extent.trained):
                    raise _error(model, other, extent)
            active.append(extent)


def _extents(model: nn.Module, holders: Mapping[str, Sequence[int]]) -> Iterator[list[_Extent]]:
    """Those of several parameters in one storage, by storage."""
    named: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    by_storage: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters.values():
        if parameter.numel():
            storage = int(parameter.untyped_storage()._cdata)
            by_storage.setdefault(storage, []).append(parameter)
    for sharing in by_storage.values():
        if len(sharing) > 1:
            yield [_extent(parameter, named[id(parameter)], holders) for parameter in sharing]


def _extent(
    parameter: nn.Parameter, names: list[str], holders: Mapping[str, Sequence[int]]
) -> _Extent:
    start = int(parameter.storage_offset())
    steps = zip(parameter.shape, parameter.stride(), strict=True)
    stop = start + 1 + sum((size - 1) * stride for size, stride in steps)
    stages = frozenset(stage for name in names for stage in holders.get(name, ()))
    return _Extent(start, stop, names[0], stages, parameter.requires_grad)


def _error(model: nn.Module, one: _Extent, other: _Extent) -> PipelineConfigError:
    return PipelineConfigError(
        f"{one.name} (on stages {sorted(one.stages)}) and {other.name} (on stages "
        f"{sorted(other.stages)}) of {type(model).__name__} are two parameters over the same "
        f"memory, which stages of their own would not share: tie them as one parameter "
        f"(model.{other.name} = model.{one.name}), or give one of them a copy (.clone())."
    )
