"""Types of the native core; the functions are documented where `hfpp.plan` wraps them."""

from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Final, Never, SupportsIndex, final

__version__: Final[str]

@final
class Table:
    def __init__(self, *args: Never, **kwargs: Never) -> None: ...  # made by the core only
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def format(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    def row(self, *args: SupportsIndex) -> tuple[int, ...]: ...
    def __getitem__(self, key: SupportsIndex | tuple[SupportsIndex, ...]) -> int: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class DType(IntEnum):
    bool = 0
    uint8 = 1
    int8 = 2
    int16 = 3
    int32 = 4
    int64 = 5
    float16 = 6
    bfloat16 = 7
    float32 = 8
    float64 = 9

def itemsize(dtype: DType | SupportsIndex | str) -> int: ...
def checked_integer(
    name: str,
    value: object,
    *,
    minimum: SupportsIndex | None = None,
    maximum: SupportsIndex | None = None,
) -> int: ...
def stage_ids_this_rank(
    pp_rank: SupportsIndex, pp_size: SupportsIndex, num_stages: SupportsIndex, style: str = "loop"
) -> tuple[int, ...]: ...
def stage_ids_by_rank(
    pp_size: SupportsIndex, num_stages: SupportsIndex, style: str = "loop"
) -> Table: ...
def ranks_by_stage(
    pp_size: SupportsIndex, num_stages: SupportsIndex, style: str = "loop"
) -> Table: ...
def uniform_offsets(num_stages: SupportsIndex, num_layers: SupportsIndex) -> Table: ...
def layers_of_stage(
    stage_index: SupportsIndex, num_stages: SupportsIndex, num_layers: SupportsIndex
) -> tuple[int, int]: ...
def fqn_lists(
    num_stages: SupportsIndex,
    num_layers: SupportsIndex,
    layers_prefix: str,
    first: tuple[str, ...],
    last: tuple[str, ...],
    every: tuple[str, ...],
) -> list[list[str]]: ...
def fqn_list_of_stage(
    stage_index: SupportsIndex,
    num_stages: SupportsIndex,
    num_layers: SupportsIndex,
    layers_prefix: str,
    first: tuple[str, ...],
    last: tuple[str, ...],
    every: tuple[str, ...],
) -> list[str]: ...
def boundary_tables(
    num_stages: SupportsIndex,
    *,
    microbatch_size: SupportsIndex,
    seq_len: SupportsIndex,
    hidden_size: SupportsIndex,
    vocab_size: SupportsIndex | None,
    dtype: DType | SupportsIndex | str,
) -> tuple[Table, Table, Table]: ...

@final
class Schedule:
    def __init__(self, *args: Never, **kwargs: Never) -> None: ...  # made by the core only
    @staticmethod
    def of_codes(name: str, rows: Sequence[Iterable[SupportsIndex]]) -> Schedule: ...
    @staticmethod
    def of_order(
        *,
        name: str,
        pp_size: SupportsIndex,
        stages_per_rank: SupportsIndex,
        n_microbatches: SupportsIndex,
        activation_limit: SupportsIndex | None = None,
    ) -> Schedule: ...
    @staticmethod
    def codes_of_order(
        *,
        name: str,
        rank: SupportsIndex,
        pp_size: SupportsIndex,
        stages_per_rank: SupportsIndex,
        n_microbatches: SupportsIndex,
        activation_limit: SupportsIndex | None = None,
    ) -> Table: ...
    @staticmethod
    def forward_only(
        stage_to_rank: Sequence[SupportsIndex], n_microbatches: SupportsIndex
    ) -> Schedule: ...
    def lowered(
        self,
        *,
        communication: bool = True,
        unshard: bool = True,
        reduce_grad: bool = True,
        wait_send: bool = False,
        wait_reduce_grad: bool = False,
        ordered_reshard: bool = False,
    ) -> Schedule: ...
    @property
    def name(self) -> str: ...
    @property
    def pp_size(self) -> int: ...
    @property
    def num_stages(self) -> int: ...
    @property
    def n_microbatches(self) -> int: ...
    @property
    def num_actions(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def has_communication(self) -> bool: ...
    @property
    def kinds(self) -> int: ...
    def codes(self, rank: SupportsIndex) -> Table: ...
    def stage_to_rank(self) -> Table: ...
    def placement(self) -> str: ...

def verify(schedule: Schedule, *, activation_limit: SupportsIndex | None = None) -> Table: ...
def balance(
    pp_size: SupportsIndex,
    num_stages: SupportsIndex,
    style: str,
    *,
    seconds: Sequence[float],
    static_bytes: Sequence[SupportsIndex] = (),
    activation_bytes: Sequence[SupportsIndex] = (),
    live: Sequence[SupportsIndex] = (),
    cap: SupportsIndex | None = None,
) -> tuple[Table, float, float, bool]: ...
def action_codes(text: str) -> Table: ...
def read_csv(name: str, read: Callable[[int], bytes]) -> Schedule: ...
def csv_line(schedule: Schedule, rank: SupportsIndex) -> bytes: ...
def read_json(name: str, read: Callable[[int], bytes]) -> tuple[Schedule, str]: ...
def json_row(schedule: Schedule, rank: SupportsIndex) -> bytes: ...
def check_metadata(name: str, text: str) -> None: ...

@final
class Simulation:
    def __init__(self, *args: Never, **kwargs: Never) -> None: ...  # made by the core only
    @property
    def step_time(self) -> float: ...
    @property
    def idle_share(self) -> float: ...
    def report(
        self, rank: SupportsIndex
    ) -> tuple[
        tuple[float, float, float, float, float, float],
        tuple[float, float],
        tuple[int, int, int, int, int, int],
    ]: ...
    def spans(self, rank: SupportsIndex) -> list[tuple[float, float]]: ...
    def transfers(
        self, rank: SupportsIndex
    ) -> list[tuple[int, int, bool, int, int, float, float]]: ...

def lock_step(schedule: Schedule) -> tuple[Table, int]: ...
def simulate(
    schedule: Schedule,
    *,
    forward: Sequence[float],
    backward: Sequence[float],
    backward_input: Sequence[float],
    backward_weight: Sequence[float],
    activation_bytes: Sequence[SupportsIndex],
    weight_bytes: Sequence[SupportsIndex],
    activation_seconds: Sequence[float],
    gradient_seconds: Sequence[float],
    boundary_bytes: Sequence[SupportsIndex],
    overlap: bool,
    overlap_gain: float,
) -> Simulation: ...
