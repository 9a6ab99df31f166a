"""Frozen stages: right gradients, and no message or backward where the unsplit model has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from hfpp import PipelineConfigError, reset_pp_stage_shapes
from hfpp.runtime import controlled_schedule, needed_gradients
from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.runtime.real_pipelines import (
    MICROBATCHES,
    ROWS,
    SCHEDULES,
    SEQ,
    SINGLE,
    batches,
    build,
    data_and_pipeline_mesh,
    loss,
    step,
    tiny_llama,
    unsplit_gradients,
    wrong_gradients,
)

HIDDEN = 32
BYTES = ROWS * SEQ * HIDDEN * 8  # of the hidden states of a batch, in float64

START = ("model.embed_tokens.", "model.layers.0.")
END = ("model.layers.3.", "model.norm.", "lm_head.")
FROZEN: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "the first stage": (*START, "model.layers.1."),
    "all but the last layer": (*START, "model.layers.1.", "model.layers.2.", "model.norm."),
    "the middle": ("model.layers.1.", "model.layers.2."),
    "the last stage": ("model.layers.2.", *END),
    "all but the head": ("model.",),
}
FIRST_TRAINED = dict(zip(FROZEN, (0, 2, 3, 0, 0, 4), strict=True))
"""The layer; 4: none."""


def freeze(module: nn.Module, prefixes: tuple[str, ...]) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(prefixes))


def frozen_llama(which: str) -> Any:
    model = tiny_llama()
    freeze(model, FROZEN[which])
    return model


@contextmanager
def counted_backward(module: nn.Module) -> Iterator[dict[int, int]]:
    """Fills up with how often the gradient of each layer's output was computed."""
    counts: dict[int, int] = {}

    def see(index: int, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: counts.update({index: counts.get(index, 0) + 1}))

    def hook(index: int) -> Callable[..., None]:
        return lambda _module, _args, output: see(index, output)

    layers = next(m for n, m in module.named_modules() if n.endswith("model.layers"))
    handles = [
        layer.register_forward_hook(hook(index))
        for index, layer in enumerate(layers.children())
        if list(layer.parameters())
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def counted_bytes(stages: list[Any]) -> Iterator[list[int]]:
    """Fills up with the sizes of all messages of this rank's stages."""
    sent: list[int] = []

    def counting(get: Callable[[int], list[dist.P2POp]]) -> Callable[[int], list[dist.P2POp]]:
        def counted(microbatch: int) -> list[dist.P2POp]:
            ops = get(microbatch)
            sent.extend(op.tensor.nbytes for op in ops)
            return ops

        return counted

    names = ("get_fwd_send_ops", "get_bwd_send_ops")
    for stage in stages:
        for name in names:
            setattr(stage, name, counting(getattr(stage, name)))
    try:
        yield sent
    finally:
        for stage in stages:
            for name in names:
                delattr(stage, name)


def counted_step(pipeline: Any, mesh: Any, ids: Tensor) -> tuple[dict[int, int], int]:
    """One step; the layers whose backward ran and how often, and the bytes sent."""
    with ExitStack() as contexts:
        sent = contexts.enter_context(counted_bytes(pipeline.stages))
        counts = [contexts.enter_context(counted_backward(part)) for part in pipeline.model_parts]
        step(pipeline, mesh, ids)
    return {layer: count for found in counts for layer, count in found.items()}, sum(sent)


Case = tuple[str, str, bool]  # what is frozen, schedule, whether shapes are given


def train(
    rank: int, world_size: int, cases: list[Case], fault: bool = False
) -> list[tuple[list[str], dict[int, int], int]]:
    """By case: wrong gradients, layers whose backward ran and how often, bytes sent.

    The fault: nobody agrees on what is needed.
    """
    mesh, ids = data_and_pipeline_mesh(world_size), batches()[0]
    expected = {which: unsplit_gradients(frozen_llama(which), batches()) for which, _, _ in cases}
    if fault:
        controlled_schedule.agree_on_gradients = lambda _stages: None
    results = []
    for which, schedule, static in cases:
        pipeline = build(frozen_llama(which), mesh, schedule, seq_len=SEQ if static else None)
        step(pipeline, mesh, ids)  # on which torch may infer shapes
        wrong = wrong_gradients(pipeline.model_parts, expected[which])
        results.append((wrong, *counted_step(pipeline, mesh, ids)))
    return results


def needed_bytes(which: str, schedule: str) -> int:
    """Hidden states over every cut between ranks, gradients over those behind what is trained."""
    layers_per_stage = 2 if schedule in SINGLE else 1
    num_stages = 4 // layers_per_stage
    first = min(FIRST_TRAINED[which] // layers_per_stage, num_stages - 1)
    local = {2} if schedule in ("ZBVZeroBubble", "DualPipeV") else set()  # of a V
    cuts = set(range(1, num_stages)) - local
    return BYTES * (len(cuts) + sum(cut > first for cut in cuts))


def check(cases: list[Case]) -> None:
    one, other = run_ranks(train, 2, args=(cases,), timeout_s=120)
    for (which, schedule, _), mine, theirs in zip(cases, one, other, strict=True):
        assert mine[0] + theirs[0] == [], (which, schedule)
        layers = {**mine[1], **theirs[1]}
        assert layers == dict.fromkeys(range(FIRST_TRAINED[which], 4), MICROBATCHES), schedule
        assert mine[2] + theirs[2] == needed_bytes(which, schedule), (which, schedule)


def test_the_layers_counted_are_those_of_the_unsplit_model() -> None:
    for which, first in FIRST_TRAINED.items():
        model, ids = frozen_llama(which), batches()[0]
        with counted_backward(model) as counts:
            loss(model(ids).logits, ids).backward()
        assert counts == dict.fromkeys(range(first, 4), 1), which


def test_no_gradient_is_computed_or_sent_where_none_is_needed() -> None:
    check(
        [("the first stage", schedule, True) for schedule in SCHEDULES]
        + [("all but the last layer", schedule, False) for schedule in SCHEDULES]
    )


def test_gradients_pass_through_frozen_stages() -> None:
    cases = [
        ("the middle", "1F1B", True),
        ("the middle", "InterleavedZeroBubble", True),
        ("the middle", "DualPipeV", False),
        ("the last stage", "Interleaved1F1B", True),
        ("the last stage", "ZBVZeroBubble", True),
        ("all but the head", "GPipe", False),
        ("all but the head", "ZBVZeroBubble", True),
        ("nothing", "LoopedBFS", True),
    ]
    check(cases)


def test_needless_gradients_are_seen() -> None:
    case = ("the first stage", "1F1B", True)
    one, other = (result[0] for result in run_ranks(train, 2, args=([case], True)))
    assert one[0] + other[0] == []
    assert one[2] + other[2] > needed_bytes(*case[:2])


# Several values at a boundary, sharded stages


def freeze_first_layers(module: nn.Module, count: int) -> None:
    """Embeddings and the first layers."""
    own = tuple(f"model.layers.{index}." for index in range(count))
    for name, parameter in module.named_parameters():
        inside = name.startswith("model.layers.") and not name.startswith(own)
        parameter.requires_grad_(inside or name.startswith(("model.norm.", "lm_head.")))


def several_values(rank: int, world_size: int) -> list[str]:
    mesh, ids = data_and_pipeline_mesh(world_size), batches()[0]
    wrong = []
    for family, schedules in (
        ("gemma3n_text", ("1F1B", "InterleavedZeroBubble")),
        ("zamba2", ("ZBVZeroBubble",)),
    ):
        model = tiny_model(family)
        freeze_first_layers(model, 3)
        expected = unsplit_gradients(model, batches())
        for schedule in schedules:
            pipeline = build(model, mesh, schedule)
            _, sent = counted_step(pipeline, mesh, ids)
            found = wrong_gradients(pipeline.model_parts, expected)
            if pipeline.has_last_stage and schedule == "1F1B" and sent:
                found.append(f"{sent} bytes of gradients sent")
            wrong += [f"{family} {schedule} {what}" for what in found]
    return wrong


def test_several_values_at_a_boundary() -> None:
    assert run_ranks(several_values, 2) == [[], []]


def shard(part: Any, world_mesh: Any, moe_mesh: Any, **_: Any) -> None:
    for layer in part.model.layers:
        fully_shard(layer, mesh=world_mesh["dp"])
    fully_shard(part, mesh=world_mesh["dp"])


def sharded(rank: int, world_size: int) -> list[str]:
    mesh, ids = data_and_pipeline_mesh(world_size), batches(2)
    wrong = []
    for which, schedule, reduce_each in (
        ("the first stage", "1F1B", True),
        ("the first stage", "Interleaved1F1B", False),
        ("the first stage", "ZBVZeroBubble", False),
        ("the last stage", "ZBVZeroBubble", False),
    ):
        model = frozen_llama(which)
        expected = unsplit_gradients(model, ids, replicas=2)
        pipeline = build(
            model, mesh, schedule, parallelize_fn=shard, reduce_grad_per_microbatch=reduce_each
        )
        for one in ids:
            step(pipeline, mesh, one)
        found = wrong_gradients(pipeline.model_parts, expected)
        wrong += [f"{which} {schedule} {what}" for what in found]
    return wrong


def test_frozen_stages_are_sharded() -> None:
    assert run_ranks(sharded, 4) == [[]] * 4


# Changes after the build


def changed(rank: int, world_size: int) -> tuple[list[str], list[str]]:
    """What is wrong, and what refused a stage that wants gradients again, on this rank."""
    mesh, ids = data_and_pipeline_mesh(world_size), batches()[0]
    wanted = {which: unsplit_gradients(frozen_llama(which), batches()) for which in FROZEN}
    wrong, refusals = [], []

    def train(pipeline: Any, which: str) -> None:
        for part in pipeline.model_parts:
            freeze(part, FROZEN[which])
            part.zero_grad()
        step(pipeline, mesh, ids)
        found = wrong_gradients(pipeline.model_parts, wanted[which])
        wrong.extend(f"{type(pipeline.schedule).__name__}, {which}: {what}" for what in found)

    def reset(pipeline: Any) -> None:
        reset_pp_stage_shapes(pipeline.schedule, pipeline.stages, None, ROWS // MICROBATCHES, SEQ)

    for schedule in ("1F1B", "InterleavedZeroBubble"):
        pipeline = build(tiny_llama(), mesh, schedule)
        train(pipeline, "the last stage")  # frozen after the build
        train(pipeline, "all but the last layer")  # frozen between two steps
        reset(pipeline)
        train(pipeline, "all but the last layer")
        for part in pipeline.model_parts:
            freeze(part, ())
        try:
            needed_gradients.check_nothing_thawed(pipeline.stages)
        except PipelineConfigError as error:
            refusals.append(str(error))
        reset(pipeline)
        train(pipeline, "nothing")
    return wrong, refusals


def test_what_is_frozen_changes_after_the_build() -> None:
    (wrong, refusals), (other_wrong, other_refusals) = run_ranks(changed, 2)
    assert wrong + other_wrong == []
    assert ["reset_pp_stage_shapes" in text for text in refusals] == [True, True]
    assert len(other_refusals) == 1  # its one stage of 1F1B was trained all along


def thawed(rank: int, world_size: int) -> str:
    """The error of a step after the frozen first stage was thawed."""
    mesh, ids = data_and_pipeline_mesh(world_size), batches()[0]
    pipeline = build(frozen_llama("the first stage"), mesh, "1F1B")
    step(pipeline, mesh, ids)
    if pipeline.has_first_stage:
        freeze(pipeline.model_parts[0], ())
        with pytest.raises(PipelineConfigError, match=r"stage 0 has parameters with requires_grad"):
            step(pipeline, mesh, ids)
    return "raised" if pipeline.has_first_stage else "not affected"


def test_a_thawed_stage_is_refused() -> None:
    assert run_ranks(thawed, 2) == ["raised", "not affected"]


def all_frozen(rank: int, world_size: int) -> str:
    mesh, ids = data_and_pipeline_mesh(world_size), batches()[0]
    model = tiny_llama().requires_grad_(False)
    pipeline = build(model, mesh, "1F1B")
    with pytest.raises(PipelineConfigError, match="would train nothing") as refusal:
        step(pipeline, mesh, ids)
    target = ids if pipeline.has_last_stage else None
    losses: list[Tensor] = []
    pipeline.schedule.eval(
        *((ids,) if pipeline.has_first_stage else ()), target=target, losses=losses
    )
    assert len(losses) == (MICROBATCHES if pipeline.has_last_stage else 0)
    return str(refusal.value)


def test_nothing_to_train_is_refused_on_all_ranks() -> None:
    one, other = run_ranks(all_frozen, 2)
    assert one == other
