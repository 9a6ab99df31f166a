"""Schedules over real gloo ranks: equal to the model without a pipeline; and what is refused."""

from __future__ import annotations

import contextlib
import logging
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import schedules as torch_schedules

from hfpp.errors import PipelineConfigError
from hfpp.plan.placement import Placement
from hfpp.plan.schedules import SCHEDULES, compute_table, find_schedule, write_csv
from hfpp.plan.schedules.lowering import lower
from hfpp.runtime.build_schedule import (
    add_step_context,
    build_pipeline_schedule,
    check_pipeline_schedule,
)
from hfpp.runtime.torch_compat import lowering_options
from tests.advice import check_advice
from tests.ranks import run_ranks
from tests.reference.torch_orders import TORCH_NAMES
from tests.runtime.plain_stages import (
    SEQ,
    assert_gradients,
    batch,
    local_stages,
    mean_loss,
    reference,
    zero_grad,
)

NAMES = TORCH_NAMES
ALL_NAMES = tuple(SCHEDULES)  # those that torch lacks run as a table does
N, MICROBATCH = 8, 2
ROWS = N * MICROBATCH
PARAMETERS = 8 * 4 + 3


def stage_indices(name: str, rank: int, pp_size: int) -> tuple[list[int], int]:
    spec = find_schedule(name)
    per_rank = spec.stages_per_rank or 2
    num_stages = pp_size * per_rank
    if spec.placement is Placement.V:
        return [rank, num_stages - 1 - rank], num_stages
    return list(range(rank, num_stages, pp_size)), num_stages


def build(
    name: str,
    rank: int,
    pp_size: int,
    *,
    static: bool = True,
    loss_fn: Any = mean_loss,
    scale_grads: bool = False,
    csv: Any = None,
) -> tuple[Any, list[Any]]:
    indices, num_stages = stage_indices(name, rank, pp_size)
    stages = local_stages(indices, num_stages, static=(MICROBATCH, SEQ) if static else None)
    schedule = build_pipeline_schedule(
        csv, None if csv else name, MICROBATCH, ROWS, stages, loss_fn, scale_grads=scale_grads
    )
    return schedule, stages


def inputs(stages: list[Any], data: tuple[torch.Tensor, ...]) -> tuple[tuple[Any, ...], Any]:
    ids, target, _ = data
    first = any(stage.is_first for stage in stages)
    last = any(stage.is_last for stage in stages)
    return ((ids,) if first else ()), (target if last else None)


def step(schedule: Any, stages: list[Any], data: Any, **kwargs: Any) -> tuple[Any, list[float]]:
    args, target = inputs(stages, data)
    losses: list[torch.Tensor] = []
    outputs = schedule.step(*args, target=target, losses=losses, shift=data[2], **kwargs)
    return outputs, [loss.item() for loss in losses]


def evaluate(
    schedule: Any, stages: list[Any], data: Any, *, with_target: bool, **kwargs: Any
) -> tuple[Any, list[float]]:
    args, target = inputs(stages, data)
    losses: list[Any] = []
    outputs = schedule.eval(
        *args, target=target if with_target else None, losses=losses, shift=data[2], **kwargs
    )
    return outputs, [loss.item() for loss in losses]


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-9, atol=1e-12
    )


# Training


def _trains(rank: int, pp_size: int, name: str, csv: str | None) -> int:
    data = batch(ROWS, seed=1)
    expected = reference([data], N)
    count = 0
    for static in (True, False):
        schedule, stages = build(name, rank, pp_size, static=static, csv=csv)
        wanted = torch_schedules._PipelineScheduleRuntime
        if not csv and name in TORCH_NAMES:
            wanted = torch_schedules.get_schedule_class(name)
        assert isinstance(schedule, wanted)
        calls = [b.item() for stage in stages for b in stage.submod.buffers()]
        outputs, losses = step(schedule, stages, data)
        if any(stage.is_last for stage in stages):
            close(losses, expected.losses)
            close(outputs, expected.logits)
        else:
            assert outputs is None
            assert losses == []
        count = assert_gradients(stages, expected.gradients)
        # Inference of shapes left no trace in the model's buffers.
        after = [b.item() for stage in stages for b in stage.submod.buffers()]
        assert after == [before + N for before in calls]
    return count


