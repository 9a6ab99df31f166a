"""The routers' auxiliary loss in a pipeline: its value and its gradients, or a refusal."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.loss.loss_utils import ForCausalLMLoss

from hfpp import PipelineConfigError, check_model
from hfpp.runtime.auxiliary_loss import take_auxiliary_loss
from hfpp.runtime.find_anatomy import find_anatomy
from hfpp.runtime.pipeline import Pipeline
from hfpp.runtime.stage_boundary import boundary_of, own_layers
from tests.models import VOCAB, relative_error, token_ids
from tests.ranks import run_ranks
from tests.runtime.real_pipelines import (
    LOOPED,
    MICROBATCHES,
    ROWS,
    SCHEDULES,
    V_SHAPED,
    build,
    data_and_pipeline_mesh,
    plain_name,
    split,
    whole,
)
from tests.runtime.real_pipelines import SEQ as SHORT
from tests.runtime.routed_models import (
    COEFFICIENT,
    FAMILIES,
    RoutedModel,
    padded,
    routed_config,
    routed_model,
    token_loss,
    tolerance_of,
)

ROUTER = re.compile(r"(?<!shared_expert_)gate\.weight|router")


def gradients(model: nn.Module, parts: list[nn.Module]) -> dict[str, Tensor]:
    """Of all stages of the model, by name: the sum over the copies of a tied parameter."""
    first: dict[int, str] = {}
    named = list(model.named_parameters(remove_duplicate=False))
    names = {name: first.setdefault(id(parameter), name) for name, parameter in named}
    found: dict[str, Tensor] = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            if parameter.grad is not None:
                found[names[name]] = found.get(names[name], 0) + parameter.grad
    return found


def run_stages(stages: list[nn.Module], ids: Tensor, **kwargs: Any) -> Tensor:
    values: Any = (ids,)
    for stage in stages:
        values = stage(*values, **kwargs)
        values = values if isinstance(values, tuple) else (values,)
    return values[0]


def errors_of_stages(
    model: Any,
    num_stages: int,
    loss_of: Callable[..., Tensor],
    plant: Callable[[list[Any]], None] = lambda _: None,
    **kwargs: Any,
) -> tuple[float, float]:
    """Relative errors of loss and gradients; the auxiliary loss must matter to every router."""
    ids = token_ids(2)
    wanted = model(ids, labels=ids, **kwargs)
    routers = {n: p for n, p in model.named_parameters() if ROUTER.search(n)}
    share = torch.autograd.grad(
        wanted["loss"] - loss_of(wanted["logits"], ids), list(routers.values()), retain_graph=True
    )
    wanted["loss"].backward()
    assert routers
    assert all(
        part.norm() > 1e-3 * routers[name].grad.norm()
        for name, part in zip(routers, share, strict=True)
    )
    expected = gradients(model, [model])
    model.zero_grad()
    stages = split(model, num_stages)
    plant(stages)
    loss = loss_of(run_stages(stages, ids, **kwargs), ids)
    taken = take_auxiliary_loss(stages[-1])
    assert taken is not None
    assert taken.coefficient == COEFFICIENT
    loss += taken.coefficient * taken.value
    loss.backward()
    found = gradients(model, stages)
    assert found.keys() == expected.keys()
    worst = max(relative_error(found[name], expected[name]) for name in found)
    return relative_error(loss, wanted["loss"]), worst


@pytest.mark.parametrize("family", FAMILIES)
def test_every_class_that_adds_an_auxiliary_loss_is_exact(family):
    model = routed_model(family)

    def loss_of(logits, ids):
        return model.loss_function(logits, ids, VOCAB)

    mask = padded(token_ids(2))
    assert max(errors_of_stages(model, 3, loss_of, attention_mask=mask)) <= tolerance_of(family)


def test_a_strangers_model_that_returns_router_logits_from_its_layers():
    assert max(errors_of_stages(RoutedModel(), 4, token_loss)) <= 1e-9


def detach_router_logits(stages: list[Any]) -> None:
    """On the first stage: what is routed stays, what is sent lost where it came from."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        return output[0].detach(), *output[1:]

    stages[0].model.layers[0].mlp.gate.register_forward_hook(hook)


def test_a_lost_gradient_of_router_logits_is_seen():
    model = routed_model("mixtral")
    errors = errors_of_stages(model, 2, model_loss, plant=detach_router_logits)
    assert errors[0] == 0
    assert errors[1] > 1e-2


