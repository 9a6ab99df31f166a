"""Which kind each layer of a config is of: lists, periods and offsets under their many names."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hfpp.plan.model.config import MOST_LAYERS, ModelConfig

if TYPE_CHECKING:
    from hfpp.plan.model.family import Family

__all__ = ["EXPERT_KEYS", "LayerKind", "layer_kinds"]

LAYER_KEYS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
)
LISTS = ("layer_types", "layers_block_type")
EXPERT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)

_NAMES = {
    "full_attention": "full",
    "attention": "full",
    "global": "full",
    "indexed_attention": "full",
    "sliding_attention": "sliding",
    "local": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "recurrent",
    "mamba": "recurrent",
    "mamba2": "recurrent",
    "recurrent": "recurrent",
    "conv": "recurrent",
    "hybrid": "hybrid",
    "mlp": "mlp",
    "moe": "moe",
}


class LayerKind(NamedTuple):
    """One layer.

    Attributes:
        mixer: full, sliding, chunked, recurrent, hybrid, or none.
        is_sparse: whether it has experts.
        has_feed_forward: whether it has a feed-forward of any kind.
        nth: of hybrid layers, how many precede it; others are all alike.
        of: of hybrid layers, how many there are.
    """

    mixer: str
    is_sparse: bool
    has_feed_forward: bool = True
    nth: int = 0
    of: int = 0


def layer_kinds(config: ModelConfig, family: Family) -> list[LayerKind]:
    """The kind of every layer.

    Raises:
        PipelineConfigError: the number of layers is absent or absurd, a list has another length,
            or a kind is unknown.
    """
    count = config.optional(*LAYER_KEYS, maximum=MOST_LAYERS)
    if count is None:
        count = next((len(config.listed(key) or ()) for key in LISTS if config.has(key)), 0)
    if not count:
        config.fail_missing((*LAYER_KEYS, *LISTS))
    mixers = _mixers(config, family, count)
    sparse = _sparse(config, count)
    if not family.single:
        return [LayerKind(*pair) for pair in zip(mixers, sparse, strict=True)]
    hybrids = mixers.count("hybrid")
    kinds: list[LayerKind] = []
    seen = 0
    for mixer in mixers:
        if mixer == "hybrid":
            kinds.append(LayerKind(mixer, False, nth=seen, of=hybrids))
            seen += 1
        elif mixer in ("mlp", "moe"):
            kinds.append(LayerKind("none", mixer == "moe"))
        else:
            kinds.append(LayerKind(mixer, False, has_feed_forward=False))
    return kinds


def _mixers(config: ModelConfig, family: Family, count: int) -> list[str]:
    for key in LISTS:
        named = config.listed(key)
        if named is None:
            continue
        if len(named) != count:
            config.fail(key, f"has {len(named)} entries for {count} layers")
        unknown = next((n for n in named if not isinstance(n, str) or n not in _NAMES), None)
        if unknown is not None:
            config.fail(key, f"has the kind {str(unknown)[:40]!r}, which is unknown")
        kinds = [_NAMES[name] for name in named]
        return ["full" if k == "sliding" and not _window(config) else k for k in kinds]
    if family.single:
        return ["recurrent"] * count
    if (indices := config.indices("attn_layer_indices")) is not None:
        return ["full" if i in indices else "recurrent" for i in range(count)]
    if (indices := config.indices("full_attn_idxs")) is not None:
        return ["full" if i in indices else "recurrent" for i in range(count)]
    if (chosen := config.listed("attn_type_list")) is not None and len(chosen) == count:
        return ["full" if kind == 1 else "recurrent" for kind in chosen]
    if (period := config.optional("attn_layer_period")) is not None:
        offset = config.optional("attn_layer_offset", minimum=0, maximum=period - 1) or 0
        return ["full" if i % period == offset else "recurrent" for i in range(count)]
    if (period := config.optional("full_attention_interval")) is not None:
        return ["full" if (i + 1) % period == 0 else "recurrent" for i in range(count)]
    return _windows(config, family, count)


def _window(config: ModelConfig) -> int | None:
    return config.optional("sliding_window", "sliding_window_size", "window_size", minimum=0)


def _windows(config: ModelConfig, family: Family, count: int) -> list[str]:
    if config.has("attention_chunk_size"):
        every = config.optional("no_rope_layer_interval") or 4
        return ["full" if (i + 1) % every == 0 else "chunked" for i in range(count)]
    if not _window(config):
        return ["full"] * count
    if not config.flag("use_sliding_window", default="use_sliding_window" not in config.values):
        return ["full"] * count
    if config.flag("use_sliding_window") and config.has("max_window_layers"):
        below = config.integer("max_window_layers", minimum=0)
        return ["full" if i < below else "sliding" for i in range(count)]
    pattern = config.values.get("sliding_window_pattern")
    if isinstance(pattern, str):  # such as LLLG: local three times, then global
        if not pattern or set(pattern) - {"L", "G"}:
            config.fail("sliding_window_pattern", "may hold the letters L and G only")
        return ["full" if pattern[i % len(pattern)] == "G" else "sliding" for i in range(count)]
    every = config.optional("sliding_window_pattern") or family.window_pattern
    if every:
        return ["full" if (i + 1) % every == 0 else "sliding" for i in range(count)]
    return ["sliding"] * count


def _sparse(config: ModelConfig, count: int) -> list[bool]:
    if (config.optional(*EXPERT_KEYS, minimum=0) or 0) == 0:
        return [False] * count
    for key in ("mlp_layer_types", "moe_layer_freq"):
        value = config.values.get(key)
        if not isinstance(value, list | tuple):
            continue
        named = config.listed(key) or []
        if len(named) != count:
            config.fail(key, f"has {len(named)} entries for {count} layers")
        if any(item not in ("dense", "sparse", "moe", 0, 1) for item in named):
            config.fail(key, "may hold dense and sparse (0 and 1) only")
        return [item in ("sparse", "moe", 1) for item in named]
    if (indices := config.indices("moe_layers")) is not None:
        return [i in indices for i in range(count)]
    if (step := config.optional("interleave_moe_layer_step", minimum=0)) is not None:
        return [step > 0 and (i + 1) % step == 0 for i in range(count)]
    if (period := config.optional("expert_layer_period")) is not None:
        offset = config.optional("expert_layer_offset", minimum=0, maximum=period - 1) or 0
        return [i % period == offset for i in range(count)]
    if config.has("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"):
        return _between(config, count)
    dense = config.optional("first_k_dense_replace", "num_dense_layers", minimum=0) or 0
    every = config.optional("moe_layer_freq", "decoder_sparse_step", minimum=0)
    if every == 0:
        return [False] * count
    only = config.indices("mlp_only_layers") or frozenset()
    shift = 1 if config.has("decoder_sparse_step") else 0
    return [i >= dense and i not in only and (i + shift) % (every or 1) == 0 for i in range(count)]


def _between(config: ModelConfig, count: int) -> list[bool]:
    start = config.optional("moe_layer_start_index", minimum=0) or 0
    end = config.optional("moe_layer_end_index", minimum=-1)
    end = count - 1 if end is None or end == -1 else end
    every = config.optional("moe_layer_interval") or 1
    return [start <= i <= end and (i + 1) % every == 0 for i in range(count)]