@pytest.mark.parametrize("pp_size", [1, 2, 4])
@pytest.mark.parametrize("name", ALL_NAMES)
def test_every_schedule_equals_the_unsplit_model(name: str, pp_size: int) -> None:
    counts = run_ranks(_trains, pp_size, args=(name, None))
    assert sum(counts) == PARAMETERS


@pytest.mark.parametrize(("pp_size", "limit"), [(2, 4), (4, 5), (4, 6)])
def test_a_limit_on_activations_changes_no_gradient(pp_size: int, limit: int) -> None:
    assert sum(run_ranks(_trains, pp_size, args=(f"VLimited-{limit}", None))) == PARAMETERS


@pytest.mark.parametrize("lowered", [False, True], ids=["compute", "communication"])
@pytest.mark.parametrize(("name", "pp_size"), [("Interleaved1F1B", 4), ("DualPipeV", 2)])
def test_a_csv_needs_no_name(name: str, pp_size: int, lowered: bool, tmp_path: Path) -> None:
    table = compute_table(SCHEDULES[name], pp_size=pp_size, n_microbatches=N)
    write_csv(
        lower(table, unshard=False, reduce_grad=False) if lowered else table,
        tmp_path / "schedule.csv",
    )
    counts = run_ranks(_trains, pp_size, args=(name, str(tmp_path / "schedule.csv")))
    assert sum(counts) == PARAMETERS


def test_a_csv_of_a_single_stage_schedule(tmp_path: Path) -> None:
    table = compute_table(SCHEDULES["1F1B"], pp_size=2, n_microbatches=N)
    write_csv(table, tmp_path / "schedule.csv")
    counts = run_ranks(_trains, 2, args=("1F1B", str(tmp_path / "schedule.csv")))
    assert sum(counts) == PARAMETERS


def _torch_file(rank: int, pp_size: int, path: str) -> None:
    schedule, _ = build("ZBVZeroBubble", rank, pp_size)
    if rank == 0:
        schedule._dump_csv(path, "compute_comms")


def test_a_csv_that_torch_wrote_with_its_own_communication(tmp_path: Path) -> None:
    run_ranks(_torch_file, 2, args=(str(tmp_path / "torch.csv"),))
    counts = run_ranks(_trains, 2, args=("ZBVZeroBubble", str(tmp_path / "torch.csv")))
    assert sum(counts) == PARAMETERS


def _recorded(rank: int, pp_size: int, name: str) -> list[str]:
    schedule, stages = build(name, rank, pp_size)
    order: list[str] = []

    def record(stage: Any, method: str, letter: str) -> None:
        run = getattr(stage, method)

        def recorded(microbatch: int, *args: Any, **kwargs: Any) -> Any:
            kind = letter if kwargs.get("full_backward", True) else "I"
            order.append(f"{stage.stage_index}{kind}{microbatch}")
            return run(microbatch, *args, **kwargs)

        setattr(stage, method, recorded)

    def record_messages(stage: Any, method: str, kind: str) -> None:
        run = getattr(stage, method)

        def recorded(microbatch: int) -> Any:
            operations = run(microbatch)
            order.extend([f"{stage.stage_index}{kind}{microbatch}"] if operations else [])
            return operations

        setattr(stage, method, recorded)

    for stage in stages:
        record(stage, "forward_one_chunk", "F")
        record(stage, "backward_one_chunk", "B")
        record(stage, "backward_weight_one_chunk", "W")
        for direction, letter in (("fwd", "F"), ("bwd", "B")):
            record_messages(stage, f"get_{direction}_send_ops", f"SEND_{letter}")
            record_messages(stage, f"get_{direction}_recv_ops", f"RECV_{letter}")
    step(schedule, stages, batch(ROWS, seed=1))
    return order