def test_the_check_of_a_model_includes_the_auxiliary_loss():
    report = check_model(routed_model("mixtral"), pp_sizes=(2,), full=True)
    assert report.exact
    crossings = [crossing.description for crossing in report.sizes[0].cuts[0].crossings]
    assert crossings[1:] == [f"router logits of layer {n} (mlp.gate)" for n in range(2)]


class Case(NamedTuple):
    """How one pipeline of a distributed test is built and run."""

    schedule: str
    family: str = "dbrx"
    scale_grads: bool = False
    static: bool = True
    prepare: Callable[..., Any] | None = None
    layers: int = 4
    microbatches: int = MICROBATCHES


def model_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss that transformers' causal LMs compute themselves."""
    return ForCausalLMLoss(logits, labels, VOCAB)


class Unsplit(NamedTuple):
    """What the whole model computes, by batch and microbatch; gradients of all batches' sum."""

    losses: list[list[Tensor]]
    values: list[list[Tensor]]
    gradients: dict[str, Tensor]


def unsplit(model: nn.Module, batches: list[Tensor], mask: Tensor, microbatches: int) -> Unsplit:
    losses, values = [], []
    for ids in batches:
        rows = zip(ids.chunk(microbatches), mask.chunk(microbatches), strict=True)
        results = [model(r, labels=r, attention_mask=m) for r, m in rows]
        sum(result.loss for result in results).backward()
        losses.append([result.loss.detach() for result in results])
        values.append([result.aux_loss.detach() for result in results])
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Unsplit(losses, values, found)


