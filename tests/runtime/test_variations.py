"""What people run besides a plain causal LM: other heads, kernels, autocast, compilers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.attention import flex_attention
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hfpp import PipelineConfigError
from hfpp.runtime.stage_boundary import own_layers
from tests.models import config_of, padding_mask, relative_error, token_ids
from tests.ranks import run_ranks
from tests.runtime.real_pipelines import (
    MICROBATCHES,
    ROWS,
    SEQ,
    TOLERANCE,
    build,
    data_and_pipeline_mesh,
    split,
)

LABELS = 3


class JoinedAnswers(nn.Module):
    """A question-answering model whose two results are one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        result = self.model(*args, **kwargs)
        return torch.stack((result.start_logits, result.end_logits), -1)


def model_of(auto: Any, family: str = "llama", **changes: Any) -> Any:
    # dropout is random, and a classifier takes the last token that is no padding
    changes = {"num_labels": LABELS, "classifier_dropout": 0.0, "pad_token_id": 0, **changes}
    torch.manual_seed(0)
    return auto.from_config(config_of(family, **changes)).double()


def joined_answers() -> nn.Module:
    return JoinedAnswers(model_of(AutoModelForQuestionAnswering))


def checkpointed_before() -> Any:
    model = model_of(AutoModelForCausalLM)
    model.gradient_checkpointing_enable()
    return model


def wrapped_before() -> Any:
    model = model_of(AutoModelForCausalLM)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "causal": partial(model_of, AutoModelForCausalLM),
    "two layers": partial(model_of, AutoModelForCausalLM, num_hidden_layers=2),
    "sequences": partial(model_of, AutoModelForSequenceClassification),
    "sequences, gpt2": partial(model_of, AutoModelForSequenceClassification, "gpt2"),
    "tokens": partial(model_of, AutoModelForTokenClassification, "qwen2"),
    "answers": joined_answers,
    "base": partial(model_of, AutoModel),
    "base, gpt2": partial(model_of, AutoModel, "gpt2"),
    "eager": partial(model_of, AutoModelForCausalLM, attn_implementation="eager"),
    "sdpa": partial(model_of, AutoModelForCausalLM, attn_implementation="sdpa"),
    "checkpointed": checkpointed_before,
    "checkpoint_wrapper": wrapped_before,
}


