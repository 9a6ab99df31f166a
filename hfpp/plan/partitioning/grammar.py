r"""One grammar for every way to say where a model is cut.

::

    partition  = "uniform" | "balanced" | "parameters" | type | counts | weights | ends | layout
               | names ;
    type       = "type:" REGEX ;                       (* type:decoder|mamba *)
    counts     = NUMBER { "," NUMBER } ;               (* 7,8,9,8 *)
    weights    = weight [ "," weight ] ;               (* input_weight=1,output_weight=2 *)
    weight     = ( "input_weight" | "output_weight" ) "=" NUMBER ;
    ends       = end [ "," end ] ;                     (* first=6,last=5 *)
    end        = ( "first" | "last" ) "=" NUMBER ;
    layout     = item { item } ;                       (* Et*3|(t*4|)*2tL *)
    item       = ( "E" | "t" | "L" | "|" | "(" layout ")" ) [ "*" NUMBER ] ;
    names      = JSON list of one list of module names per stage ;

- ``uniform``: as evenly as can be in layers, the longer stages first.
- ``balanced``: the slowest rank as fast as can be, by what the parts of the model cost.
- ``parameters``: the rank with most parameters has as few as can be.
- ``type:REGEX``: the rank with most layers whose class name matches has as few of them as can be;
  the pattern may match anywhere in the name and in any case, as DeepSpeed's.
- counts: the layers of each stage, in order.
- weights: uniform over the layers and, as layers of the first and last stage, the embedding and the
  head; a weight that is left out is 1. With one stage, weights change nothing. As torchtitan.
- ends: the layers of the first and last stage; the other stages share the rest evenly, the longer
  ones first. As Megatron-LM's counts for the first and last pipeline stage, but by stage.
- layout: Megatron-LM's. ``E`` is the embedding, ``t`` a layer, ``L`` the head with the loss, ``|``
  separates stages, ``*n`` repeats what stands before it. ``E`` comes first and ``L`` last, once
  each.
- names: the modules of every stage by name (FQN).

Spaces do not matter, outside of patterns and names; in a layout commas do not either. Numbers are
written with at most nine digits. Every stage has at least one layer.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence

from hfpp.errors import PipelineConfigError
from hfpp.plan.partitioning.layout import read_layout
from hfpp.plan.partitioning.spec import PartitionKind, PartitionSpec
from hfpp.plan.partitioning.text import PartitionText

__all__ = ["parse_partition"]

_WORDS = {
    kind.value: kind
    for kind in (PartitionKind.UNIFORM, PartitionKind.BALANCED, PartitionKind.PARAMETERS)
}
_SPELLINGS = (
    "uniform, balanced, parameters, type:REGEX, counts as 7,8,9,8, first=6,last=5, "
    "input_weight=1,output_weight=2, a layout as Et*3|(t*4|)*2tL, or lists of module names"
)
_MOST_CHARACTERS = 1 << 24
_MOST_STAGES = 1 << 16
_MOST_OF_PATTERN = 1000


def parse_partition(
    value: str | Sequence[int] | Sequence[Sequence[str]] | PartitionSpec,
    *,
    argument: str = "partition",
) -> PartitionSpec:
    """Reads a partition in any spelling of the grammar above.

    Args:
        value: A text, or a list of counts or of lists of module names.
        argument: What the caller calls it, for errors.

    Returns:
        What was asked for; its `offsets` gives the layers of each stage of a model.

    Raises:
        PipelineConfigError: If it is none of the grammar's sentences; with the column, the rule and
            what to write instead.

    Example:
        >>> parse_partition("Et*3|(t*4|)*2tL").counts
        (3, 4, 4, 1)
        >>> parse_partition("input_weight=1,output_weight=2").offsets(num_layers=13, num_stages=4)
        (0, 3, 7, 11, 13)
    """
    if isinstance(value, PartitionSpec):
        return value
    if not isinstance(value, str):
        return _of_lists(value, argument)
    if len(value) > _MOST_CHARACTERS:
        raise PipelineConfigError(
            f"{argument} is a text of {len(value)} characters, and at most {_MOST_CHARACTERS} are "
            "read: give lists of names as lists."
        )
    text = PartitionText(value, argument)
    plain = value.strip()
    start = text.skip_spaces(0)
    if not plain:
        raise text.error(0, "is empty", f"write {_SPELLINGS}")
    if plain in _WORDS:
        return _spec(text, _WORDS[plain])
    if plain.startswith("type:"):
        return _type(text, start + len("type:"))
    if plain[0] == "[":
        return _json(text, plain)
    if plain[0] in "+-,." or "0" <= plain[0] <= "9":
        return _counts(text)
    if "=" in plain:
        return _assignments(text)
    if "|" in plain or re.fullmatch(r"[EtLm()*0-9,\s]+", plain):
        return _spec(text, PartitionKind.COUNTS, counts=read_layout(text, _MOST_STAGES))
    word = re.match(r"[^\s,:|*()]*", plain)
    near = difflib.get_close_matches(word[0] if word else "", _WORDS, 1)
    raise text.error(
        start,
        f"{text.shown(start, len(plain))} is no partition",
        f"write {near[0]}" if near else f"write {_SPELLINGS}",
    )


def _spec(text: PartitionText, kind: PartitionKind, **found: object) -> PartitionSpec:
    return PartitionSpec(text=text.text, argument=text.argument, kind=kind, **found)  # type: ignore[arg-type]


def _counts(text: PartitionText) -> PartitionSpec:
    counts: list[int] = []
    at = 0
    while True:
        begin = text.skip_spaces(at)
        count, at = text.number(begin, "a count of layers")
        if count == 0:
            raise text.error(
                begin,
                f"stage {len(counts)} has no layers, and every stage needs one",
                "write 1 or more",
            )
        counts.append(count)
        if len(counts) > _MOST_STAGES:
            raise text.error(begin, f"more than {_MOST_STAGES} stages", "write fewer counts")
        at = text.skip_spaces(at)
        if at == len(text.text):
            return _spec(text, PartitionKind.COUNTS, counts=tuple(counts))
        if text.text[at] != ",":
            raise text.error(
                at, f"{text.shown(at)} stands where a comma must", "write counts as 7,8,9,8"
            )
        at += 1


def _assignments(text: PartitionText) -> PartitionSpec:
    known = ("first", "last", "input_weight", "output_weight")
    found: dict[str, int] = {}
    at = 0
    while True:
        begin = text.skip_spaces(at)
        word = re.compile(r"[A-Za-z_]*").match(text.text, begin)
        name = word[0] if word else ""
        if name not in known:
            raise text.error(
                begin,
                f"{text.shown(begin, max(1, len(name)))} is none of {', '.join(known)}",
                "write first=6,last=5 or input_weight=1,output_weight=2",
            )
        if name in found:
            raise text.error(begin, f"{name} is given twice", "write it once")
        if found and ("weight" in name) != ("weight" in next(iter(found))):
            raise text.error(
                begin,
                f"{name} does not go with {next(iter(found))}",
                "write first=6,last=5 or input_weight=1,output_weight=2",
            )
        at = text.skip_spaces(begin + len(name))
        if text.text[at : at + 1] != "=":
            raise text.error(at, f"an = must follow {name}", f"write {name}=1")
        at = text.skip_spaces(at + 1)
        number, after = text.number(at, "a number of layers")
        if number == 0 and "weight" not in name:
            stage = "first" if name == "first" else "last"
            raise text.error(
                at, f"the {stage} stage has no layers, and needs one", f"write {name}=1"
            )
        found[name] = number
        at = text.skip_spaces(after)
        if at == len(text.text):
            break
        if text.text[at] != ",":
            raise text.error(
                at, f"{text.shown(at)} stands where a comma must", "write first=6,last=5"
            )
        at += 1
    if "first" in found or "last" in found:
        return _spec(text, PartitionKind.ENDS, first=found.get("first"), last=found.get("last"))
    return _spec(
        text,
        PartitionKind.WEIGHTS,
        input_weight=found.get("input_weight", 1),
        output_weight=found.get("output_weight", 1),
    )


def _type(text: PartitionText, at: int) -> PartitionSpec:
    pattern = text.text[at:]
    if not pattern.strip():
        raise text.error(
            at, "no pattern follows type:", "write type: and a part of the class's name"
        )
    if len(pattern) > _MOST_OF_PATTERN:
        raise text.error(
            at,
            f"the pattern has {len(pattern)} characters",
            f"write one of at most {_MOST_OF_PATTERN}",
        )
    try:
        re.compile(pattern, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        place = getattr(error, "pos", None) or 0
        reason = getattr(error, "msg", None) or type(error).__name__
        raise text.error(
            at + place,
            f"the pattern is no regular expression ({reason})",
            "write type: and a part of the class's name",
        ) from None
    return _spec(text, PartitionKind.TYPE, pattern=pattern)


def _json(text: PartitionText, plain: str) -> PartitionSpec:
    try:
        value = json.loads(plain)
    except json.JSONDecodeError as error:
        raise text.error(
            text.skip_spaces(0) + error.pos,
            f"no JSON ({error.msg})",
            'write lists of names as [["model.embed_tokens", "model.layers.0"], ...]',
        ) from None
    except (ValueError, RecursionError) as error:  # endless digits or brackets
        raise text.error(
            0, f"no JSON that can be read ({type(error).__name__})", "write lists of names"
        ) from None
    spec = _of_lists(value, text.argument)
    return _spec(text, spec.kind, counts=spec.counts, names=spec.names)


def _of_lists(value: object, argument: str) -> PartitionSpec:
    """Counts, or names by stage, as Python or JSON has them."""

    def error(problem: str, remedy: str) -> PipelineConfigError:
        space = "" if problem.startswith("[") else " "
        return PipelineConfigError(f"{argument}{space}{problem}: {remedy}.")

    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise error(f"is a {type(value).__name__}", f"write {_SPELLINGS}")
    if not value:
        raise error("is an empty list", "give one list of module names, or one count, per stage")
    if len(value) > _MOST_STAGES:
        raise error(f"has {len(value)} stages", f"give {_MOST_STAGES} or fewer")
    if all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value):
        counts = tuple(int(entry) for entry in value)
        for stage, count in enumerate(counts):
            if not 1 <= count < 10**9:
                raise error(
                    f"[{stage}] ({str(count)[:20]}) is no count of layers",
                    "give 1 or more, of at most nine digits",
                )
        shown = ",".join(map(str, counts))
        return PartitionSpec(
            text=shown, argument=argument, kind=PartitionKind.COUNTS, counts=counts
        )
    for stage, modules in enumerate(value):
        if isinstance(modules, str) or not isinstance(modules, Sequence):
            raise error(
                f"[{stage}] is a {type(modules).__name__}, not a list of module names",
                "give one list of names per stage",
            )
        for name in modules:
            if not isinstance(name, str) or not name:
                raise error(
                    f"[{stage}] holds {str(name)[:20]!r}, which is no name", "give names (FQNs)"
                )
        if not modules:
            raise error(f"[{stage}] is empty, and every stage needs a layer", "list its modules")
    names = tuple(tuple(modules) for modules in value)
    return PartitionSpec(
        text=f"{len(names)} lists of names",
        argument=argument,
        kind=PartitionKind.NAMES,
        names=names,
    )
