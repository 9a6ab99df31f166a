"""Tiny random models of many families, with the settings that make a split go wrong.

Windows shorter than the test sequences, multipliers other than 1, tied weights where they are the
family's default, and at least one layer of every type that the family mixes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB = 96
SEQ = 21
WINDOW = 8  # shorter than SEQ

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
_HEAD = {"head_dim": 8}
_WINDOW = {"sliding_window": WINDOW}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _BASE,
    "qwen2": {**_BASE, **_WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {**_BASE, **_HEAD},
    "qwen3_moe": {
        **_BASE,
        **_HEAD,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "mistral": {**_BASE, **_WINDOW},
    "mixtral": {**_BASE, **_WINDOW, "num_local_experts": 4},
    "gemma": {**_BASE, **_HEAD},
    "gemma2": {**_BASE, **_HEAD, **_WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        **_BASE,
        **_HEAD,
        **_WINDOW,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    },
    "phi": {**_BASE, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phi3": {**_BASE, **_WINDOW, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "cohere": {**_BASE, "logit_scale": 0.25},
    "cohere2": {**_BASE, **_WINDOW, "num_hidden_layers": 8, "logit_scale": 0.25},
    "granite": {
        **_BASE,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.25,
        "logits_scaling": 8.0,
    },
    "olmo2": _BASE,
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {**_BASE, **_NO_DROPOUT},
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    },
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 4, "n_head": 4, **_NO_DROPOUT},
    "falcon": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        **_NO_DROPOUT,
    },
    "starcoder2": {**_BASE, **_WINDOW, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "mamba": {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 8},
    "zamba2": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "adapter_rank": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "mamba", "hybrid", "mamba"],
    },
    "gemma3n_text": {
        **_BASE,
        **_HEAD,
        **_WINDOW,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0, 0.0],
    },
}
"""Configs by model type."""

_FLOAT32_ONLY = frozenset(("qwen3_moe", "mixtral"))  # grouped expert kernels


def dtype_of(family: str) -> torch.dtype:
    """float64, where the family's kernels have it."""
    return torch.float32 if family in _FLOAT32_ONLY else torch.float64


def tolerance_of(family: str) -> float:
    """Largest relative error that counts as equal."""
    return 1e-5 if family in _FLOAT32_ONLY else 1e-9


def config_of(family: str, **changes: Any) -> PretrainedConfig:
    """The tiny config of a family."""
    return AutoConfig.for_model(family, **{**FAMILIES[family], **changes})


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of a family; every parameter differs from its neutral value."""
    config = config_of(family, **changes)
    torch.manual_seed(seed)
    model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    model = model.to(dtype_of(family)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms at 1 and biases at 0 would hide that one is missing
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def token_ids(batch: int, seq: int = SEQ, *, seed: int = 0) -> torch.Tensor:
    """Random ids without special tokens, int64 [batch, seq]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, seq), generator=generator)


def padding_mask(batch: int, seq: int = SEQ, *, side: str = "right") -> torch.Tensor:
    """An attention mask with 4 pads in every other sequence, int64 [batch, seq]."""
    mask = torch.ones(batch, seq, dtype=torch.int64)
    columns = slice(seq - 4, seq) if side == "right" else slice(0, 4)
    mask[::2, columns] = 0
    return mask


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; infinite for NaN."""
    found, wanted = found.detach().double(), wanted.detach().double()
    error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


class Block(nn.Module):
    """A block of a model that nobody registered anywhere: tuple in, tuple out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a second tensor into the first and hand both on."""
        y = x + torch.tanh(self.inner(x)) * memory
        return y, memory + y.mean(-1, keepdim=True)


class PlainModel(nn.Module):
    """A stranger's model in plain torch: embedding, blocks that pass on two tensors, a head."""

    def __init__(self, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.out = nn.Linear(width, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits, float [batch, seq, vocab]."""
        x = self.tokens(ids)
        memory = x.mean(-1, keepdim=True)
        for block in self.blocks:
            x, memory = block(x, memory)
        return self.out(x)  # type: ignore[no-any-return]
