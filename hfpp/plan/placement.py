"""Which rank holds which stages."""

from __future__ import annotations

from enum import StrEnum

from hfpp import _core

__all__ = ["Placement", "ranks_by_stage", "stage_ids_by_rank", "stage_ids_this_rank"]


class Placement(StrEnum):
    """How the stages lie over the ranks.

    ``LOOP`` deals them round: rank r holds stages r, r + pp_size, r + 2 * pp_size, and so on. ``V``
    goes there and back: rank r holds exactly two, stage r and stage num_stages - 1 - r, so that the
    first rank holds both ends of the model.
    """

    LOOP = "loop"
    V = "v"


def stage_ids_this_rank(
    pp_rank: int, pp_size: int, num_stages: int, style: str = "loop"
) -> tuple[int, ...]:
    """Stages of one rank, in O(stages per rank): see `hfpp.functional.stage_ids_this_rank`."""
    return _core.stage_ids_this_rank(pp_rank, pp_size, num_stages, style)


def stage_ids_by_rank(pp_size: int, num_stages: int, style: str = "loop") -> _core.Table:
    """Stages of every rank: see `hfpp.functional.stage_ids_by_rank`."""
    return _core.stage_ids_by_rank(pp_size, num_stages, style)


def ranks_by_stage(pp_size: int, num_stages: int, style: str = "loop") -> _core.Table:
    """The rank of every stage: see `hfpp.functional.ranks_by_stage`."""
    return _core.ranks_by_stage(pp_size, num_stages, style)
