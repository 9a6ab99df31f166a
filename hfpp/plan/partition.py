"""How layers are cut into stages, and the module names (FQNs) of every stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from hfpp import _core
from hfpp.errors import PipelineConfigError

__all__ = [
    "MULTIMODAL_NAMES",
    "VirtualStages",
    "calculate_virtual_stages",
    "check_rounding",
    "generate_hf_model_fqn_of_stage",
    "generate_hf_model_fqn_per_model_part",
    "layers_of_stage",
    "uniform_offsets",
]

# Modules beside the decoder of a multimodal model; they live on stage 0, in this order.
MULTIMODAL_NAMES = (
    "vision_tower",
    "visual",
    "vision_model",
    "image_encoder",
    "vision_encoder",
    "embed_vision",
    "audio_tower",
    "audio_encoder",
    "audio_model",
    "mm_projector",
    "multi_modal_projector",
    "multimodal_projector",
    "vision_projector",
    "vit_large_projector",
    "audio_projector",
)


def uniform_offsets(num_stages: int, num_layers: int) -> _core.Table:
    """Cuts layers into stages as evenly as can be, the longer stages first.

    Args:
        num_stages: Number of stages, 1 to `num_layers`.
        num_layers: Number of layers.

    Returns:
        An int64 table ``[num_stages + 1]``: stage s has the layers ``offsets[s]`` to
        ``offsets[s + 1] - 1``. Sizes differ by one at most.

    Raises:
        PipelineConfigError: If a size is below 1, or there are more stages than layers.

    Example:
        >>> uniform_offsets(num_stages=3, num_layers=8).row()
        (0, 3, 6, 8)
    """
    return _core.uniform_offsets(num_stages, num_layers)


def layers_of_stage(stage_index: int, num_stages: int, num_layers: int) -> range:
    """Layers of one stage of the uniform partition, in O(1).

    Args:
        stage_index: The stage, 0 to `num_stages` - 1.
        num_stages: Number of stages, 1 to `num_layers`.
        num_layers: Number of layers.

    Returns:
        The indices of the stage's layers.

    Raises:
        PipelineConfigError: If a size is below 1, there are more stages than layers, or there is no
            such stage.

    Example:
        >>> layers_of_stage(1, num_stages=3, num_layers=8)
        range(3, 6)
    """
    return range(*_core.layers_of_stage(stage_index, num_stages, num_layers))


def _require_names(extra_module_fqns: Iterable[str] | None, **names: str) -> None:
    for argument, name in names.items():
        if not isinstance(name, str):
            raise TypeError(f"{argument} must be a string, not {type(name).__name__}.")
    for name in extra_module_fqns or ():
        if not isinstance(name, str):
            raise TypeError(f"extra_module_fqns must hold strings, not {type(name).__name__}.")
    if isinstance(extra_module_fqns, str):
        # A string is an iterable of its letters, each of which would become a module name.
        raise TypeError(
            f"extra_module_fqns must be a list of names, not the string {extra_module_fqns!r}: "
            f"use extra_module_fqns=[{extra_module_fqns!r}]."
        )


def _first_names(
    include_embeddings: bool,
    include_multimodal_encoders: bool,
    extra_module_fqns: Iterable[str] | None,
    fqn_prefix: str,
) -> tuple[str, ...]:
    """What stage 0 begins with."""
    embeddings = (f"{fqn_prefix}embed_tokens",) if include_embeddings else ()
    encoders = MULTIMODAL_NAMES if include_multimodal_encoders else ()
    return (*embeddings, *(fqn_prefix + name for name in encoders), *(extra_module_fqns or ()))


def _last_names(include_lm_head: bool, fqn_prefix: str, lm_head_fqn: str) -> tuple[str, ...]:
    """What the last stage has after its layers."""
    norm = f"{fqn_prefix}norm"
    return (norm, lm_head_fqn) if include_lm_head else (norm,)


def _names_of_every_stage(include_rotary_emb: bool, fqn_prefix: str) -> tuple[str, ...]:
    """What every stage ends with."""
    return (f"{fqn_prefix}rotary_emb",) if include_rotary_emb else ()


def generate_hf_model_fqn_per_model_part(
    num_stages: int,
    num_layers: int,
    include_embeddings: bool = True,
    include_lm_head: bool = True,
    include_rotary_emb: bool = True,
    include_multimodal_encoders: bool = True,
    extra_module_fqns: Sequence[str] | None = None,
    fqn_prefix: str = "model.",
    lm_head_fqn: str = "lm_head",
) -> list[list[str]]:
    """Module names per stage: see `hfpp.functional.generate_hf_model_fqn_per_model_part`."""
    _require_names(extra_module_fqns, fqn_prefix=fqn_prefix, lm_head_fqn=lm_head_fqn)
    return _core.fqn_lists(
        num_stages,
        num_layers,
        f"{fqn_prefix}layers.",
        _first_names(
            include_embeddings, include_multimodal_encoders, extra_module_fqns, fqn_prefix
        ),
        _last_names(include_lm_head, fqn_prefix, lm_head_fqn),
        _names_of_every_stage(include_rotary_emb, fqn_prefix),
    )


def generate_hf_model_fqn_of_stage(
    stage_index: int,
    num_stages: int,
    num_layers: int,
    *,
    include_embeddings: bool = True,
    include_lm_head: bool = True,
    include_rotary_emb: bool = True,
    include_multimodal_encoders: bool = True,
    extra_module_fqns: Sequence[str] | None = None,
    fqn_prefix: str = "model.",
    lm_head_fqn: str = "lm_head",
) -> list[str]:
    """Module names of one stage, without making the lists of the others.

    Args:
        stage_index: The stage, 0 to `num_stages` - 1.
        num_stages: Number of stages, 1 to `num_layers`.
        num_layers: Number of layers.
        include_embeddings: As in `generate_hf_model_fqn_per_model_part`, like all that follow.
        include_lm_head: Whether the last stage lists the head.
        include_rotary_emb: Whether every stage lists the rotary embedding.
        include_multimodal_encoders: Whether stage 0 lists the multimodal names.
        extra_module_fqns: Further full names of stage 0.
        fqn_prefix: What stands before every name but the head's and the extra ones.
        lm_head_fqn: The full name of the head.

    Returns:
        ``generate_hf_model_fqn_per_model_part(num_stages, num_layers, ...)[stage_index]``.

    Raises:
        PipelineConfigError: If a size is below 1, there are more stages than layers, or there is no
            such stage.
        TypeError: If `extra_module_fqns` is one string, or a name is none.

    Example:
        >>> generate_hf_model_fqn_of_stage(1, num_stages=2, num_layers=3)
        ['model.layers.2', 'model.norm', 'lm_head', 'model.rotary_emb']
    """
    _require_names(extra_module_fqns, fqn_prefix=fqn_prefix, lm_head_fqn=lm_head_fqn)
    # The first names are the longest part, and no other stage needs them.
    first = (
        _first_names(include_embeddings, include_multimodal_encoders, extra_module_fqns, fqn_prefix)
        if stage_index == 0
        else ()
    )
    return _core.fqn_list_of_stage(
        stage_index,
        num_stages,
        num_layers,
        f"{fqn_prefix}layers.",
        first,
        _last_names(include_lm_head, fqn_prefix, lm_head_fqn),
        _names_of_every_stage(include_rotary_emb, fqn_prefix),
    )


class VirtualStages(NamedTuple):
    """The number of stages of a pipeline and of each of its ranks."""

    num_virtual_stages: int
    stages_per_rank: int


def calculate_virtual_stages(
    num_layers: int,
    layers_per_stage: int | None,
    pp_size: int,
    is_single_stage_schedule: bool,
    round_to_pp_multiple: Literal["up", "down"] | None = None,
) -> VirtualStages:
    """Number of virtual stages: see `hfpp.functional.calculate_virtual_stages`."""
    num_layers = _core.checked_integer("num_layers", num_layers, minimum=1)
    pp_size = _core.checked_integer("pp_size", pp_size, minimum=1)
    if layers_per_stage is not None:
        layers_per_stage = _core.checked_integer("layers_per_stage", layers_per_stage, minimum=1)
    check_rounding(round_to_pp_multiple)
    stages = _virtual_stages(
        num_layers, layers_per_stage, pp_size, is_single_stage_schedule, round_to_pp_multiple
    )
    broken_rule = _broken_rule(
        stages, num_layers, layers_per_stage, pp_size, is_single_stage_schedule
    )
    if broken_rule is not None:
        advice = _advice(num_layers, pp_size, is_single_stage_schedule, round_to_pp_multiple)
        raise PipelineConfigError(f"{broken_rule}: use {advice}.")
    return VirtualStages(stages, stages // pp_size)


def check_rounding(round_to_pp_multiple: str | None) -> None:
    """Refuses an unknown way of rounding, also where nothing is to be rounded.

    Raises:
        PipelineConfigError: If it is none of 'up', 'down' and None.
    """
    if round_to_pp_multiple not in (None, "up", "down"):
        raise PipelineConfigError(
            f"round_to_pp_multiple ({round_to_pp_multiple!r}) must be 'up', 'down' or None: "
            "use round_to_pp_multiple='up' or round_to_pp_multiple='down'."
        )


def _virtual_stages(
    num_layers: int,
    layers_per_stage: int | None,
    pp_size: int,
    is_single_stage_schedule: bool,
    round_to_pp_multiple: Literal["up", "down"] | None,
) -> int:
    if layers_per_stage is None:
        return pp_size if is_single_stage_schedule else 2 * pp_size
    stages = -(-num_layers // layers_per_stage)
    if round_to_pp_multiple == "up":
        return -(-stages // pp_size) * pp_size
    if round_to_pp_multiple == "down":
        return stages // pp_size * pp_size
    return stages


def _broken_rule(
    stages: int,
    num_layers: int,
    layers_per_stage: int | None,
    pp_size: int,
    is_single_stage_schedule: bool,
) -> str | None:
    """The first rule that a count of stages breaks, in words, or None."""
    if layers_per_stage is None:
        count = f"{stages} virtual stages for pp_size ({pp_size})"
    else:
        count = (
            f"layers_per_stage ({layers_per_stage}) with num_layers ({num_layers}) gives "
            f"{stages} virtual stages for pp_size ({pp_size})"
        )
    if stages % pp_size:
        return f"{count}, and the number of virtual stages must be divisible by pp_size"
    per_rank = stages // pp_size
    if stages == 0:
        return f"{count} after rounding down, and every rank needs a stage"
    if is_single_stage_schedule and per_rank != 1:
        return f"Single stage schedule requires exactly 1 stage per rank, but {count}: {per_rank}"
    if not is_single_stage_schedule and per_rank < 2:
        return f"Multi-stage schedule requires at least 2 stages per rank, but {count}: {per_rank}"
    if stages > num_layers:
        return f"{count}, more than num_layers ({num_layers}), and every stage needs a layer"
    return None


def _advice(
    num_layers: int,
    pp_size: int,
    is_single_stage_schedule: bool,
    round_to_pp_multiple: Literal["up", "down"] | None,
) -> str:
    """What to pass instead; every alternative, taken alone, has been tried and works."""
    least_per_rank = 1 if is_single_stage_schedule else 2
    if num_layers < least_per_rank:
        return (
            "is_single_stage_schedule=True and pp_size=1"  # one layer: the only pipeline there is
        )
    if num_layers < least_per_rank * pp_size:
        return f"layers_per_stage=None and pp_size={num_layers // least_per_rank}"
    options = [f"layers_per_stage=None (for {least_per_rank * pp_size} stages)"]
    # The layers per stage that give one, two, ... stages per rank, where such a number exists.
    most_per_rank = 1 if is_single_stage_schedule else min(num_layers // pp_size, 64)
    tried = set()
    for per_rank in range(least_per_rank, most_per_rank + 1):
        layers_per_stage = -(-num_layers // (per_rank * pp_size))
        if layers_per_stage in tried or len(options) == 4:
            continue
        tried.add(layers_per_stage)
        stages = _virtual_stages(
            num_layers, layers_per_stage, pp_size, is_single_stage_schedule, round_to_pp_multiple
        )
        if not _broken_rule(
            stages, num_layers, layers_per_stage, pp_size, is_single_stage_schedule
        ):
            options.append(f"layers_per_stage={layers_per_stage} (for {stages} stages)")
    return " or ".join(options)
