"""How a rank joins its job, started by `hfpp train` itself or by torchrun, and trains its part."""

from __future__ import annotations

import os
import platform
import socket
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

    from hfpp.train.events import RunShape, StepMetrics, StepTrace
    from hfpp.train.inputs import RunInputs
    from hfpp.train.options import TrainOptions
    from hfpp.train.torchrun import TorchrunRank

__all__ = ["check_same_inputs", "train_as_local_rank", "train_as_torchrun_rank"]

_TIMEOUT = timedelta(minutes=10)


def train_as_local_rank(
    options: TrainOptions,
    inputs: RunInputs,
    report: Callable[[RunShape | StepMetrics | StepTrace], None],
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


def train_as_torchrun_rank(
    options: TrainOptions,
    inputs: RunInputs,
    report: Callable[[RunShape | StepMetrics | StepTrace], None],
    *,
    rank: TorchrunRank,
) -> torch.device:
    """Trains as a rank of torchrun's job, on a GPU of its own where every rank can have one.

    Args:
        options: the run.
        inputs: its files.
        report: see `train_rank`.
        rank: of this process.

    Returns:
        The device that it trained on.

    Raises:
        OptionError: the ranks read different texts or configurations.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() >= rank.local_world_size:
        device = torch.device("cuda", rank.local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=_TIMEOUT, device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    check_same_inputs(inputs)
    _train(options, inputs, device, report)
    return device


def check_same_inputs(inputs: RunInputs) -> None:
    """Checks that all ranks train on the same tokens; every rank calls it.

    Raises:
        OptionError: they do not (on every rank).
    """
    mine = (inputs.digest, f"{inputs.text_name} under Python {platform.python_version()}")
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    digest, first = everyone[0]
    for rank, (other_digest, other) in enumerate(everyone):
        if other_digest != digest:
            raise OptionError(
                f"rank 0 reads another text or model configuration ({first}) than rank {rank} "
                f"({other}): give every rank the same --text and --model. The default text comes "
                "with Python and differs between its versions."
            )


def _train(
    options: TrainOptions,
    inputs: RunInputs,
    device: torch.device,
    report: Callable[[RunShape | StepMetrics | StepTrace], None],
) -> None:
    replicas = dist.get_world_size() // options.pp
    mesh = init_device_mesh(device.type, (options.pp, replicas), mesh_dim_names=(PP, DP))
    train_rank(options, inputs, mesh, device, report)
    dist.destroy_process_group()


def _use_loopback() -> None:
    """Local ranks need no network, and a machine's name may not resolve."""
    names = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in names if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
