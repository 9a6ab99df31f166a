"""The loss: equal to its definition, adding up over microbatches, never NaN, clear errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.loss.loss_utils import ForCausalLMLoss

from hfpp import PipelineConfigError, causal_lm_loss

IGNORED = -100


def batch(rows, length, vocabulary, *, dtype=torch.float64, ignored=0.3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, vocabulary, generator=draw, dtype=torch.float64).to(dtype)
    labels = torch.randint(vocabulary, (rows, length), generator=draw)
    labels[torch.rand(rows, length, generator=draw) < ignored] = IGNORED
    return logits.requires_grad_(), labels


def by_definition(logits, labels):
    """Token by token: the sum of minus log p(next token), and the count of targets."""
    total, count = 0.0, 0
    for row, targets in zip(logits.tolist(), labels.tolist(), strict=True):
        for position in range(len(targets) - 1):
            target = targets[position + 1]
            if target != IGNORED:
                total += math.log(sum(map(math.exp, row[position]))) - row[position][target]
                count += 1
    return total, count


@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 6),
    vocabulary=st.integers(1, 9),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_it_is_the_mean_over_the_targets(rows, length, vocabulary, ignored, seed):
    logits, labels = batch(rows, length, vocabulary, ignored=ignored, seed=seed)
    total, count = by_definition(logits, labels)
    loss = causal_lm_loss(logits, labels)
    assert loss.item() == pytest.approx(total / max(count, 1), rel=1e-12, abs=1e-12)
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    assert bool(logits.grad.any()) == (count > 0 and vocabulary > 1)


@given(cuts=st.lists(st.integers(1, 3), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_microbatches_of_different_counts_add_up_to_the_batch(cuts, seed):
    logits, labels = batch(sum(cuts), 5, 7, ignored=0.5, seed=seed)
    labels[0] = IGNORED  # a row, and perhaps a microbatch, without any target
    targets = int((labels[:, 1:] != IGNORED).sum())
    whole = causal_lm_loss(logits, labels)
    whole.backward()
    expected, logits.grad = logits.grad, None
    parts = [
        causal_lm_loss(some_logits, some_labels, num_items=max(targets, 1))
        for some_logits, some_labels in zip(logits.split(cuts), labels.split(cuts), strict=True)
    ]
    sum(parts).backward()
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-12)


def test_the_mean_of_microbatch_means_is_something_else():
    logits, labels = batch(4, 6, 7, ignored=0.5)
    halves = zip(logits.split(2), labels.split(2), strict=True)
    mean_of_means = sum(causal_lm_loss(*half) for half in halves) / 2
    assert abs(mean_of_means - causal_lm_loss(logits, labels)) > 1e-4


def test_it_equals_the_loss_of_transformers():
    logits, labels = batch(3, 9, 17, dtype=torch.float32)
    expected = ForCausalLMLoss(logits, labels, vocab_size=17)
    torch.testing.assert_close(causal_lm_loss(logits, labels), expected)
    tensor = torch.tensor(5)
    expected = ForCausalLMLoss(logits, labels, vocab_size=17, num_items_in_batch=tensor)
    torch.testing.assert_close(causal_lm_loss(logits, labels, tensor), expected)
    torch.testing.assert_close(causal_lm_loss(logits, labels, 5), expected)


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_types_are_computed_in_float32_and_others_stay(given, computed):
    logits, labels = batch(2, 300, 11, dtype=given)
    loss = causal_lm_loss(logits, labels)
    assert loss.dtype == computed
    loss.backward()
    assert logits.grad.dtype == given
    torch.testing.assert_close(loss, causal_lm_loss(logits.detach().to(computed), labels))


@pytest.mark.parametrize("num_items", [None, 8, torch.tensor(8), torch.tensor(0)])
def test_a_microbatch_without_targets_adds_nothing(num_items):
    logits, labels = batch(2, 4, 5, ignored=1.0)
    loss = causal_lm_loss(logits, labels, num_items)
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


def test_leading_dimensions_are_free_and_small_integers_are_labels():
    logits, labels = batch(4, 5, 7)
    shaped = causal_lm_loss(logits.view(2, 2, 5, 7), labels.view(2, 2, 5).to(torch.int32))
    torch.testing.assert_close(shaped, causal_lm_loss(logits, labels))
    one = causal_lm_loss(logits[0], labels[0])
    torch.testing.assert_close(one, causal_lm_loss(logits[:1], labels[:1]))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (((torch.zeros(2, 3, 5),), torch.zeros(2, 3).long()), "logits (tuple)"),
        ((torch.zeros(2, 3, 5).long(), torch.zeros(2, 3).long()), "logits (torch.int64 (2, 3, 5))"),
        ((torch.zeros(3), torch.zeros(()).long()), "logits"),
        ((torch.zeros(2, 0, 5), torch.zeros(2, 0).long()), "logits (2, 0, 5)"),
        ((torch.zeros(2, 3, 5), torch.zeros(2, 2).long()), "labels (2, 2)"),
        ((torch.zeros(2, 3, 5), torch.zeros(3, 2).long()), "labels (3, 2)"),
        ((torch.zeros(2, 3, 5), torch.zeros(2, 3)), "labels (torch.float32)"),
        ((torch.zeros(2, 3, 5), torch.zeros(2, 3).long(), 0), "num_items (0)"),
        ((torch.zeros(2, 3, 5), torch.zeros(2, 3).long(), -1.0), "num_items (-1.0)"),
        ((torch.zeros(2, 3, 5), torch.zeros(2, 3).long(), float("nan")), "num_items (nan)"),
        ((torch.zeros(2, 3, 5), torch.zeros(2, 3).long(), torch.ones(2)), "num_items (a tensor"),
    ],
)
def test_errors_name_the_argument(arguments, names):
    with pytest.raises(PipelineConfigError) as raised:
        causal_lm_loss(*arguments)
    assert str(raised.value).startswith(names)


def test_a_tensor_of_items_divides_as_the_number_does() -> None:
    logits, labels = torch.zeros(1, 3, 4), torch.ones(1, 3, dtype=torch.int64)
    for items in (0.5, 1.0, 3.0):
        by_tensor = causal_lm_loss(logits, labels, torch.tensor(items))
        torch.testing.assert_close(by_tensor, causal_lm_loss(logits, labels, items))
    with pytest.raises(PipelineConfigError, match="must not be negative"):
        causal_lm_loss(logits, labels, torch.tensor(-3.0))