def right_values(
    pipeline: Pipeline,
    expected: Unsplit,
    which: tuple[int, slice],
    losses: list[Tensor] | None,
    tolerance: float,
) -> bool:
    """What the schedule reports of a batch's microbatches, ``which``; losses where given."""
    batch, own = which
    values = pipeline.schedule.aux_losses
    if not pipeline.has_last_stage:
        return values == []
    pairs = list(zip(values, expected.values[batch][own], strict=True))
    if losses is not None:
        pairs += zip(losses, expected.losses[batch][own], strict=True)
    return all(relative_error(found, wanted) <= tolerance for found, wanted in pairs)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained(rank: int, size: int, cases: list[Case], replicas: int = 1) -> list[str]:
    """Two steps and an eval of every case; what differs from the unsplit model, on this rank."""
    mesh, wrong = data_and_pipeline_mesh(size, size // replicas), []
    for case in cases:
        model = routed_model(case.family, num_hidden_layers=case.layers)
        batches = [token_ids(ROWS, SHORT, seed=seed) for seed in range(2)]
        mask = torch.ones_like(batches[0])
        mask[::2, SHORT - 3 :] = 0
        expected = unsplit(model, batches, mask, case.microbatches * replicas)
        pipeline = build(
            model,
            mesh,
            case.schedule,
            loss_fn=model_loss,
            scale_grads=case.scale_grads,
            seq_len=SHORT if case.static else None,
            microbatch_size=ROWS // replicas // case.microbatches,
            parallelize_fn=case.prepare,
        )
        tolerance, schedule = tolerance_of(case.family), pipeline.schedule
        divisor = replicas * (case.microbatches if case.scale_grads else 1)
        mine = mesh.get_local_rank("dp")
        own = slice(mine * case.microbatches, (mine + 1) * case.microbatches)

        steps = [batch.chunk(replicas)[mine] for batch in batches]
        padding, last = mask.chunk(replicas)[mine], pipeline.has_last_stage
        inputs = [((ids,) if pipeline.has_first_stage else ()) for ids in steps]
        targets = [ids if last else None for ids in steps]

        losses: list[Tensor] = []
        keywords = {"attention_mask": padding}
        for n in range(2):
            schedule.step(*inputs[n], target=targets[n], losses=losses, **keywords)
            if not right_values(pipeline, expected, (n, own), losses, tolerance):
                wrong.append(f"{case}: values of step {n}")
        for part in pipeline.model_parts:
            for full_name, parameter in part.named_parameters():
                name = plain_name(full_name)
                gradient = whole(parameter.grad)
                error = relative_error(gradient, expected.gradients[name] / divisor)
                if error > tolerance:
                    wrong.append(f"{case}: {name} off by {error:.1e}")
        own_gradients = [p.grad for part in pipeline.model_parts for p in part.parameters()]
        kept = [local(gradient).clone() for gradient in own_gradients]
        schedule.eval(*inputs[0], target=targets[0], losses=losses, **keywords)
        if not right_values(pipeline, expected, (0, own), losses, tolerance):
            wrong.append(f"{case}: values of eval")
        schedule.eval(*inputs[1], **keywords)
        if not right_values(pipeline, expected, (1, own), None, tolerance):
            wrong.append(f"{case}: values of eval without targets")
        now = [local(p.grad) for part in pipeline.model_parts for p in part.parameters()]
        if any(not torch.equal(a, b) for a, b in zip(kept, now, strict=True)):
            wrong.append(f"{case}: eval changed gradients")
    return wrong


def checkpointing(part: Any, *_: Any, **__: Any) -> None:
    part.gradient_checkpointing_enable({"use_reentrant": False})


def sharded(part: Any, world_mesh: Any, *_: Any, **__: Any) -> None:
    for layer in own_layers(part):
        fully_shard(layer, mesh=world_mesh["dp"])
    fully_shard(part, mesh=world_mesh["dp"])


def test_every_schedule_adds_the_auxiliary_loss_of_each_microbatch():
    cases = [
        Case(name, scale_grads=name in LOOPED, static=name not in LOOPED) for name in SCHEDULES
    ]
    assert run_ranks(trained, 2, args=(cases,), timeout_s=120) == [[], []]


def test_four_ranks_hand_the_router_logits_on():
    deep = [Case(n, layers=8, microbatches=8) for n in ("InterleavedZeroBubble", *V_SHAPED)]
    assert run_ranks(trained, 4, args=([Case("1F1B"), *deep],), timeout_s=120) == [[]] * 4


def test_checkpointed_layers_and_a_pipeline_of_one_rank():
    cases = [
        Case("1F1B", "jamba", prepare=checkpointing),
        Case("ZBVZeroBubble", "qwen3_moe", prepare=checkpointing),
    ]
    assert run_ranks(trained, 2, args=(cases,), timeout_s=120) == [[], []]
    assert run_ranks(trained, 1, args=([Case("1F1B"), Case("ZBVZeroBubble")],)) == [[]]


def test_sharded_stages_add_the_mean_of_the_replicas_auxiliary_losses():
    cases = [Case(name, prepare=sharded) for name in ("1F1B", "ZBVZeroBubble")]
    assert run_ranks(trained, 4, args=(cases, 2), timeout_s=120) == [[]] * 4


@pytest.mark.parametrize("family", ["mixtral", "laguna", "jetmoe"])
def test_what_crosses_has_the_shapes_and_dtypes_that_were_foretold(family):
    stages = split(routed_model(family).to(torch.bfloat16), 4)
    for batch, seq in ((1, 6), (4, 9)):
        values: Any = (token_ids(batch, seq),)
        for stage in stages:
            boundary = boundary_of(stage)
            assert boundary is not None
            wanted = boundary.tensor_metas(batch, seq, None)
            given = values
            values = stage(*values)
            values = values if isinstance(values, tuple) else (values,)
            for tensors, metas in zip((given, values), wanted, strict=True):
                assert [(t.shape, t.dtype) for t in tensors] == [m[:2] for m in metas]
        take_auxiliary_loss(stages[-1])
    assert values[0].dtype == torch.bfloat16
    assert len(given) > 2


# What cannot be exact is refused


class Literal(RoutedModel):
    def combined(self, loss, auxiliary):
        return loss + 0.125 * auxiliary


class Scaled(RoutedModel):
    def combined(self, loss, auxiliary):
        return 0.5 * loss + self.z_loss_coef * auxiliary


class Squared(RoutedModel):
    def combined(self, loss, auxiliary):
        return loss + self.z_loss_coef * auxiliary**2


class NotAdded(RoutedModel):
    def combined(self, loss, auxiliary):
        return loss


class Weighty(RoutedModel):
    def combined(self, loss, auxiliary):
        return loss * self.out.weight.norm() + self.z_loss_coef * auxiliary


class Twofold(RoutedModel):
    def combined(self, loss, auxiliary):
        return loss + self.z_loss_coef * auxiliary + 0.125 * auxiliary.sqrt()


class WithoutLabels(RoutedModel):
    def forward(self, input_ids):
        return super().forward(input_ids)


class Unreturned(RoutedModel):
    def forward(self, input_ids, labels=None):
        found = super().forward(input_ids, labels)
        return {name: value for name, value in found.items() if name != "routers"}


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [
        (Literal, "the factor 0.125 .* is in no attribute"),
        (Scaled, "it scales the loss of its logits"),
        (Squared, "no number times a returned value"),
        (NotAdded, "it returns a scalar .* that is not in its loss"),
        (Weighty, "its loss depends on its weights other than by its logits"),
        (Twofold, "it adds 2 values to its loss"),
        (WithoutLabels, "it returns no 'loss' by that name"),
        (Unreturned, "not all that the loss is made from"),
    ],
)
def test_a_loss_that_cannot_be_followed_is_refused_by_name(model_class, reason):
    model = model_class()
    with pytest.raises(PipelineConfigError, match=f"{model_class.__name__}.*{reason}"):
        find_anatomy(model)
    model.config.output_router_logits = False  # as the message says
    assert find_anatomy(model).auxiliary is None


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification])
def test_a_head_that_adds_no_auxiliary_loss_sends_no_router_logits(auto_class):
    anatomy = find_anatomy(auto_class.from_config(routed_config("mixtral")))
    assert anatomy.auxiliary is None
    assert all(slot.source is None for slot in anatomy.slots(2))


