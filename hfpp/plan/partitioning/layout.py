"""Megatron-LM's layout strings: what stands on each stage, in letters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfpp.plan.partitioning.text import PartitionText

__all__ = ["read_layout"]

_DEEPEST = 32
_IGNORED = ", \t\r\n"


@dataclass(frozen=True, slots=True)
class _Stage:
    """What is known of one stage, or of the part of one that was read so far."""

    layers: int = 0
    embeddings: int = 0
    heads: int = 0
    begins: bool = True  # no embedding behind a layer or head
    ends: bool = True  # nothing behind the head

    def then(self, other: _Stage) -> _Stage:
        return _Stage(
            self.layers + other.layers,
            self.embeddings + other.embeddings,
            self.heads + other.heads,
            self.begins and other.begins and not (other.embeddings and (self.layers or self.heads)),
            self.ends and other.ends and not (self.heads and (other.layers or other.embeddings)),
        )

    def times(self, count: int) -> _Stage:
        twice = self.then(self)
        return _Stage(
            self.layers * count,
            self.embeddings * count,
            self.heads * count,
            twice.begins if count > 1 else self.begins,
            twice.ends if count > 1 else self.ends,
        )


_Stages = tuple[_Stage, ...]  # one more than there are separators


def read_layout(text: PartitionText, most_stages: int) -> tuple[int, ...]:
    """Layers of each stage of a layout.

    Args:
        text: The layout.
        most_stages: More are refused, before they are made.

    Raises:
        PipelineConfigError: If a letter, bracket or number is wrong, a stage has no layer, or the
            embedding does not come first and the head last, once each.

    Example:
        >>> from hfpp.plan.partitioning.text import PartitionText
        >>> read_layout(PartitionText("Ett|(t|)*2tL", "partition"), 100)
        (2, 1, 1, 1)
    """
    stages, at = _read(text, 0, 0, most_stages)
    if at < len(text.text):
        raise text.error(at, "this bracket closes nothing", "leave it out, or open one before it")
    _check_ends(text, stages)
    for stage, content in enumerate(stages):
        if content.layers == 0:
            raise text.error(
                _place_of_stage(text, stage),
                f"stage {stage} has no layer, and every stage needs one: embedding and head stand "
                "with a layer",
                f"write a t on stage {stage}, or one | less",
            )
    return tuple(content.layers for content in stages)


def _read(text: PartitionText, at: int, depth: int, most_stages: int) -> tuple[_Stages, int]:
    """What stands from a place to the end or to the bracket that closes it."""
    done: list[_Stage] = []
    open_stage = _Stage()
    while at < len(text.text) and text.text[at] != ")":
        begin, letter = at, text.text[at]
        at += 1
        if letter in _IGNORED:
            continue
        if letter == "(":
            if depth == _DEEPEST:
                raise text.error(begin, f"brackets are nested {depth} deep", "write them out")
            item, at = _read(text, at, depth + 1, most_stages)
            if text.text[at : at + 1] != ")":
                raise text.error(
                    begin, "this bracket is not closed", "write ) behind what it holds"
                )
            at += 1
        else:
            item = _letter(text, begin)
        after = text.skip_spaces(at)
        if text.text[after : after + 1] == "*":
            begin = text.skip_spaces(after + 1)
            count, at = text.number(begin, "a number of repetitions")
            if count == 0:
                raise text.error(
                    begin, "nothing is repeated 0 times", "write 1 or more, or leave it out"
                )
            if (len(item) - 1) * count > most_stages:
                raise text.error(begin, f"that makes more than {most_stages} stages", "repeat less")
            item = _repeated(item, count)
        if len(item) > 1:
            done += [open_stage.then(item[0]), *item[1:-1]]
            open_stage = item[-1]
            if len(done) > most_stages:
                raise text.error(begin, f"that makes more than {most_stages} stages", "repeat less")
        else:
            open_stage = open_stage.then(item[0])
    return (*done, open_stage), at


def _letter(text: PartitionText, at: int) -> _Stages:
    letter = text.text[at]
    if letter in "mM":
        raise text.error(
            at,
            f"{letter!r} is a multi-token prediction (MTP) layer, which no pipeline here has",
            "leave it out",
        )
    known = {
        "E": (_Stage(embeddings=1),),
        "t": (_Stage(layers=1),),
        "L": (_Stage(heads=1),),
        "|": (_Stage(), _Stage()),
    }
    if letter not in known:
        raise text.error(
            at,
            f"{text.shown(at)} is no part of a layout",
            "write E, t, L, | and (...), each with *n behind it or not",
        )
    return known[letter]


def _repeated(item: _Stages, count: int) -> _Stages:
    """Once after another: where two meet, the last stage of one goes on in the next."""
    if len(item) == 1:
        return (item[0].times(count),)
    first, *inner, last = item
    return (first, *inner, *((last.then(first), *inner) * (count - 1)), last)


def _check_ends(text: PartitionText, stages: _Stages) -> None:
    last = len(stages) - 1
    for letter, name, place, counts in (
        ("E", "the embedding", "first", [stage.embeddings for stage in stages]),
        ("L", "the head", "last", [stage.heads for stage in stages]),
    ):
        right = 0 if letter == "E" else last
        at = text.text.rfind(letter)
        if sum(counts) == 0:
            raise text.error(
                0 if letter == "E" else len(text.text),
                f"{letter}, {name}, is missing",
                f"write it {place}, as in Et|tL",
            )
        if sum(counts) > 1:
            raise text.error(
                at, f"{letter}, {name}, stands there {sum(counts)} times", "write it once"
            )
        if counts[right] == 0 or not (
            stages[right].begins if letter == "E" else stages[right].ends
        ):
            raise text.error(at, f"{letter}, {name}, must come {place}", "write it as in Et|tL")


def _place_of_stage(text: PartitionText, stage: int) -> int:
    """Where the stage begins, if no repetition stands before it; else the first separator."""
    if "*" in text.text or "(" in text.text:
        return max(text.text.find("|"), 0)
    at = 0
    for _ in range(stage):
        at = text.text.index("|", at) + 1
    return min(at, len(text.text) - 1)
