"""What `hfpp profile` does: build the model with random weights, time its parts, write the file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from hfpp.check.sources import find_source
from hfpp.errors import PipelineConfigError
from hfpp.plan.costs import ModelCosts, UnitCost
from hfpp.plan.costs_file import costs_as_json
from hfpp.profile.measure import profile_model

__all__ = ["profile_and_write"]


def profile_and_write(
    model: str,
    *,
    microbatch_size: int,
    seq_len: int,
    dtype: str | None,
    device: str | None,
    repeats: int,
    out: Path,
    trust_remote_code: bool,
) -> ModelCosts:
    """Times the parts of what ``model`` names, prints them and writes the file.

    Raises:
        PipelineConfigError: if there is no such model or device, or an option cannot work.
        OSError: if the file cannot be written.
    """
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    source = find_source(model, trust_remote_code=trust_remote_code)
    place = _device(device)
    kind = None if dtype is None else getattr(torch, dtype)
    if source.model is not None:
        live = source.model.to(device=place, dtype=kind)
    else:
        with place:
            live = source.build(source.config).to(kind or _configured(source.config))
    try:
        costs = profile_model(
            live, microbatch_size=microbatch_size, seq_len=seq_len, repeats=repeats
        )
    except RuntimeError as error:  # on CPUs, memory that is not there is no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise PipelineConfigError(
            f"--microbatch-size ({microbatch_size}) with --seq-len ({seq_len}) needs more memory "
            f"than {place} has: use a smaller one of them"
        ) from None
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else str(place)
    text = costs_as_json(
        costs,
        model=model,
        device=name,
        dtype=str(next(live.parameters()).dtype).removeprefix("torch."),
        microbatch_size=microbatch_size,
        seq_len=seq_len,
        torch=torch.__version__,
    )
    out.write_text(text + "\n", encoding="utf-8")
    _print(costs, out, name)
    return costs


def _configured(config: object) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for devices it has not
        reason = str(error).partition("\n")[0][:200]
        raise PipelineConfigError(
            f"--device ({name}) cannot be used: {reason}: use --device cpu"
        ) from None
    return device


def _print(costs: ModelCosts, out: Path, device: str) -> None:
    table = Table(title=f"per microbatch on {device}", title_justify="left")
    table.add_column("part", no_wrap=True)
    for heading in (
        "layers",
        "forward",
        "backward,\ninputs",
        "backward,\nweights",
        "parameters",
        "activations",
    ):
        table.add_column(heading, justify="right")
    kinds: dict[UnitCost, list[int]] = {}
    for index, layer in enumerate(costs.layers):
        kinds.setdefault(layer, []).append(index)
    rows = [("embedding", "", costs.embedding)]
    rows += [(f"layer {places[0]}", str(len(places)), unit) for unit, places in kinds.items()]
    rows += [("head and loss", "", costs.head)]
    for name, count, unit in rows:
        times = (unit.forward, unit.backward_input, unit.backward_weight)
        table.add_row(
            name,
            count,
            *(f"{1e3 * seconds:.3f} ms" for seconds in times),
            f"{unit.parameters:,}",
            f"{unit.activation_bytes / 2**20:.1f} MiB",
        )
    Console(file=sys.stdout, highlight=False).print(table)
    sys.stdout.write(f"written to {out}\n")
