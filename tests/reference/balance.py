"""Balanced partitions the slow, obvious way: try every one of them, with exact fractions."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations

from tests.reference.placement import stage_ids_this_rank


def partitions(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    """Offsets of every way to cut layers into stages of at least one layer."""
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        yield (0, *cuts, num_layers)


def rank_sums(
    offsets: Sequence[int],
    pp_size: int,
    style: str,
    fixed: Sequence[float],
    moving: Sequence[float] = (),
    live: Sequence[int] = (),
) -> list[Fraction]:
    """For every rank the sum of its stages' layers: ``fixed + live of the stage * moving``."""
    sums = []
    for rank in range(pp_size):
        total = Fraction(0)
        for stage in stage_ids_this_rank(rank, pp_size, len(offsets) - 1, style):
            for layer in range(offsets[stage], offsets[stage + 1]):
                total += Fraction(fixed[layer])
                if moving:
                    total += live[stage] * Fraction(moving[layer])
        sums.append(total)
    return sums


def least_slowest(
    pp_size: int,
    num_stages: int,
    style: str,
    seconds: Sequence[float],
    *,
    static_bytes: Sequence[int] = (),
    activation_bytes: Sequence[int] = (),
    live: Sequence[int] = (),
    cap: int | None = None,
) -> Fraction | None:
    """The slowest rank's time in the best partition whose ranks fit the cap; None: none does."""
    return min(
        (
            max(rank_sums(offsets, pp_size, style, seconds))
            for offsets in partitions(len(seconds), num_stages)
            if cap is None
            or max(rank_sums(offsets, pp_size, style, static_bytes, activation_bytes, live)) <= cap
        ),
        default=None,
    )


def least_cap(
    pp_size: int,
    num_stages: int,
    style: str,
    static_bytes: Sequence[int],
    activation_bytes: Sequence[int],
    live: Sequence[int],
) -> int:
    """The smallest cap that some partition fits."""
    return int(
        min(
            max(rank_sums(offsets, pp_size, style, static_bytes, activation_bytes, live))
            for offsets in partitions(len(static_bytes), num_stages)
        )
    )


def least_slowest_chain(seconds: Sequence[int], num_stages: int) -> int:
    """One stage per rank, for more layers than can be tried: the textbook's recurrence."""
    num_layers = len(seconds)
    best = [0] + [10**30] * num_layers
    for _ in range(num_stages):
        after = [10**30] * (num_layers + 1)
        for end in range(1, num_layers + 1):
            stage = 0
            for begin in range(end - 1, -1, -1):
                stage += seconds[begin]
                after[end] = min(after[end], max(best[begin], stage))
        best = after
    return best[num_layers]
