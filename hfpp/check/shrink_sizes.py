"""Small values for a config's sizes, by what their names say they are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TEXT_HIDDEN = 64  # four heads of 16
OTHER_HIDDEN = 32  # encoders and the like: another width, so that mixing them up is an error
VOCAB = 128
WINDOW = 8
POSITIONS = 64
_WIDEST = 0.25  # standard deviation of weights
ORIGINAL_POSITIONS = 32  # of a context that rotary embeddings stretch
PATCH = 4
GRID = 8  # patches along the side of an image

# The first role whose pattern is found in a name decides. Names that match none are left as they
# are: activations, multipliers, soft-caps, norms, kernel widths.
_ROLES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (role, re.compile(pattern))
    for role, pattern in (
        ("probability", r"drop(?!less)|jitter|^mask_(time|feature)_prob$"),
        (
            "token",
            r"token_(id|index|idx)(s|es)?$|^_?(pad|bos|eos|mask|unk|sep|cls|eoc)_(index|id)$"
            r"|^im(age)?_\w+_id$|^vocab_offset$",
        ),
        ("vocab", r"^vocab_size|vocab_size$|_vocab$|codebook_size|^num_embeddings$|vocab_size_"),
        (
            "window",
            r"window|^local_attention$|attention_chunk_size$|chunk_length$|chunk_size$"
            r"|^block_size$|floor_scale$|_n_floor$|^index_block_size$|^index_kpool$",
        ),
        ("spread", r"initializer_range$|^(embed_)?init_std$"),
        ("kept", r"kernel|multiplier|factor|stride|ratio|_scale|^scale_|theta|_eps|_std$|range"),
        (
            "top_k",
            r"experts_per_tok|^(moe_)?top_?k(_experts)?$|^moe_(topk|k|top_k)$|^router_top_?k$",
        ),
        (
            "experts",
            r"(^|_)(num_)?(local_|routed_|n_routed_)?experts$|^(moe_)?num_experts$|expert_num$",
        ),
        ("groups", r"^n_group$|^num_expert_group$"),
        ("top_groups", r"^topk_group$"),
        ("rank", r"rank$|^adapter_rank$"),
        ("state", r"state_size$|_d_state$|^d_state$"),
        ("index_top_k", r"^index_topk"),
        (
            "positions",
            r"position_embeddings$|^n_positions$|^n_ctx$|_positions$|^max_seq_len$"
            r"|^model_max_length$|^context_length$|^seq_len$|max_distance$|^mem_len$",
        ),
        ("heads", r"(^|_)heads($|_per_layer$)|^n_head$|^num_query_groups$"),
        (
            "head_dim",
            r"head_dim$|^dim_head$|^d_head$|^d_kv$|^kv_channels$|^rotary_dim$"
            r"|attention_head_(size|dim)$|^resampler_dim_head$",
        ),
        ("patch", r"patch_size$"),
        ("image", r"^(max_|min_)?(image|img)_size$|^crop_size$|^resolution$"),
        ("tokens_per_image", r"^mm_tokens_per_image$|^image_seq_length$|^num_image_tokens$"),
        (
            "width",
            r"hidden_size|hidden_dim|intermediate|^n_embd$|^d_model$|^d_ff$|^dff$|^dim|_dim$"
            r"|ffn|_width$|embed_dim|embedding_size$|emb_dim|^d_inner$|^n_inner$|_dim_?\w*$"
            r"|hidden_dimension|feed_forward_size|_proj_size$|channels$|^hidden_sizes$",
        ),
        ("known_width", r"input_size$"),
        ("multiple", r"multiple_of$"),
    )
)


def role_of(name: str) -> str | None:
    """What kind of size an attribute of this name is; None where it is none."""
    return next((role for role, pattern in _ROLES if pattern.search(name)), None)


def _near(value: float, step: int) -> int:
    """`value` rounded to a multiple of `step`, at least `step`."""
    return max(step, round(value / step) * step)


def first_int(attributes: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of `names` whose value is a positive integer."""
    for name in names:
        value = attributes.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


HIDDEN = (
    "hidden_size",
    "d_model",
    "n_embd",
    "embed_dim",
    "emb_dim",
    "embedding_dim",
    "dim",
    "model_dim",
)
_HEADS = (
    "decoder_attention_heads",
    "num_decoder_attention_heads",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "attention_heads",
)
_HEAD_DIMS = (
    "qk_nope_head_dim",
    "head_dim",
    "attention_head_size",
    "attention_head_dim",
    "d_kv",
    "dim_head",
    "d_head",
    "kv_channels",
)
_TOKENS_KEPT = 16  # ids below stay what they are


