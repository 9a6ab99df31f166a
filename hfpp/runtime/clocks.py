"""How far apart the clocks of ranks are."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

__all__ = ["clock_offset"]

_ROUNDS = 8


def clock_offset(
    group: dist.ProcessGroup, device: torch.device, *, now: Callable[[], float]
) -> float:
    """Seconds to add to this rank's clock to get the time of the group's first rank.

    The first rank asks each other one for its time and takes the middle of asking and hearing for
    the moment of the answer (Cristian's algorithm, the quickest of some rounds): wrong by at most
    half of the round trip. Clocks that agree within that are taken for the same one, as those of
    processes of one machine are.

    Args:
        group: whose ranks all call this at the same time, with no message between them on its way.
        device: of the messages.
        now: this rank's clock, in seconds.
    """
    message = torch.zeros(1, dtype=torch.float64, device=device)
    if dist.get_rank(group) == 0:
        for rank in range(1, dist.get_world_size(group)):
            message.fill_(_offset_of(rank, group, message, now))
            dist.send(message, group=group, group_dst=rank)
        return 0.0
    for _ in range(_ROUNDS):
        dist.recv(message, group=group, group_src=0)
        message.item()  # on a device: the message is there only now
        message.fill_(now())
        dist.send(message, group=group, group_dst=0)
    dist.recv(message, group=group, group_src=0)
    return message.item()


def _offset_of(
    rank: int, group: dist.ProcessGroup, message: torch.Tensor, now: Callable[[], float]
) -> float:
    found: list[tuple[float, float]] = []
    for _ in range(_ROUNDS):
        asked = now()
        dist.send(message, group=group, group_dst=rank)
        dist.recv(message, group=group, group_src=rank)
        answer = message.item()
        heard = now()
        found.append((heard - asked, (asked + heard) / 2 - answer))
    round_trip, offset = min(found)
    return offset if abs(offset) > round_trip / 2 else 0.0
