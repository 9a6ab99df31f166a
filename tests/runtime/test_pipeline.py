"""The real thing over gloo: losses and every gradient equal those of the unsplit model."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import LlamaForCausalLM

from hfpp import causal_lm_loss, pipeline_model, reset_pp_stage_shapes, scale_grads_by_divisor
from hfpp.errors import PipelineConfigError
from hfpp.plan.partition import generate_hf_model_fqn_per_model_part
from hfpp.plan.schedules import compute_table, find_schedule, write_csv
from hfpp.runtime.pipeline import Pipeline, _move
from tests.models import (
    FAMILIES,
    SEQ,
    PlainModel,
    config_of,
    padding_mask,
    relative_error,
    tiny_model,
    token_ids,
    tolerance_of,
)
from tests.ranks import run_ranks
from tests.runtime.test_split_model import Twice, split

SINGLE = ("GPipe", "1F1B")
SCHEDULES = (
    *SINGLE,
    "Interleaved1F1B",
    "LoopedBFS",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
)
MICROBATCHES = 4
ITEMS = 100.0


def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return causal_lm_loss(logits, labels, num_items=ITEMS)


def mesh_of(size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (size,), mesh_dim_names=("pp",))


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "pp_axis_name": "pp",
        "dp_axis_names": (),
        "layers_per_stage": None,
        "pipeline_parallel_schedule_csv": None,
        "pipeline_parallel_schedule": "1F1B",
        "microbatch_size": 2,
        "local_batch_size": 2 * MICROBATCHES,
        "device": torch.device("cpu"),
        "loss_fn": loss_fn,
        **changes,
    }


class Reference:
    """The unsplit model, trained on the same microbatches in one process."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)

    def step(self, ids: torch.Tensor, mask: torch.Tensor, scale: float = 1.0) -> list[float]:
        losses = []
        for part, part_mask in zip(ids.split(2), mask.split(2), strict=True):
            loss = loss_fn(self.logits(part, part_mask), labels_of(part, part_mask))
            (loss * scale).backward()
            losses.append(loss.item())
        return losses

    def logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if isinstance(self.model, PlainModel):
            return self.model(ids)
        return self.model(ids, attention_mask=mask, use_cache=False).logits

    def gradient_error(self, parts: list[nn.Module]) -> float:
        """The worst of the parts' parameters; infinite where one has no gradient."""
        wanted = dict(self.model.named_parameters(remove_duplicate=False))
        worst, count = 0.0, 0
        for part in parts:
            for name, parameter in part.named_parameters():
                count += 1
                expected = wanted[name].grad
                if (expected is None) != (parameter.grad is None):
                    return float("inf")
                if expected is not None and parameter.grad is not None:
                    worst = max(worst, relative_error(parameter.grad, expected))
        return worst if count else float("inf")


def labels_of(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return ids.masked_fill(mask == 0, -100)


def step(pipeline: Pipeline, ids: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """One step of the schedule; the losses, on the last stage's rank."""
    losses: list[torch.Tensor] = []
    kwargs = {} if isinstance(pipeline.model_parts[0], PlainModel) else {"attention_mask": mask}
    inputs = (ids,) if pipeline.has_first_stage else ()
    target = labels_of(ids, mask) if pipeline.has_last_stage else None
    pipeline.schedule.step(*inputs, target=target, losses=losses, **kwargs)
    return [loss.item() for loss in losses]


def loss_error(pipeline: Pipeline, found: list[float], wanted: list[float]) -> float:
    if not pipeline.has_last_stage:
        return 0.0
    if len(found) != len(wanted):
        return float("inf")
    return max(abs(f - w) / abs(w) for f, w in zip(found, wanted, strict=True))


def train_once(model: nn.Module, mesh: DeviceMesh, **changes: Any) -> float:
    """The worst error of losses and gradients after one step."""
    reference = Reference(model)
    options = settings(**changes)
    pipeline = pipeline_model(model, mesh, None, **options)
    rows = options["local_batch_size"]
    ids, mask = token_ids(rows), padding_mask(rows)
    wanted = reference.step(ids, mask)
    errors = [loss_error(pipeline, step(pipeline, ids, mask), wanted)]
    return max([*errors, reference.gradient_error(pipeline.model_parts)])


def every_schedule(rank: int, size: int, family: str, names: tuple[str, ...]) -> dict[str, float]:
    mesh = mesh_of(size)
    errors = {}
    for name in names:
        for seq_len in (SEQ, None):
            model = PlainModel(depth=8).double() if family == "plain" else tiny_model(family)
            errors[f"{name} seq_len={seq_len}"] = train_once(
                model, mesh, pipeline_parallel_schedule=name, seq_len=seq_len
            )
    return errors


def assert_small(results: list[dict[str, float]], tolerance: float) -> None:
    worst = {name: max(result[name] for result in results) for name in results[0]}
    assert all(error < tolerance for error in worst.values()), worst


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "zamba2", "gemma3n_text", "plain"])
def test_every_schedule_on_two_ranks(family: str) -> None:
    results = run_ranks(every_schedule, 2, args=(family, SCHEDULES), timeout_s=120)
    assert len(results[0]) == 14
    assert_small(results, 1e-9)


