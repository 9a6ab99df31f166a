"""The contract: names, parameters, order and defaults, and what the pure functions decide."""

import ast
import doctest
import importlib
import inspect
import pkgutil

import pytest

import hfpp
import hfpp.plan
from hfpp import functional

# As the contract writes them. hfpp may add keyword-only parameters with defaults at the end.
CONTRACT = """
stage_ids_this_rank(pp_rank, pp_size, num_stages, style="loop")
stage_ids_by_rank(pp_size, num_stages, style="loop")
generate_hf_model_fqn_per_model_part(num_stages, num_layers, include_embeddings=True, include_lm_head=True, include_rotary_emb=True, include_multimodal_encoders=True, extra_module_fqns=None, fqn_prefix="model.", lm_head_fqn="lm_head")
calculate_virtual_stages(num_layers, layers_per_stage, pp_size, is_single_stage_schedule, round_to_pp_multiple=None)
_get_hidden_and_vocab_size(model_config)
_precompute_stage_shapes(stages, model_config, microbatch_size, seq_len, tensor_dtype=None)
reset_pp_stage_shapes(schedule, stages, model_config, microbatch_size, seq_len, tensor_dtype=None)
split_model_into_stages(model, pp_mesh, pp_axis_name, pp_schedule, device, module_names_per_stage=None, layers_per_stage=None, patch_inner_model=True, patch_causal_lm_model=True, round_to_pp_multiple=None)
build_pipeline_schedule(pipeline_parallel_schedule_csv, pipeline_parallel_schedule, microbatch_size, local_batch_size, stages, loss_fn, scale_grads=False)
scale_grads_by_divisor(stages, divisor)
causal_lm_loss(logits, labels, num_items=None)
pipeline_model(model, world_mesh, moe_mesh, *, pp_axis_name, dp_axis_names, cp_axis_name=None, tp_axis_name=None, ep_axis_name=None, ep_shard_axis_names=None, layers_per_stage, pipeline_parallel_schedule_csv, pipeline_parallel_schedule, microbatch_size, local_batch_size, device, loss_fn=None, parallelize_fn=None, module_fqns_per_model_part=None, patch_inner_model=True, patch_causal_lm_model=True, scale_grads=False, round_to_pp_multiple=None, patch_stage_backward_maybe_with_nosync=False, seq_len=None, reduce_grad_per_microbatch=False, tensor_dtype=None)
ParallelizeFnProtocol.__call__(self, model, world_mesh, moe_mesh, *, dp_axis_names, cp_axis_name=None, tp_axis_name=None, ep_axis_name=None, ep_shard_axis_names=None)
"""  # noqa: E501

ADDED = {
    "split_model_into_stages": ["pipeline_parallel_schedule_csv"],
    "pipeline_model": ["verify", "plan", "partition", "costs"],
}


def written(signature: str) -> tuple[str, list[tuple]]:
    """A contract line as (name, [(parameter, keyword-only, default)])."""
    name, _, parameters = signature.partition("(")
    arguments = ast.parse(f"def f({parameters}: pass").body[0].args
    none = inspect.Parameter.empty
    defaults = [none] * (len(arguments.args) - len(arguments.defaults)) + [
        ast.literal_eval(default) for default in arguments.defaults
    ]
    kw_defaults = [
        none if default is None else ast.literal_eval(default) for default in arguments.kw_defaults
    ]
    return name, [
        *((a.arg, False, d) for a, d in zip(arguments.args, defaults, strict=True)),
        *((a.arg, True, d) for a, d in zip(arguments.kwonlyargs, kw_defaults, strict=True)),
    ]


