"""Plans for tests."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from hfpp.plan.partition import uniform_offsets
from hfpp.plan.pipeline_plan import RECOMPUTE, ModelFingerprint, ParallelSizes, PipelinePlan
from hfpp.plan.prediction import MemoryParts, NetworkParts, Prediction, TimeParts
from hfpp.plan.schedules import SCHEDULES

MODEL = ModelFingerprint(
    model_type="llama",
    num_layers=5,
    hidden_size=64,
    vocab_size=1000,
    parameters=123_456,
    is_tied=False,
)


def plan_of(**changes: Any) -> PipelinePlan:
    usual: dict[str, Any] = {
        "model": MODEL,
        "pp_size": 2,
        "schedule": "1F1B",
        "n_microbatches": 4,
        "microbatch_size": 2,
        "seq_len": 128,
        "offsets": (0, 3, 5),
    }
    return PipelinePlan(**{**usual, **changes})


def _figures(kind: type, numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(kind, **dict.fromkeys(kind.__dataclass_fields__, numbers))


@st.composite
def plans(draw) -> PipelinePlan:
    spec = SCHEDULES[draw(st.sampled_from(sorted(SCHEDULES)))]
    pp_size = draw(st.integers(1, 6))
    per_rank = spec.stages_per_rank or draw(st.integers(2, 3))
    stages = pp_size * per_rank
    layers = stages + draw(st.integers(0, 9))
    seconds = st.floats(0, 1e9, allow_nan=False)
    count = st.integers(0, 1 << 50)
    memory = st.lists(_figures(MemoryParts, count), min_size=pp_size, max_size=pp_size)
    prediction = st.builds(
        Prediction,
        time=_figures(TimeParts, seconds),
        memory=memory.map(tuple),
        network=_figures(NetworkParts, count),
        idle_share=st.floats(0, 1),
        tokens_per_second=seconds,
        source=st.sampled_from(["analytic", "measured"]),
    )
    size = st.sampled_from([1, 2, 3, 8])
    tp, cp, dp = draw(size), draw(size), draw(size)
    return PipelinePlan(
        model=ModelFingerprint(
            model_type=draw(st.text(st.characters(exclude_characters="\n"), max_size=20)),
            num_layers=layers,
            hidden_size=draw(st.none() | st.integers(1, 1 << 40)),
            vocab_size=draw(st.none() | st.integers(1, 1 << 40)),
            parameters=draw(st.none() | st.integers(1, 1 << 53)),
            is_tied=draw(st.none() | st.booleans()),
        ),
        pp_size=pp_size,
        schedule=spec.name,
        stages_per_rank=per_rank,
        # a multiple of what every schedule asks for
        n_microbatches=2 * stages * draw(st.integers(1, 3)),
        microbatch_size=draw(st.integers(1, 64)),
        seq_len=draw(st.integers(1, 1 << 20)),
        offsets=uniform_offsets(stages, layers).row(),
        recompute=draw(st.sampled_from(RECOMPUTE)),
        parallel=ParallelSizes(dp=dp, tp=tp, cp=cp, ep=draw(st.sampled_from([1, tp, tp * cp, dp]))),
        prediction=draw(st.none() | prediction),
    )
