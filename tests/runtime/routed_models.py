"""Tiny mixture-of-experts models of every causal-LM class that adds an auxiliary loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.models import SEQ, VOCAB

COEFFICIENT = 0.5  # large enough to change the routers' gradients clearly

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "q_lora_rank": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Set where a class's config has them."""

FAMILIES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_loss_weight": COEFFICIENT,
        },
    },
    "deepseek_v4": {},
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
    "ernie4_5_moe": {},
    "flex_olmo": {},
    "flint": {},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "granitemoeshared": {},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "jetmoe": {"aux_loss_coef": COEFFICIENT},
    "laguna": {},
    "mellum": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "hc_lowrank": 8,
    },
}
"""Configs by model type."""

_FLOAT64 = frozenset(("dbrx", "doge", "jetmoe"))  # the others' expert kernels have float32
_RANDOM = frozenset(("phimoe",))  # routers that draw random numbers in training


def dtype_of(family: str) -> torch.dtype:
    """float64, where the family's kernels have it."""
    return torch.float64 if family in _FLOAT64 else torch.float32


def tolerance_of(family: str) -> float:
    """Largest relative error that counts as equal."""
    return 1e-9 if family in _FLOAT64 else 1e-5


def routed_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The tiny config of a family, with the setting that asks for the auxiliary loss."""
    plain = AutoConfig.for_model(family)
    sizes = {k: v for k, v in _SIZES.items() if hasattr(plain, k) and family != "dbrx"}
    more = {"vocab_size": VOCAB, "output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
    wanted = {**sizes, **more, **FAMILIES[family], **changes}
    if family == "dbrx":
        wanted["n_layers"] = wanted.pop("num_hidden_layers", wanted["n_layers"])
    return AutoConfig.for_model(family, **wanted)


def routed_model(family: str, **changes: Any) -> Any:
    """A random model of a family; norms and biases differ from their neutral values."""
    config = routed_config(family, **changes)
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    model = model.to(dtype_of(family)).train(family not in _RANDOM)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


class RoutedBlock(nn.Module):
    """A block that hands its router's logits out beside the hidden state, no hook involved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 3)
        self.experts = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mix three experts."""
        logits = self.router(x)
        outputs = torch.tanh(self.experts(x)).unflatten(-1, (3, -1))
        return x + (logits.softmax(-1)[..., None] * outputs).sum(-2), {"logits": logits}


class RoutedModel(nn.Module):
    """A stranger's mixture of experts in plain torch, with an auxiliary loss."""

    def __init__(self, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.config = SimpleNamespace(output_router_logits=True)
        self.z_loss_coef = COEFFICIENT
        self.tokens = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(RoutedBlock(width) for _ in range(depth))
        self.out = nn.Linear(width, VOCAB)
        self.double()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        """Logits and what else the model computes, by name."""
        x, routers = self.tokens(input_ids), []
        for block in self.blocks:
            x, more = block(x)
            routers.append(more["logits"])
        logits = self.out(x)
        z_loss = torch.stack(routers).logsumexp(-1).square().mean()
        found: dict[str, Any] = {"logits": logits, "z": z_loss, "routers": routers}
        if labels is not None:
            found["loss"] = self.combined(token_loss(logits, labels), z_loss)
        return found

    def combined(self, loss: Tensor, auxiliary: Tensor) -> Tensor:
        """What the model trains on."""
        return loss + self.z_loss_coef * auxiliary


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over a microbatch, written without hfpp."""
    logits = logits[:, :-1].reshape(-1, VOCAB)
    return nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1))


def padded(ids: Tensor) -> Tensor:
    """An attention mask that hides the end of the first sequence."""
    mask = torch.ones_like(ids)
    mask[0, SEQ - 4 :] = 0
    return mask