def eight_layers(rank: int, size: int) -> dict[str, float]:
    """With 8 microbatches, as DualPipeV wants two per rank."""
    mesh = mesh_of(size)
    return {
        f"{name} seq_len={seq_len}": train_once(
            tiny_model("cohere2"),
            mesh,
            pipeline_parallel_schedule=name,
            seq_len=seq_len,
            local_batch_size=16,
        )
        for name in SCHEDULES
        for seq_len in (SEQ, None)
    }


def test_every_schedule_on_four_ranks() -> None:
    results = run_ranks(eight_layers, 4, timeout_s=120)
    assert len(results[0]) == 14
    assert_small(results, 1e-9)


def every_family(rank: int, size: int) -> dict[str, float]:
    mesh = mesh_of(size)
    return {
        family: train_once(tiny_model(family), mesh, seq_len=SEQ) / tolerance_of(family)
        for family in FAMILIES
    }


def test_every_family_on_two_ranks() -> None:
    assert_small(run_ranks(every_family, 2, timeout_s=120), 1.0)


def one_rank(rank: int, size: int) -> dict[str, float]:
    mesh = mesh_of(size)
    errors = {}
    for name in SCHEDULES:
        errors[name] = train_once(
            tiny_model("gemma2"), mesh, pipeline_parallel_schedule=name, seq_len=SEQ
        )
    errors["no seq_len"] = train_once(tiny_model("llama"), mesh)
    errors["cannot be cut"] = train_once(Twice().double(), mesh, seq_len=None)
    return errors


def test_a_pipeline_of_one_rank() -> None:
    assert_small(run_ranks(one_rank, 1, timeout_s=120), 1e-9)


def from_csv(rank: int, size: int, path: str) -> dict[str, float]:
    changes = {"pipeline_parallel_schedule": None, "pipeline_parallel_schedule_csv": path}
    return {"csv": train_once(tiny_model("llama"), mesh_of(size), seq_len=SEQ, **changes)}


@pytest.mark.parametrize("name", ["Interleaved1F1B", "ZBVZeroBubble"])
def test_a_csv_without_a_name(name: str, tmp_path: Path) -> None:
    table = compute_table(find_schedule(name), pp_size=2, n_microbatches=MICROBATCHES)
    write_csv(table, tmp_path / "schedule.csv")
    results = run_ranks(from_csv, 2, args=(str(tmp_path / "schedule.csv"),), timeout_s=60)
    assert_small(results, 1e-9)


def two_lengths(rank: int, size: int) -> dict[str, float]:
    """Gradients accumulate over a step of one length and a step of another."""
    errors = {}
    for name in ("1F1B", "Interleaved1F1B", "ZBVZeroBubble"):
        for seq_len in (SEQ, None):
            model = tiny_model("gemma2")
            reference = Reference(model)
            pipeline = pipeline_model(
                model,
                mesh_of(size),
                None,
                **settings(pipeline_parallel_schedule=name, seq_len=seq_len),
            )
            found, wanted = [], []
            for length in (SEQ, 13, 34):
                ids = token_ids(2 * MICROBATCHES, length, seed=length)
                mask = padding_mask(2 * MICROBATCHES, length)
                wanted += reference.step(ids, mask)
                if length != SEQ:
                    tokens = reset_pp_stage_shapes(
                        pipeline.schedule, pipeline.stages, model.config, 2, length
                    )
                    assert tokens == 2 * length
                found += step(pipeline, ids, mask)
            errors[f"{name} {seq_len}"] = max(
                loss_error(pipeline, found, wanted),
                reference.gradient_error(pipeline.model_parts),
            )
    return errors


