"""Schedule files: CSV and JSON there and back, against slow readers, against torch, and broken."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hfpp import _core
from hfpp.errors import PipelineConfigError
from hfpp.plan.schedules.actions import Action, ActionKind, ScheduleTable, parse_action
from hfpp.plan.schedules.schedule_csv import read_csv, write_csv
from hfpp.plan.schedules.schedule_json import read_json, read_json_metadata, write_json
from tests.reference import schedule_files as slow

CORPUS = Path(__file__).parent / "corpus"
MOST = (1 << 28) - 1
COMPUTE = [kind for kind in ActionKind if kind.is_compute and kind is not ActionKind.OVERLAP]
SINGLE = [kind for kind in ActionKind if kind is not ActionKind.OVERLAP]

# Tables


def numbers() -> st.SearchStrategy[int]:
    return st.integers(0, 12) | st.sampled_from([MOST, MOST - 1, 10**6])


@st.composite
def actions(draw: Any, kinds: list[ActionKind] = SINGLE) -> Action:
    kind = draw(st.sampled_from(kinds))
    return Action(draw(numbers()), kind, draw(numbers()) if kind.has_microbatch else None)


def groups() -> st.SearchStrategy[Action]:
    parts = st.lists(actions(COMPUTE), min_size=2, max_size=4).map(tuple)
    return parts.map(lambda parts: Action(-1, ActionKind.OVERLAP, None, parts))


@st.composite
def tables(draw: Any) -> ScheduleTable:
    """Rows of any actions, sensible or not; the last rank has one, as a file's last line does."""
    columns = st.none() | actions() | groups()
    rows = draw(st.lists(st.lists(columns, max_size=4), max_size=3))
    last = [*draw(st.lists(columns, max_size=2)), draw(actions() | groups())]
    name = draw(st.text(max_size=8) | st.just("1F1B"))
    return ScheduleTable.from_rows(name, [*rows, last])


def read_bytes(
    read: Callable[..., Any], data: bytes, name: str = "a file", block: int | None = None
) -> Any:
    """What the core reads, in blocks of a size."""
    file = io.BytesIO(data)
    return read(name, file.read if block is None else lambda size: file.read(min(block, size)))


@settings(max_examples=60)
@given(table=tables())
def test_csv_there_and_back(table: ScheduleTable, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("csv") / "schedule.csv"
    write_csv(table, path)
    assert path.read_bytes() == slow.csv_of(table.rows)
    assert read_csv(path) == ScheduleTable.from_rows(str(path), table.rows)
    assert slow.read_csv(path.read_bytes()) == table.rows


plain = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False,
    allow_infinity=False) | st.text(max_size=5)  # fmt: skip
metadata = st.dictionaries(
    st.text(max_size=5),
    st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
    max_size=3,
)


