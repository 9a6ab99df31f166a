"""A model that was taken apart before is not run again; one that differs in anything is."""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mistral import modeling_mistral

from hfpp.runtime import code_identity
from hfpp.runtime.anatomy import Anatomy
from hfpp.runtime.anatomy_cache import AnatomyCache
from hfpp.runtime.find_anatomy import find_anatomy
from hfpp.runtime.model_digest import digest_of
from tests.models import PlainModel, tiny_model


def same_run(one: Anatomy, other: Anatomy) -> bool:
    return one._trace is other._trace


@pytest.fixture
def known_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own code passes for that of a known package."""
    known = code_identity.KNOWN_PACKAGES | {"tests"}
    monkeypatch.setattr(code_identity, "KNOWN_PACKAGES", known)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "mamba", "gemma3n_text"])
def test_models_of_one_config_have_one_anatomy(family: str) -> None:
    first = find_anatomy(tiny_model(family))
    second = find_anatomy(tiny_model(family, seed=1))
    assert same_run(first, second)
    assert second.slots(2) == first.slots(2)
    assert second.skeleton is not first.skeleton


def test_a_model_of_other_code_is_always_run_anew() -> None:
    assert digest_of(PlainModel()) is None
    assert not same_run(find_anatomy(PlainModel()), find_anatomy(PlainModel()))


@pytest.mark.usefixtures("known_tests")
def test_a_model_without_a_config() -> None:
    assert same_run(find_anatomy(PlainModel()), find_anatomy(PlainModel()))
    assert not same_run(find_anatomy(PlainModel()), find_anatomy(PlainModel(depth=5)))


def test_models_on_the_meta_device() -> None:
    with torch.device("meta"):
        first, second = tiny_model("mistral"), tiny_model("mistral")
    assert same_run(find_anatomy(first), find_anatomy(second))
    assert not same_run(find_anatomy(first), find_anatomy(tiny_model("mistral")))


def test_large_buffers_count_by_shape_and_small_ones_by_value() -> None:
    models = [tiny_model("mistral") for _ in range(4)]
    for model, size, value in zip(models, (1 << 17, 1 << 17, 8, 8), (1, 2, 1, 2), strict=True):
        model.register_buffer("table", torch.full((size,), value))
    large, other_large, small, other_small = map(find_anatomy, models)
    assert same_run(large, other_large)
    assert not same_run(small, other_small)


class LowRank(nn.Module):
    """An adapter around a linear layer."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(inner.in_features, 2, bias=False, dtype=inner.weight.dtype)
        self.up = nn.Linear(2, inner.out_features, bias=False, dtype=inner.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.up(self.down(x))


class OtherMlp(modeling_mistral.MistralMLP):
    """The same parameters, other code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def doubled(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return type(self).forward(self, x) * 2


def scaled(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def wrap_a_linear(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj = LowRank(model.model.layers[1].self_attn.q_proj)


def replace_a_class(model: Any) -> None:
    model.model.layers[1].mlp.__class__ = OtherMlp


def patch_an_instance(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(doubled, mlp)


def patch_an_instance_by_a_closure(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    before = mlp.forward
    mlp.forward = lambda x: before(x) * 2


def tie(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def untie_a_layer(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[1].mlp.gate_proj.weight


def add_a_value_to_a_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.add_(1)


def change_an_attribute(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 7.0


CHANGES: dict[str, Callable[[Any], Any]] = {
    "wrapper": wrap_a_linear,
    "class": replace_a_class,
    "instance": patch_an_instance,
    "closure": patch_an_instance_by_a_closure,
    "tie": tie,
    "tie within a layer": untie_a_layer,
    "buffer": add_a_value_to_a_buffer,
    "attribute": change_an_attribute,
    "dtype": lambda model: model.to(torch.float32),
    "dtype of one": lambda model: model.model.norm.to(torch.float32),
    "hook": lambda model: model.model.norm.register_forward_hook(scaled),
    "config": lambda model: setattr(model.config, "rms_norm_eps", 0.5),
    "frozen": lambda model: model.model.layers[0].requires_grad_(False),
    "attention": lambda model: model.set_attn_implementation("eager"),
}


@pytest.mark.usefixtures("known_tests")
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_run_anew(change: str) -> None:
    CHANGES[change](tiny_model("mistral"))  # classes remember what was asked of them first
    before = find_anatomy(tiny_model("mistral"))
    changed = tiny_model("mistral")
    CHANGES[change](changed)
    assert not same_run(find_anatomy(changed), before)
    assert same_run(find_anatomy(tiny_model("mistral")), before)


@pytest.mark.parametrize("change", ["wrapper", "class", "instance", "closure", "hook"])
def test_other_code_in_a_model_of_a_known_package(change: str) -> None:
    model = tiny_model("mistral")
    assert digest_of(model) is not None
    CHANGES[change](model)
    assert digest_of(model) is None


settings = types.ModuleType("settings")
settings.FLAG = False  # type: ignore[attr-defined]
options = types.SimpleNamespace(flag=False)


class Flagged(PlainModel):
    """Its forward reads what belongs to no model."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = super().forward(input_ids)
        if settings.FLAG or options.flag:
            logits = logits * 2
        return logits


@pytest.mark.parametrize(("holder", "name"), [(settings, "FLAG"), (options, "flag")])
def test_flags_elsewhere_are_seen(holder: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = find_anatomy(Flagged())
    monkeypatch.setattr(holder, name, True)
    changed = find_anatomy(Flagged())
    assert changed.size() == before.size() + 1


def test_flags_read_by_patches_of_known_packages_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rotate, silu = modeling_mistral.rotate_half, nn.functional.silu

    def flagged_rotate(x: torch.Tensor) -> torch.Tensor:
        return rotate(x) * 2 if settings.FLAG else rotate(x)

    @functools.wraps(silu)
    def flagged_silu(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
        return silu(x) * 2 if options.flag else silu(x)

    patches: list[tuple[Any, str, Any]] = [
        (modeling_mistral, "rotate_half", flagged_rotate),
        (modeling_mistral, "rotate_half", functools.partial(flagged_rotate)),
        (nn.functional, "silu", flagged_silu),
        (modeling_mistral, "torch", settings),
    ]
    model = tiny_model("mistral")
    for target, name, value in patches:
        assert digest_of(model) is not None
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            assert digest_of(model) is None, (target, name)


def test_the_code_that_comes_with_checkpoints_is_not_of_a_known_package() -> None:
    kind = type("Model", (nn.Module,), {"__module__": "transformers_modules.org.modeling"})
    assert not code_identity.is_known(kind)
    assert code_identity.is_known(modeling_mistral.MistralModel)


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "DeepseekV3ForCausalLM"])
def test_families_of_the_bench_are_remembered(kind: str) -> None:
    model_class = getattr(transformers, kind)
    config = model_class.config_class(num_hidden_layers=4)
    with torch.device("meta"):
        first, second = model_class(config), model_class(config)
    assert digest_of(first) == digest_of(second) is not None


def test_adapters_of_peft_are_remembered_and_told_apart() -> None:
    def adapted(rank: int) -> nn.Module:
        return get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], r=rank))

    assert digest_of(adapted(2)) == digest_of(adapted(2)) is not None
    assert digest_of(adapted(3)) != digest_of(adapted(2))


