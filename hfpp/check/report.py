"""What a check found, as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Result = Literal["exact", "refused", "different", "failed"]
RESULTS: tuple[Result, ...] = ("exact", "refused", "failed", "different")
"""From the best to the worst."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """One value that crosses a cut, for one microbatch.

    Attributes:
        description: what it is.
        shape: its sizes.
        dtype: such as "bfloat16".
        num_bytes: what one microbatch sends.
    """

    description: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A border between two stages: before layer ``layer``."""

    layer: int
    crossings: tuple[Crossing, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePart:
    """What one stage owns.

    Attributes:
        index: the stage.
        first_layer: index of its first layer.
        num_layers: how many it runs.
        parameters: FQNs of the parameters that count as its own.
        num_parameters: elements in them.
        num_bytes: their size.
        copies: FQNs of tensors that an earlier stage owns and this one holds too.
    """

    index: int
    first_layer: int
    num_layers: int
    parameters: tuple[str, ...]
    num_parameters: int
    num_bytes: int
    copies: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KindReport:
    """One kind of batch on one pipeline size.

    Attributes:
        kind: such as "plain" or "left-padded".
        result: as in `SizeReport`.
        reason: what is wrong; empty for "exact".
        logits_error: largest relative error of the logits; None where they were not computed.
        gradient_error: the same of the worst parameter's gradient.
        worst_parameter: its FQN.
        first_difference: where it arises.
        zero_for_none: FQNs of parameters that have no gradient in the unsplit model, as nothing
            uses them, and a gradient of zeros here.
    """

    kind: str
    result: Result
    reason: str = ""
    logits_error: float | None = None
    gradient_error: float | None = None
    worst_parameter: str | None = None
    first_difference: str | None = None
    zero_for_none: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeReport:
    """One pipeline size.

    Attributes:
        pp_size: number of stages.
        result: "exact"; "refused" before anything was built; "different" from the unsplit model;
            "failed" for an error where there should be a result.
        reason: of anything but "exact".
        kinds: one entry per kind of batch.
        cuts: what crosses between stages; of the whole model where that could be looked at.
        stages: what each stage owns; likewise.
    """

    pp_size: int
    result: Result
    reason: str
    kinds: tuple[KindReport, ...]
    cuts: tuple[Cut, ...]
    stages: tuple[StagePart, ...]

    @property
    def logits_error(self) -> float | None:
        """The worst over all kinds."""
        return max((k.logits_error for k in self.kinds if k.logits_error is not None), default=None)

    @property
    def worst(self) -> KindReport | None:
        """The kind with the largest error of a gradient."""
        known = [k for k in self.kinds if k.gradient_error is not None]
        return max(known, key=lambda k: k.gradient_error or 0.0, default=None)

    @property
    def zero_for_none(self) -> tuple[str, ...]:
        """Over all kinds."""
        return tuple(dict.fromkeys(name for kind in self.kinds for name in kind.zero_for_none))

    @property
    def first_difference(self) -> str | None:
        """Of the first kind that differs."""
        return next((k.first_difference for k in self.kinds if k.first_difference), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What `hfpp.check_model` found.

    Attributes:
        model: name of the model's class.
        layers: FQN of its list of layers; None where none was found.
        num_layers: of the model that was compared.
        is_shrunk: whether a small twin of the model was compared.
        layout: whose cuts and stages are listed: "model" for the one that was asked about, "twin"
            for the small one.
        dtype: what was compared in.
        tolerance: largest relative error that counts as exact.
        rows: sequences per microbatch.
        tokens: tokens per sequence.
        unsplit_error: why the unsplit model does not run; None where it does.
        notes: what a reader should know, such as kinds of batches that were left out.
        sizes: one entry per pipeline size.
    """

    model: str
    layers: str | None
    num_layers: int | None
    is_shrunk: bool
    layout: Literal["model", "twin"]
    dtype: str
    tolerance: float
    rows: int
    tokens: int
    unsplit_error: str | None
    notes: tuple[str, ...]
    sizes: tuple[SizeReport, ...]

    @property
    def exact(self) -> bool:
        """Whether every size is exact."""
        return bool(self.sizes) and all(size.result == "exact" for size in self.sizes)

    @property
    def result(self) -> Result:
        """The worst over all sizes."""
        return worst_result(size.result for size in self.sizes)

    def to_dict(self) -> dict[str, Any]:
        """The report in dicts, lists, strings and numbers, for JSON; infinity as "inf"."""
        plain: dict[str, Any] = _plain(asdict(self))
        return {"result": self.result, "exact": self.exact, **plain}

    def __str__(self) -> str:
        from hfpp.check.render import as_text

        return as_text(self)


def worst_result(results: Any) -> Result:
    """The worst of several; "failed" of none."""
    return max(results, key=RESULTS.index, default="failed")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