def test_sequence_lengths_change_and_gradients_stay() -> None:
    assert_small(run_ranks(two_lengths, 2, timeout_s=120), 1e-9)


def other_shapes(rank: int, size: int) -> list[str]:
    """A batch of another length or size than the stages are set up for."""
    found = []
    for seq_len in (SEQ, None):
        model = tiny_model("llama")
        pipeline = pipeline_model(model, mesh_of(size), None, **settings(seq_len=seq_len))
        step(pipeline, token_ids(2 * MICROBATCHES), padding_mask(2 * MICROBATCHES))
        for ids in (token_ids(2 * MICROBATCHES, 13), token_ids(MICROBATCHES)):
            for run in (step, pipeline.schedule.eval):
                if not pipeline.has_first_stage or (run is not step and seq_len is None):
                    continue  # only the first stage sees the ids; without static shapes eval infers
                try:
                    arguments = (pipeline, ids, torch.ones_like(ids)) if run is step else (ids,)
                    run(*arguments)
                    found.append("accepted")
                except PipelineConfigError as error:
                    found.append(str(error))
    return found


def test_a_batch_of_other_shapes_is_refused() -> None:
    messages, _ = run_ranks(other_shapes, 2, timeout_s=60)
    assert len(messages) == 6
    for message in messages:
        assert "set up for [2, 21]: call reset_pp_stage_shapes" in message


def scaled(rank: int, size: int) -> dict[str, float]:
    """The mean over microbatches, over two accumulated steps, and a divisor at the end."""
    errors = {}
    for name in SCHEDULES:
        model = tiny_model("gemma")
        reference = Reference(model)
        changes = {"pipeline_parallel_schedule": name, "scale_grads": True, "seq_len": SEQ}
        pipeline = pipeline_model(model, mesh_of(size), None, **settings(**changes))
        found, wanted = [], []
        for seed in (1, 2):
            ids, mask = token_ids(2 * MICROBATCHES, seed=seed), padding_mask(2 * MICROBATCHES)
            wanted += reference.step(ids, mask, scale=1 / MICROBATCHES)
            found += step(pipeline, ids, mask)
        errors[name] = max(
            loss_error(pipeline, found, wanted), reference.gradient_error(pipeline.model_parts)
        )
        scale_grads_by_divisor(pipeline.stages, 3)
        for parameter in reference.model.parameters():
            parameter.grad = parameter.grad / 3
        errors[f"{name} divided"] = reference.gradient_error(pipeline.model_parts)
    return errors


def test_scaled_gradients_with_accumulation() -> None:
    assert_small(run_ranks(scaled, 2, timeout_s=120), 1e-9)