@settings(max_examples=60)
@given(table=tables(), more=st.none() | metadata)
def test_json_there_and_back(
    table: ScheduleTable, more: dict[str, Any] | None, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("json") / "schedule.json"
    write_json(table, path, metadata=more)
    assert read_json(path) == table
    assert read_json_metadata(path) == (more or {})
    data = json.loads(path.read_text())
    assert data["rows"] == [[str(a or "") for a in row] for row in table.rows]
    assert (data["name"], data["pp_size"]) == (table.name, table.pp_size)


def test_a_row_of_one_blank_column_is_not_an_empty_row(tmp_path: Path) -> None:
    table = ScheduleTable.from_rows("gap", [[None], [], [None, None], [parse_action("0F0")]])
    write_csv(table, tmp_path / "gap.csv")
    assert (tmp_path / "gap.csv").read_bytes() == b'""\r\n\r\n,\r\n0F0\r\n'
    assert read_csv(tmp_path / "gap.csv").rows == table.rows


# Against the slow readers

PIECES = [
    "0F0", "12SEND_F3", "1UNSHARD", "2W1", "(0F1;3B0)OVERLAP_F_B", "( 0F1 ; 3B0 )OVERLAP_F_B",
    "00F01", " 1B0\t", "None", "", " ", '"', '""', '"0F0"', '"0F0""', ",", ",,", "\n", "\r\n", "\r",
    "0X0", "0F", "F0", "0UNSHARD1", "()OVERLAP_F_B", "(0F0)OVERLAP_F_B", "(0F0;)OVERLAP_F_B",
    "(0F0;1UNSHARD)OVERLAP_F_B", "((0F0;1B0)OVERLAP_F_B;0F0)OVERLAP_F_B", "OVERLAP_F_B", ";", "(",
    "268435455F0", "268435456F0", "0F268435456", "0F99999999999999999999", "é", "\x00", "\ufeff",
    "-1F0", "0f0", "none", "#", "0F0 1B0", "0F0;1B0",
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join).map(str.encode)


def outcome(read: Callable[[], Any]) -> Any:
    """The rows, or that there are none."""
    try:
        return read()
    except (PipelineConfigError, ValueError):
        return "refused"


@settings(max_examples=600)
@given(data=texts | st.binary(max_size=12), block=st.integers(1, 9))
@example(data=b"\xef\xbb\xbf0F0,1B0", block=1)
@example(data=b"0F0\r\r\n\n1F0", block=4)
@example(data=b"\xef\xbb", block=9)
def test_csv_is_read_as_python_reads_it(data: bytes, block: int) -> None:
    expected = outcome(lambda: slow.read_csv(data))
    assert outcome(lambda: ScheduleTable(read_bytes(_core.read_csv, data)).rows) == expected
    assert outcome(lambda: ScheduleTable(read_bytes(_core.read_csv, data, block=block)).rows) == (
        expected
    )


JSON_PIECES = [
    "{", "}", "[", "]", ",", ":", " ", "\n", '"', '"0F0"', '""', '"0X0"', "null", "true", "1", "01",
    "-1", "1.5", "1e3", "2", '"rows"', '"name"', '"metadata"', '"\\u0030F0"', '"\\ud83d\\ude00"',
    '"\\ud83d"', '"\\x"', "é", '"é"', "\x00", "[[]]", '{"a": [1, {"b": -0.5e-3}]}', "{}", "NaN",
    '"a\tb"', "//", "'0F0'",
]  # fmt: skip
GOOD = (
    '{"format": "hfpp schedule", "version": 1, "name": "é\\n", "pp_size": 2,'
    '"rows": [["0F0", ""], ["1F0", "(0F1;1B0)OVERLAP_F_B"]], "metadata": {"k": [1, -2.5e3]}}'
)


@st.composite
def nearly_json(draw: Any) -> bytes:
    """A good file with a piece put in, taken out or exchanged here and there."""
    text = GOOD
    for _ in range(draw(st.integers(0, 3))):
        begin = draw(st.integers(0, len(text)))
        end = min(len(text), begin + draw(st.integers(0, 8)))
        text = text[:begin] + draw(st.sampled_from(["", *JSON_PIECES])) + text[end:]
    return text.encode()


@settings(max_examples=600)
@given(data=nearly_json(), block=st.integers(1, 9))
def test_json_is_read_as_python_reads_it(data: bytes, block: int) -> None:
    def read(block: int | None = None) -> Any:
        schedule, more = read_bytes(_core.read_json, data, block=block)
        table = ScheduleTable(schedule)
        return table.name, table.rows, json.loads(more, object_pairs_hook=list)

    found = outcome(read)
    assert outcome(lambda: read(block)) == found
    try:
        name, rows, more = slow.read_json(data)
    except (ValueError, TypeError, AttributeError, IndexError):
        assert found == "refused"
    else:
        if found != "refused":
            assert found[:2] == (name, rows)
            assert dict(found[2]) == more
        else:  # stricter in what Python is lax about
            lax = rb'NaN|1e3|1\.5|true|"metadata": *[^{]|"(\\\\ud83d|[^"]*\\\\ud83d[^\\\\])'
            assert re.search(lax, data)


# torch


@pytest.mark.torch
@pytest.mark.parametrize("form", ["compute_only", "compute_comms"])
@pytest.mark.parametrize("name", ["Interleaved1F1B", "InterleavedZeroBubble", "DualPipeV"])
def test_torch_reads_what_is_written_and_the_other_way_round(
    name: str, form: Any, tmp_path: Path
) -> None:
    from tests.reference.torch_orders import torch_schedule

    sizes = {"pp_size": 3, "stages_per_rank": 2, "n_microbatches": 6}
    theirs = torch_schedule(name, rank=0, **sizes)
    theirs._dump_csv(tmp_path / "theirs.csv", form)
    table = read_csv(tmp_path / "theirs.csv")
    write_csv(table, tmp_path / "ours.csv")
    assert (tmp_path / "ours.csv").read_bytes() == (tmp_path / "theirs.csv").read_bytes()

    written = ScheduleTable.from_rows(
        "compact", [[action for action in row if action is not None] for row in table.rows]
    )
    write_csv(written, tmp_path / "compact.csv")
    again = torch_schedule(name, rank=0, **sizes)
    again._load_csv(tmp_path / "compact.csv", form)
    assert again.pipeline_order_with_comms == theirs.pipeline_order_with_comms


# Broken files: every message has file, line, character


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"0F0,0B0\n1F0,1X0\n", "line 2, character 5: rank 1, column 1: '1X0' is not a schedule"),
        (b"0F0\r\n\r\n ,1F\r\n", "line 3, character 3: rank 2, column 1: '1F' is not"),
        (b"0F0\r1F0,x", "line 2, character 5: rank 1, column 1: 'x'"),
        (b"\xef\xbb\xbfx", "line 1, character 1: rank 0, column 0: 'x'"),
        (b"0F0,0B\n", "line 1, character 5: rank 0, column 1: '0B' is not a schedule action"),
        (b"0F0,0UNSHARD3\n", "rank 0, column 1: '0UNSHARD3' is not"),
        (b"0F0,()OVERLAP_F_B\n", r"rank 0, column 1: '\(\)OVERLAP_F_B' is not"),
        (b"0F0 and more\n", "rank 0, column 0: '0F0 and more' is not"),
        (b"0F0,999999999B0", "character 5: rank 0, column 1: '999999999B0': stages and microb"),
        (b"0F0," + b"9" * 4000 + b"F0", "stages and microbatches are numbered from 0 to 268435455"),
        (b"0F0," + b"F" * 5000, r"character 4101: rank 0, column 1: '(F{60})\.\.\.' is longer"),
        (b'0F0,"1F0', "line 1, character 5: rank 0, column 1: the quotes are not closed"),
        (b'0F0,"1F0\n"', "line 1, character 5: rank 0, column 1: the quotes are not closed"),
        (b'"0F0"1\n', "line 1, character 6: rank 0, column 1: text after a column in quotes"),
        (b"0F0\x00", "line 1, character 4: byte 0x00: this is not a schedule file"),
        (b"\x7fELF\x02\x01", "line 1, character 1: byte 0x7f: this is not a schedule file"),
        ("0F0,\u00a01B0".encode(), "line 1, character 5: byte 0xc2: this is not a schedule file"),
        ("0F0,0B0".encode("utf-16"), "line 1, character 1: byte 0xff: this is not a schedule"),
        (b"\xef\xbb", "line 1, character 3: the file ends within a character: it is cut off"),
        (b"(0F0;1B0)OVERLAP", r"line 1, character 1: rank 0, column 0: '\(0F0;1B0\)OVERLAP' is"),
        (b"0F0 \x1b[31m", "line 1, character 5: byte 0x1b"),
        (b"", "holds no actions"),
        (b"\n,,\n\n", "holds no actions"),
    ],
)
def test_a_broken_csv_is_an_error_with_its_place(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.csv").write_bytes(data)
    with pytest.raises(PipelineConfigError, match=message) as caught:
        read_csv(tmp_path / "broken.csv")
    assert str(caught.value).startswith(f"{tmp_path / 'broken.csv'}")


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1, character 1: expected '{', with which .* file ends here: it is cut off"),
        ("[", "line 1, character 1: expected '{', .*not '\\['"),
        (
            GOOD[:60],
            "character 62: expected the closing quotes of a key in quotes, but the file ends",
        ),
        (GOOD + "\n x", "line 2, character 2: expected nothing behind the closing '}', not 'x'"),
        (changed('"0F0"', '"0X0"'), "character 82: rank 0, column 0: '0X0' is not a schedule act"),
        (changed('"0F0"', "0"), 'character 82: expected an action in quotes, such as "0F0", not'),
        (changed('["1F0"', '[\n"1F"'), "line 2, character 1: rank 1, column 0: '1F' is not"),
        (changed('"version": 1', '"version": 2'), "character 40: the version is unknown"),
        (changed('"version": 1', '"version": 01'), "character 40: expected a version number"),
        (changed("hfpp schedule", "other"), 'character 12: format is not "hfpp schedule"'),
        (changed('"pp_size": 2', '"pp_size": 3'), r"pp_size \(3\) is not the number of rows \(2\)"),
        (changed('"pp_size": 2', '"pp_size": ' + "9" * 400), "expected the number of ranks, from"),
        (changed('"rows"', '"row"'), "unknown key 'row': known are format, version, name, pp_size"),
        (changed('"pp_size": 2', '"version": 1'), "the key 'version' comes twice"),
        (changed('"pp_size": 2,', ""), 'the file ends without the key "pp_size"'),
        (changed("\\n", "\\ud800"), "expected both halves of a surrogate pair"),
        (changed("\\n", "\\ud800\\u0041"), "a surrogate pair without its second half"),
        (changed("\\n", "\\q"), "expected an escape such as"),
        (changed("\\n", "\\u12g4"), "expected four hexadecimal digits, not 'g'"),
        (changed("\\n", "n" * 5000), "the schedule's name in quotes is longer than 4096 bytes"),
        (changed("\\n", "\n"), "byte 0x0a"),
        (changed("[1, -2.5e3]", "[" * 40), "nested deeper than 32 levels"),
        (changed("[1, -2.5e3]", "1" * 70), "a number of more than 64 characters"),
        (changed("[1, -2.5e3]", '"' + "a" * (1 << 20) + '"'), "longer than 1048576 bytes"),
        (changed("[1, -2.5e3]", "NaN"), "expected a JSON value, not 'N'"),
        (changed('{"k": [1, -2.5e3]}', "[]"), "expected metadata as an object"),
        (changed('["0F0", ""], ["1F0", "(0F1;1B0)OVERLAP_F_B"]', "[], []"), "holds no actions"),
    ],
)
def test_a_broken_json_is_an_error_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(PipelineConfigError, match=message) as caught:
        read_json(tmp_path / "broken.json")
    assert str(caught.value).startswith(f"{tmp_path / 'broken.json'}, line ")