@dataclass(slots=True)
class SharedSizes:
    """What all configs of a composite one agree on: equal values stay equal.

    Attributes:
        text_hidden: The widest text stack's hidden size, before.
        widths: New widths by old ones.
        vocab: The main vocabulary's size, before.
        grid: Patches along the side of an image, before and after.
        tokens: New token ids by old ones.
    """

    text_hidden: int
    vocab: int
    grid: tuple[int, int]
    widths: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)

    def add_tokens(self, ids: set[int]) -> None:
        """Map special ids: small ones stay, the others go to the vocabulary's end, in order."""
        if self.vocab <= VOCAB:
            return
        large = sorted(token for token in ids if token >= _TOKENS_KEPT)
        for place, token in enumerate(large):
            self.tokens[token] = VOCAB - len(large) + place


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSizes:
    """One config's own measures, before and after, that its other sizes are relative to."""

    shared: SharedSizes
    hidden: tuple[int, int]
    heads: tuple[int, int]
    head_dim: tuple[int, int]
    grid: tuple[int, int]
    patch: tuple[int, int]

    def small(self, role: str, value: int) -> int:
        """The small value for a size of this role.

        Args:
            role: What `role_of` says of its name.
            value: The size; what is below 1 means something else (none, all) and stays.
        """
        if value < 1 and role != "token":
            return value
        match role:
            case "token":
                return self.shared.tokens.get(value, value)
            case "vocab":
                return min(value, VOCAB)
            case "experts":
                return min(value, 8)
            case "top_k" | "groups":
                return min(value, 2)
            case "top_groups":
                return 1
            case "rank":
                return min(value, 16)
            case "state" | "window":
                return min(value, WINDOW)
            case "index_top_k":
                return min(value, 8)
            case "positions":
                return min(value, POSITIONS)
            case "heads":
                return self._heads(value)
            case "head_dim":
                old, new = self.head_dim
                return new if value == old else min(_near(value * new / old, 4), 4 * new)
            case "patch":
                return self.patch[1] if value == self.patch[0] else min(value, PATCH)
            case "image":
                return max(1, self.grid[1] * self.patch[1])
            case "tokens_per_image":
                return max(1, round(value * (self.grid[1] / self.grid[0]) ** 2))
            case "multiple":
                return min(value, 16)
            case "known_width":
                return self.shared.widths.get(value, value)
            case "width":
                return self._width(value)
            case _:
                return value

    def spread(self, value: float) -> float:
        """The standard deviation of small weights, which sum over fewer inputs.

        Values in the model keep their magnitudes: with the large model's weights, attention scores
        and expert outputs would be too small for a difference in them to be seen.
        """
        old, new = self.hidden
        return max(value, min(value * math.sqrt(old / new), _WIDEST))

    def _heads(self, value: int) -> int:
        old, new = self.heads
        if value == old or value == 1:
            return new if value == old else 1
        return max(1, new // 2) if value < old else new * 2

    def _width(self, value: int) -> int:
        widths = self.shared.widths
        if value not in widths:
            old, new = self.hidden
            widths[value] = min(value, _near(value * new / old, 8), 512)
        return widths[value]


def small_hidden(value: int, shared: SharedSizes, *, text: bool) -> int:
    """The small hidden size of a stack; stacks of equal width stay equal."""
    if value not in shared.widths:
        small = _near(value * TEXT_HIDDEN / shared.text_hidden, 32) if text else OTHER_HIDDEN
        shared.widths[value] = min(value, small, 2 * TEXT_HIDDEN)
    return shared.widths[value]


def _rotary_fits(head_dim: int, factor: float, sections: int) -> bool:
    rotary = int(head_dim * factor)
    return rotary % 2 == 0 and rotary // 2 >= sections


def small_head_dim(
    attributes: Mapping[str, Any], hidden: tuple[int, int], heads: tuple[int, int]
) -> tuple[int, int]:
    """A stack's head dimension, before and after.

    Heads that together were as wide as the hidden states stay so; others stay wider or narrower.
    Rotary embeddings need an even part of it, with a place for each section.
    """
    old = first_int(attributes, _HEAD_DIMS) or max(1, hidden[0] // heads[0])
    even = hidden[1] // heads[1]
    wanted = even
    if old * heads[0] > hidden[0]:
        wanted = 2 * even
    elif old * heads[0] < hidden[0] // 2:
        wanted = max(8, even // 2)
    factor, sections = _rotary(attributes)
    choices = [wanted, *range(wanted + 8, 8 * wanted, 8)]
    return old, next((c for c in choices if _rotary_fits(c, factor, sections)), wanted)


def _rotary(attributes: Mapping[str, Any]) -> tuple[float, int]:
    """The rotary part of a head dimension and the number of its sections (1 where undivided)."""
    rope = attributes.get("rope_parameters") or {}
    parts = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    factors = [p["partial_rotary_factor"] for p in parts if p.get("partial_rotary_factor")]
    if attributes.get("partial_rotary_factor"):
        factors.append(attributes["partial_rotary_factor"])
    sections = [len(p["mrope_section"]) for p in parts if p.get("mrope_section")]
    return min(factors, default=1.0), max(sections, default=1)


def find_heads(attributes: Mapping[str, Any], hidden: int) -> tuple[int, int]:
    """A stack's attention heads, before and after: at most four, dividing its new hidden size."""
    old = first_int(attributes, _HEADS) or 1
    return old, math.gcd(min(old, 4) if old != 3 else 1, hidden)
