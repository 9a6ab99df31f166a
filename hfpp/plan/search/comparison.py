"""Why one plan is slower than another, from the parts of their steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfpp.plan.sizes import bytes_as_text, seconds_as_text

if TYPE_CHECKING:
    from hfpp.plan.prediction import Prediction

__all__ = ["why_it_lost"]

_WORDS = {
    "compute": "less efficient compute",
    "recompute": "more recomputation",
    "collectives": "more communication within layers",
    "imbalance": "a slowest rank with more above the mean",
    "bubble": "more bubble",
    "reduction": "more gradient reduction that is not hidden",
    "optimizer": "a longer optimizer step",
}
_EQUAL = 1e-3  # closer than this, costs are not known


def why_it_lost(best: Prediction, other: Prediction) -> str:
    """One sentence with the figures: the part of the step that differs most, or the memory.

    The parts of a step add up to it, so that the one that grew most tells most of the difference.
    """
    slower = other.step_time / best.step_time - 1
    if slower <= _EQUAL:
        return _as_fast(best, other)
    ours, theirs = best.time.parts(), other.time.parts()
    more = {name: theirs[name] - ours[name] for name in ours}
    name = max(more, key=lambda part: more[part])
    sentence = (
        f"{slower:.1%} slower: {_WORDS[name]} ({seconds_as_text(theirs[name])} against "
        f"{seconds_as_text(ours[name])})"
    )
    gain = min(more, key=lambda part: more[part])
    if -more[gain] > 0.1 * more[name]:
        sentence += f", though {seconds_as_text(-more[gain])} less {_SHORT[gain]}"
    return sentence


_SHORT = {
    "compute": "compute",
    "recompute": "recomputation",
    "collectives": "communication within layers",
    "imbalance": "imbalance",
    "bubble": "bubble",
    "reduction": "gradient reduction",
    "optimizer": "optimizer time",
}


def _as_fast(best: Prediction, other: Prediction) -> str:
    ours, theirs = best.peak_memory.total, other.peak_memory.total
    if theirs > ours * (1 + _EQUAL):
        return f"as fast, with {bytes_as_text(theirs - ours)} more memory on the fullest rank"
    sent, received = best.network.total, other.network.total
    if received > sent * (1 + _EQUAL):
        return f"as fast, with {bytes_as_text(received - sent)} more sent per rank"
    return f"as fast to {_EQUAL:.1%}"
