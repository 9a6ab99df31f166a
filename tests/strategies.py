"""Hypothesis strategies that construct valid inputs instead of filtering random ones."""

from typing import NamedTuple

from hypothesis import strategies as st


class World(NamedTuple):
    """A pipeline whose stages fit its ranks."""

    pp_size: int
    num_stages: int
    style: str


@st.composite
def worlds(draw, max_pp_size: int = 48, max_stages_per_rank: int = 6) -> World:
    pp_size = draw(st.integers(1, max_pp_size))
    style = draw(st.sampled_from(["loop", "v"]))
    per_rank = 2 if style == "v" else draw(st.integers(1, max_stages_per_rank))
    return World(pp_size, pp_size * per_rank, style)


class Layers(NamedTuple):
    """Stages that each can have a layer."""

    num_stages: int
    num_layers: int


@st.composite
def partitions(draw, max_stages: int = 40, max_more_layers: int = 120) -> Layers:
    num_stages = draw(st.integers(1, max_stages))
    return Layers(num_stages, num_stages + draw(st.integers(0, max_more_layers)))


def module_names() -> st.SearchStrategy[str]:
    """Dotted names, not only in ASCII: Python identifiers may have any letters."""
    part = st.text(alphabet=st.sampled_from("abz_09éλ層"), min_size=1, max_size=6)
    return st.lists(part, min_size=1, max_size=3).map(".".join)


@st.composite
def fqn_options(draw) -> dict[str, object]:
    """Keyword arguments of the generator of module names."""
    return {
        "include_embeddings": draw(st.booleans()),
        "include_lm_head": draw(st.booleans()),
        "include_rotary_emb": draw(st.booleans()),
        "include_multimodal_encoders": draw(st.booleans()),
        "extra_module_fqns": draw(st.none() | st.lists(module_names(), max_size=3)),
        "fqn_prefix": draw(st.sampled_from(["", "model.", "transformer.h.", "modèle.", "層."])),
        "lm_head_fqn": draw(module_names()),
    }


class BoundarySizes(NamedTuple):
    """Arguments of `boundary_tables`."""

    num_stages: int
    microbatch_size: int
    seq_len: int
    hidden_size: int
    vocab_size: int | None
    dtype: str


@st.composite
def boundary_sizes(draw) -> BoundarySizes:
    return BoundarySizes(
        num_stages=draw(st.integers(1, 30)),
        microbatch_size=draw(st.integers(1, 64)),
        seq_len=draw(st.integers(1, 1 << 20)),
        hidden_size=draw(st.integers(1, 1 << 15)),
        vocab_size=draw(st.none() | st.integers(1, 1 << 18)),
        dtype=draw(st.sampled_from(["float16", "bfloat16", "float32", "float64"])),
    )


def any_integers() -> st.SearchStrategy[int]:
    """Integers where errors live: around zero, around the limits of 32 and 64 bits, and beyond."""
    edges = [0, 1, 1 << 31, 1 << 32, 1 << 63, 1 << 64]
    near = [edge + delta for edge in edges for delta in (-2, -1, 0, 1, 2)]
    return st.integers(-5, 300) | st.sampled_from([*near, *(-n for n in near)]) | st.integers()
