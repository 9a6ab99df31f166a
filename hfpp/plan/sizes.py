"""Sizes as people write them: ``80GiB``, ``989e12``, ``989TFLOPS``, ``450GB/s``."""

from __future__ import annotations

import re
from fractions import Fraction

from hfpp.errors import PipelineConfigError

__all__ = [
    "bytes_as_text",
    "count_as_text",
    "parameters_as_text",
    "parse_bandwidth",
    "parse_bytes",
    "parse_flops",
    "seconds_as_text",
]

_NUMBER = re.compile(r"(\d{1,30}(?:\.\d{1,30})?(?:[eE]\+?\d{1,2})?) ?([A-Za-z/]*)", re.ASCII)
_PREFIXES = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_LARGEST = 1 << 60


def _units(*names: str, binary: bool) -> dict[str, int]:
    units = {prefix + name: 1000**n for prefix, n in _PREFIXES.items() for name in names}
    if binary:
        units |= {
            f"{prefix}i{name}": 1024**n
            for prefix, n in _PREFIXES.items()
            for name in names
            if prefix not in ("", "k")
        }
    return units


_BYTES = _units("B", binary=True)
_BANDWIDTH = _units("B/s", binary=True)
_FLOPS = _units("FLOPS", "FLOP/s", binary=False)


def parse_bytes(text: str, argument: str = "memory") -> int:
    """Bytes of a text such as ``80GiB``, ``80e9`` or ``80 GB``.

    Raises:
        PipelineConfigError: it is no size, or none that a machine has.

    Example:
        >>> parse_bytes("80GiB")
        85899345920
    """
    return _parsed(text, argument, _BYTES, "80GiB")


def parse_flops(text: str, argument: str = "flops") -> int:
    """Operations per second of a text such as ``989e12`` or ``989TFLOPS``.

    Raises:
        PipelineConfigError: it is no such number.
    """
    return _parsed(text, argument, _FLOPS, "989e12")


def parse_bandwidth(text: str, argument: str) -> int:
    """Bytes per second of a text such as ``450GB/s`` or ``450e9``.

    Raises:
        PipelineConfigError: it is no such number.
    """
    return _parsed(text, argument, _BANDWIDTH, "450GB/s")


def _parsed(text: str, argument: str, units: dict[str, int], example: str) -> int:
    shown = repr(text if len(text) <= 40 else f"{text[:40]}...")
    found = _NUMBER.fullmatch(text.strip())
    if found is None or found[2] not in {"", *units}:
        known = ", ".join(list(units)[1:5])
        raise PipelineConfigError(
            f"{argument} ({shown}) must be a number, with or without a unit such as {known}: "
            f"use {argument}={example}"
        )
    value = Fraction(found[1]) * (units[found[2]] if found[2] else 1)
    if value.denominator != 1 and not found[2]:
        raise PipelineConfigError(
            f"{argument} ({shown}) must be a whole number where it has no unit: "
            f"use {argument}={example}"
        )
    if not 1 <= value <= _LARGEST:
        raise PipelineConfigError(
            f"{argument} ({shown}) must be from 1 to 2**60: use {argument}={example}"
        )
    return int(value)


def bytes_as_text(count: float) -> str:
    """Bytes with a binary unit and three or four digits.

    Example:
        >>> bytes_as_text(80 * 2**30)
        '80.0 GiB'
    """
    unit = 0
    while count >= 1000 and unit < 5:
        count, unit = count / 1024, unit + 1
    name = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")[unit]
    return f"{count:.0f} {name}" if unit == 0 or count >= 100 else f"{count:.1f} {name}"


def count_as_text(count: float) -> str:
    """A number with a decimal prefix and three digits.

    Example:
        >>> count_as_text(1.4159e6)
        '1.42M'
    """
    unit = 0
    while count >= 999.5 and unit < 5:
        count, unit = count / 1000, unit + 1
    return f"{count:.3g}{('', 'k', 'M', 'G', 'T', 'P')[unit]}"


def parameters_as_text(count: int) -> str:
    """A model's size as models are named, with four digits.

    Example:
        >>> parameters_as_text(405_853_388_800), parameters_as_text(478_112)
        ('405.9B', '478.1K')
    """
    for unit, factor in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= factor:
            return f"{count / factor:.4g}{unit}"
    return str(count)


def seconds_as_text(seconds: float) -> str:
    """Seconds with a unit and three digits.

    Example:
        >>> seconds_as_text(0.0123)
        '12.3 ms'
    """
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    raise AssertionError("the last unit takes all")
