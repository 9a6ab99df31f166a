"""The reader of JSON files: what it refuses, and that every error tells the right place."""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfpp.errors import PipelineConfigError
from hfpp.plan.json_document import read_document
from hfpp.plan.json_places import position_of

KEYS = st.text(alphabet='ab"\\{}[]:,\né ', max_size=3)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | KEYS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def read(tmp_path: Path, text: str, **options: Any) -> Any:
    path = tmp_path / "some.json"
    path.write_text(text, encoding="utf-8")
    return read_document(path, what="a test file", largest=1 << 20, **options).value


def refused(tmp_path: Path, text: str, **options: Any) -> str:
    with pytest.raises(PipelineConfigError) as caught:
        read(tmp_path, text, **options)
    return str(caught.value).removeprefix(f"{tmp_path / 'some.json'}, ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1,\n  "a": 2}', 'line 2, column 3: the member "a" stands twice in one object'),
        ('{"a": {"b": 1}, "c": [{"b": 1,\n"b": 2}]}', 'line 2, column 1: the member "b" stands'),
        ('{"a": 1, "\\u0061": 2}', 'line 1, column 10: the member "a" stands twice'),
        ('{"s": "{NaN}", "a":\n -Infinity}', "line 2, column 2: -Infinity is no JSON number"),
        ('["NaN", "\\"", NaN]', "line 1, column 15: NaN is no JSON number"),
        ('{"a": [0.0,\n\n  Infinity]}', "line 3, column 3: Infinity is no JSON number"),
        ('{"a":\n' + "9" * 5000 + "}", "line 2, column 1: a number of 5000 digits: at most"),
        ("[\n" + "[" * 100_000, "line 2, column 256: nested too deep to be a test file"),
        ('{"a": "[[[",\n"b": ' + '{"c":' * 50_000, "nested too deep to be a test file"),
        ('{"a": 1,}', "line 1, column 9: not JSON"),
        ('{"a": 1}\n x', "line 2, column 2: not JSON"),
        ("", "line 1, column 1: not JSON"),
    ],
)
def test_what_is_refused_has_its_line_and_column(tmp_path: Path, text: str, said: str) -> None:
    message = refused(tmp_path, text)
    assert said in message
    assert message.startswith("line ")
    assert len(message) < 200


def test_the_same_member_in_other_objects_is_none_twice(tmp_path: Path) -> None:
    text = '{"a": {"a": [{"a": 1}, {"a": 2}]}, "b": {"a": "\\"a\\": 1"}}'
    assert read(tmp_path, text) == json.loads(text)


def test_infinity_only_where_it_is_allowed(tmp_path: Path) -> None:
    assert read(tmp_path, "[Infinity]", allow_infinity=True) == [math.inf]
    assert "Infinity is no" in refused(tmp_path, "[Infinity]")
    for word in ("NaN", "-Infinity"):
        message = refused(tmp_path, f"[Infinity, {word}]", allow_infinity=True)
        assert message.startswith(f"line 1, column 12: {word} is no JSON number")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none: no such file: give the path of a test file"):
        read_document(tmp_path / "none", what="a test file", largest=9)
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(PipelineConfigError, match="is no regular file: give the path of a te"):
            read_document(path, what="a test file", largest=9)
    (tmp_path / "large").write_bytes(b"1" * 10)
    with pytest.raises(PipelineConfigError, match="is larger than 0 MiB"):
        read_document(tmp_path / "large", what="a test file", largest=9)
    (tmp_path / "binary").write_bytes('"é",\n'.encode() + b"ab\xff")
    with pytest.raises(PipelineConfigError, match="line 2, column 3: not UTF-8"):
        read_document(tmp_path / "binary", what="a test file", largest=99)


def test_a_fault_at_the_end_of_a_malicious_file_takes_seconds_and_little_memory(
    tmp_path: Path,
) -> None:
    text = '{"a": [' + '{"b":1},' * 50_000 + '0],\n"z": 1, "z": 2}'
    started = time.perf_counter()
    tracemalloc.start()
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(PipelineConfigError, match="line 2, column 9: the member"):
        read_document(path, what="a test file", largest=8 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * len(text)
    assert time.perf_counter() - started < 30


def ways(value: Any, way: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], Any]]:
    """Every value of a document and the way to it, the slow way."""
    found = [(way, value)]
    inner: Any = ()
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
    for step, member in inner:
        found += ways(member, (*way, step))
    return found


@given(value=VALUES, indent=st.sampled_from([None, 0, 3]))
def test_every_value_is_found_where_it_stands(value: Any, indent: int | None) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    decoder = json.JSONDecoder()
    seen = -1
    for way, member in ways(value):
        at = position_of(text, way)
        assert at is not None
        assert at > seen  # so that equal values are told apart: they stand in this order
        seen = at
        if way and isinstance(way[-1], str):
            name, at = decoder.raw_decode(text, at)
            assert name == way[-1]
            at = text.index(":", at) + 1
            at += len(text[at:]) - len(text[at:].lstrip())
        assert decoder.raw_decode(text, at)[0] == member
        for step in ("absent", 99):
            assert position_of(text, (*way, step)) is None
