"""Sizes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfpp import PipelineConfigError
from hfpp.plan.sizes import (
    bytes_as_text,
    parse_bandwidth,
    parse_bytes,
    parse_flops,
    seconds_as_text,
)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_bytes, "80GiB", 80 * 2**30),
        (parse_bytes, "80 GB", 80 * 10**9),
        (parse_bytes, "1.5KiB", 1536),
        (parse_bytes, " 7 ", 7),
        (parse_bytes, "80e9", 80 * 10**9),
        (parse_flops, "989e12", 989 * 10**12),
        (parse_flops, "1.9795PFLOPS", 1979_500 * 10**9),
        (lambda text: parse_bandwidth(text, "network"), "450GB/s", 450 * 10**9),
    ],
)
def test_sizes(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "-80GiB", "80 gib", "80GiBs", "nan", "inf", "1e99", "0", "0.5", "0x10",
     "8,0GiB", "80TFLOPS", "१२GiB", "1e999999999", "9" * 5000, "80GiB/s", "1" + "e1" * 50],
)  # fmt: skip
def test_what_is_no_size_is_refused_and_the_advice_works(text):
    with pytest.raises(PipelineConfigError) as caught:
        parse_bytes(text)
    message = str(caught.value)
    assert message.startswith("memory (")
    assert len(message) < 300
    assert parse_bytes(message.rpartition("memory=")[2]) == 80 * 2**30


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_an_error(text):
    try:
        assert 1 <= parse_flops(text) <= 2**60
    except PipelineConfigError as error:
        assert "flops" in str(error)


@given(st.floats(1, 2**59))
def test_shown_sizes_are_right_to_their_digits(count):
    assert parse_bytes(bytes_as_text(count)) == pytest.approx(count, rel=0.05, abs=1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 us"), (1e-6, "1 us"), (0.0123, "12.3 ms"), (7.25, "7.25 s"), (12345.6, "12346 s")],
)
def test_seconds(seconds, text):
    assert seconds_as_text(seconds) == text
