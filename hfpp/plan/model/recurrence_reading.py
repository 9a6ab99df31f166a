"""Mixers that are no softmax attention: state-space models, linear attention, convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfpp.plan.model.layer_shape import Linear, Recurrence

if TYPE_CHECKING:
    from hfpp.plan.model.config import ModelConfig

__all__ = ["read_recurrence"]

_MAMBA_HEAD_KEYS = ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
_GROUP_KEYS = ("mamba_n_groups", "mamba_ngroups", "n_groups")


def read_recurrence(config: ModelConfig, kind: str, hidden: int) -> Recurrence:
    """A mixer of this kind.

    Raises:
        PipelineConfigError: a size is absent or absurd.
    """
    if kind.startswith("mamba") and kind != "mamba2":
        return _mamba(config, hidden, kind)
    if kind == "mamba2":
        return _mamba2(config, hidden)
    if kind.startswith("delta"):
        return _delta(config, hidden)
    if kind.startswith("kda"):
        return _kimi_delta(config, hidden, compressed=kind == "kda")
    if kind == "conv":
        return _short_convolution(config, hidden)
    if kind == "lru":
        return _linear_recurrent_unit(config, hidden)
    return _lightning(config, hidden)


def _inner(config: ModelConfig, hidden: int) -> int:
    expand = config.values.get("mamba_expand", config.values.get("expand"))
    name = "mamba_expand" if "mamba_expand" in config.values else "expand"
    inner = int((2 if expand is None else config.number(name, 2.0)) * hidden)
    if inner < 1:
        config.fail(name, f"is {expand}: with hidden states of {hidden} it leaves no width")
    return inner


def _mamba(config: ModelConfig, hidden: int, kind: str) -> Recurrence:
    """Selective state spaces (arXiv 2312.00752)."""
    own = config.optional("intermediate_size") if config.has("state_size") else None
    inner = own or _inner(config, hidden)
    state = config.integer("mamba_d_state", "state_size")
    kernel = config.integer("mamba_d_conv", "conv_kernel")
    rank = config.values.get("mamba_dt_rank", config.values.get("time_step_rank"))
    if rank is None or rank == "auto":
        rank = -(-hidden // 16)
    else:
        rank = config.integer("mamba_dt_rank", "time_step_rank")
    bias = config.flag("use_bias") or config.flag("mamba_proj_bias")
    conv_bias = config.flag("mamba_conv_bias", config.flag("use_conv_bias", default=True))
    besides = inner * kernel + (inner if conv_bias else 0) + inner * state + inner
    inside: tuple[Linear, ...] = (Linear(inner, rank + 2 * state), Linear(rank, inner, bias=True))
    if kind == "mamba_normed":
        besides += rank + 2 * state
    elif kind == "mamba_heads":
        heads = config.integer("n_mamba_heads")
        if inner % heads:
            config.fail("n_mamba_heads", f"is {heads}: it must divide the width of {inner}")
        inside = (
            Linear(inner // heads, heads * (rank + 2 * state)),
            Linear(rank, inner, bias=True),
        )
    return Recurrence(
        kind="mamba",
        linears=(Linear(hidden, 2 * inner, bias), *inside, Linear(inner, hidden, bias)),
        width=inner,
        state=state,
        conv_width=inner,
        conv_kernel=kernel,
        besides=besides,
    )


def _mamba2(config: ModelConfig, hidden: int) -> Recurrence:
    """State-space duality (arXiv 2405.21060)."""
    heads = config.integer(*_MAMBA_HEAD_KEYS)
    dim = config.integer("mamba_d_head", "mamba_head_dim", "mamba_headdim", "head_dim")
    inner = config.optional("mamba_d_ssm") or heads * dim
    state = config.integer("mamba_d_state", "ssm_state_size", "state_size")
    groups = config.integer(*_GROUP_KEYS)
    config.check_multiple(_MAMBA_HEAD_KEYS, heads, _GROUP_KEYS, groups)
    kernel = config.integer("mamba_d_conv", "conv_kernel")
    bias = config.flag("mamba_proj_bias") or config.flag("use_bias")
    conv_bias = config.flag("mamba_conv_bias", config.flag("use_conv_bias", default=True))
    conv = inner + 2 * groups * state
    besides = conv * kernel + (conv if conv_bias else 0) + 3 * heads
    if config.flag("mamba_rms_norm", default=True):
        besides += inner
    return Recurrence(
        kind="mamba2",
        linears=(Linear(hidden, inner + conv + heads, bias), Linear(inner, hidden, bias)),
        width=inner,
        state=state,
        conv_width=conv,
        conv_kernel=kernel,
        chunk=config.optional("mamba_chunk_size", "chunk_size") or 256,
        besides=besides,
    )


def _delta(config: ModelConfig, hidden: int) -> Recurrence:
    """The gated delta rule (arXiv 2412.06464)."""
    key_dim = config.integer("linear_key_head_dim")
    value_dim = config.integer("linear_value_head_dim")
    value_heads = config.integer("linear_num_value_heads")
    key_heads = config.integer("linear_num_key_heads")
    config.check_multiple(
        ["linear_num_value_heads"], value_heads, ["linear_num_key_heads"], key_heads
    )
    keys = key_heads * key_dim
    values = value_heads * value_dim
    kernel = config.integer("linear_conv_kernel_dim")
    conv = 2 * keys + values
    return Recurrence(
        kind="delta",
        linears=(
            Linear(hidden, conv + values),
            Linear(hidden, 2 * value_heads),
            Linear(values, hidden),
        ),
        width=values,
        state=key_dim,
        conv_width=conv,
        conv_kernel=kernel,
        chunk=64,
        besides=conv * kernel + 2 * value_heads + value_dim,
    )


def _kimi_delta(config: ModelConfig, hidden: int, *, compressed: bool) -> Recurrence:
    """The delta rule with a gate per channel (arXiv 2510.26692)."""
    heads = config.integer("linear_num_heads")
    dim = config.integer("linear_head_dim")
    width = heads * dim
    kernel = config.integer("linear_conv_kernel_dim", "short_conv_kernel_size")
    gates: tuple[Linear, ...] = (Linear(hidden, width), Linear(hidden, width))
    if compressed:
        gates = (Linear(hidden, dim), Linear(dim, width)) * 2
    return Recurrence(
        kind="delta",
        linears=(
            Linear(hidden, 3 * width),
            Linear(hidden, heads),
            *gates,
            Linear(width, hidden),
        ),
        width=width,
        state=dim,
        conv_width=3 * width,
        conv_kernel=kernel,
        chunk=64,
        besides=3 * width * kernel + heads + width + dim,
    )


def _short_convolution(config: ModelConfig, hidden: int) -> Recurrence:
    kernel = config.integer("conv_L_cache")
    bias = config.flag("conv_bias")
    return Recurrence(
        kind="conv",
        linears=(Linear(hidden, 3 * hidden, bias), Linear(hidden, hidden, bias)),
        width=hidden,
        conv_width=hidden,
        conv_kernel=kernel,
        besides=hidden * kernel + (hidden if bias else 0),
    )


def _linear_recurrent_unit(config: ModelConfig, hidden: int) -> Recurrence:
    """The real-gated linear recurrent unit (arXiv 2402.19427)."""
    width = config.optional("lru_width") or hidden
    heads = config.integer("num_attention_heads")
    kernel = config.integer("conv1d_width")
    if width % heads:
        config.fail("lru_width", f"({width}) is no multiple of the number of heads ({heads})")
    block = width // heads
    return Recurrence(
        kind="lru",
        linears=(
            Linear(hidden, width, bias=True),
            Linear(hidden, width, bias=True),
            Linear(block, width, bias=True),
            Linear(block, width, bias=True),
            Linear(width, hidden, bias=True),
        ),
        width=width,
        state=1,
        conv_width=width,
        conv_kernel=kernel,
        besides=width * kernel + width + width,
    )


def _lightning(config: ModelConfig, hidden: int) -> Recurrence:
    """Linear attention with a decay per head (arXiv 2401.04658)."""
    heads = config.integer("num_attention_heads")
    dim = config.optional("head_dim")
    if dim is None:
        config.check_multiple(["hidden_size"], hidden, ["num_attention_heads"], heads)
        dim = hidden // heads
    width = heads * dim
    return Recurrence(
        kind="linear",
        linears=(Linear(hidden, 3 * width), Linear(hidden, width), Linear(width, hidden)),
        width=width,
        state=dim,
        chunk=config.optional("block_size") or 256,
        besides=width,
    )