class Wrapper(nn.Module):
    """What a parallelize_fn may put around a part."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.module(*args, **kwargs)


def parallelized(rank: int, size: int) -> dict[str, float]:
    seen: list[dict[str, Any]] = []

    def in_place(part: nn.Module, world_mesh: DeviceMesh, moe_mesh: None, **axes: Any) -> None:
        seen.append({"mesh": world_mesh.mesh_dim_names, "moe": moe_mesh, **axes})
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.mul_(1.5)

    def replaced(part: nn.Module, *meshes: Any, **axes: Any) -> nn.Module:
        return Wrapper(part)

    mesh, errors = mesh_of(size), {}
    for name, function in (("in place", in_place), ("replaced", replaced)):
        model = tiny_model("llama")
        reference = Reference(model)
        if function is in_place:
            with torch.no_grad():
                for parameter in reference.model.parameters():
                    parameter.mul_(1.5)
        changes = {"parallelize_fn": function, "pipeline_parallel_schedule": "Interleaved1F1B"}
        pipeline = pipeline_model(model, mesh, None, **settings(seq_len=SEQ, **changes))
        ids, mask = token_ids(2 * MICROBATCHES), padding_mask(2 * MICROBATCHES)
        wanted = reference.step(ids, mask)
        errors[f"{name} loss"] = loss_error(pipeline, step(pipeline, ids, mask), wanted)
        parts: list[nn.Module] = pipeline.model_parts
        if function is replaced:
            assert all(isinstance(part, Wrapper) and part.calls == MICROBATCHES for part in parts)
            assert [stage.submod for stage in pipeline.stages] == parts
            parts = [part.module for part in parts if isinstance(part, Wrapper)]
        errors[name] = reference.gradient_error(parts)
    assert seen == 2 * [
        {
            "mesh": ("pp",),
            "moe": None,
            "dp_axis_names": (),
            "cp_axis_name": None,
            "tp_axis_name": None,
            "ep_axis_name": None,
            "ep_shard_axis_names": None,
        }
    ]
    return errors


def test_parallelize_fn_in_place_and_replacing() -> None:
    assert_small(run_ranks(parallelized, 2, timeout_s=60), 1e-9)


def evaluated(rank: int, size: int) -> dict[str, float]:
    """Outputs and losses of eval, then training as if nothing had been."""
    errors = {}
    for name in SCHEDULES:
        model = tiny_model("llama")
        reference = Reference(model)
        pipeline = pipeline_model(
            model, mesh_of(size), None, **settings(pipeline_parallel_schedule=name, seq_len=SEQ)
        )
        ids, mask = token_ids(2 * MICROBATCHES), padding_mask(2 * MICROBATCHES)
        inputs = (ids,) if pipeline.has_first_stage else ()
        wanted = reference.logits(ids, mask)
        labels = labels_of(ids, mask) if pipeline.has_last_stage else None
        for target in (None, labels):
            losses: list[torch.Tensor] = []
            output = pipeline.schedule.eval(
                *inputs, attention_mask=mask, target=target, losses=losses
            )
            if pipeline.has_last_stage:
                errors[f"{name} {target is None}"] = relative_error(output, wanted)
                assert not output.requires_grad
                assert len(losses) == (0 if target is None else MICROBATCHES)
        assert all(p.grad is None for part in pipeline.model_parts for p in part.parameters())
        expected = reference.step(ids, mask)
        errors[f"{name} loss"] = loss_error(pipeline, step(pipeline, ids, mask), expected)
        errors[f"{name} after"] = reference.gradient_error(pipeline.model_parts)
    return errors


def test_eval_and_then_training() -> None:
    first, last = run_ranks(evaluated, 2, timeout_s=120)
    errors = [*first.values(), *last.values()]
    assert len(errors) >= 7 * 4
    assert max(errors) < 1e-9, (first, last)


UNEVEN = [
    ["model.embed_tokens", "model.layers.0", "model.rotary_emb"],
    [*(f"model.layers.{i}" for i in (1, 2, 3)), "model.norm", "lm_head", "model.rotary_emb"],
]


def uneven(rank: int, size: int) -> dict[str, float]:
    mesh = mesh_of(size)
    error = train_once(tiny_model("llama"), mesh, seq_len=SEQ, module_fqns_per_model_part=UNEVEN)
    return {"uneven": error}


def test_a_manual_uneven_list() -> None:
    assert_small(run_ranks(uneven, 2, timeout_s=60), 1e-9)


class Refusal:
    """Settings that cannot work, and what the error must say."""

    def __init__(self, match: str, family: str = "llama", **changes: Any) -> None:
        self.match, self.family, self.changes = match, family, changes


def _listed(*changes: tuple[int, list[str]]) -> list[list[str]]:
    lists = copy.deepcopy(UNEVEN)
    for index, names in changes:
        lists[index] = names
    return lists


REFUSALS = {
    "misspelt layer": Refusal(
        r"module_fqns_per_model_part\[0\]: 'model.layer.0' is no module",
        module_fqns_per_model_part=_listed((0, ["model.embed_tokens", "model.layer.0"])),
    ),
    "missing layer": Refusal(
        r"model.layers.1.*must",
        module_fqns_per_model_part=_listed((1, ["model.layers.2", "model.layers.3"])),
    ),
    "missing last layer": Refusal(
        "lacks model.layers.3",
        module_fqns_per_model_part=_listed((1, ["model.layers.1", "model.layers.2"])),
    ),
    "duplicated layer": Refusal(
        r"\[1\].*model.layers.0",
        module_fqns_per_model_part=_listed((1, ["model.layers.0", *UNEVEN[1]])),
    ),
    "reordered layers": Refusal(
        "once, in order",
        module_fqns_per_model_part=_listed(
            (1, ["model.layers.2", "model.layers.1", "model.layers.3", "model.norm", "lm_head"])
        ),
    ),
    "missing norm": Refusal(
        r"module_fqns_per_model_part\[1\] lacks 'model.norm'",
        module_fqns_per_model_part=_listed((1, [n for n in UNEVEN[1] if n != "model.norm"])),
    ),
    "missing embedding": Refusal(
        r"\[0\] lacks 'model.embed_tokens'",
        module_fqns_per_model_part=_listed((0, ["model.layers.0"])),
    ),
    "missing head": Refusal(
        r"\[1\] lacks 'lm_head'",
        module_fqns_per_model_part=_listed((1, UNEVEN[1][:-2])),
    ),
    "head on the first stage": Refusal(
        r"\[0\].*'lm_head' is needed by stage 1",
        module_fqns_per_model_part=_listed((0, [*UNEVEN[0], "lm_head"])),
    ),
    "three stages on two ranks": Refusal(
        "multiple of pp_size",
        module_fqns_per_model_part=[*UNEVEN, ["model.layers.3"]],
    ),
    "unknown schedule": Refusal("unknown", pipeline_parallel_schedule="2F2B"),
    "abstract schedule": Refusal("abstract", pipeline_parallel_schedule="PipelineScheduleMulti"),
    "no schedule": Refusal("both empty", pipeline_parallel_schedule=None),
    "uneven batch": Refusal("must be divisible by", local_batch_size=7),
    "too few microbatches": Refusal("1F1B needs", local_batch_size=2),
    "too few for DualPipeV": Refusal(
        "DualPipeV needs", pipeline_parallel_schedule="DualPipeV", local_batch_size=4
    ),
    "odd rounds": Refusal(
        "n_microbatches", pipeline_parallel_schedule="Interleaved1F1B", local_batch_size=10
    ),
    "several stages in 1F1B": Refusal("requires exactly 1 stage", layers_per_stage=1),
    "one stage in Interleaved1F1B": Refusal(
        "at least 2 stages", pipeline_parallel_schedule="Interleaved1F1B", layers_per_stage=2
    ),
    "layers_per_stage that does not fit": Refusal("must be divisible by", layers_per_stage=4),
    "unknown rounding": Refusal(
        "round_to_pp_multiple", layers_per_stage=2, round_to_pp_multiple="nearest"
    ),
    "more stages than layers": Refusal(
        "layers", pipeline_parallel_schedule="Interleaved1F1B", family="short"
    ),
    "axis": Refusal("pp_axis_name", pp_axis_name="pipe"),
    "another axis": Refusal("tp_axis_name .'tensor'.", tp_axis_name="tensor"),
    "dp_axis_names": Refusal(r"write \('dp',\)", dp_axis_names="dp"),
    "seq_len": Refusal("seq_len", seq_len=0),
    "broken seq_len": Refusal("seq_len", seq_len=7.5),
    "head on both stages": Refusal(
        "list it on stage 1 only", module_fqns_per_model_part=_listed((0, [*UNEVEN[0], "lm_head"]))
    ),
    "more stages than layers, by schedule": Refusal(
        "ZBVZeroBubble on this pipeline has 4 stages, but LlamaForCausalLM has 2 layers",
        family="short",
        pipeline_parallel_schedule="ZBVZeroBubble",
    ),
    "CSV that is not there": Refusal("missing.csv", pipeline_parallel_schedule_csv="missing.csv"),
    "router logits": Refusal(
        "output_router_logits",
        family="router",
        patch_inner_model=False,
        patch_causal_lm_model=False,
    ),
    "model without layers": Refusal("Unsplittable cannot be split", family="unsplittable"),
}


class Unsplittable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


def _refused_model(family: str) -> nn.Module:
    if family == "short":
        return tiny_model("llama", num_hidden_layers=2)
    if family == "router":
        return tiny_model("mixtral", output_router_logits=True)
    return Unsplittable() if family == "unsplittable" else tiny_model(family)


def refuse(rank: int, size: int) -> dict[str, str]:
    """Every refusal on this rank: its message, or what came instead."""
    mesh, found = mesh_of(size), {}
    for name, refusal in REFUSALS.items():
        try:
            pipeline_model(
                _refused_model(refusal.family), mesh, None, **settings(**refusal.changes)
            )
            found[name] = "accepted"
        except (PipelineConfigError, FileNotFoundError) as error:
            found[name] = str(error)
    return found


def test_bad_settings_are_errors_on_every_rank() -> None:
    results = run_ranks(refuse, 2, timeout_s=120)
    assert results[0] == results[1]
    for name, refusal in REFUSALS.items():
        with pytest.raises(PipelineConfigError, match=refusal.match):
            raise PipelineConfigError(f"{results[0][name]}")


def disagree(rank: int, size: int) -> dict[str, str]:
    """One rank has something else than the others."""
    mesh, found = mesh_of(size), {}
    odd = rank == size - 1
    cases: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "depth": (tiny_model("llama", num_hidden_layers=6 if odd else 4), {}),
        "multiplier": (tiny_model("granite", logits_scaling=9.0 if odd else 8.0), {}),
        "class": (tiny_model("qwen3" if odd else "llama"), {}),
        "schedule": (
            tiny_model("llama"),
            {"pipeline_parallel_schedule": "GPipe" if odd else "1F1B"},
        ),
        "microbatch": (tiny_model("llama"), {"local_batch_size": 16 if odd else 8}),
        "tied": (tiny_model("llama", tie_word_embeddings=odd), {}),
        "own error": (tiny_model("llama"), {"local_batch_size": 7 if odd else 8}),
        "no loss": (tiny_model("llama"), {"loss_fn": None if odd else loss_fn}),
        "crash": (Crashing(config_of("llama")) if odd else tiny_model("llama"), {}),
    }
    for name, (model, changes) in cases.items():
        try:
            pipeline_model(model, mesh, None, **settings(**changes))
            found[name] = "accepted"
        except (PipelineConfigError, ZeroDivisionError) as error:
            found[name] = str(error)
    dist.barrier()
    return found


class Crashing(LlamaForCausalLM):
    """Its hook has a bug."""

    def customize_pipeline_stage_modules(self, names: Any, **_: Any) -> Any:
        """Fail as code fails."""
        return 1 / len([])


def test_ranks_that_disagree_all_hear_of_it() -> None:
    results = run_ranks(disagree, 2, timeout_s=60)
    expected = {
        "depth": "num_hidden_layers|number of parameter",
        "multiplier": "logits_scaling",
        "class": "disagree on",
        "schedule": "pipeline_parallel_schedule",
        "microbatch": "local_batch_size",
        "tied": "tie",
        "own error": "must be divisible by",
        "no loss": "a loss_fn",
        "crash": "division by zero",
    }
    for result in results:
        for name, pattern in expected.items():
            with pytest.raises(PipelineConfigError, match=pattern):
                raise PipelineConfigError(result[name])


def disagree_between_replicas(rank: int, size: int) -> str:
    """Two replicas of a pipeline of two; the last rank of the second has another model."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    model = tiny_model("llama", rms_norm_eps=1e-5 if rank == size - 1 else 1e-6)
    try:
        pipeline_model(model, mesh, None, **settings(dp_axis_names=("dp",)))
    except PipelineConfigError as error:
        return str(error)
    return "accepted"


