"""What torchrun tells a process of its place in the job."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from hfpp.train.errors import OptionError

if TYPE_CHECKING:
    from hfpp.train.options import TrainOptions

__all__ = ["TorchrunRank"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchrunRank:
    """The place of this process.

    Attributes:
        rank: in the whole job.
        world_size: ranks of the whole job.
        local_rank: on this machine.
        local_world_size: ranks on this machine.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> Self | None:
        """The place that torchrun's variables tell of; None when it did not start this process.

        Raises:
            OptionError: the variables are no such place.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return None
        world_size = _number("WORLD_SIZE", least=1)
        rank = _number("RANK", below=world_size)
        local_world_size = _number("LOCAL_WORLD_SIZE", usual=world_size, least=1)
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=_number("LOCAL_RANK", usual=rank, below=local_world_size),
            local_world_size=local_world_size,
        )

    def check(self, options: TrainOptions) -> None:
        """Checks that the job's ranks form whole pipelines, and that the batch feeds them.

        Raises:
            OptionError: they do not.
        """
        if self.world_size % options.pp:
            nearest = max(options.pp, self.world_size // options.pp * options.pp)
            fitting = next(n for n in range(options.pp, 0, -1) if self.world_size % n == 0)
            raise OptionError(
                f"the job's {self.world_size} ranks must be a multiple of --pp ({options.pp}): "
                f"start {nearest} ranks, or use --pp {fitting}."
            )
        options.check_schedule(replicas=self.world_size // options.pp)


def _number(name: str, *, usual: int = 0, least: int = 0, below: int | None = None) -> int:
    given = os.environ.get(name, str(usual))
    if given.isdecimal() and least <= int(given) and (below is None or int(given) < below):
        return int(given)
    bound = f"at least {least}" if below is None else f"from {least} to {below - 1}"
    raise OptionError(
        f"{name} ({given!r}) in the environment must be an integer, {bound}: start the job with "
        "torchrun, or unset RANK and WORLD_SIZE to run local processes."
    )
