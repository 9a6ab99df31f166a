"""Tiny configs: of the same kind as the config they come from, and small in every size."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers

from hfpp import PipelineConfigError
from hfpp.check.shrink import shrink_config, tiny_config
from tests.check import user_configs

# One class per way in which configs differ: names of sizes, kinds of layers, nested configs.
CLASSES = (
    "BambaForCausalLM",
    "BertLMHeadModel",
    "BloomForCausalLM",
    "DbrxForCausalLM",
    "DeepseekV3ForCausalLM",
    "FalconH1ForCausalLM",
    "GPT2LMHeadModel",
    "Gemma2ForCausalLM",
    "Gemma3nForCausalLM",
    "GptOssForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "JambaForCausalLM",
    "LlavaForConditionalGeneration",
    "Lfm2MoeForCausalLM",
    "Llama4ForConditionalGeneration",
    "Mamba2ForCausalLM",
    "MllamaForConditionalGeneration",
    "OPTForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "Qwen3NextForCausalLM",
    "XLMWithLMHeadModel",
    "Zamba2ForCausalLM",
)


def tiny(name):
    model_class = getattr(transformers, name)
    return model_class, tiny_config(model_class.config_class, model_class)


def logits_of(model, length=21):
    tokens = torch.randint(20, 90, (2, length), generator=torch.Generator().manual_seed(1))
    cache = (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )
    return model(tokens, **cache).logits


def built(model_class, config):
    torch.manual_seed(0)
    return model_class(config).to(torch.float32).eval()


@pytest.mark.parametrize("name", CLASSES)
def test_tiny_models_run_and_nothing_in_them_is_random(name):
    model_class, config = tiny(name)
    model = built(model_class, config)
    assert sum(p.numel() for p in model.parameters()) < 3_000_000
    assert config.get_text_config().num_hidden_layers >= 4
    assert config.get_text_config().vocab_size <= 512
    logits = logits_of(model)
    assert torch.isfinite(logits).all()
    logits.square().mean().backward()
    torch.testing.assert_close(logits_of(model.train()), logits)


def per_layer_lists(config):
    text = config.get_text_config()
    count = text.num_hidden_layers
    return {
        name: set(map(str, value))
        for name, value in vars(text).items()
        if isinstance(value, (list, tuple)) and len(value) == count and isinstance(value[0], str)
    }


@pytest.mark.parametrize(
    "name", ["Gemma3nForCausalLM", "Qwen3NextForCausalLM", "Zamba2ForCausalLM"]
)
def test_every_kind_of_layer_of_the_default_occurs(name):
    model_class, config = tiny(name)
    default = per_layer_lists(model_class.config_class())
    assert any(len(kinds) > 1 for kinds in default.values())
    assert per_layer_lists(config) == default


USER_CONFIGS = {
    "deepseek_v3": transformers.DeepseekV3ForCausalLM,
    "gemma3": transformers.Gemma3ForConditionalGeneration,
    "gemma3n": transformers.Gemma3nForCausalLM,
    "granite": transformers.GraniteForCausalLM,
    "llama": transformers.LlamaForCausalLM,
    "mixtral": transformers.MixtralForCausalLM,
    "mllama": transformers.MllamaForConditionalGeneration,
    "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
}


@pytest.mark.parametrize("name", USER_CONFIGS)
def test_user_configs_shrink_to_models_that_run_and_stay_as_they_were(name):
    config = getattr(user_configs, name)()
    before = copy.deepcopy(config.to_dict())
    small = shrink_config(config)
    assert config.to_dict() == before
    assert type(small) is type(config)
    model = built(USER_CONFIGS[name], small)
    assert sum(p.numel() for p in model.parameters()) < 3_000_000
    logits = logits_of(model)
    assert logits.shape == (2, 21, 128)
    assert torch.isfinite(logits).all()


def test_llama():
    small = shrink_config(user_configs.llama())
    assert small.num_attention_heads == 2 * small.num_key_value_heads == 4  # grouped still
    assert small.hidden_size == small.num_attention_heads * small.head_dim
    rope = small.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 8.0, 500000.0)
    # Sixteen times as long as the context it was stretched from.
    assert small.max_position_embeddings == 16 * rope["original_max_position_embeddings"]
    assert (small.bos_token_id, small.eos_token_id) == (124, [125, 126, 127])
    assert small.dtype == torch.bfloat16  # left alone


def test_probabilities_are_zero_and_the_router_keeps_its_choice():
    small = shrink_config(user_configs.mixtral())
    assert small.attention_dropout == small.router_jitter_noise == 0.0
    assert small.router_aux_loss_coef == 0.02
    assert (small.num_local_experts, small.num_experts_per_tok) == (8, 2)
    assert small.sliding_window == 8


def test_gemma3():
    small = shrink_config(user_configs.gemma3())
    text = small.text_config
    assert text.layer_types == ["sliding_attention", "full_attention"] * 2
    assert text.rope_parameters["full_attention"]["factor"] == 8.0
    assert text.query_pre_attn_scalar == 168  # multiplies: no size
    assert small.image_token_index < text.vocab_size == 128
    side = small.vision_config.image_size // small.vision_config.patch_size
    assert small.mm_tokens_per_image == (side // 4) ** 2  # pooled four by four, as before


def test_deepseek_v3():
    small = shrink_config(user_configs.deepseek_v3())
    assert (small.num_hidden_layers, small.first_k_dense_replace) == (4, 1)
    assert small.n_routed_experts % small.n_group == 0
    assert small.topk_group < small.n_group  # whole groups are left out still
    assert small.num_experts_per_tok <= small.topk_group * small.n_routed_experts // small.n_group
    assert small.qk_head_dim == small.qk_nope_head_dim + small.qk_rope_head_dim
    assert small.head_dim == small.qk_rope_head_dim
    assert small.routed_scaling_factor == 2.5
    assert small.rope_parameters["factor"] == 40
    assert small.max_position_embeddings == 40 * 32


def test_qwen3_vl():
    small = shrink_config(user_configs.qwen3_vl())
    text, vision = small.text_config, small.vision_config
    assert sum(text.rope_parameters["mrope_section"]) == text.head_dim // 2
    assert vision.out_hidden_size == text.hidden_size != vision.hidden_size
    assert vision.deepstack_visual_indexes == [1, 2, 3]
    assert vision.depth == 4
    assert vision.num_position_embeddings == 64
    ids = [small.vision_start_token_id, small.vision_end_token_id]
    assert [*ids, small.image_token_id, small.video_token_id] == [124, 125, 126, 127]


def test_mllama():
    small = shrink_config(user_configs.mllama())
    assert (
        small.text_config.num_hidden_layers == 5
    )  # it does not end with a layer that is called for images only
    assert small.text_config.cross_attention_layers == [1, 3]
    vision = small.vision_config
    kept = len(vision.intermediate_layers_indices)
    assert kept == 5
    assert vision.vision_output_dim == vision.hidden_size * (1 + kept)


def test_gemma3n_shares_keys_among_both_kinds_of_layers():
    small = shrink_config(user_configs.gemma3n())
    first_shared = small.num_hidden_layers - small.num_kv_shared_layers
    assert 0 < first_shared < small.num_hidden_layers
    assert set(small.layer_types[:first_shared]) == set(small.layer_types[first_shared:])
    assert set(small.activation_sparsity_pattern) == {0.0, 0.95}


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        ("granite", "residual_multiplier", 0.23),
        ("granite", "embedding_multiplier", 12.5),
        ("granite", "attention_multiplier", 0.0079),
        ("granite", "logits_scaling", 16.5),
        ("mixtral", "sliding_window", 9),
        ("mixtral", "num_experts_per_tok", 1),
        ("deepseek_v3", "routed_scaling_factor", 2.6),
    ],
)
def test_what_the_kind_consists_of_still_matters_at_the_small_size(config, name, value):
    small = shrink_config(getattr(user_configs, config)())
    other = copy.deepcopy(small)
    assert getattr(other, name) != value
    setattr(other, name, value)
    logits, changed = (logits_of(built(USER_CONFIGS[config], each)) for each in (small, other))
    assert (changed - logits).abs().max() > 1e-5 * logits.abs().max()


def test_more_layers_on_request():
    assert shrink_config(user_configs.llama(), layers=9).num_hidden_layers == 9
    assert shrink_config(user_configs.gemma3(), layers=6).text_config.num_hidden_layers == 6


def test_layers_below_one_are_refused():
    with pytest.raises(PipelineConfigError, match=r"layers \(0\) must be at least 1: use 4"):
        shrink_config(user_configs.llama(), layers=0)


def test_classes_without_usable_defaults_are_refused_by_name():
    with pytest.raises(PipelineConfigError, match="Gemma4AssistantConfig cannot be made"):
        tiny_config(transformers.Gemma4AssistantConfig)


def test_a_causal_lm_gets_its_part_of_a_composite_config():
    config = tiny_config(transformers.Qwen3_5Config, transformers.Qwen3_5ForCausalLM)
    assert isinstance(config, transformers.Qwen3_5ForCausalLM.config_class)
    assert set(config.layer_types) == {"linear_attention", "full_attention"}


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("Gemma3ForConditionalGeneration", 4),
        ("LlavaForConditionalGeneration", 64),
        ("PaliGemmaForConditionalGeneration", 64),
    ],
)
def test_images_pass_through_a_tiny_encoder_to_the_text_width(name, tokens):
    model_class, config = tiny(name)
    vision = config.vision_config
    assert vision.hidden_size != config.text_config.hidden_size
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size)
    features = built(model_class, config).model.get_image_features(pixels).pooler_output
    assert torch.cat(list(features)).shape == (tokens, config.text_config.hidden_size)
