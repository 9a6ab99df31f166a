"""How a rank joins its job, started by `hfpp train` itself or by torchrun, and trains its part."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hfpp.train.errors import OptionError
from hfpp.train.loop import DP, PP, train_rank

if TYPE_CHECKING:
    from collections.abc import Callable

    from pathlib import Path

    from hfpp.train.events import RunShape, StepMetrics
    from hfpp.train.inputs import RunInputs
    from hfpp.train.options import TrainOptions

__all__ = ["TorchrunRank", "train_as_local_rank"]

_TIMEOUT = timedelta(minutes=10)


def train_as_local_rank(
    options: TrainOptions,
    inputs: RunInputs,
    report: Callable[[RunShape | StepMetrics], None],
    *,
    rank: int,
    store: Path,
    threads: int,
) -> None:
    """Trains as one of `options.pp` local gloo processes.

    Args:
        options: the run.
        inputs: its files.
        report: see `train_rank`.
        rank: of this process.
        store: a file that does not exist yet, where the ranks meet: no port to collide.
        threads: CPU threads of this rank.
    """
    torch.set_num_threads(threads)
    _use_loopback()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=options.pp,
        timeout=_TIMEOUT,
    )
    _train(options, inputs, torch.device("cpu"), report)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchrunRank:
    """This process as torchrun started it.

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
    def from_environment(cls) -> TorchrunRank:
        """The rank that torchrun's variables tell of."""
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=int(os.environ.get("LOCAL_RANK", rank)),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        )

    @property
    def device(self) -> torch.device:
        """A GPU of its own, where every rank of this machine can have one; else the CPU."""
        if torch.cuda.is_available() and torch.cuda.device_count() >= self.local_world_size:
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")

    def check(self, options: TrainOptions) -> None:
        """Checks that the job's ranks form whole pipelines, and that the batch feeds them.

        Raises:
            OptionError: they do not.
        """
        if self.world_size % options.pp:
            nearest = max(options.pp, self.world_size // options.pp * options.pp)
            raise OptionError(
                f"the job's {self.world_size} ranks must be a multiple of --pp ({options.pp}): "
                f"start {nearest} ranks, or use --pp {_largest_divisor(self.world_size, options.pp)}."
            )
        options.check_schedule(replicas=self.world_size // options.pp)

    def train(
        self,
        options: TrainOptions,
        inputs: RunInputs,
        report: Callable[[RunShape | StepMetrics], None],
    ) -> None:
        """Trains this rank's part."""
        device = self.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
        _train(options, inputs, device, report)


def _train(
    options: TrainOptions,
    inputs: RunInputs,
    device: torch.device,
    report: Callable[[RunShape | StepMetrics], None],
) -> None:
    replicas = dist.get_world_size() // options.pp
    mesh = init_device_mesh(device.type, (options.pp, replicas), mesh_dim_names=(PP, DP))
    train_rank(options, inputs, mesh, device, report)
    dist.destroy_process_group()


def _largest_divisor(number: int, limit: int) -> int:
    return next(size for size in range(limit, 0, -1) if number % size == 0)


def _use_loopback() -> None:
    """Local ranks need no network, and a machine's name may not resolve."""
    names = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in names if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
