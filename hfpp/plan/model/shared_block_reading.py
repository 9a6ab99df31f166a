"""Hybrid layers whose attention and feed-forward are shared among them: Zamba and Zamba 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfpp.plan.model.family import Family, holds
from hfpp.plan.model.layer_shape import Attention, FeedForward, LayerShape, Linear
from hfpp.plan.model.recurrence_reading import read_recurrence

if TYPE_CHECKING:
    from hfpp.plan.model.config import ModelConfig

__all__ = ["read_shared_block"]


def read_shared_block(
    config: ModelConfig, family: Family, hidden: int, *, nth: int, count: int
) -> LayerShape:
    """A layer whose transformer block takes hidden states and embeddings side by side.

    The first layer to use a block holds it, with the adapters of all layers that use it.

    Args:
        config: the config.
        family: its family.
        hidden: width of the hidden states.
        nth: how many such layers precede it.
        count: of all such layers.

    Raises:
        PipelineConfigError: a size is absent or absurd, or the family has no such layers.
    """
    if config.model_type not in ("zamba", "zamba2"):
        config.fail("layer_types", "has layers of the kind 'hybrid', which are not known")
    heads = config.integer("num_attention_heads")
    kv_heads = config.optional("num_key_value_heads") or heads
    config.check_multiple(["num_attention_heads"], heads, ["num_key_value_heads"], kv_heads)
    dim = config.optional("attention_head_dim") or 2 * hidden // heads
    width = config.integer("intermediate_size")
    bias = holds(family.mlp_bias, config)
    attention = Attention(
        inward=(
            Linear(2 * hidden, heads * dim),
            Linear(2 * hidden, kv_heads * dim),
            Linear(2 * hidden, kv_heads * dim),
        ),
        outward=(Linear(heads * dim, hidden),),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        value_dim=dim,
    )
    linears = (
        Linear(hidden, width, bias),
        Linear(hidden, width, bias),
        Linear(width, hidden, bias),
    )
    feed_forward = FeedForward(linears=linears, width=width)
    rank = config.optional("adapter_rank") if config.model_type == "zamba2" else None
    adapter = () if rank is None else (Linear(hidden, rank), Linear(rank, 2 * width))
    adapters = sum(linear.parameters for linear in adapter)
    blocks = config.optional("num_mem_blocks") or 1 if rank else 1
    block_norms = 3 * hidden
    block = attention.parameters + feed_forward.parameters + block_norms
    users = -(-(count - nth) // blocks)  # layers that use the block which this one holds
    return LayerShape(
        kind="hybrid dense",
        mixers=(attention, read_recurrence(config, family.recurrence, hidden)),
        feed_forwards=(feed_forward,),
        norm=family.norm,
        norms=(2 * hidden, hidden, hidden),
        linears=(Linear(hidden, hidden), *adapter),
        besides=block_norms + hidden + (adapters * (users - 1) if nth < blocks else 0),
        held_elsewhere=0 if nth < blocks else block + adapters,
    )