def test_replicas_that_disagree_all_hear_of_it() -> None:
    results = run_ranks(disagree_between_replicas, 4, timeout_s=60)
    assert len(set(results)) == 1
    assert "config.rms_norm_eps: rank 0 has 1e-06, rank 3 has 1e-05" in results[0]


def different_keywords(rank: int, size: int) -> tuple[str, str]:
    """A mask that only the first rank passes, by keyword and by position."""
    mesh, found = mesh_of(size), []
    ids, mask = token_ids(2 * MICROBATCHES), padding_mask(2 * MICROBATCHES)
    for schedule in ("1F1B", "Interleaved1F1B"):
        changes = {"pipeline_parallel_schedule": schedule, "seq_len": SEQ}
        pipeline = pipeline_model(tiny_model("llama"), mesh, None, **settings(**changes))
        try:
            pipeline.schedule.step(
                ids, target=ids, **({"attention_mask": mask} if rank == 0 else {})
            )
            found.append("accepted")
        except PipelineConfigError as error:
            found.append(str(error))
    return found[0], found[1]


def test_a_mask_on_one_rank_only_is_refused_on_all() -> None:
    for messages in run_ranks(different_keywords, 2, timeout_s=60):
        for message in messages:
            assert "rank 0 passes ['attention_mask'], rank 1 passes []" in message


