"""Stages chained in one process equal the unsplit model: logits, gradients, names and owners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hfpp.errors import PipelineConfigError
from hfpp.plan.partition import uniform_offsets
from hfpp.runtime.find_anatomy import find_anatomy
from hfpp.runtime.model_inputs import forward_constants
from hfpp.runtime.ownership import find_ownership
from hfpp.runtime.split_model import build_stages
from hfpp.runtime.stage_boundary import boundary_of
from tests.models import (
    FAMILIES,
    SEQ,
    VOCAB,
    PlainModel,
    padding_mask,
    relative_error,
    tiny_model,
    token_ids,
    tolerance_of,
)

TIED_BY_DEFAULT = (
    "gemma", "gemma2", "gemma3_text", "gemma3n_text", "cohere", "cohere2", "gpt2", "opt", "bloom",
    "falcon", "mamba", "starcoder2", "zamba2",
)  # fmt: skip


def split(model: nn.Module, num_stages: int) -> list[nn.Module]:
    anatomy = find_anatomy(model)
    offsets = uniform_offsets(num_stages, anatomy.num_layers).row()
    ownership = find_ownership(model, anatomy, offsets)
    return build_stages(model, anatomy, ownership, range(num_stages))


def run_chain(stages: list[nn.Module], ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The stages one after the other; what goes between them is cut off the graph and joined again
    as a pipeline would do it.
    """
    values: tuple[torch.Tensor, ...] = (ids,)
    for stage in stages:
        result = stage(*values, **kwargs)
        values = result if isinstance(result, tuple) else (result,)
    return values[0]


def logits_of(model: nn.Module, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The unsplit model without a key-value cache, with which transformers ignores packing."""
    result = model(ids, **kwargs, **forward_constants(model))
    return result if isinstance(result, torch.Tensor) else result.logits


def gradients(modules: list[nn.Module], same: dict[str, str]) -> dict[str, torch.Tensor]:
    """Gradients by the owner's name: copies of one tensor are added up."""
    found: dict[str, torch.Tensor] = {}
    for module in modules:
        seen: set[int] = set()
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if parameter.grad is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            owner = same[name]
            found[owner] = found[owner] + parameter.grad if owner in found else parameter.grad
    return found


def names_of_same_tensor(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def worst_error(model: nn.Module, stages: list[nn.Module], **kwargs: Any) -> float:
    """Largest relative error of logits and of any parameter's gradient; inf for a lost gradient."""
    ids = token_ids(4)
    mask = kwargs.get("attention_mask", torch.ones_like(ids)).bool()
    same = names_of_same_tensor(model)
    weights = torch.randn(4, SEQ, VOCAB, generator=torch.Generator().manual_seed(1))
    weights = weights * mask[..., None]
    wanted = logits_of(model, ids, **kwargs)
    (wanted * weights.to(wanted.dtype)).sum().backward()
    expected = {n: g.clone() for n, g in gradients([model], same).items()}
    model.zero_grad(set_to_none=True)
    found = run_chain(stages, ids, **kwargs)
    (found * weights.to(found.dtype)).sum().backward()
    got = gradients(stages, same)
    if set(got) != set(expected):
        return float("inf")
    errors = [relative_error(found * mask[..., None], wanted * mask[..., None])]
    errors += [relative_error(got[name], expected[name]) for name in expected]
    return max(errors)


@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_split_model_is_the_model(family: str, num_stages: int) -> None:
    model = tiny_model(family)
    stages = split(model, num_stages)
    masks = {"attention_mask": padding_mask(4)}
    assert worst_error(model, stages, **masks) < tolerance_of(family)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "opt", "gpt2"])
def test_left_padding_and_no_mask(family: str) -> None:
    model = tiny_model(family)
    stages = split(model, 2)
    assert worst_error(model, stages) < tolerance_of(family)
    model.zero_grad(set_to_none=True)
    for stage in stages:
        stage.zero_grad(set_to_none=True)
    left = {"attention_mask": padding_mask(4, side="left")}
    assert worst_error(model, stages, **left) < tolerance_of(family)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_sequences(family: str) -> None:
    model = tiny_model(family)
    positions = torch.cat((torch.arange(9), torch.arange(SEQ - 9))).expand(4, SEQ)
    error = worst_error(model, split(model, 4), position_ids=positions)
    assert error < tolerance_of(family)


@pytest.mark.parametrize("family", ["granite", "gemma2", "zamba2"])
def test_a_planted_fault_is_seen(family: str) -> None:
    """One weight off by 0.1 % in one stage."""
    stages = split(tiny_model(family), 2)
    with torch.no_grad():
        next(p for n, p in stages[0].named_parameters() if ".layers.0." in f".{n}").mul_(1.001)
    assert worst_error(tiny_model(family), stages) > 100 * tolerance_of(family)


def test_a_wrong_window_is_seen() -> None:
    stages = split(tiny_model("mistral", sliding_window=7), 2)
    assert worst_error(tiny_model("mistral"), stages) > 1e-4