@pytest.mark.parametrize(
    "other",
    [{"sliding_window": 9}, {"rope_theta": 3.0}, {"tie_word_embeddings": True}, {"head_dim": 16}],
)
def test_another_config_is_run_anew(other: dict[str, Any]) -> None:
    first, second = (
        find_anatomy(tiny_model("mistral")),
        find_anatomy(tiny_model("mistral", **other)),
    )
    assert not same_run(first, second)


def test_a_closure_on_an_instance_is_never_held() -> None:
    model = tiny_model("mistral")
    patch_an_instance_by_a_closure(model)
    assert digest_of(model) is None
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    anatomy = find_anatomy(model)
    del model, anatomy
    gc.collect()
    assert weight() is None


def test_weights_are_not_held() -> None:
    model = tiny_model("mistral", sliding_window=5)
    weights = [weakref.ref(p) for p in model.parameters()]
    find_anatomy(model)
    del model
    gc.collect()
    assert all(weight() is None for weight in weights)


@pytest.mark.usefixtures("known_tests")
def test_patched_code_is_run_anew_and_undone_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = find_anatomy(tiny_model("mistral"))

    def attend(*args: Any, **kwargs: Any) -> Any:
        return modeling_mistral.eager_attention_forward(*args, **kwargs)

    own_forward, rotate = modeling_mistral.MistralMLP.forward, modeling_mistral.rotate_half
    patches: list[tuple[Any, str, Any]] = [
        (modeling_mistral.MistralMLP, "forward", lambda self, x: own_forward(self, x) * 2),
        (modeling_mistral, "rotate_half", lambda x: rotate(x) * 2),
        (modeling_mistral.MistralAttention, "is_causal", False),
    ]
    for target, name, value in patches:
        for _ in range(2):  # the second may lie where the first one lay
            with monkeypatch.context() as patch:
                patch.setattr(target, name, value, raising=False)
                assert not same_run(find_anatomy(tiny_model("mistral")), before)
            assert same_run(find_anatomy(tiny_model("mistral")), before)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attend)
    assert not same_run(find_anatomy(tiny_model("mistral")), before)