@pytest.mark.parametrize("name", ALL_NAMES)
def test_the_tables_are_what_torch_runs(name: str) -> None:
    table = compute_table(SCHEDULES[name], pp_size=4, n_microbatches=N)
    lowered = lower(table, **lowering_options())
    expected = [
        [str(leaf) for step_ in lowered.steps(rank) for leaf in step_.action.leaves]
        for rank in range(4)
    ]
    no_calls = re.compile(r"SHARD|GRAD|WAIT")
    expected = [[a for a in row if not no_calls.search(a)] for row in expected]
    ran = run_ranks(_recorded, 4, args=(name,))
    if not SCHEDULES[name].single_stage or name not in TORCH_NAMES:
        assert ran == expected
        return
    # Without a table torch posts a receive when it needs it; all else is in the same order, and
    # so are the receives of a direction among themselves.
    for parts in (r"\d[FB]\d|SEND", "RECV_F", "RECV_B"):
        kept = re.compile(parts)
        assert [list(filter(kept.search, row)) for row in ran] == [
            list(filter(kept.search, row)) for row in expected
        ]


# Gradients' scale and accumulation


def _accumulates(rank: int, pp_size: int, name: str) -> int:
    data = [batch(ROWS, seed=1), batch(ROWS, seed=2)]
    expected = reference(data, N, mean=True)
    schedule, stages = build(name, rank, pp_size, scale_grads=True)
    losses = [loss for item in data for loss in step(schedule, stages, item)[1]]
    if any(stage.is_last for stage in stages):
        close(losses, expected.losses)  # the losses themselves are not scaled
    assert not schedule.scale_grads
    return assert_gradients(stages, expected.gradients)


@pytest.mark.parametrize("name", NAMES)
def test_scale_grads_is_the_mean_over_microbatches_also_over_two_steps(name: str) -> None:
    assert sum(run_ranks(_accumulates, 2, args=(name,))) == PARAMETERS


def _view_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return mean_loss(logits, target).reshape(1).squeeze()


def _takes_a_view(rank: int, pp_size: int, name: str) -> int:
    data = batch(ROWS, seed=1)
    schedule, stages = build(name, rank, pp_size, loss_fn=_view_loss)
    step(schedule, stages, data)
    return assert_gradients(stages, reference([data], N).gradients)


@pytest.mark.parametrize("name", ["1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"])
def test_the_loss_may_be_a_view(name: str) -> None:
    """torch's split backward detaches the loss in place, which a view forbids."""
    assert sum(run_ranks(_takes_a_view, 2, args=(name,))) == PARAMETERS


# Evaluation


def _evaluates(rank: int, pp_size: int, name: str, static: bool) -> int:
    data, other = batch(ROWS, seed=1), batch(ROWS, seed=2)
    expected, expected_other = reference([data], N), reference([other], N)
    schedule, stages = build(name, rank, pp_size, static=static)
    last = any(stage.is_last for stage in stages)
    alive: list[Any] = []

    def watch(module: Any, args: Any, output: torch.Tensor) -> None:
        assert not output.requires_grad
        alive.append(weakref.ref(output))

    def check_eval() -> None:
        hooks = [stage.submod.register_forward_hook(watch) for stage in stages]
        for with_target in (True, False):
            outputs, losses = evaluate(schedule, stages, other, with_target=with_target)
            assert losses == [] or (last and with_target)
            if last:
                close(outputs, expected_other.logits)
                if with_target:
                    close(losses, expected_other.losses)
                assert not outputs.requires_grad
            outputs, losses = evaluate(
                schedule, stages, other, with_target=with_target, return_outputs=False
            )
            assert outputs is None
        for hook in hooks:
            hook.remove()
        for stage in stages:
            assert not stage.output_chunks
            assert not getattr(stage, "fwd_cache", {})
            assert not getattr(stage, "_forward_chunk_states", {})

    def check_training() -> int:
        zero_grad(stages)
        _, losses = step(schedule, stages, data)
        if last:
            close(losses, expected.losses)
        return assert_gradients(stages, expected.gradients)

    check_eval()  # before the first step
    assert all(p.grad is None for stage in stages for p in stage.submod.parameters())
    check_training()
    check_eval()  # after a step: the gradients of the step stay
    assert_gradients(stages, expected.gradients)
    check_eval()
    count = check_training()
    check_training()
    return count