def primary(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def any_loss(output: Tensor, ids: Tensor) -> Tensor:
    """Of whatever a head gives, against numbers that depend on the token ids."""
    if output.shape[-1] != LABELS:
        return (output * (ids % 5).reshape(*ids.shape, 1)).sin().mean()
    if output.dim() == 2:
        return nn.functional.cross_entropy(output, ids[:, 0] % LABELS)
    return nn.functional.cross_entropy(output.reshape(-1, LABELS), (ids % LABELS).reshape(-1))


def batch() -> tuple[Tensor, Tensor]:
    ids, mask = token_ids(ROWS, SEQ), padding_mask(ROWS, SEQ)
    return ids * mask, mask


def plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


class Unsplit:
    """Gradients, and losses by microbatch, of the unsplit model."""

    def __init__(self, model: nn.Module, around: Callable[[], Any] = nullcontext) -> None:
        ids, mask = batch()
        self.losses = []
        with around():
            for rows, kept in zip(ids.chunk(MICROBATCHES), mask.chunk(MICROBATCHES), strict=True):
                found = any_loss(primary(model(rows, attention_mask=kept, use_cache=False)), rows)
                found.backward()
                self.losses.append(found.item())
        self.gradients = {plain(name): p.grad for name, p in model.named_parameters()}

    def differs(self, pipeline: Any, around: Callable[[], Any] = nullcontext) -> list[str]:
        """One step of the pipeline, and what is wrong with it."""
        ids, mask = batch()
        losses: list[Tensor] = []
        with around():
            pipeline.schedule.step(
                *((ids,) if pipeline.has_first_stage else ()),
                target=ids if pipeline.has_last_stage else None,
                losses=losses,
                attention_mask=mask,
            )
        wrong = []
        if pipeline.has_last_stage:
            pairs = zip(losses, self.losses, strict=True)
            wrong += [f"loss {f} not {w}" for f, w in pairs if abs(f.item() - w) > TOLERANCE]
        for part in pipeline.model_parts:
            for name, parameter in part.named_parameters():
                wanted = self.gradients[plain(name)]
                if (wanted is None) != (parameter.grad is None):
                    wrong.append(f"{name}: gradient {parameter.grad is not None}")
                elif wanted is not None and relative_error(parameter.grad, wanted) > TOLERANCE:
                    wrong.append(f"{name}: off by {relative_error(parameter.grad, wanted):.1e}")
        return wrong


def trained(rank: int, world_size: int, cases: list[tuple[str, str]]) -> list[str]:
    mesh = data_and_pipeline_mesh(world_size)
    wrong = []
    for which, schedule in cases:
        expected = Unsplit(MODELS[which]())
        pipeline = build(MODELS[which](), mesh, schedule, loss_fn=any_loss, copy_model=False)
        wrong += [f"{which}, {schedule}: {what}" for what in expected.differs(pipeline)]
    return wrong


def test_heads_and_models_without_one() -> None:
    cases = [
        ("sequences", "1F1B"),
        ("sequences, gpt2", "InterleavedZeroBubble"),
        ("tokens", "ZBVZeroBubble"),
        ("answers", "1F1B"),
        ("base", "Interleaved1F1B"),
        ("base, gpt2", "DualPipeV"),
    ]
    assert run_ranks(trained, 2, args=(cases,)) == [[], []]


def test_several_results_are_refused_by_name() -> None:
    model = model_of(AutoModelForQuestionAnswering)
    rule = r"LlamaForQuestionAnswering returns several tensors \(start_logits, end_logits\)"
    with pytest.raises(PipelineConfigError, match=rule):
        split(model, 2)


def test_attention_kernels() -> None:
    cases = [("eager", "1F1B"), ("sdpa", "ZBVZeroBubble")]
    assert run_ranks(trained, 2, args=(cases,)) == [[], []]


def note_call(calls: Counter[nn.Module], module: nn.Module, _: Any) -> None:
    calls[module] += 1


def recomputed(
    rank: int, world_size: int, cases: list[tuple[str, str]]
) -> list[tuple[list[str], set[int]]]:
    """By case: what is wrong, and how often layers of this rank ran."""
    mesh = data_and_pipeline_mesh(world_size)
    results = []
    for which, schedule in cases:
        expected = Unsplit(MODELS[which]())
        pipeline = build(MODELS[which](), mesh, schedule, loss_fn=any_loss)
        calls: Counter[nn.Module] = Counter()
        for part in pipeline.model_parts:
            for layer in own_layers(part):
                layer.self_attn.register_forward_pre_hook(partial(note_call, calls))
        wrong = expected.differs(pipeline)
        results.append((wrong, set(calls.values())))
    return results


def test_checkpoints_made_before_the_split() -> None:
    """Every layer runs once more for its backward, and not once more for each of its weights."""
    cases = [
        ("checkpointed", "1F1B"),
        ("checkpointed", "ZBVZeroBubble"),
        ("checkpoint_wrapper", "InterleavedZeroBubble"),
    ]
    twice = ([], {2 * MICROBATCHES})
    assert run_ranks(recomputed, 2, args=(cases,)) == [[twice] * len(cases)] * 2


# Flex attention: torch has no backward for it on the CPU, and compiling its forward takes minutes


def flex_forward(rank: int, world_size: int) -> float:
    """How far a pipeline's outputs are from the unsplit model's; compiled nowhere."""
    flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    with torch._dynamo.config.patch(disable=True):
        model = model_of(AutoModelForCausalLM, attn_implementation="flex_attention").float()
        ids, mask = batch()
        with torch.no_grad():
            wanted = model(ids, attention_mask=mask).logits
        pipeline = build(model, data_and_pipeline_mesh(world_size), "1F1B")
        found = pipeline.schedule.eval(
            *((ids,) if pipeline.has_first_stage else ()), attention_mask=mask
        )
    if not pipeline.has_last_stage:
        return 0.0
    return relative_error(found[mask.bool()], wanted[mask.bool()])


def test_flex_attention_forward() -> None:
    assert max(run_ranks(flex_forward, 2)) < 1e-5


# Autocast


def autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def autocasted(rank: int, world_size: int) -> tuple[list[str], bool]:
    """What is wrong, and whether autocast changed anything."""
    mesh = data_and_pipeline_mesh(world_size)
    wrong = []
    model = model_of(AutoModelForCausalLM).float()
    expected = Unsplit(model_of(AutoModelForCausalLM).float(), autocast)
    for schedule in ("1F1B", "ZBVZeroBubble"):
        pipeline = build(model, mesh, schedule, loss_fn=any_loss)
        wrong += [f"{schedule}: {what}" for what in expected.differs(pipeline, autocast)]
    return wrong, Unsplit(model_of(AutoModelForCausalLM).float()).losses != expected.losses


def test_autocast_around_the_step() -> None:
    assert run_ranks(autocasted, 2) == [([], True)] * 2


# torch.compile, with the backend that generates no code; a graph break is an error (fullgraph)


def compile_in_place(part: Any, *_: Any, **__: Any) -> None:
    for layer in own_layers(part):
        layer.compile(backend="aot_eager", fullgraph=True)


def compile_by_wrapping(part: Any, *_: Any, **__: Any) -> None:
    for index in part.__dict__["_hfpp_boundary"].layers:
        layer = part.model.layers[index]
        part.model.layers[index] = torch.compile(layer, backend="aot_eager", fullgraph=True)


def compiled_before() -> Any:
    model = MODELS["two layers"]()
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="aot_eager", fullgraph=True)
    return model