def test_unknown_code_works_without_registration() -> None:
    torch.manual_seed(0)
    model = PlainModel().double()
    stages = split(model, 4)
    assert [len(boundary.slots_in()) for boundary in map(boundary_of, stages) if boundary] == [
        0, 2, 2, 2,
    ]  # fmt: skip
    assert worst_error(model, stages) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_owners(family: str) -> None:
    model = tiny_model(family)
    stages = split(model, 4)
    same = names_of_same_tensor(model)
    owners: dict[str, list[int]] = {}
    for index, stage in enumerate(stages):
        boundary = boundary_of(stage)
        assert boundary is not None
        for name, _ in stage.named_parameters():
            assert name in same
            if name not in boundary.tied_names:
                owners.setdefault(same[name], []).append(index)
        assert {n for n, _ in stage.named_buffers()} <= {n for n, _ in model.named_buffers()}
    assert set(owners) == set(same.values())
    assert all(len(stages_) == 1 for stages_ in owners.values()), owners


@pytest.mark.parametrize("family", TIED_BY_DEFAULT)
def test_tied_ends_are_found(family: str) -> None:
    model = tiny_model(family)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    boundary = boundary_of(split(model, 2)[0])
    assert boundary is not None
    ends = [tied.stages for tied in boundary.tied if "mbed" in tied.names[0][1][0] or "wte" in
            tied.names[0][1][0]]  # fmt: skip
    assert ends == [(0, 1)]


def test_untied_in_the_config_but_tied_in_fact() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    boundary = boundary_of(split(model, 2)[1])
    assert boundary is not None
    assert boundary.tied_names == {"lm_head.weight"}
    assert worst_error(model, split(model, 2)) < 1e-9


def test_nothing_is_copied_and_the_model_is_left_alone() -> None:
    model = tiny_model("llama")
    before = {name: id(p) for name, p in model.named_parameters()}
    classes = [type(m) for m in model.modules()]
    stages = split(model, 4)
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert id(parameter) == before[name]
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert [type(m) for m in model.modules()] == classes
    assert type(stages[0]).__name__ == "LlamaForCausalLM"


def test_a_model_on_the_meta_device_is_split() -> None:
    with torch.device("meta"):
        model = tiny_model("gemma2")
    stages = split(model, 4)
    assert all(p.is_meta for stage in stages for p in stage.parameters())
    assert sum(1 for stage in stages for _ in stage.parameters()) == 1 + len(
        list(model.parameters())
    )  # the tied tensor at both ends


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_chain_and_are_what_runs(family: str) -> None:
    model = tiny_model(family)
    stages = split(model, 4)
    boundaries = [b for b in map(boundary_of, stages) if b is not None]
    metas = [b.tensor_metas(2, SEQ, None) for b in boundaries]
    values: tuple[torch.Tensor, ...] = (token_ids(2),)
    for stage, sides in zip(stages, metas, strict=True):
        assert sides is not None
        assert [(m.shape, m.dtype) for m in sides[0]] == [(v.shape, v.dtype) for v in values]
        result = stage(*values)
        values = result if isinstance(result, tuple) else (result,)
        assert [(m.shape, m.dtype, m.requires_grad) for m in sides[1]] == [
            (v.shape, v.dtype, v.requires_grad) for v in values
        ]


def test_shapes_after_a_change_of_dtype() -> None:
    """A residual stream kept in float32 stays so when the model is bfloat16."""
    stages = [stage.bfloat16() for stage in split(tiny_model("mamba", residual_in_fp32=True), 2)]
    boundary = boundary_of(stages[0])
    assert boundary is not None
    sides = boundary.tensor_metas(2, SEQ, torch.bfloat16)
    out = stages[0](token_ids(2))
    assert sides is not None
    assert (out.shape, out.dtype) == sides[1][0][:2]


def test_a_cache_is_refused() -> None:
    stage = split(tiny_model("llama"), 2)[0]
    with pytest.raises(PipelineConfigError, match="use_cache"):
        stage(token_ids(2), use_cache=True)


