"""Vision-language models cut into stages, with real pixels: the same as the unsplit model."""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfpp import PipelineConfigError, pipeline_model
from hfpp.runtime.anatomy import Anatomy
from hfpp.runtime.find_anatomy import find_anatomy
from hfpp.runtime.input_kinds import feature_lengths
from hfpp.runtime.pipeline import Pipeline
from hfpp.runtime.split_keywords import split_keywords
from tests.models import relative_error
from tests.ranks import run_ranks
from tests.runtime.real_pipelines import TOLERANCE, data_and_pipeline_mesh, split, wrong_gradients
from tests.vision_models import (
    FAMILIES,
    IMAGE,
    SEQ,
    VIDEO,
    microbatch,
    tiny_vision_model,
    token_loss,
    unsplit_loss,
    vision_batch,
)

MICROBATCHES = 2
Batch = tuple[Tensor, dict[str, Tensor], tuple[int, ...]]  # ids, keyword arguments, image counts


@cache
def model_of(name: str) -> PreTrainedModel:
    return tiny_vision_model(name)


@cache
def anatomy_of(name: str) -> Anatomy:
    return find_anatomy(model_of(name))


def batches_of(name: str) -> list[Batch]:
    """With images; without; left-padded with as many images, dealt otherwise."""
    counts = FAMILIES[name].counts
    text = vision_batch(name, counts, seed=1)[0].clamp(max=IMAGE - 1)
    turned = counts[::-1]
    return [
        (*vision_batch(name, counts), counts),
        (text, {}, ()),
        (*vision_batch(name, turned, seed=2, left_padded=True), turned),
    ]


def microbatches(name: str, batch: Batch) -> list[tuple[Tensor, dict[str, Tensor]]]:
    ids, kwargs, counts = batch
    if not kwargs:
        return [(rows, {}) for rows in ids.chunk(MICROBATCHES)]
    size = len(ids) // MICROBATCHES
    rows = [slice(i * size, (i + 1) * size) for i in range(MICROBATCHES)]
    return [microbatch(name, counts, ids, kwargs, part) for part in rows]


def unsplit(name: str) -> tuple[dict[str, Tensor | None], list[Tensor]]:
    """Gradients of all batches, and the logits of each batch."""
    model = copy.deepcopy(model_of(name))
    logits = []
    for batch in batches_of(name):
        found = []
        for ids, kwargs in microbatches(name, batch):
            found.append(model(ids, **kwargs, use_cache=False).logits)
            token_loss(found[-1], ids).backward()
        logits.append(torch.cat(found).detach())
    return {n: p.grad for n, p in model.named_parameters(remove_duplicate=False)}, logits