def compiled(
    rank: int, world_size: int, cases: list[tuple[str, str]]
) -> list[tuple[list[str], int, int]]:
    """By case: what is wrong, graphs made on the first step, and on a second one."""
    torch.set_num_threads(1)
    mesh = data_and_pipeline_mesh(world_size)
    after = {"in place": compile_in_place, "wrapping": compile_by_wrapping, "before": None}
    results = []
    for when, schedule in cases:
        torch._dynamo.reset()
        counters.clear()
        which = "causal" if when == "in place" else "two layers"
        expected = Unsplit(MODELS[which]())
        model = compiled_before() if when == "before" else MODELS[which]()
        pipeline = build(model, mesh, schedule, loss_fn=any_loss, parallelize_fn=after[when])
        wrong = expected.differs(pipeline)
        graphs = counters["stats"]["unique_graphs"]
        for part in pipeline.model_parts:
            part.zero_grad()
        wrong += expected.differs(pipeline)
        again = counters["stats"]["unique_graphs"] - graphs
        wrong += [f"{when}, {schedule}: graph break {what}" for what in counters["graph_break"]]
        results.append((wrong, graphs, again))
    return results


def test_compiled_layers() -> None:
    """One graph for all layers of a kind, and one for the layer that takes what was received."""
    cases = [
        ("in place", "1F1B"),
        ("wrapping", "1F1B"),
        ("before", "1F1B"),
        ("in place", "InterleavedZeroBubble"),
    ]
    for results in run_ranks(compiled, 2, args=(cases,), timeout_s=180):
        for case, (wrong, graphs, again) in zip(cases, results, strict=True):
            assert (wrong, again) == ([], 0), case
            assert 1 <= graphs <= 2, case


def told(rank: int, world_size: int) -> tuple[str, list[str]]:
    """The refusal of layers that were wrapped, and what is logged of the whole backward."""
    mesh = data_and_pipeline_mesh(world_size)
    with pytest.raises(PipelineConfigError) as refusal:
        build(MODELS["causal"](), mesh, "ZBVZeroBubble", parallelize_fn=compile_by_wrapping)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("hfpp").addHandler(handler)
    build(MODELS["causal"](), mesh, "ZBVZeroBubble", parallelize_fn=compile_in_place)
    return str(refusal.value), [r.getMessage() for r in records if r.levelno == logging.WARNING]


def test_what_compilation_cannot_do_is_told() -> None:
    for refusal, warnings in run_ranks(told, 2):
        assert "ZBVZeroBubble" in refusal
        assert "layer.compile()" in refusal
        assert len(warnings) == 2
        assert all("whose backward is of one piece: ZBVZeroBubble" in text for text in warnings)
