"""Pipeline parallelism for Hugging Face models that runs the model's own forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfpp._core import Table, __version__
from hfpp.errors import PipelineConfigError
from hfpp.functional import (
    ParallelizeFnProtocol,
    build_pipeline_schedule,
    calculate_virtual_stages,
    causal_lm_loss,
    check_model,
    clip_grad_norm_,
    generate_hf_model_fqn_per_model_part,
    pipeline_model,
    ranks_by_stage,
    reset_pp_stage_shapes,
    scale_grads_by_divisor,
    split_model_into_stages,
    stage_ids_by_rank,
    stage_ids_this_rank,
)
from hfpp.plan.placement import Placement

if TYPE_CHECKING:
    from hfpp.check.report import CheckReport
    from hfpp.runtime.pipeline import Pipeline

__all__ = [
    "__version__",
    "CheckReport",
    "ParallelizeFnProtocol",
    "Pipeline",
    "PipelineConfigError",
    "Placement",
    "Table",
    "build_pipeline_schedule",
    "calculate_virtual_stages",
    "causal_lm_loss",
    "check_model",
    "clip_grad_norm_",
    "generate_hf_model_fqn_per_model_part",
    "pipeline_model",
    "ranks_by_stage",
    "reset_pp_stage_shapes",
    "scale_grads_by_divisor",
    "split_model_into_stages",
    "stage_ids_by_rank",
    "stage_ids_this_rank",
]

# Names whose module imports torch: they load it on first use, not on `import hfpp`.
_RUNTIME_NAMES = {"CheckReport": "hfpp.check.report", "Pipeline": "hfpp.runtime.pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _RUNTIME_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_RUNTIME_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