def implemented(name: str) -> list[tuple]:
    """The same of the function that is there."""
    function = functional
    for part in name.split("."):
        function = getattr(function, part)
    return [
        (p.name, p.kind is inspect.Parameter.KEYWORD_ONLY, p.default)
        for p in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize("line", CONTRACT.split("\n")[1:-1], ids=lambda line: line.split("(")[0])
def test_signature_is_the_contracts(line):
    name, expected = written(line)
    actual = implemented(name)
    assert actual[: len(expected)] == expected
    added = actual[len(expected) :]
    assert [parameter for parameter, _, _ in added] == ADDED.get(name, [])
    assert all(keyword and default is None for _, keyword, default in added)


def test_signature_check_trips_on_planted_faults():
    line = "stage_ids_this_rank(pp_rank, pp_size, num_stages, style='loop')"
    assert written(line)[1] == implemented("stage_ids_this_rank")
    for fault in (
        line.replace("'loop'", "'v'"),
        line.replace("pp_rank, ", ""),
        line.replace("(", "(*,"),
    ):
        assert written(fault)[1] != implemented("stage_ids_this_rank")


def test_public_functions_are_at_the_top_level():
    for name in functional.__all__:
        assert getattr(hfpp, name) is getattr(functional, name)
    assert not [name for name in functional.__all__ if name.startswith("_")]


RUNTIME_HOMES = {
    "_precompute_stage_shapes": "stage_shapes.precompute_stage_shapes",
    "reset_pp_stage_shapes": "stage_shapes.reset_pp_stage_shapes",
    "split_model_into_stages": "split_model.split_model_into_stages",
    "build_pipeline_schedule": "build_schedule.build_pipeline_schedule",
    "scale_grads_by_divisor": "gradients.scale_grads_by_divisor",
    "clip_grad_norm_": "gradients.clip_grad_norm_",
    "causal_lm_loss": "loss.causal_lm_loss",
    "pipeline_model": "pipeline.pipeline_model",
}


@pytest.mark.parametrize("name", RUNTIME_HOMES)
def test_the_runtime_takes_the_same_parameters(name):
    """In the same order; what it takes beyond that is optional."""
    module, _, home = RUNTIME_HOMES[name].partition(".")
    function = getattr(importlib.import_module(f"hfpp.runtime.{module}"), home)
    behind = [
        (p.name, p.kind is inspect.Parameter.KEYWORD_ONLY, p.default)
        for p in inspect.signature(function).parameters.values()
    ]
    expected = implemented(name)
    assert behind[: len(expected)] == expected
    for _, keyword, default in behind[len(expected) :]:
        assert keyword
        assert default is not inspect.Parameter.empty


# ---- docstrings


def documented_functions():
    return [
        getattr(functional, name)
        for name in dir(functional)
        if inspect.isfunction(getattr(functional, name))
    ]


@pytest.mark.parametrize("function", documented_functions(), ids=lambda f: f.__name__)
def test_docstrings_are_complete(function):
    text = inspect.getdoc(function)
    parameters = inspect.signature(function).parameters
    for section in ("Args:", "Raises:", "Example:"):
        assert section in text, f"{section} is missing"
    if inspect.signature(function).return_annotation != "None":
        assert "Returns:" in text
    arguments = text.split("Args:")[1].split("\n\n")[0]
    described = [
        line.strip().split(":")[0]
        for line in arguments.splitlines()
        if line.startswith("    ") and not line.startswith("     ")
    ]
    assert described == list(parameters)


def modules_with_examples():
    plan = [f"hfpp.plan.{module.name}" for module in pkgutil.iter_modules(hfpp.plan.__path__)]
    return ["hfpp", "hfpp.errors", "hfpp.functional", *plan]


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstring_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_examples_are_found_and_can_fail():
    assert doctest.testmod(functional).attempted > 10
    runner = doctest.DocTestRunner(verbose=False)
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "planted", None, 0)
    assert runner.run(wrong, out=lambda text: None).failed == 1


# ---- the pure functions behind their contract names; tests/plan covers them in depth


def test_pure_functions():
    assert hfpp.stage_ids_this_rank(1, 4, 12) == (1, 5, 9)
    assert hfpp.stage_ids_this_rank(3, 4, 8, style="v") == (3, 4)
    assert hfpp.stage_ids_by_rank(2, 4, "v").row(0) == (0, 3)
    assert hfpp.ranks_by_stage(2, 4, "v").row() == (0, 1, 1, 0)
    assert hfpp.calculate_virtual_stages(32, 5, 4, False, "up") == (8, 2)
    names = hfpp.generate_hf_model_fqn_per_model_part(
        2, 4, False, False, False, False, ["a.b"], "net.", "out"
    )
    assert names == [
        ["a.b", "net.layers.0", "net.layers.1"],
        ["net.layers.2", "net.layers.3", "net.norm"],
    ]
    names = hfpp.generate_hf_model_fqn_per_model_part(
        1, 1, include_multimodal_encoders=False, fqn_prefix="", lm_head_fqn="out"
    )
    assert names == [["embed_tokens", "layers.0", "norm", "out", "rotary_emb"]]


def test_existing_code_may_catch_either_error():
    for kind in (ValueError, AssertionError):
        with pytest.raises(kind, match=r"num_stages \(6\)"):
            hfpp.stage_ids_this_rank(0, 4, 6)
