"""Checks a model, or a small twin of it, before its pipeline is built."""

from __future__ import annotations

from torch import nn

from hfpp.check.instance import check_instance
from hfpp.check.model_check import model_or_twin
from hfpp.errors import PipelineConfigError

_COMPARED = {"logits": False, "grads": True}  # with gradients
_MOST_STAGES = 8  # of a twin with a layer on each: every kind of cut occurs


def verify_twin(compared: str, model: nn.Module, num_stages: int) -> None:
    """Compare ``model``'s pipeline with the unsplit model.

    Args:
        compared: "logits", or "grads" for these and the gradients.
        model: the model; a transformers model is checked as a small random twin.
        num_stages: how many stages the pipeline has; more than 8, or than the twin has layers, are
            checked as that many.

    Raises:
        PipelineConfigError: if they differ, or cannot be compared.
    """
    if compared not in _COMPARED:
        raise PipelineConfigError(
            f"verify ({compared!r}) is unknown: use 'logits', 'grads' or None."
        )
    if num_stages == 1:
        return  # the whole model
    stages = min(num_stages, _MOST_STAGES)
    try:
        subject, is_twin = model_or_twin(model, layers=stages)
    except PipelineConfigError as error:
        raise PipelineConfigError(f"verify ({compared!r}) finds nothing to run: {error}") from error
    report = check_instance(
        subject,
        pp_sizes=(stages,),
        gradients=_COMPARED[compared],
        is_shrunk=is_twin,
        at_most_layers=True,
    )
    if not report.exact:
        (size,) = report.sizes
        what = "a small twin of the model" if is_twin else "the model"
        raise PipelineConfigError(
            f"verify ({compared!r}): {report.model} on {size.pp_size} stages is {size.result}, "
            f"checked on {what}: {size.reason}. hfpp.check_model tells more."
        )
