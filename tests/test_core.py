"""The native core: its table, its buffers, its errors, and that it lets other threads run."""

import array
import gc
import os
import struct
import subprocess
import sys
import threading
import time
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfpp import PipelineConfigError, Table, _core
from tests import strategies


def test_indexing():
    table = _core.stage_ids_by_rank(3, 12)
    assert [[table[rank, k] for k in range(4)] for rank in range(3)] == [
        [0, 3, 6, 9],
        [1, 4, 7, 10],
        [2, 5, 8, 11],
    ]
    assert table.row(2) == (2, 5, 8, 11)
    assert table.shape == (3, 4)
    assert (table.ndim, len(table), table.nbytes, table.format) == (2, 3, 48, "i")
    assert repr(table) == "Table(shape=(3, 4), format='i')"
    assert _core.uniform_offsets(2, 5)[1] == 3
    assert _core.uniform_offsets(2, 5).row() == (0, 3, 5)


@pytest.mark.parametrize("index", [-1, 3, 9, 1 << 31, 1 << 63, -(1 << 63), 1 << 100])
def test_indices_out_of_bounds(index):
    table = _core.stage_ids_by_rank(3, 6)
    for look in (lambda: table[index, 0], lambda: table[0, index], lambda: table.row(index)):
        with pytest.raises(IndexError, match=r"^index"):
            look()
    with pytest.raises(IndexError, match=r"^index"):
        _core.ranks_by_stage(1, 3)[index]


@given(
    strategies.worlds(max_pp_size=5, max_stages_per_rank=3), st.integers(-9, 9), st.integers(-9, 9)
)
def test_every_index_is_inside_or_an_error(world, rank, k):
    table = _core.stage_ids_by_rank(*world)
    if 0 <= rank < table.shape[0] and 0 <= k < table.shape[1]:
        assert table[rank, k] == table.row(rank)[k] == memoryview(table)[rank, k]
    else:
        with pytest.raises(IndexError):
            table[rank, k]


def test_wrong_kinds_of_index():
    table = _core.stage_ids_by_rank(3, 6)
    with pytest.raises(TypeError, match="takes 2 indices, not 1"):
        table[0]
    with pytest.raises(TypeError, match="takes 2 indices, not 3"):
        table[0, 0, 0]
    with pytest.raises(TypeError, match="takes 1 indices, not 0"):
        table.row()
    with pytest.raises(TypeError, match="index must be an integer, not str"):
        table[0, "1"]
    with pytest.raises(TypeError, match="not slice"):
        table[0, :]
    with pytest.raises(PipelineConfigError, match=r"index \(True\)"):
        table[0, True]
    with pytest.raises(TypeError):
        iter(table).__next__()  # no half-working iteration over a table of two axes
    with pytest.raises(TypeError, match="No constructor"):
        Table()


def test_index_accepts_whatever_has_index():
    assert _core.stage_ids_this_rank(np.int64(1), np.int32(4), np.uint8(8)) == (1, 5)
    assert _core.stage_ids_by_rank(4, 8)[np.int64(1), np.int8(1)] == 5


# ---- the buffer protocol


@pytest.mark.torch
def test_memoryview_numpy_and_torch_share_the_memory():
    import torch

    table = _core.ranks_by_stage(4, 8, "v")
    view = memoryview(table)
    assert (view.shape, view.strides, view.format) == ((8,), (4,), "i")
    assert view.c_contiguous
    as_array = np.asarray(table)
    as_tensor = torch.frombuffer(table, dtype=torch.int32)
    view[0] = 77
    assert as_array[0] == as_tensor[0] == table[0] == 77
    assert as_array.dtype == np.int32
    assert as_array.tolist() == as_tensor.tolist() == [77, 1, 2, 3, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("table", "dtype"),
    [
        (_core.stage_ids_by_rank(5, 15), np.int32),
        (_core.uniform_offsets(3, 10), np.int64),
        *zip(
            _core.boundary_tables(
                4, microbatch_size=2, seq_len=3, hidden_size=5, vocab_size=7, dtype="float16"
            ),
            (np.int64, np.int8, np.int64),
            strict=True,
        ),
    ],
)
def test_every_item_type_and_number_of_axes(table, dtype):
    view = memoryview(table)
    as_array = np.asarray(table)
    assert as_array.dtype == dtype
    assert as_array.shape == view.shape == table.shape
    assert view.nbytes == table.nbytes == as_array.nbytes == len(bytes(table))
    for index in np.ndindex(*table.shape):
        assert table[index] == view[index] == as_array[index]
        assert table.row(*index[:-1]) == tuple(as_array[index[:-1]])
    flat = struct.unpack(f"{as_array.size}{table.format}", bytes(view))
    assert list(flat) == as_array.ravel().tolist()


def test_a_view_keeps_the_table_alive():
    view = memoryview(_core.uniform_offsets(1000, 1000))
    gc.collect()
    churn = [_core.uniform_offsets(1000, 5000) for _ in range(50)]
    assert view.tolist() == list(range(1001))
    del churn


def test_tables_do_not_share_memory():
    first, second = _core.ranks_by_stage(2, 4), _core.ranks_by_stage(2, 4)
    memoryview(first)[0] = 5
    assert second.row() == (0, 1, 0, 1)