def run_chain(stages: list[nn.Module], ids: Tensor, kwargs: dict[str, Tensor]) -> Any:
    values: Any = (ids,)
    for stage in stages:
        result = stage(*values, **kwargs, **({"input_ids": ids} if kwargs else {}))
        values = result if isinstance(result, tuple) else (result,)
    return values[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_in_a_row_equal_the_unsplit_model(name: str) -> None:
    wanted, logits = unsplit(name)
    stages = split(copy.deepcopy(model_of(name)), 2 if name == "qwen3_vl" else 3)
    for batch, want in zip(batches_of(name), logits, strict=True):
        found = []
        for ids, kwargs in microbatches(name, batch):
            found.append(run_chain(stages, ids, kwargs))
            token_loss(found[-1], ids).backward()
        assert relative_error(torch.cat(found), want) < TOLERANCE
    assert wrong_gradients(stages, wanted) == []
    assert sum(g is not None for n, g in wanted.items() if "vision" in n or "visual" in n) > 4


# Over processes


def _build(name: str, schedule: str, static: bool, world_size: int) -> Pipeline:
    mesh = data_and_pipeline_mesh(world_size, world_size)
    return pipeline_model(
        copy.deepcopy(model_of(name)),
        mesh,
        None,
        pp_axis_name="pp",
        dp_axis_names=("dp",),
        layers_per_stage=None,
        pipeline_parallel_schedule_csv=None,
        pipeline_parallel_schedule=schedule,
        microbatch_size=2,
        local_batch_size=2 * MICROBATCHES,
        device=torch.device("cpu"),
        loss_fn=token_loss,
        seq_len=SEQ if static else None,
    )


def _step(pipeline: Pipeline, ids: Tensor, kwargs: dict[str, Tensor], **options: Any) -> Any:
    run = pipeline.schedule.eval if options.pop("eval", False) else pipeline.schedule.step
    return run(
        *((ids,) if pipeline.has_first_stage else ()),
        target=ids if pipeline.has_last_stage else None,
        **kwargs,
        **options,
    )


def _equals_unsplit(
    rank: int, world_size: int, names: list[str], schedule: str, static: bool
) -> list[str]:
    wrong = []
    for name in names:
        wanted, logits = unsplit(name)
        pipeline = _build(name, schedule, static, world_size)
        for index, (batch, want) in enumerate(zip(batches_of(name), logits, strict=True)):
            outputs = [_step(pipeline, *batch[:2])]
            if index < 2 and not (static and schedule == "GPipe" and name != "mllama"):
                outputs.append(_step(pipeline, *batch[:2], eval=True))
            if pipeline.has_last_stage:
                errors = [relative_error(output, want) for output in outputs]
                wrong += [f"{name}: logits off by {e:.1e}" for e in errors if e > TOLERANCE]
        wrong += [f"{name}: {text}" for text in wrong_gradients(pipeline.model_parts, wanted)]
    return wrong


@pytest.mark.parametrize(
    ("schedule", "static", "names", "world_size"),
    [
        ("GPipe", True, sorted(FAMILIES), 2),
        ("Interleaved1F1B", False, ["llava", "mllama", "qwen2_vl"], 2),
        ("ZBVZeroBubble", True, ["idefics3", "mllama"], 2),
        ("1F1B", True, ["llava_onevision"], 1),
    ],
)
def test_a_pipeline_equals_the_unsplit_model(
    schedule: str, static: bool, names: list[str], world_size: int
) -> None:
    found = run_ranks(_equals_unsplit, world_size, args=(names, schedule, static), timeout_s=120)
    assert found == [[]] * world_size


def _refusals(rank: int, world_size: int) -> list[str]:
    """What each rank is told: media on one rank only, a cut inside of deepstack."""
    told = []
    pipeline = _build("llava", "GPipe", True, world_size)
    ids, kwargs = vision_batch("llava")
    for odd in (
        {} if rank else kwargs,
        {**kwargs, "pixel_values": kwargs["pixel_values"][rank:]},
        {**kwargs, "pixel_values": kwargs["pixel_values"][1:]},
        {**kwargs, "attention_mask": torch.ones(3, SEQ)},
    ):
        _step(pipeline, ids, kwargs)
        with pytest.raises(PipelineConfigError) as caught:
            _step(pipeline, ids, odd)
        told.append(str(caught.value))
    deep = _build("qwen3_vl", "Interleaved1F1B", True, world_size)
    with pytest.raises(PipelineConfigError) as caught:
        _step(deep, *vision_batch("qwen3_vl"))
    return [*told, str(caught.value)]


def test_every_rank_is_told_what_is_wrong() -> None:
    first, second = run_ranks(_refusals, 2)
    assert first == second
    missing, shapes, count, mask, deepstack = first
    assert "pixel_values is [4, 3, 8, 8] torch.float64 on rank 0 and missing on rank 1" in missing
    assert "[3, 3, 8, 8]" in shapes
    assert "pixel_values of shape [3, 3, 8, 8]" in count
    assert "attention_mask of shape [3, 32]" in mask
    assert "get_pipeline_kwargs_chunk_dims" in mask
    assert "Qwen3VLForConditionalGeneration cannot be cut before layer 1" in deepstack
    assert "before the layers [2, 3]" in deepstack


# What stages have no use for


def test_later_stages_leave_pixels_out_where_nothing_depends_on_them() -> None:
    """Their encoders are NaN: a run of one would be waste."""
    for name, dropped in (("gemma3", {"pixel_values"}), ("mllama", set())):
        first, second = split(copy.deepcopy(model_of(name)), 2)
        ids, kwargs = microbatches(name, batches_of(name)[0])[0]
        run_chain([first, second], ids, kwargs)
        (kind,) = second.__dict__["_hfpp_kinds"].values()
        assert kind.dropped == dropped
        assert not first.__dict__["_hfpp_kind"].dropped


def videos_with_seconds() -> tuple[Tensor, dict[str, Tensor]]:
    """Qwen2.5-VL, a video per sample; how far apart its frames are is part of all positions."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 80, (2, SEQ), generator=generator)
    ids[:, 1:3] = VIDEO
    return ids, {
        "pixel_values_videos": torch.randn(16, 96, generator=generator, dtype=torch.float64),
        "video_grid_thw": torch.tensor([[2, 2, 2], [2, 2, 2]]),
        "second_per_grid_ts": torch.tensor([1.0, 5.0]),
        "mm_token_type_ids": (ids == VIDEO).long() * 2,
    }


def test_later_stages_leave_pixels_out_beside_floats_that_they_need() -> None:
    model = model_of("qwen2_5_vl")
    ids, kwargs = videos_with_seconds()
    wanted = model(ids, **kwargs, use_cache=False).logits
    stages = split(copy.deepcopy(model), 2)
    pieces = split_keywords(kwargs, 2, batch=2, ids=ids, model=model)
    found = [run_chain(stages, ids[i : i + 1], piece) for i, piece in enumerate(pieces)]
    assert relative_error(torch.cat(found), wanted) < TOLERANCE
    (kind,) = stages[1].__dict__["_hfpp_kinds"].values()
    assert kind.dropped == {"pixel_values_videos"}
    one_second = {**pieces[1], "second_per_grid_ts": torch.ones(1)}
    assert relative_error(run_chain(stages, ids[1:], one_second), wanted[1:]) > TOLERANCE


def test_an_encoder_without_weights_tells_its_dtype() -> None:
    ids, kwargs = videos_with_seconds()
    stages = split(copy.deepcopy(model_of("qwen2_5_vl")), 2)
    run_chain(stages, ids, kwargs)
    assert next(stages[1].model.visual.parameters(), None) is None
    assert stages[1].model.visual.dtype == torch.float64


def test_media_without_ids_on_a_later_stage_are_refused() -> None:
    first, second = split(copy.deepcopy(model_of("llava")), 2)
    ids, kwargs = microbatches("llava", batches_of("llava")[0])[0]
    with pytest.raises(PipelineConfigError, match="pass input_ids by keyword to every stage"):
        second(first(ids, **kwargs), **kwargs)


# Splitting


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_media_follow_their_samples(name: str, turn: int) -> None:
    counts = FAMILIES[name].counts[turn:] + FAMILIES[name].counts[:turn]
    ids, kwargs = vision_batch(name, counts, left_padded=turn == 1)
    features = partial(feature_lengths, anatomy_of(name))
    pieces = split_keywords(kwargs, 2, batch=4, ids=ids, model=model_of(name), features=features)
    for piece, (_, wanted) in zip(pieces, microbatches(name, (ids, kwargs, counts)), strict=True):
        found = {key: value for key, value in piece.items() if value is not None}
        assert set(found) == set(wanted)
        for key, value in found.items():
            assert torch.equal(value, wanted[key]), key


def test_videos_and_images_are_counted_apart() -> None:
    ids, kwargs = vision_batch("qwen2_vl", (1, 0, 2, 1))
    grids = torch.tensor([[2, 2, 2], [1, 4, 4]])
    ids[1, 1:3], ids[2, 20:24] = VIDEO, VIDEO
    videos = torch.randn(8 + 16, 96)
    kwargs |= {"pixel_values_videos": videos, "video_grid_thw": grids}
    first, second = split_keywords(kwargs, 2, batch=4, ids=ids, model=model_of("qwen2_vl"))
    assert torch.equal(first["pixel_values_videos"], videos[:8])
    assert torch.equal(second["pixel_values_videos"], videos[8:])
    assert torch.equal(second["video_grid_thw"], grids[1:])
    assert len(first["image_grid_thw"]) == 1
    assert len(second["image_grid_thw"]) == 3
    alone = {"pixel_values_videos": videos[:8], "video_grid_thw": grids[:1]}
    ids[2, 20:24] = 5
    first, second = split_keywords(alone, 2, batch=4, ids=ids, model=model_of("qwen2_vl"))
    assert second == {"pixel_values_videos": None, "video_grid_thw": None}


def test_seconds_per_grid_follow_their_videos() -> None:
    ids, kwargs = videos_with_seconds()
    ids[0, 3:5], ids[1, 1:3] = VIDEO, 5
    first, second = split_keywords(kwargs, 2, batch=2, ids=ids, model=model_of("qwen2_5_vl"))
    assert torch.equal(first["second_per_grid_ts"], kwargs["second_per_grid_ts"])
    assert second["second_per_grid_ts"] is None


@pytest.mark.parametrize("counts", [(2, 1, 0), (1, 1, 1), (2, 1, 1)])
def test_counts_of_images_are_one_for_each_sample(counts: tuple[int, ...]) -> None:
    ids, kwargs = vision_batch("llava_onevision", counts)
    kwargs["batch_num_images"] = torch.tensor(counts)
    pieces = split_keywords(kwargs, 3, batch=3, ids=ids, model=model_of("llava_onevision"))
    assert [piece["batch_num_images"].tolist() for piece in pieces] == [[n] for n in counts]
    images = [
        0 if piece["pixel_values"] is None else len(piece["pixel_values"]) for piece in pieces
    ]
    assert images == list(counts)


class Declares(nn.Module):
    """Says where the batch is."""

    def get_pipeline_kwargs_chunk_dims(self) -> dict[str, int | None]:
        return {"memory": 1, "table": None, "tasks": 0, "names": None}


def test_arguments_are_cut_where_the_batch_is() -> None:
    memory, table = torch.randn(3, 4, 5), torch.randn(7)
    positions = torch.arange(3 * 4 * 6).reshape(3, 4, 6)
    kwargs = {"memory": memory, "table": table, "position_ids": positions, "flag": True,
              "mask": {"full": torch.ones(4, 1, 6, 6)}, "scale": torch.tensor(2.0)}  # fmt: skip
    first, second = split_keywords(kwargs, 2, batch=4, model=Declares())
    assert torch.equal(first["memory"], memory[:, :2])
    assert torch.equal(second["memory"], memory[:, 2:])
    assert second["table"] is table
    assert torch.equal(second["position_ids"], positions[:, 2:])
    assert second["mask"]["full"].shape == (2, 1, 6, 6)
    assert (first["flag"], float(second["scale"])) == (True, 2.0)


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"cu_seq_lens_q": torch.arange(6)}, r"cu_seq_lens_q of shape \[6\]"),
        ({"position_ids": torch.ones(3, 2, 8)}, r"position_ids of shape \[3, 2, 8\]"),
        ({"memory": torch.ones(4, 3)}, r"memory of shape \[4, 3\].*dimension 1 is the batch"),
        ({"mask": {"full": torch.ones(2, 8)}}, r"mask of shape \[2, 8\]"),
    ],
)
def test_an_argument_that_cannot_be_cut_is_refused(kwargs: dict[str, Any], told: str) -> None:
    with pytest.raises(PipelineConfigError, match=told):
        split_keywords(kwargs, 2, batch=4, model=Declares())


@pytest.mark.parametrize("value", [[0, 1, 2, 3], ("a", "b", "c", "d"), {"of": [0, 1, 2, 3]}])
@pytest.mark.parametrize("batch", [4, 8, None])
def test_a_list_without_tensors_is_cut_only_as_declared(value: Any, batch: int | None) -> None:
    """It may have an item per sample: to give all of it to all would be wrong without a word."""
    with pytest.raises(PipelineConfigError) as caught:
        split_keywords({"task_ids": value}, 2, batch=batch, model=Declares())
    for part in ("task_ids", "4 items", "Pass a tensor", "'task_ids': 0", "'task_ids': None"):
        assert part in str(caught.value)
    assert f"{batch} rows" in str(caught.value) or batch is None
    assert split_keywords({"task_ids": value}, 1, batch=batch) == [{"task_ids": value}]
    assert split_keywords({"names": value}, 2, batch=4, model=Declares()) == [{"names": value}] * 2


def test_a_list_without_tensors_is_cut_along_its_items_where_declared() -> None:
    first, second = split_keywords({"tasks": ["a", "b", "c", "d"]}, 2, batch=4, model=Declares())
    assert (first, second) == ({"tasks": ["a", "b"]}, {"tasks": ["c", "d"]})
    with pytest.raises(PipelineConfigError, match=r"tasks of shape 3 items.*one for each row"):
        split_keywords({"tasks": [1, 2, 3]}, 2, batch=4, model=Declares())


@pytest.mark.parametrize("value", [3, 0.5, "text", True, None, [], {"a": 1, "b": "text"}])
def test_other_plain_values_are_the_same_for_all(value: Any) -> None:
    assert split_keywords({"plain": value}, 2, batch=4) == [{"plain": value}] * 2


def test_a_loss_sees_frozen_encoders_as_they_are() -> None:
    """No gradient where none is wanted; the projector's as in the unsplit model."""
    model = copy.deepcopy(model_of("llava"))
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(False)
    ids, kwargs = microbatches("llava", batches_of("llava")[0])[0]
    whole = copy.deepcopy(model)
    unsplit_loss(whole, ids, kwargs).backward()
    stages = split(model, 2)
    token_loss(run_chain(stages, ids, kwargs), ids).backward()
    assert wrong_gradients(stages, {n: p.grad for n, p in whole.named_parameters()}) == []
    assert whole.model.multi_modal_projector.linear_1.weight.grad is not None