def test_an_attention_kernel_that_needs_data() -> None:
    """The anatomy is read without running it; the stages run it."""

    def fused(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert query.data_ptr() != 0, "a kernel without data"
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **kwargs)

    AttentionInterface.register("fused", fused)
    AttentionMaskInterface.register("fused", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = tiny_model("llama", attn_implementation="fused")
    assert model.config._attn_implementation == "fused"
    stages = split(model, 2)
    assert stages[1].config._attn_implementation == "fused"
    assert worst_error(model, stages, attention_mask=padding_mask(4)) < 1e-9


class Adding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x += memory * 0.5
        return x + torch.tanh(self.inner(x)), memory


def test_layers_that_write_into_their_input() -> None:
    torch.manual_seed(0)
    model = PlainModel().double()
    model.blocks = nn.ModuleList(Adding(16) for _ in range(4)).double()
    stages = split(model, 2)
    ids = token_ids(4)
    wanted = model(ids)
    wanted.sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    sent = stages[0](ids)
    received = [tensor.detach().requires_grad_() for tensor in sent]  # leaves, as in a pipeline
    found = stages[1](*received)
    assert relative_error(found, wanted) < 1e-12
    found.sum().backward()
    torch.autograd.backward(sent, [tensor.grad for tensor in received])
    for name, gradient in expected.items():
        assert relative_error(model.get_parameter(name).grad, gradient) < 1e-12, name


class Ignoring(PlainModel):
    """Its last block takes a second tensor and does nothing with it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[-1] = Last()


class Last(nn.Module):
    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * x, memory


def test_every_received_value_gets_a_gradient_to_send_back() -> None:
    model = Ignoring().double()
    stages = split(model, 4)
    x = torch.randn(2, SEQ, 16, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(2, SEQ, 1, dtype=torch.float64, requires_grad=True)
    stages[3](x, memory).sum().backward()
    assert x.grad is not None
    assert torch.equal(memory.grad, torch.zeros_like(memory))


class Dropping(PlainModel):
    """Skips its first layers while training, as layerdrop does at times."""

    skip = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        memory = x.mean(-1, keepdim=True)
        for block in self.blocks[self.skip :] if self.training else self.blocks:
            x, memory = block(x, memory)
        return self.out(x)


def test_a_skipped_layer_is_an_error_and_no_other_result() -> None:
    stages = split(Dropping(), 2)
    sent = stages[0](token_ids(2))
    assert stages[1](*sent).shape == (2, SEQ, VOCAB)
    type(stages[1]).skip = 3
    with pytest.raises(RuntimeError, match="did not call layer 2"):
        stages[1](*sent)


class Optional(PlainModel):
    """Adds something between its blocks that was not there when it was split."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Embedding(4, 16)

    def forward(self, ids: torch.Tensor, kinds: torch.Tensor | None = None) -> torch.Tensor:
        x = self.tokens(ids)
        memory = x.mean(-1, keepdim=True)
        for block in self.blocks:
            x, memory = block(x, memory)
            if kinds is not None:
                x = x + self.kinds(kinds)
        return self.out(x)


def test_an_input_that_needs_another_stage_s_weights_is_refused() -> None:
    stages = split(Optional(), 2)
    ids = token_ids(2)
    assert run_chain(stages, ids).isfinite().all()
    with pytest.raises(
        PipelineConfigError, match=r"Optional with kinds uses 'kinds\.weight' on stage 1"
    ):
        run_chain(stages, ids, kinds=ids % 4)


def test_further_arguments_by_position_are_refused() -> None:
    first, _ = split(tiny_model("llama"), 2)
    with pytest.raises(PipelineConfigError, match="Pass it by keyword, on every rank"):
        first(token_ids(2), padding_mask(2))


@pytest.mark.parametrize("vocab", [39, 65])
def test_sizes_of_the_run_are_no_sizes_of_the_model(vocab: int) -> None:
    model = tiny_model("llama", vocab_size=vocab, num_hidden_layers=3)
    anatomy = find_anatomy(model)
    assert anatomy.output_meta(2, 7, None).shape == (2, 7, vocab)


class Twice(PlainModel):
    """Calls its blocks two times."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        memory = x.mean(-1, keepdim=True)
        for block in [*self.blocks, *self.blocks]:
            x, memory = block(x, memory)
        return self.out(x)


class Glued(PlainModel):
    """Reads the embedding again after the blocks."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        start = x = self.tokens(ids)
        memory = x.mean(-1, keepdim=True)
        for block in self.blocks:
            x, memory = block(x, memory)
        return self.out(x + start)


class Branching(PlainModel):
    """Decides in Python on a computed value outside of its blocks."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        memory = x.mean(-1, keepdim=True)
        if x.sum() > 0:
            memory = -memory
        for block in self.blocks:
            x, memory = block(x, memory)
        return self.out(x)


class Unlisted(nn.Module):
    """Has no list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, 8)
        self.out = nn.Linear(8, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.tokens(ids))


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Twice, "in the order"),
        (Glued, "outside of the layers"),
        (Branching, "branches in Python"),
        (Unlisted, "no nn.ModuleList"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(cls: type[nn.Module], reason: str) -> None:
    with pytest.raises(PipelineConfigError, match=reason) as caught:
        split(cls(), 2)
    assert cls.__name__ in str(caught.value)


class Reader(PlainModel):
    """Masks by the values of the ids between its blocks: every stage needs the real ones."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        memory = x.mean(-1, keepdim=True)
        for block in self.blocks:
            x, memory = block(x, memory)
            x = x * (ids > VOCAB // 2)[..., None]
        return self.out(x)


def test_ids_go_along_where_the_model_reads_them() -> None:
    torch.manual_seed(0)
    model = Reader().double()
    stages = split(model, 4)
    assert worst_error(model, stages) < 1e-9
    boundary = boundary_of(stages[2])
    assert boundary is not None
    assert [slot.dtype for slot in boundary.slots_in()][-1] is torch.int64