def test_what_surrounds_the_run_counts() -> None:
    before = find_anatomy(tiny_model("mistral"))
    model = tiny_model("mistral")
    with torch.autocast("cpu", torch.bfloat16):
        assert not same_run(find_anatomy(model), before)
    with torch.device("meta"):
        assert digest_of(model) is None
    handle = nn.modules.module.register_module_forward_hook(scaled)  # type: ignore[arg-type]
    try:
        assert digest_of(model) is None
    finally:
        handle.remove()
    assert same_run(find_anatomy(model), before)


def test_what_cannot_be_looked_into() -> None:
    class Local(nn.Linear):
        pass

    assert digest_of(tiny_model("mistral")) is not None
    for opaque in (iter([]), torch.Generator(), Local(2, 2), torch.zeros(1 << 17), lambda: 0):
        model = tiny_model("mistral")
        model.extra = opaque
        assert digest_of(model) is None, opaque


def test_containers_that_hold_themselves() -> None:
    digests = []
    for value in (1, 1, 2):
        model = tiny_model("mistral")
        loop: list[Any] = [value, {"model": model}]
        loop.append(loop)
        model.extra = loop
        digests.append(digest_of(model))
    assert digests[0] is not None
    assert digests[0] == digests[1] != digests[2]


def test_nobody_sees_what_others_write_on_the_skeleton() -> None:
    first = find_anatomy(tiny_model("mistral"))
    first.skeleton.model.layers[1].mark = "mine"
    first.skeleton.config.hidden_size = 1
    second = find_anatomy(tiny_model("mistral"))
    assert same_run(first, second)
    assert not hasattr(second.skeleton.model.layers[1], "mark")
    assert second.skeleton.config.hidden_size == 32


@pytest.mark.usefixtures("known_tests")
def test_the_cache_is_bounded() -> None:
    made: list[nn.Module] = []

    def make(model: nn.Module) -> Anatomy:
        made.append(model)
        return find_anatomy(model)

    cache = AnatomyCache(most=3)
    models = [PlainModel(depth=depth) for depth in range(2, 7)]
    for model in models:
        cache.find(model, make)
    assert len(cache) == 3
    cache.find(models[-3], make)
    assert made == models
    cache.find(models[0], make)  # in its place the one used longest ago goes: not the third last
    assert len(cache) == 3
    cache.find(models[-3], make)
    assert made == [*models, models[0]]
    size = find_anatomy(models[0]).size()
    small = AnatomyCache(most_nodes=size - 1)
    small.find(models[0], make)
    assert len(small) == 0
    two = AnatomyCache(most_nodes=2 * size)
    for model in models[:3]:
        two.find(model, make)
    assert len(two) == 1
    two.clear()
    assert len(two) == 0


def test_runs_of_other_sizes_are_bounded() -> None:
    anatomy = find_anatomy(tiny_model("zamba2"))
    for seq in range(20, 29):
        hidden, original = anatomy.slot_metas(3, 2, seq, None)
        assert hidden.shape == original.shape == (2, seq, 32)
    assert len(anatomy._resized) == 8
    assert not find_anatomy(tiny_model("zamba2"))._resized