@pytest.mark.parametrize("pp_size", [1, 2, 4])
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", NAMES)
def test_eval_then_training_again(name: str, static: bool, pp_size: int) -> None:
    assert sum(run_ranks(_evaluates, pp_size, args=(name, static))) == PARAMETERS


def _evaluates_csv(rank: int, pp_size: int, csv: str) -> None:
    data = batch(ROWS, seed=1)
    schedule, stages = build("Interleaved1F1B", rank, pp_size, csv=csv)
    outputs, losses = evaluate(schedule, stages, data, with_target=True)
    if any(stage.is_last for stage in stages):
        expected = reference([data], N)
        close(outputs, expected.logits)
        close(losses, expected.losses)


def test_eval_of_a_csv(tmp_path: Path) -> None:
    table = compute_table(SCHEDULES["Interleaved1F1B"], pp_size=2, n_microbatches=N)
    write_csv(table, tmp_path / "schedule.csv")
    run_ranks(_evaluates_csv, 2, args=(str(tmp_path / "schedule.csv"),))


def _evaluates_another_length(rank: int, pp_size: int, name: str) -> None:
    """With inferred shapes an evaluation may have another length than training."""
    data, longer = batch(ROWS, seed=1), batch(ROWS, seed=2, seq=SEQ + 4)
    schedule, stages = build(name, rank, pp_size, static=False)
    step(schedule, stages, data)
    outputs, _ = evaluate(schedule, stages, longer, with_target=True)
    if any(stage.is_last for stage in stages):
        close(outputs, reference([longer], N).logits)
    zero_grad(stages)
    step(schedule, stages, data)
    assert_gradients(stages, reference([data], N).gradients)


@pytest.mark.parametrize("name", ["1F1B", "ZBVZeroBubble"])
def test_eval_of_another_length_with_inferred_shapes(name: str) -> None:
    run_ranks(_evaluates_another_length, 2, args=(name,))


def _evaluates_with_one_rank_static(rank: int, pp_size: int) -> None:
    """torch then infers on all ranks: the rank that knows its shapes must not go its own way."""
    data = batch(ROWS, seed=1)
    votes = hasattr(
        torch_schedules._PipelineSchedule, "_initialize_pp_stages"
    )  # 2.11 waits forever without a vote
    schedule, stages = build("1F1B", rank, pp_size, static=rank == 0 or not votes)
    for _ in range(2):
        zero_grad(stages)
        step(schedule, stages, data)
        assert_gradients(stages, reference([data], N).gradients)
        outputs, _ = evaluate(schedule, stages, data, with_target=True)
        if any(stage.is_last for stage in stages):
            close(outputs, reference([data], N).logits)


def test_eval_where_one_rank_only_knows_its_shapes() -> None:
    run_ranks(_evaluates_with_one_rank_static, 2)


def _without_loss(rank: int, pp_size: int, name: str) -> None:
    data = batch(ROWS, seed=1)
    schedule, stages = build(name, rank, pp_size, loss_fn=None)
    args, _ = inputs(stages, data)
    for run in (schedule.step, schedule.eval):
        outputs = run(*args, shift=data[2])
        if any(stage.is_last for stage in stages):
            close(outputs, reference([data], N).logits)
        else:
            assert outputs is None


@pytest.mark.parametrize("name", NAMES)
def test_without_a_loss_schedules_run_forward_only(name: str) -> None:
    run_ranks(_without_loss, 2, args=(name,))


# Contexts


