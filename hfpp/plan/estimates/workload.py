"""What one rank works on at a time: one microbatch's share, in which dtype and by which kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hfpp.errors import PipelineConfigError

__all__ = ["DTYPE_BYTES", "Workload"]

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_LARGEST = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One microbatch, as each rank of a stage sees it.

    Attributes:
        microbatch_size: sequences.
        seq_len: tokens per sequence.
        dtype: of weights and activations, by torch's name.
        tp: ranks that share each matrix; what lies between matrices they share by tokens
            (sequence parallelism).
        ep: ranks that share the experts.
        cp: ranks that share each sequence.
        recompute: what is computed again for the backward: nothing; the inside of attention; or
            whole layers, of which the input alone is kept.
        attention: kernels: one that keeps no scores ("flash"); torch's, which keeps them where
            queries are wider than values ("sdpa", as on CPUs); or plain matrix products ("eager").
    """

    microbatch_size: int
    seq_len: int
    dtype: str = "bfloat16"
    tp: int = 1
    ep: int = 1
    cp: int = 1
    recompute: Literal["none", "selective", "full"] = "none"
    attention: Literal["flash", "sdpa", "eager"] = "flash"

    def __post_init__(self) -> None:
        for name in ("microbatch_size", "seq_len", "tp", "ep", "cp"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
                raise PipelineConfigError(f"{name} ({value!r}) must be an integer of at least 1")
        choices = {
            "dtype": tuple(DTYPE_BYTES),
            "recompute": ("none", "selective", "full"),
            "attention": ("flash", "sdpa", "eager"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise PipelineConfigError(f"{name} ({value!r}) must be one of {', '.join(allowed)}")

    @property
    def width(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def tokens(self) -> float:
        """Tokens of one microbatch per rank of a context-parallel group."""
        return self.microbatch_size * self.seq_len / self.cp

    @property
    def has_whole_backwards(self) -> bool:
        """Whether backwards are not split into inputs and weights, whatever the schedule.

        Where whole layers are computed again, autograd would compute them again for every weight.
        """
        return self.recompute == "full"

    @property
    def boundary_bytes(self) -> int:
        """Bytes per element of the hidden width that cross to the next stage."""
        return round(self.tokens / self.tp * self.width)
