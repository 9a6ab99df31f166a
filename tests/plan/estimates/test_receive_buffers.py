"""What is received and sent, with buffers made ahead and on demand, counted by hand."""

from __future__ import annotations

import pytest

from hfpp.plan.estimates.memory import Keeping, rank_memory
from hfpp.plan.estimates.workload import Workload
from hfpp.plan.model.shape import ModelShape
from hfpp.plan.prediction import MemoryParts
from hfpp.plan.schedules.actions import parse_action

N_MICROBATCHES = 4
BOUNDARY = 2 * 16 * 64 * 4  # rows, tokens of each, hidden size, bytes
SHAPE = ModelShape.from_config(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 8,
        "vocab_size": 64,
        "tie_word_embeddings": False,
    }
)
WORK = Workload(microbatch_size=2, seq_len=16, dtype="float32", attention="sdpa")


def _memory(
    text: str, stages: tuple[int, ...], offsets: tuple[int, ...], *, ahead: bool
) -> MemoryParts:
    return rank_memory(
        SHAPE,
        WORK,
        offsets=offsets,
        stages=stages,
        actions=[parse_action(word) for word in text.split()],
        n_microbatches=N_MICROBATCHES,
        keeping=Keeping(buffers_ahead=ahead),
    )


TWO, FOUR = (0, 4, 8), (0, 2, 4, 6, 8)
ONE_AT_A_TIME = "1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3"
SPLIT = "1F0 1I0 1W0 1F1 1I1 1W1 1F2 1I2 1W2 1F3 1I3 1W3"


@pytest.mark.parametrize(
    ("text", "stages", "offsets", "ahead", "on_demand"),
    [
        # The first stage receives gradients only: each while the backward goes on from it.
        ("0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3", (0,), TWO, 4, 0),
        # Inputs of the last stage stay to the step's end, but not after a split backward.
        (ONE_AT_A_TIME, (1,), TWO, 4, 4),
        (SPLIT, (1,), TWO, 4, 1),
        # In between an input goes with its microbatch; a split backward keeps its gradient too.
        (ONE_AT_A_TIME, (1,), FOUR, 8, 1),
        (SPLIT, (1,), FOUR, 8, 2),
        # Where a rank has two stages, the first one's four gradients stay when they are sent; its
        # outputs only with buffers ahead. The peak is in the last stage's backward.
        (f"{ONE_AT_A_TIME} 3F0 3B0", (1, 3), FOUR, 3 * 4 + 4 + 4, 4 + 1),
        # Stages 1 and 2 hand on to each other: stage 1 has what stage 2 works on.
        ("1F0 2F0 2B0 1B0", (1, 2), FOUR, 4 * 4, 1),
    ],
)
def test_what_is_received_and_sent(
    text: str, stages: tuple[int, ...], offsets: tuple[int, ...], ahead: int, on_demand: int
) -> None:
    assert _memory(text, stages, offsets, ahead=True).receive_buffers == ahead * BOUNDARY
    assert _memory(text, stages, offsets, ahead=False).receive_buffers == on_demand * BOUNDARY


def test_an_output_is_freed_once_it_is_sent_where_a_rank_has_one_stage() -> None:
    """Two microbatches are in flight."""
    text = "0F0 0F1 0B0 0B1"
    ahead, on_demand = (_memory(text, (0,), TWO, ahead=a) for a in (True, False))
    assert ahead.activations - on_demand.activations == 2 * BOUNDARY
    text = "0F0 0F1 2F0 2B0 0B0 0B1"
    ahead, on_demand = (_memory(text, (0, 2), FOUR, ahead=a) for a in (True, False))
    assert ahead.activations == on_demand.activations