def _contexts(rank: int, pp_size: int) -> list[str]:
    data = batch(ROWS, seed=1)
    schedule, stages = build("1F1B", rank, pp_size)
    seen: list[str] = []

    def context(name: str) -> Any:
        @contextlib.contextmanager
        def inner() -> Iterator[None]:
            seen.append(f"enter {name}")
            assert all(p.grad is None for s in stages for p in s.submod.parameters())
            yield
            assert all(p.grad is not None for s in stages for p in s.submod.parameters())
            seen.append(f"leave {name}")

        return inner

    add_step_context(schedule, context("a"))
    add_step_context(schedule, context("b"))
    step(schedule, stages, data)
    seen.append("eval")
    evaluate(schedule, stages, data, with_target=True)
    zero_grad(stages)
    step(schedule, stages, data)
    return seen


def test_step_contexts_surround_every_step_and_no_eval() -> None:
    once = ["enter a", "enter b", "leave b", "leave a"]
    assert run_ranks(_contexts, 2) == [[*once, "eval", *once]] * 2


# Refusals


class Stage:
    """The place of a stage, which is all that building looks at before it refuses."""

    def __init__(self, index: int, num_stages: int, rank: int, pp_size: int) -> None:
        self.stage_index, self.num_stages = index, num_stages
        self.group_rank, self.group_size = rank, pp_size
        self.is_first, self.is_last = index == 0, index == num_stages - 1
        self.submod = torch.nn.Identity()


def places(name: str, rank: int, pp_size: int) -> list[Any]:
    indices, num_stages = stage_indices(name, rank, pp_size)
    return [Stage(index, num_stages, rank, pp_size) for index in indices]


def refused(match: str, *args: Any) -> str:
    with pytest.raises(PipelineConfigError, match=match) as caught:
        build_pipeline_schedule(*args)
    return str(caught.value)


@pytest.mark.parametrize(
    ("microbatch_size", "local_batch_size", "match"),
    [
        (
            3,
            8,
            r"local_batch_size \(8\) must be divisible by microbatch_size \(3\).*=6 or .*=9",
        ),
        (4, 2, r"local_batch_size \(2\) must be divisible by microbatch_size \(4\).*size=4"),
        (0, 8, r"microbatch_size \(0\) must be at least 1"),
        (2, 0, r"local_batch_size \(0\) must be at least 1"),
        (-2, 8, r"microbatch_size \(-2\)"),
        (True, 8, r"microbatch_size must be an integer, not True"),
        (2, 8.0, r"local_batch_size must be an integer, not 8.0"),
    ],
)
def test_batch_sizes_that_do_not_fit(
    microbatch_size: Any, local_batch_size: Any, match: str
) -> None:
    stages = places("GPipe", 0, 2)
    refused(match, None, "GPipe", microbatch_size, local_batch_size, stages, mean_loss)


def test_unknown_abstract_and_missing_names() -> None:
    stages = places("GPipe", 0, 2)
    assert "DualPipeV" in refused("unknown", None, "2F2B", 1, 8, stages, mean_loss)
    refused("abstract", None, "PipelineScheduleMulti", 1, 8, stages, mean_loss)
    for nothing in (None, ""):
        refused("both empty", nothing, nothing, 1, 8, stages, mean_loss)


@pytest.mark.parametrize(
    ("name", "n", "match"),
    [
        ("1F1B", 3, r"use local_batch_size=8"),
        ("DualPipeV", 7, r"use local_batch_size=16"),
        ("Interleaved1F1B", 9, r"use local_batch_size=16 or local_batch_size=20"),
        ("InterleavedZeroBubble", 13, r"use local_batch_size=24 or local_batch_size=30"),
    ],
)
def test_microbatches_that_a_schedule_cannot_run(name: str, n: int, match: str) -> None:
    refused(match, None, name, 2, 2 * n, places(name, 0, 4), mean_loss)


@pytest.mark.parametrize("name", [*NAMES, "2F2B", None])
@pytest.mark.parametrize("sizes", [(3, 8), (4, 2), (0, 8), (2, 0), (True, 8), (2, 18), (1, 3)])
def test_following_the_advice_removes_the_error(name: Any, sizes: tuple[int, int]) -> None:
    """For whatever is wrong with names and sizes, on a pipeline of 4 ranks."""

    def check(pipeline_parallel_schedule: Any, microbatch_size: int, local_batch_size: int) -> None:
        stages = places(name if name in NAMES else "1F1B", 0, 4)
        check_pipeline_schedule(
            None, pipeline_parallel_schedule, microbatch_size, local_batch_size, stages
        )

    check_advice(
        check,
        {
            "pipeline_parallel_schedule": name,
            "microbatch_size": sizes[0],
            "local_batch_size": sizes[1],
        },
    )