def lost_parts(rank: int, size: int) -> str:
    def other(part: nn.Module, *meshes: Any, **axes: Any) -> nn.Module:
        return nn.Linear(2, 2)

    try:
        pipeline_model(tiny_model("llama"), mesh_of(size), None, **settings(parallelize_fn=other))
    except PipelineConfigError as error:
        return str(error)
    return "accepted"


def test_a_replacement_without_the_part_is_refused() -> None:
    messages = run_ranks(lost_parts, 2, timeout_s=60)
    assert all("returned a Linear that does not hold the part" in message for message in messages)


ADVISED = {
    "stage count": (
        {"module_fqns_per_model_part": [*UNEVEN, ["model.layers.3"]]},
        r"Use (\d+) stages",
        lambda found: {
            "module_fqns_per_model_part": generate_hf_model_fqn_per_model_part(int(found), 4),
            "pipeline_parallel_schedule": "Interleaved1F1B" if int(found) > 2 else "1F1B",
        },
    ),
    "interleaved stage count": (
        {
            "module_fqns_per_model_part": [*UNEVEN, ["model.layers.3"]],
            "pipeline_parallel_schedule": "Interleaved1F1B",
        },
        r"Use (\d+) stages",
        lambda found: {
            "module_fqns_per_model_part": generate_hf_model_fqn_per_model_part(int(found), 4)
        },
    ),
    "batch": (
        {"local_batch_size": 7},
        r"local_batch_size[ =](\d+)",
        lambda found: {"local_batch_size": int(found)},
    ),
    "microbatches": (
        {"local_batch_size": 2},
        r"local_batch_size[ =](\d+)",
        lambda found: {"local_batch_size": int(found)},
    ),
    "missing norm": (
        {"module_fqns_per_model_part": [UNEVEN[0], [n for n in UNEVEN[1] if "norm" not in n]]},
        r"lacks '([\w.]+)'",
        lambda found: (
            {"module_fqns_per_model_part": [UNEVEN[0], [*UNEVEN[1][:-2], found, "lm_head"]]}
            if found not in UNEVEN[1][:-2]
            else {"module_fqns_per_model_part": UNEVEN}
        ),
    ),
    "dp_axis_names": (
        {"dp_axis_names": "dp"},
        r"write \('(\w+)',\)",
        lambda found: {"dp_axis_names": (found,)},
    ),
}


