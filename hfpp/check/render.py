"""A report as text: what was compared, and for each size the result, the cuts and the stages."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hfpp.check.report import CheckReport, Crossing, Result, SizeReport, StagePart

_COLOURS: dict[Result, str] = {
    "exact": "green",
    "refused": "yellow",
    "failed": "red",
    "different": "red",
}
_NAMES_SHOWN = 5
_WIDTH = 100


def print_report(report: CheckReport, console: Console) -> None:
    """Print the report, in colour where the console has some."""
    console.print(_headline(report))
    for line in _circumstances(report):
        console.print(Text(f"  {line}", style="dim"), soft_wrap=True)
    for size in report.sizes:
        console.print()
        console.print(_result(size))
        for line in _findings(size):
            console.print(Text(f"  {line}"), soft_wrap=True)
        if size.stages:
            console.print(_stages(report, size))
        for cut in size.cuts:
            values = "; ".join(map(_crossing, cut.crossings))
            console.print(Text(f"  before layer {cut.layer} crosses: {values}"), soft_wrap=True)


def as_text(report: CheckReport) -> str:
    """The report without colours."""
    file = io.StringIO()
    print_report(report, Console(file=file, width=_WIDTH, highlight=False))
    return file.getvalue().rstrip()


def _headline(report: CheckReport) -> Text:
    colour = _COLOURS[report.result]
    return Text.assemble((report.model, "bold"), ": ", (report.result, f"bold {colour}"))


def _circumstances(report: CheckReport) -> Iterator[str]:
    what = "the model as it is"
    if report.is_shrunk:
        layers = "" if report.num_layers is None else f" of {report.num_layers} layers"
        what = f"a small model of the same kind{layers}"
    yield (
        f"compared: {what}, in {report.dtype}, equal up to {report.tolerance:g}, "
        f"microbatches of {report.rows} x {report.tokens} tokens"
    )
    kinds = list(dict.fromkeys(kind.kind for size in report.sizes for kind in size.kinds))
    if kinds:
        yield f"batches: {', '.join(kinds)}"
    if report.layers is not None:
        yield f"layers: {report.layers}"
    for note in report.notes:
        yield f"note: {note}"
    if report.layout == "twin" and any(size.stages for size in report.sizes):
        yield "the cuts and stages below are the small model's"


def _result(size: SizeReport) -> Text:
    stages = "1 stage" if size.pp_size == 1 else f"{size.pp_size} stages"
    return Text.assemble((stages, "bold"), ": ", (size.result, _COLOURS[size.result]))


def _findings(size: SizeReport) -> Iterator[str]:
    if size.reason:
        yield size.reason
    worst = size.worst
    if size.logits_error is not None:
        gradient = "not compared"
        if worst is not None and worst.gradient_error is not None:
            of = f" ({worst.worst_parameter})" if worst.gradient_error else ""
            gradient = f"{worst.gradient_error:.1e}{of}"
        yield f"largest error: logits {size.logits_error:.1e}, gradients {gradient}"
    if size.zero_for_none:
        yield (
            f"zero where the unsplit model has no gradient, as it uses them nowhere: "
            f"{_shortened(size.zero_for_none)}"
        )


def _stages(report: CheckReport, size: SizeReport) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("  stage", "layers"):
        table.add_column(name, no_wrap=True)
    for name in ("parameters", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("owns beside its layers", overflow="fold")
    for part in size.stages:
        table.add_row(
            f"  {part.index}",
            _span(part),
            f"{part.num_parameters:,}",
            _bytes(part.num_bytes),
            _outside(part, f"{report.layers}."),
        )
    return table


def _span(part: StagePart) -> str:
    last = part.first_layer + part.num_layers - 1
    return f"{part.first_layer}" if last == part.first_layer else f"{part.first_layer}-{last}"


def _outside(part: StagePart, prefix: str) -> str:
    names = [name for name in part.parameters if not name.startswith(prefix)]
    copies = [f"{name} (a copy)" for name in part.copies]
    return ", ".join([*filter(None, [_shortened(names)]), *copies]) or "-"


def _shortened(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join([*names[:_NAMES_SHOWN], *([f"{more} more"] if more > 0 else [])])


def _crossing(crossing: Crossing) -> str:
    shape = " x ".join(map(str, crossing.shape))
    return f"{crossing.description} [{shape}] {crossing.dtype}, {_bytes(crossing.num_bytes)}"


def _bytes(number: int) -> str:
    size = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