def test_stages_that_do_not_fit_the_schedule() -> None:
    refused("stages is empty", None, "1F1B", 1, 8, [], mean_loss)
    two = places("Interleaved1F1B", 0, 2)
    refused("exactly 1 stage per rank, but stages has 2", None, "1F1B", 1, 8, two, mean_loss)
    one = places("1F1B", 0, 2)
    refused("exactly 2 stages per rank, but stages has 1", None, "DualPipeV", 1, 8, one, mean_loss)
    refused(r"as a v, \[0, 3\]", None, "ZBVZeroBubble", 1, 8, two, mean_loss)
    v = places("ZBVZeroBubble", 0, 2)
    refused(r"as a loop, \[0, 2\]", None, "LoopedBFS", 1, 8, v, mean_loss)


def test_a_csv_that_does_not_fit(tmp_path: Path) -> None:
    stages = places("Interleaved1F1B", 0, 2)
    path = tmp_path / "schedule.csv"
    with pytest.raises(FileNotFoundError):
        build_pipeline_schedule(str(path), None, 1, 4, stages, mean_loss)

    def written(pp_size: int, n: int, name: str = "Interleaved1F1B") -> str:
        write_csv(compute_table(SCHEDULES[name], pp_size=pp_size, n_microbatches=n), path)
        return str(path)

    refused("rows for 4 ranks.*has 2", written(4, 4), None, 1, 4, stages, mean_loss)
    refused(r"runs 6\s+microbatches.*is 4", written(2, 6), None, 1, 4, stages, mean_loss)
    v = written(2, 4, "ZBVZeroBubble")
    refused(r"stages \[0, 3\] of 4 on rank 0.*has \[0, 2\]", v, None, 1, 4, stages, mean_loss)
    path.write_text("0F0,0B0\n1B0,1F0\n")
    one = places("1F1B", 0, 2)
    refused("rank 1, column 0, action 1B0", str(path), None, 1, 1, one, mean_loss)


def _warns(rank: int, pp_size: int) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hfpp").addHandler(handler)
    stages = local_stages(stage_indices("LoopedBFS", rank, pp_size)[0], 4)
    build_pipeline_schedule(None, "LoopedBFS", 2, 6, stages, mean_loss)
    build_pipeline_schedule(None, "LoopedBFS", 2, 8, stages, mean_loss)
    return lines


def test_few_microbatches_warn_with_the_pipelines_number_of_stages() -> None:
    for lines in run_ranks(_warns, 2):
        assert len(lines) == 1
        assert "3 microbatches" in lines[0]
        assert "4 stages" in lines[0]
        assert "local_batch_size >= 8" in lines[0]


def _refuses_batches(rank: int, pp_size: int) -> list[str]:
    schedule, _ = build("1F1B", rank, pp_size)
    ids, target, shift = batch(ROWS, seed=1)
    messages = []
    for run in (schedule.step, schedule.eval):
        try:
            if rank == 0:
                run(ids[:-1], shift=shift)
            else:
                run(target=target[:-1], shift=shift)
        except PipelineConfigError as error:
            messages.append(str(error))
    if rank == 1:
        try:
            schedule.step(shift=shift)
        except PipelineConfigError as error:
            messages.append(str(error))
    return messages


def test_batches_that_cannot_be_cut_are_refused_before_anything_is_sent() -> None:
    first, last = run_ranks(_refuses_batches, 2)
    assert len(first) == 2
    assert all("args[0] has 15 rows" in message for message in first)
    assert len(last) == 3
    assert all("target has 15 rows" in message for message in last[:2])
    assert "target is None" in last[2]