def test_the_setting_cannot_change_after_the_split():
    ids = token_ids(2)
    for split_with in (True, False):
        stage = split(routed_model("mixtral", output_router_logits=split_with), 2)[0]
        with pytest.raises(
            PipelineConfigError, match=r"output_router_logits is .* MixtralForCausal"
        ):
            stage(ids, output_router_logits=not split_with)
        stage(ids, output_router_logits=split_with)
        stage.config.output_router_logits = not split_with
        with pytest.raises(PipelineConfigError, match="before splitting"):
            stage(ids)


def test_the_coefficient_may_change_in_all_its_places():
    ids, stages = token_ids(2), split(routed_model("mixtral"), 2)
    stages[-1].router_aux_loss_coef = 0.25
    with pytest.raises(PipelineConfigError, match=r"'config.router_aux_loss_coef': 0.5.*alike"):
        run_stages(stages, ids)
    stages[-1].config.router_aux_loss_coef = 0.25
    run_stages(stages, ids)
    taken = take_auxiliary_loss(stages[-1])
    assert taken is not None
    assert taken.coefficient == 0.25
    assert take_auxiliary_loss(stages[-1]) is None


def test_an_auxiliary_loss_that_nobody_takes_is_an_error():
    ids, stages = token_ids(2), split(routed_model("mixtral"), 2)
    run_stages(stages, ids)
    with pytest.raises(RuntimeError, match="was added to no loss: use the schedule of hfpp"):
        run_stages(stages, ids)
    take_auxiliary_loss(stages[-1])
    with torch.no_grad():
        run_stages(stages, ids)
        run_stages(stages, ids)


def test_router_logits_in_another_order_are_an_error():
    stages = split(routed_model("mixtral"), 2)
    first, second = (layer.__dict__ for layer in stages[-1].model.layers[:2])
    first["_hfpp_role"], second["_hfpp_role"] = second["_hfpp_role"], first["_hfpp_role"]
    with pytest.raises(RuntimeError, match="did not collect the router logits"):
        run_stages(stages, token_ids(2))


def test_a_copy_of_a_stage_has_its_own_router_logits():
    ids, stages = token_ids(2), split(routed_model("mixtral"), 2)
    copies = copy.deepcopy(stages)
    run_stages(stages, ids)
    wanted = take_auxiliary_loss(stages[-1])
    run_stages(copies, ids.flip(0) + 1)
    other = take_auxiliary_loss(copies[-1])
    run_stages(copies, ids)
    assert wanted is not None
    assert other is not None
    assert other.value != wanted.value
    same = take_auxiliary_loss(copies[-1])
    assert same is not None
    assert same.value == wanted.value


class Unsplittable(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(output_router_logits=True, num_hidden_layers=1)
        self.table = nn.Embedding(VOCAB, 8)

    def forward(self, ids):
        return self.table(ids)


def refused(rank: int, size: int) -> list[str]:
    mesh, found = data_and_pipeline_mesh(size, size), []
    model = Unsplittable() if size == 1 else routed_model("mixtral")
    try:
        build(model, mesh, "1F1B", patch_inner_model=size == 1, patch_causal_lm_model=size == 1)
    except PipelineConfigError as error:
        found.append(str(error))
    return found


def test_where_the_stages_could_not_follow_the_loss_it_is_refused():
    for size, match in ((1, "Unsplittable has .* not be followed"), (2, "only the routers of its")):
        for messages in run_ranks(refused, size):
            assert re.search(match, messages[0]), messages
