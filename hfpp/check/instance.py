"""Check one live model: every pipeline size and every kind of batch against the unsplit model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from hfpp.check.chain import Chain, StageBuilder, build_stage
from hfpp.check.compare import Comparison, compare, first_difference
from hfpp.check.inputs import ALL_KINDS, ROWS, Batch, Kind, batches
from hfpp.check.layout import describe_layout
from hfpp.check.report import (
    CheckReport,
    Cut,
    KindReport,
    Result,
    SizeReport,
    StagePart,
    worst_result,
)
from hfpp.check.unsplit import (
    Outcome,
    Subject,
    UnsplitModelError,
    make_subject,
    own_randomness,
    run_unsplit,
)
from hfpp.errors import PipelineConfigError
from hfpp.runtime.anatomy import Anatomy
from hfpp.runtime.find_anatomy import find_anatomy

TOKENS = 21  # longer than the windows of a shrunk model, and no multiple of its chunks
_ROUND_LENGTHS = (8, 64)  # multiples to try where a model does not run with the length asked for


@dataclass(slots=True)
class _Size:
    pp_size: int
    chain: Chain | None = None
    result: Result = "exact"  # of what precedes any batch
    reason: str = ""
    kinds: list[KindReport] = field(default_factory=list)
    cuts: tuple[Cut, ...] = ()
    stages: tuple[StagePart, ...] = ()

    def end(self, result: Result, reason: str) -> None:
        self.result, self.reason = result, reason

    def report(self) -> SizeReport:
        result = worst_result([self.result, *(kind.result for kind in self.kinds)])
        bad = [f"{k.kind}: {k.reason}" for k in self.kinds if k.result == result and k.reason]
        reason = self.reason if self.result == result else bad[0]
        return SizeReport(
            pp_size=self.pp_size,
            result=result,
            reason="" if result == "exact" else reason,
            kinds=tuple(self.kinds),
            cuts=self.cuts,
            stages=self.stages,
        )


def check_instance(
    model: nn.Module,
    *,
    pp_sizes: Sequence[int],
    tokens: int = TOKENS,
    kinds: Sequence[Kind] = ALL_KINDS,
    gradients: bool = True,
    is_shrunk: bool = False,
    whole: nn.Module | None = None,
    layout_tokens: int | None = None,
    more: Sequence[Batch] = (),
    at_most_layers: bool = False,
    build: StageBuilder = build_stage,
) -> CheckReport:
    """Compare ``model`` with its stages.

    Args:
        model: the model; it is left as it was.
        pp_sizes: numbers of stages.
        tokens: length of the sequences.
        kinds: of batches; those that the forward has no arguments for are left out.
        gradients: whether to compare gradients too.
        is_shrunk: what the report says.
        whole: the model whose cuts and stages are listed, such as one on the meta device that
            ``model`` is a small twin of; where it cannot be cut the result is a refusal.
        layout_tokens: length of the sequences that cuts are described for; None: ``tokens``.
        more: batches to run beside those of ``kinds``.
        at_most_layers: whether a size beyond the number of layers becomes that number.
        build: makes a stage.
    """
    sizes = [_Size(pp_size) for pp_size in pp_sizes]
    notes: list[str] = []
    anatomy: Anatomy | None = None
    subject: Subject | None = None
    unsplit_error = None
    made: list[Batch] = []
    try:
        with own_randomness(model):
            subject, made, tokens = _make_subject(model, tokens, kinds, gradients=gradients)
        notes += subject.notes
        anatomy = find_anatomy(subject.model)
    except UnsplitModelError as error:
        unsplit_error = str(error)
        _end_all(sizes, "failed", str(error))
    except PipelineConfigError as error:
        _end_all(sizes, "refused", str(error))
    except Exception as error:  # a crash is a result too
        _end_all(sizes, "failed", _said(error))
    layout_anatomy = None
    if anatomy is not None and whole is not None:
        layout_anatomy = _whole_anatomy(whole, sizes, notes)
    if subject is not None and anatomy is not None:
        for size in sizes:
            if at_most_layers:
                size.pp_size = min(size.pp_size, anatomy.num_layers)
            if size.result == "exact":
                _prepare(
                    size, subject, anatomy, whole, layout_anatomy, layout_tokens or tokens, build
                )
        with own_randomness(subject.model):
            for batch in (*made, *more):
                _compare_batch(sizes, subject, anatomy, batch, notes, gradients=gradients)
    return CheckReport(
        model=type(model).__name__,
        layers=None if anatomy is None else anatomy.layers_name,
        num_layers=None if anatomy is None else anatomy.num_layers,
        is_shrunk=is_shrunk,
        layout="twin" if is_shrunk and layout_anatomy is None else "model",
        dtype="float64" if subject is None else str(subject.dtype).removeprefix("torch."),
        tolerance=1e-9 if subject is None else subject.tolerance,
        rows=ROWS,
        tokens=tokens,
        unsplit_error=unsplit_error,
        notes=tuple(dict.fromkeys(notes)),
        sizes=tuple(size.report() for size in sizes),
    )


def _make_subject(
    model: nn.Module, tokens: int, kinds: Sequence[Kind], *, gradients: bool
) -> tuple[Subject, list[Batch], int]:
    """The model fit for comparison, its batches and their length: some models want round ones."""
    problem: UnsplitModelError | None = None
    for length in dict.fromkeys((tokens, *(-(-tokens // n) * n for n in _ROUND_LENGTHS))):
        made = list(batches(model, tokens=length, kinds=kinds))
        try:
            subject = make_subject(model, _first(model, made, length), gradients=gradients)
        except UnsplitModelError as error:
            problem = problem or error
            continue
        return subject, made, length
    assert problem is not None
    raise problem


def _first(model: nn.Module, made: list[Batch], tokens: int) -> Batch:
    """The plain batch, also where only other kinds are asked for."""
    plain = [batch for batch in made if batch.kind == Kind.PLAIN]
    return plain[0] if plain else next(batches(model, tokens=tokens, kinds=[Kind.PLAIN]))


def _end_all(sizes: list[_Size], result: Result, reason: str) -> None:
    for size in sizes:
        size.end(result, reason)


def _whole_anatomy(whole: nn.Module, sizes: list[_Size], notes: list[str]) -> Anatomy | None:
    try:
        return find_anatomy(whole)
    except PipelineConfigError as error:
        _end_all(sizes, "refused", str(error))
    except Exception as error:
        notes.append(f"the cuts listed are the small twin's: {_said(error)}")
    return None


def _prepare(
    size: _Size,
    subject: Subject,
    anatomy: Anatomy,
    whole: nn.Module | None,
    whole_anatomy: Anatomy | None,
    tokens: int,
    build: StageBuilder,
) -> None:
    """Describe and build the stages of one size."""
    try:
        if whole is None or whole_anatomy is None:
            whole, whole_anatomy = subject.model, anatomy
        size.cuts, size.stages = describe_layout(
            whole, whole_anatomy, size.pp_size, rows=ROWS, tokens=tokens
        )
        chain = Chain.of(subject.model, anatomy, size.pp_size, build)
    except PipelineConfigError as error:
        size.end("refused", str(error))
        return
    except Exception as error:
        size.end("failed", _said(error))
        return
    size.chain = chain
    problems = chain.parameter_problems(subject.model)
    if problems:
        size.end("different", "; ".join(problems[:3]))


def _compare_batch(
    sizes: list[_Size],
    subject: Subject,
    anatomy: Anatomy,
    batch: Batch,
    notes: list[str],
    *,
    gradients: bool,
) -> None:
    """All sizes on one batch."""
    chained = [(size, size.chain) for size in sizes if size.chain is not None]
    if not chained:
        return
    try:
        want = run_unsplit(subject.unsplit, batch, gradients=gradients)
    except Exception as error:
        notes.append(f"{batch.kind} is left out: the unsplit model fails with it ({_said(error)})")
        return
    if not want.is_finite():
        notes.append(
            f"{batch.kind}: the unsplit model itself gives NaN or infinity in places; the others "
            f"are compared"
        )
    for size, chain in chained:
        size.kinds.append(_compare_chain(chain, subject, anatomy, batch, want))


def _compare_chain(
    chain: Chain,
    subject: Subject,
    anatomy: Anatomy,
    batch: Batch,
    want: Outcome,
) -> KindReport:
    try:
        found = chain.run(batch, gradients=bool(want.gradients))
        problems = chain.boundary_problems(batch)
    except Exception as error:
        return KindReport(kind=batch.kind, result="failed", reason=_said(error))
    comparison = compare(want, found, subject.dtype, subject.tolerance)
    if comparison.is_equal and problems:
        return _kind(batch, "failed", problems[0], comparison, None)
    if comparison.is_equal:
        return _kind(batch, "exact", "", comparison, None)
    where = first_difference(subject.unsplit, chain, anatomy, batch, comparison, subject.tolerance)
    reason = _differs(comparison, subject.tolerance, where)
    return _kind(batch, "different", reason, comparison, where)


def _kind(
    batch: Batch, result: Result, reason: str, comparison: Comparison, where: str | None
) -> KindReport:
    return KindReport(
        kind=batch.kind,
        result=result,
        reason=reason,
        logits_error=comparison.logits_error,
        gradient_error=comparison.gradient_error,
        worst_parameter=comparison.worst_parameter,
        first_difference=where,
        zero_for_none=comparison.zero_for_none,
    )


def _differs(comparison: Comparison, tolerance: float, where: str) -> str:
    parts = []
    if comparison.logits_error > tolerance:
        parts.append(f"logits are off by {comparison.logits_error:.1e}")
    if comparison.wrong:
        parts.append(
            f"{len(comparison.wrong)} gradients are wrong, worst {comparison.worst_parameter} by "
            f"{comparison.gradient_error:.1e}"
        )
    return f"{' and '.join(parts)}; first difference: {where}"


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, PipelineConfigError) else f"{type(error).__name__}: {text}"
