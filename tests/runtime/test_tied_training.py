"""AdamW steps of tied models, as one process makes them, on every schedule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import fully_shard

from hfpp.runtime import ownership
from hfpp.runtime.stage_boundary import own_layers
from tests.ranks import run_ranks
from tests.runtime.real_pipelines import SCHEDULES, TOLERANCE, data_and_pipeline_mesh
from tests.runtime.tied_models import MODELS
from tests.runtime.tied_training import (
    Bits,
    Case,
    train_split,
    train_unsplit,
    wrong_values,
)

Result = tuple[int, list[str], list[list[Bits]], list[list[str]]]


@contextmanager
def first_names_only() -> Iterator[None]:
    """The planted fault: what is registered several times is known under its first name only."""
    right = ownership._names_of_modules
    ownership._names_of_modules = lambda skeleton: {  # type: ignore[assignment]
        name: (name,) for name, _ in skeleton.named_parameters()
    }
    try:
        yield
    finally:
        ownership._names_of_modules = right


def train(
    rank: int,
    world_size: int,
    cases: list[tuple[Case, str, dict[str, Tensor]]],
    sharded: bool,
    fault: bool,
) -> Result:
    """By rank: replica, what is wrong; by case: the bits of copies by step, the FQNs of weights."""
    mesh = data_and_pipeline_mesh(world_size, world_size // cases[0][0].replicas)
    wrong, bits, names = [], [], []
    for case, schedule, expected in cases:
        with first_names_only() if fault else nullcontext():
            pipeline, seen = train_split(
                case, mesh, schedule, parallelize_fn=shard if sharded else None
            )
        found = wrong_values(pipeline, expected, TOLERANCE)
        wrong += [f"{case.model}, {schedule}, {what}" for what in found]
        bits.append(seen)
        names.append([name for part in pipeline.model_parts for name in part.state_dict()])
    return mesh.get_local_rank("dp"), wrong, bits, names


def shard(part: Any, world_mesh: Any, moe_mesh: Any, **_: Any) -> None:
    for layer in own_layers(part):
        fully_shard(layer, mesh=world_mesh["dp"])
    fully_shard(part, mesh=world_mesh["dp"])


def results_of(
    world_size: int, cases: list[tuple[Case, str]], sharded: bool = False, fault: bool = False
) -> list[Result]:
    expected = {case: train_unsplit(case) for case, _ in cases}
    given = [(case, schedule, expected[case]) for case, schedule in cases]
    return run_ranks(train, world_size, args=(given, sharded, fault), timeout_s=120)


def check(world_size: int, cases: list[tuple[Case, str]], sharded: bool = False) -> None:
    """Every weight after the last step; copies and what AdamW knows of them after every step."""
    results = results_of(world_size, cases, sharded)
    assert [wrong for _, wrong, _, _ in results] == [[]] * world_size
    for number, (case, schedule) in enumerate(cases):
        names = {name for _, _, _, by_case in results for name in by_case[number]}
        assert names == set(case.make().state_dict())
        for step in range(case.steps):
            digests: dict[tuple[int, int], list[str]] = defaultdict(list)
            for replica, _, by_case, _ in results:
                for (tensor, _), digest in by_case[number][step].items():
                    digests[replica, tensor].append(digest)
            assert len(digests) >= case.replicas or case.model == "two lists"
            for same in digests.values():
                assert len(same) > 1
                assert len(set(same)) == 1, f"{case.model}, {schedule}: differ after step {step}"


def grid(model: str, pp_size: int, **options: Any) -> list[tuple[Case, str]]:
    """All schedules, with a microbatch per rank, and two where the schedule needs them."""
    return [
        (Case(model=model, microbatches=pp_size * (1 + (name == "DualPipeV")), **options), name)
        for name in SCHEDULES
    ]


def test_tied_by_config_on_two_ranks() -> None:
    check(2, grid("llama", 2))


def test_tied_by_hand_on_four_ranks() -> None:
    check(4, grid("head of eight layers", 4))


def test_clipped_and_scaled() -> None:
    check(2, grid("head", 2, clips=True, scale_grads=True))


def test_two_replicas_of_sharded_stages() -> None:
    plain = Case(model="head", replicas=2)
    both = Case(model="head", replicas=2, clips=True, scale_grads=True)
    cases = [(plain, "1F1B"), (plain, "ZBVZeroBubble"), (both, "InterleavedZeroBubble")]
    check(4, cases, sharded=True)


def test_tensors_in_other_places() -> None:
    """With two layers on a stage, and with one on each of four stages."""
    cases = [Case(model=name, steps=3, accumulated=1) for name in MODELS]
    check(2, [(case, schedule) for case in cases for schedule in ("1F1B", "ZBVZeroBubble")])


def test_a_name_that_is_not_followed_is_seen() -> None:
    case = Case(model="one submodule", steps=2, accumulated=1)
    for _, wrong, _, _ in results_of(2, [(case, "1F1B")], fault=True):
        assert any("mix.linear.weight: off by" in what for what in wrong)
