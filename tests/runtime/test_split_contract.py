"""What models and callers may ask of the split: hooks, own forwards, other heads, single stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaForCausalLM,
)

from hfpp import split_model_into_stages
from hfpp.errors import PipelineConfigError
from hfpp.plan.partition import generate_hf_model_fqn_per_model_part
from hfpp.runtime.find_anatomy import find_anatomy
from hfpp.runtime.module_names import module_names_of, offsets_of
from hfpp.runtime.ownership import find_ownership
from hfpp.runtime.stage_boundary import boundary_of
from tests.models import VOCAB, config_of, relative_error, tiny_model, token_ids
from tests.ranks import run_ranks
from tests.runtime.test_split_model import run_chain, split


def names_for(family: str, num_stages: int) -> list[list[str]]:
    model = tiny_model(family)
    anatomy = find_anatomy(model)
    bounds = range(0, anatomy.num_layers + 1, anatomy.num_layers // num_stages)
    return module_names_of(find_ownership(model, anatomy, list(bounds)), anatomy)


def test_a_generated_list_has_the_model_s_own_names() -> None:
    assert names_for("gpt2", 2) == [
        ["transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1"],
        ["transformer.h.2", "transformer.h.3", "transformer.ln_f", "lm_head"],
    ]


@pytest.mark.parametrize("num_stages", [2, 4])
def test_for_llama_it_is_the_contract_s_list(num_stages: int) -> None:
    wanted = generate_hf_model_fqn_per_model_part(num_stages, 4, include_multimodal_encoders=False)
    assert names_for("llama", num_stages) == wanted


def test_the_contract_s_own_list_is_accepted_whole() -> None:
    """With the names of multimodal encoders that a text model does not have."""
    lists = generate_hf_model_fqn_per_model_part(2, 4)
    assert "model.vision_tower" in lists[0]
    assert offsets_of(lists, find_anatomy(tiny_model("llama")), "names") == (0, 2, 4)


@pytest.mark.parametrize(
    ("auto", "head"),
    [
        (AutoModel, None),
        (AutoModelForTokenClassification, "score.weight"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_other_heads_and_none(auto: Any, head: str | None, family: str) -> None:
    config = config_of(family, num_labels=5)
    torch.manual_seed(0)
    model = auto.from_config(config).double().eval()
    ids = token_ids(3)
    stages = split(model, 2)
    wanted = model(ids, use_cache=False)
    wanted = wanted.last_hidden_state if head is None else wanted.logits
    assert relative_error(run_chain(stages, ids), wanted) < 1e-12
    if head is not None:
        names = [{name for name, _ in stage.named_parameters()} for stage in stages]
        assert all("classifier" not in n and "score" not in n for n in names[0])
        assert any("classifier" in n or "score" in n for n in names[1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sequence_classification_finds_the_last_token(family: str) -> None:
    """Its head skips padding by the token ids: the last stage must have the real ones."""
    config = config_of(family, num_labels=5, pad_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).double().eval()
    ids = token_ids(3)
    ids[0, -5:] = 0
    stages = split(model, 2)
    wanted = model(ids, use_cache=False).logits
    assert relative_error(run_chain(stages, ids), wanted) < 1e-12


class SelfMade(nn.Module):
    """A model that copes with missing modules by itself."""

    _pp_keep_self_forward = True

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, 8)
        self.model.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.model.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, VOCAB)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.model.embed_tokens is not None:
            x = self.model.embed_tokens(x)
        layers = self.model.layers
        for layer in layers.values() if isinstance(layers, nn.ModuleDict) else layers:
            x = x + torch.tanh(layer(x))
        if self.model.norm is not None:
            x = self.model.norm(x)
        return x if self.lm_head is None else self.lm_head(x)


class Hooked(LlamaForCausalLM):
    """Moves a layer with the hook."""

    seen: Any = None

    def customize_pipeline_stage_modules(
        self, names: list[list[str]], *, layers_prefix: str, text_model: nn.Module
    ) -> list[list[str]]:
        """Give the first stage one layer only."""
        type(self).seen = (layers_prefix, text_model is self.model)
        names[0].remove("model.layers.1")
        names[1].insert(0, "model.layers.1")
        return names


class Shortened(Hooked):
    """Gives one list for two stages."""

    def customize_pipeline_stage_modules(self, names: list[list[str]], **_: Any) -> Any:
        """Lose a stage."""
        return names[:1]


class Keeping(Hooked):
    """Keeps the generated names."""

    def customize_pipeline_stage_modules(self, names: list[list[str]], **_: Any) -> Any:
        """Change nothing."""
        return None


def contract_jobs(rank: int, size: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("pp",))
    device, found = torch.device("cpu"), {}

    torch.manual_seed(0)
    model: nn.Module = SelfMade()
    names = [
        ["model.embed_tokens", "model.layers.0"],
        ["model.layers.1", "model.layers.2", "model.layers.3", "model.norm", "lm_head"],
    ]
    stages, parts = split_model_into_stages(model, mesh, "pp", "1F1B", device, names)
    found["self"] = sorted(name for name, _ in parts[0].named_parameters())
    found["self shares"] = all(
        p is dict(model.named_parameters())[n] for n, p in parts[0].named_parameters()
    )
    type(model)._pp_keep_self_forward = False
    _, parts = split_model_into_stages(model, mesh, "pp", "1F1B", device, names, None, False, False)
    found["unpatched"] = sorted(name for name, _ in parts[0].named_parameters())
    found["forward"] = type(parts[0]).forward is SelfMade.forward
    x = token_ids(2) if rank == 0 else SelfMade.forward(model, token_ids(2))[..., :8]
    found["runs"] = tuple(parts[0](x).shape)

    torch.manual_seed(0)
    hooked = Hooked(config_of("llama"))
    _, parts = split_model_into_stages(hooked, mesh, "pp", "1F1B", device)
    found["hook"] = (Hooked.seen, _layers(parts[0]))
    Hooked.seen = None
    _, parts = split_model_into_stages(
        hooked, mesh, "pp", "1F1B", device, generate_hf_model_fqn_per_model_part(2, 4)
    )
    found["hook with a list"] = (Hooked.seen, _layers(parts[0]))

    stages, parts = split_model_into_stages(tiny_model("llama"), mesh, "pp", "DualPipeV", device)
    found["v"] = [
        (stage.stage_index, _layers(part)) for stage, part in zip(stages, parts, strict=True)
    ]
    type(model)._pp_keep_self_forward = True
    refused = []
    for wrong in (
        [["model.embed_tokens", "model.layer.0"], names[1]],
        [["model.embed_tokens"], names[1]],
        [names[0], [name for name in names[1] if name != "model.norm"]],
        [names[0], ["model.layers.2", "model.layers.1", *names[1][2:]]],
        [[*names[0], "lm_head"], names[1]],
    ):
        try:
            split_model_into_stages(model, mesh, "pp", "1F1B", device, wrong)
            refused.append("accepted")
        except PipelineConfigError as error:
            refused.append(str(error))
    found["refused"] = refused

    tied = SelfMade()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    _, parts = split_model_into_stages(tied, mesh, "pp", "1F1B", device, names)
    boundary = boundary_of(parts[0])
    found["tied"] = None if boundary is None else [t.names for t in boundary.tied]

    short = Shortened(config_of("llama"))
    try:
        split_model_into_stages(short, mesh, "pp", "1F1B", device)
    except PipelineConfigError as error:
        found["short hook"] = str(error)
    keeps = Keeping(config_of("llama"))
    _, parts = split_model_into_stages(keeps, mesh, "pp", "1F1B", device)
    found["hook gives None"] = _layers(parts[0])
    _, parts = split_model_into_stages(
        tiny_model("llama", num_hidden_layers=6), mesh, "pp", "Interleaved1F1B", device, None, 2,
        round_to_pp_multiple="up",
    )  # fmt: skip
    found["rounded"] = [_layers(part) for part in parts]
    try:
        split_model_into_stages(tiny_model("llama"), mesh, "pp", None, device)
    except PipelineConfigError as error:
        found["no schedule"] = str(error)
    return found


def _layers(part: nn.Module) -> list[int]:
    return sorted({int(n.split(".")[2]) for n, _ in part.named_parameters() if ".layers." in n})


def test_hooks_own_forwards_and_placement() -> None:
    first, last = run_ranks(contract_jobs, 2, timeout_s=60)
    assert (
        first["self"]
        == first["unpatched"]
        == [
            "model.embed_tokens.weight",
            "model.layers.0.bias",
            "model.layers.0.weight",
        ]
    )
    assert {"model.layers.3.weight", "model.norm.bias", "lm_head.weight"} < set(last["self"])
    assert len(last["self"]) == 10
    for result in (first, last):
        assert result["self shares"]
        assert result["forward"]
        assert "use pp_schedule='1F1B'" in result["no schedule"]
        misspelt, missing, no_norm, order, doubled = result["refused"]
        assert "module_names_per_stage[0]: 'model.layer.0' is no module of SelfMade" in misspelt
        assert "'model.layers.0.weight' of SelfMade on no stage" in missing
        assert "'model.norm.weight' of SelfMade on no stage" in no_norm
        assert "'model.layers.1' stands after model.layers.2" in order
        assert "'lm_head.weight' of SelfMade on stages [0, 1]" in doubled
        assert result["tied"] == [((0, ("model.embed_tokens.weight",)), (1, ("lm_head.weight",)))]
        assert "returned 1 lists of names for 2 stages" in result["short hook"]
    assert first["hook gives None"] == [0, 1]
    assert (first["rounded"], last["rounded"]) == ([[0, 1], [4]], [[2, 3], [5]])
    assert first["runs"] == (2, 21, 8)
    assert last["runs"] == (2, 21, VOCAB)
    assert first["hook"] == (("model.", True), [0])
    assert last["hook"] == (("model.", True), [1, 2, 3])
    assert first["hook with a list"] == (None, [0, 1])
    assert first["v"] == [(0, [0]), (3, [3])]
    assert last["v"] == [(1, [1]), (2, [2])]