@pytest.mark.parametrize(
    "bad", [b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x80"]
)
def test_names_are_utf8(bad: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(GOOD.encode().replace("é".encode(), bad))
    with pytest.raises(PipelineConfigError, match=r"byte 0x|within a character"):
        read_json(tmp_path / "bad.json")


@settings(max_examples=60)
@given(table=tables(), data=st.data())
def test_the_place_of_a_bad_column_is_right(table: ScheduleTable, data: Any) -> None:
    lines = [line.split(",") for line in slow.csv_of(table.rows).decode().split("\r\n")[:-1]]
    rank = data.draw(st.integers(0, len(lines) - 1))
    column = data.draw(st.integers(0, len(lines[rank]) - 1))
    lines[rank][column] = "bad"
    character = len(",".join(lines[rank][:column])) + (column > 0) + 1
    text = "\r\n".join(map(",".join, lines))
    with pytest.raises(PipelineConfigError) as caught:
        read_bytes(_core.read_csv, text.encode(), "some.csv")
    place = f"some.csv, line {rank + 1}, character {character}: rank {rank}, column {column}: 'bad'"
    assert str(caught.value).startswith(place)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for read in (read_csv, read_json, read_json_metadata):
        with pytest.raises(FileNotFoundError, match="none: no such file: give the path of a sch"):
            read(tmp_path / "none")
        with pytest.raises(PipelineConfigError, match=r"cannot be read \(Is a directory\)"):
            read(tmp_path)


def test_errors_of_the_file_come_through() -> None:
    def fails(size: int) -> bytes:
        raise OSError("the disk is gone")

    for read in (_core.read_csv, _core.read_json):
        with pytest.raises(OSError, match="the disk is gone"):
            read("x", fails)
        with pytest.raises(TypeError):
            read("x", lambda size: "text")  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("bad", [{"a": float("nan")}, {"a": {1, 2}}, {"a": b"x"}])
def test_metadata_that_json_cannot_hold(bad: dict[str, Any], tmp_path: Path) -> None:
    table = ScheduleTable.from_rows("x", [[parse_action("0F0")]])
    with pytest.raises(PipelineConfigError, match="metadata"):
        write_json(table, tmp_path / "x.json", metadata=bad)
    assert not (tmp_path / "x.json").exists()


def test_a_name_that_would_not_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [[Action(0, ActionKind.FORWARD, 0)]]
    most = ScheduleTable.from_rows("é" * 2048, rows)
    write_json(most, path)
    assert read_json(path) == most
    with pytest.raises(PipelineConfigError, match=r"has 4097 bytes, but .* can have 4096"):
        write_json(ScheduleTable.from_rows("x" + most.name, rows), path)
    assert read_json(path) == most


def test_metadata_that_would_not_be_read_back(tmp_path: Path) -> None:
    table = ScheduleTable.from_rows("x", [[parse_action("0F0")]])
    deep: Any = []
    for _ in range(40):
        deep = [deep]
    for bad, match in (({"a": "x" * (1 << 20)}, "longer"), ({"a": deep}, "deeper than 32")):
        with pytest.raises(PipelineConfigError, match=match):
            write_json(table, tmp_path / "x.json", metadata=bad)


# Files without end

ENDLESS = """
import itertools, re, sys
from pathlib import Path
from hfpp import PipelineConfigError, _core
start, again, read = eval(sys.argv[1])
blocks = itertools.chain([start or again], itertools.repeat(again * ((1 << 20) // len(again))))
try:
    getattr(_core, read)("endless", lambda size: next(blocks))
except PipelineConfigError as error:
    print(error)
    # Of this program alone: getrusage counts what its parent had before it.
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) >> 10)
"""


@pytest.mark.parametrize(
    ("start", "again", "read", "message"),
    [
        (b"", b",", "read_csv", "a schedule file holds at most 67108864 actions"),
        (b"", b"\n", "read_csv", "rows for at most 1048576 ranks"),
        (b"", b"0", "read_csv", "is longer than any action"),
        (b"", b'"', "read_csv", "is longer than any action"),
        (b'{"rows":[', b"[],", "read_json", "rows for at most 1048576 ranks"),
        (b'{"name":"', b"a", "read_json", "is longer than 4096 bytes"),
        (b'{"metadata":{"a":', b"[", "read_json", "nested deeper than 32 levels"),
        (b'{"metadata":{"a":', b" ", "read_json", "is longer than 1048576 bytes"),
    ],
)
def test_memory_is_bounded(start: bytes, again: bytes, read: str, message: str) -> None:
    arguments = [sys.executable, "-c", ENDLESS, repr((start, again, read))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60)
    error, mebibytes = done.stdout.splitlines()
    assert message in error
    assert int(mebibytes) < 1024


# What fuzzing found worth keeping


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: path.name)
def test_the_corpus_is_read_or_refused(path: Path, tmp_path: Path) -> None:
    read, write = (read_csv, write_csv) if path.parent.name == "csv" else (read_json, write_json)
    try:
        table = read(path)
    except PipelineConfigError as error:
        assert str(path) in str(error)
        assert re.search(r"line \d+, character \d+|holds no actions", str(error))
        return
    write(table, tmp_path / "again")
    assert read(tmp_path / "again").rows == table.rows


def test_there_is_a_corpus_of_both_kinds() -> None:
    for kind in ("csv", "json"):
        assert len(list((CORPUS / kind).iterdir())) >= 10
