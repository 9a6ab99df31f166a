"""Partitions the slow, obvious way: deal the layers out one by one."""

MULTIMODAL = [
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
]


def uniform_partition(num_stages: int, num_layers: int) -> list[list[int]]:
    """The layers of every stage: sizes by dealing round, indices in order."""
    sizes = [0] * num_stages
    for layer in range(num_layers):
        sizes[layer % num_stages] += 1
    layers = iter(range(num_layers))
    return [[next(layers) for _ in range(size)] for size in sizes]


def fqn_lists(
    num_stages: int,
    num_layers: int,
    include_embeddings: bool = True,
    include_lm_head: bool = True,
    include_rotary_emb: bool = True,
    include_multimodal_encoders: bool = True,
    extra_module_fqns: list[str] | None = None,
    fqn_prefix: str = "model.",
    lm_head_fqn: str = "lm_head",
) -> list[list[str]]:
    """The module names of every stage, with one append per name."""
    lists = []
    for stage, layers in enumerate(uniform_partition(num_stages, num_layers)):
        names = []
        if stage == 0:
            if include_embeddings:
                names.append(fqn_prefix + "embed_tokens")
            if include_multimodal_encoders:
                for name in MULTIMODAL:
                    names.append(fqn_prefix + name)
            for name in extra_module_fqns or []:
                names.append(name)
        for layer in layers:
            names.append(f"{fqn_prefix}layers.{layer}")
        if stage == num_stages - 1:
            names.append(fqn_prefix + "norm")
            if include_lm_head:
                names.append(lm_head_fqn)
        if include_rotary_emb:
            names.append(fqn_prefix + "rotary_emb")
        lists.append(names)
    return lists


def virtual_stages(
    num_layers: int,
    layers_per_stage: int | None,
    pp_size: int,
    is_single_stage_schedule: bool,
    round_to_pp_multiple: str | None,
) -> tuple[int, int] | None:
    """The count of stages by stepping to it, or None where there is no legal one."""
    if layers_per_stage is None:
        stages = pp_size if is_single_stage_schedule else 2 * pp_size
    else:
        stages, covered = 0, 0
        while covered < num_layers:
            stages, covered = stages + 1, covered + layers_per_stage
        while stages % pp_size:
            if round_to_pp_multiple is None:
                return None
            stages += 1 if round_to_pp_multiple == "up" else -1
    per_rank = stages // pp_size
    legal = per_rank == 1 if is_single_stage_schedule else per_rank >= 2
    return (stages, per_rank) if legal and stages <= num_layers else None
