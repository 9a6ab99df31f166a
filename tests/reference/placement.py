"""Placement the slow, obvious way: walk the stages and hand each to a rank."""


def rank_of_stage(stage: int, pp_size: int, num_stages: int, style: str) -> int:
    """The rank of a stage: dealt round for a loop, there and back for a v."""
    if style == "loop":
        return stage % pp_size
    return stage if stage < pp_size else num_stages - 1 - stage


def stage_ids_this_rank(pp_rank: int, pp_size: int, num_stages: int, style: str) -> tuple[int, ...]:
    """The stages of a rank: all those whose rank it is."""
    return tuple(
        stage
        for stage in range(num_stages)
        if rank_of_stage(stage, pp_size, num_stages, style) == pp_rank
    )