def follow_advice(rank: int, size: int) -> dict[str, str]:
    """What comes after doing what the error says."""
    mesh, found = mesh_of(size), {}
    for name, (changes, pattern, follow) in ADVISED.items():
        try:
            pipeline_model(tiny_model("llama"), mesh, None, **settings(**changes))
            found[name] = "no error"
        except PipelineConfigError as error:
            advice = re.findall(pattern, str(error))[-1]
            try:
                followed = {**changes, **follow(advice)}
                pipeline_model(tiny_model("llama"), mesh, None, **settings(**followed))
                found[name] = "gone"
            except PipelineConfigError as again:
                found[name] = f"{error} -> {again}"
    return found


def test_advice_followed_removes_the_error() -> None:
    for result in run_ranks(follow_advice, 2, timeout_s=60):
        assert result == dict.fromkeys(ADVISED, "gone")


def freed(rank: int, size: int) -> tuple[int, int]:
    """Bytes of live parameters before and after ``del model``, by weak references."""
    import gc
    import weakref

    model = tiny_model("llama", num_hidden_layers=8, hidden_size=256, intermediate_size=512)
    alive = [weakref.ref(p) for p in model.parameters()]
    pipeline = pipeline_model(model, mesh_of(size), None, **settings(seq_len=SEQ))

    def live_bytes() -> int:
        gc.collect()
        live = [reference() for reference in alive]
        return sum(p.nbytes for p in live if p is not None)

    before = live_bytes()
    del model
    after = live_bytes()
    owned = sum(p.nbytes for part in pipeline.model_parts for p in part.parameters())
    assert after == owned, (after, owned)
    return before, after


def test_dropping_the_model_frees_what_the_rank_does_not_own() -> None:
    (before, first), (_, last) = run_ranks(freed, 2, timeout_s=60)
    assert first + last == before
    assert max(first, last) < 0.6 * before


def test_a_part_moves_to_its_device_with_its_stand_ins() -> None:
    """The meta device stands for an accelerator here."""
    _, last = split(tiny_model("llama"), 2)
    assert last.model.embed_tokens.weight.device.type == "cpu"
    _move(last, torch.device("meta"))
    tensors = [*last.parameters(), *last.buffers(), last.model.embed_tokens.weight]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