def test_a_table_can_be_copied_into_an_array():
    assert array.array("i", bytes(_core.ranks_by_stage(2, 4))).tolist() == [0, 1, 0, 1]


# ---- arguments


def test_checked_integer():
    assert _core.checked_integer("n", 3, minimum=1, maximum=3) == 3
    assert _core.checked_integer("n", np.int64(-7)) == -7
    with pytest.raises(PipelineConfigError, match=r"n \(0\) must be at least 1: use n=1 or more"):
        _core.checked_integer("n", 0, minimum=1)
    with pytest.raises(PipelineConfigError, match=r"n \(4\) must be at most 3: use n=3 or less"):
        _core.checked_integer("n", 4, maximum=3)
    with pytest.raises(PipelineConfigError, match=r"n \(False\) must be an integer, not a bool"):
        _core.checked_integer("n", False)
    with pytest.raises(TypeError, match=r"n must be an integer, not decimal\.Decimal"):
        _core.checked_integer("n", Decimal(3))
    with pytest.raises(OverflowError, match="n does not fit in 64 bits"):
        _core.checked_integer("n", 10**5000)  # longer than Python prints


def test_an_index_that_raises_is_passed_on():
    class Broken:
        def __index__(self):
            raise ZeroDivisionError("from __index__")

    with pytest.raises(ZeroDivisionError, match="from __index__"):
        _core.stage_ids_this_rank(Broken(), 4, 8)


SEQUENCES_MADE_WHEN_ASKED = """
import array
from hfpp import _core

seconds = array.array("d", [1.25, 2.5, 3.75, 5.0] * 500)
offsets = _core.balance(2, 2, "loop", seconds=seconds)[0]
assert offsets.row() == _core.balance(2, 2, "loop", seconds=list(seconds))[0].row()
assert _core.Schedule.forward_only(range(2000), 1).pp_size == 2000
codes = [[1 << 56 | 1000 << 28 | m for m in range(rank)] for rank in range(3)]
class Rows:
    __len__ = lambda self: 3
    def __getitem__(self, index): return array.array("q", codes[index])
import collections.abc
collections.abc.Sequence.register(Rows)
schedule = _core.Schedule.of_codes("made", Rows())
assert [list(schedule.codes(rank).row()) for rank in range(3)] == codes
print("read")
"""


def test_sequences_may_make_their_items_when_asked():
    # In a process of its own, where freed memory is overwritten: reading it does not go unseen.
    done = subprocess.run(
        [sys.executable, "-c", SEQUENCES_MADE_WHEN_ASKED],
        env={**os.environ, "PYTHONMALLOC": "debug"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr


def test_config_error_is_both_kinds_of_error():
    for kind in (ValueError, AssertionError, PipelineConfigError):
        with pytest.raises(kind):
            _core.stage_ids_this_rank(4, 4, 8)


def test_arguments_by_position_where_several_integers_meet_are_refused():
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _core.boundary_tables(4, 2, 8, 16, 32, "float32")


FUZZED = {
    "stage_ids_this_rank": 3,
    "stage_ids_by_rank": 2,
    "ranks_by_stage": 2,
    "uniform_offsets": 2,
    "layers_of_stage": 3,
}


@pytest.mark.parametrize("name", FUZZED)
@given(data=st.data())
def test_no_input_crashes_the_process(name, data):
    junk = strategies.any_integers() | st.sampled_from([None, "", b"4", 1.5, True, (), [], 2j])
    arguments = data.draw(st.tuples(*[junk] * FUZZED[name]))
    try:
        getattr(_core, name)(*arguments)
    except (PipelineConfigError, OverflowError, TypeError) as error:
        assert str(error).split()[0].rstrip(":") in {
            *("pp_rank", "pp_size", "num_stages", "num_layers", "stage_index")
        }
    except MemoryError:  # below the table's limit but more than this machine gives
        pass


@given(st.lists(strategies.any_integers(), min_size=5, max_size=5))
def test_no_sizes_crash_the_shape_tables(sizes):
    stages, microbatch, seq, hidden, vocab = sizes
    try:
        shapes, _, counts = _core.boundary_tables(
            min(stages, 4096),  # the rest is the table's limit, tested elsewhere
            microbatch_size=microbatch,
            seq_len=seq,
            hidden_size=hidden,
            vocab_size=vocab,
            dtype="float64",
        )
    except (PipelineConfigError, OverflowError) as error:
        assert any(name in str(error) for name in ("size", "seq_len", "num_stages"))
    else:
        assert counts[len(counts) - 1] == microbatch * seq * vocab * 8
        assert shapes.row(0, 0) == (microbatch, seq, 0)


# ---- the GIL


def longest_pause(work) -> float:
    """How long this thread is kept from running while another does `work`, as a share of it."""
    took = []

    def timed():
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)

    thread = threading.Thread(target=timed)
    pause, last = 0.0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        pause, last = max(pause, now - last), now
    return pause / took[0]


def test_the_gil_is_released_while_a_table_is_made():
    # The best of several tries: other processes of the machine may pause this thread as well.
    native = min(longest_pause(lambda: _core.stage_ids_by_rank(1 << 22, 1 << 25)) for _ in range(5))
    assert native < 0.5
    held = min(longest_pause(lambda: sum(range(1 << 24))) for _ in range(3))
    assert held > 0.9  # the same measure sees a call that keeps the GIL
