"""The drawing for terminals: what stands in it, how wide it is, with and without colours."""

from __future__ import annotations

import io
import itertools
import re
from collections import Counter
from typing import Any

import pytest
from rich.console import Console

from hfpp.commands.terminal import print_timelines
from hfpp.plan.render.chrome_trace import Take
from hfpp.plan.render.colours import shade
from hfpp.plan.render.planned import planned
from hfpp.plan.render.terminal import Look, terminal_lines
from hfpp.plan.render.timeline import Timeline
from hfpp.plan.schedules import SCHEDULES, ActionKind, compute_table
from hfpp.plan.schedules.simulator import Link, uniform_costs


def timeline_of(name: str, pp_size: int, n_microbatches: int, latency: float = 0.0) -> Timeline:
    table = compute_table(SCHEDULES[name], pp_size=pp_size, n_microbatches=n_microbatches)
    costs = uniform_costs(table.num_stages)
    return planned(table, costs, link=Link(latency=latency), unit="")


def lines_of(line: Timeline, **look: Any) -> list[str]:
    found = terminal_lines(line, Look(**{"colours": False, **look}))
    return ["".join(piece.words for piece in pieces) for pieces in found]


def cells(line: str) -> str:
    """The bars of one rank's line."""
    match = re.fullmatch(r" *rank \d+ (.*?) +[\d.]+ % +[\d,]+", line)
    assert match, line
    return match[1]


def printed(*takes: Take, **terminal: Any) -> str:
    file = io.StringIO()
    console = Console(file=file, width=100, highlight=False, **terminal)
    print_timelines("title", takes, console=console)
    return file.getvalue()


def test_without_colours_letters_and_numbers_tell_all() -> None:
    """Two cells per unit of time: the whole drawing by hand."""
    lines = lines_of(timeline_of("1F1B", 2, 2), width=7 + 18 + 8 + 11)
    assert [line.rstrip() for line in lines] == [
        "                             idle  peak live",
        "rank 0 F0F1····B0──··B1──  33.3 %          2",
        "       ▄▄██████████▄▄▄▄▄▄",
        "rank 1 ··F0B0──F1B1──····  33.3 %          1",
        "         ▄▄▄▄▄▄▄▄▄▄▄▄",
        "  time 0",
    ]


@pytest.mark.parametrize("width", [60, 100, 230])
@pytest.mark.parametrize(
    ("name", "pp_size", "n_microbatches"),
    [("1F1B", 4, 8), ("DualPipeV", 8, 16), ("ZBVZeroBubble", 16, 32), ("1F1B", 64, 64)],
)
def test_every_line_is_as_wide_as_asked_for(
    name: str, pp_size: int, n_microbatches: int, width: int
) -> None:
    line = timeline_of(name, pp_size, n_microbatches)
    for colours in (True, False):
        lines = lines_of(line, width=width, colours=colours)
        ranks = [text for text in lines if text.lstrip().startswith("rank ")]
        assert len(ranks) == pp_size
        assert {len(text) for text in ranks} == {width}
        assert max(map(len, lines)) <= width
        assert len(lines) == 2 + pp_size * (2 if pp_size <= 8 else 1)


@pytest.mark.parametrize(("name", "pp_size"), [("1F1B", 4), ("ZBVZeroBubble", 2)])
def test_every_computation_is_there_where_there_is_room(name: str, pp_size: int) -> None:
    line = timeline_of(name, pp_size, 8)
    ranks = [text for text in lines_of(line, width=240) if text.startswith("rank ")]
    for row, text in enumerate(ranks):
        found = Counter(re.findall(r"[FBIW]\d+", cells(text)))
        expected = Counter(f"{b.action.kind.value}{b.action.microbatch}" for b in line.bars[row])
        assert found == expected


def test_letters_that_are_too_many_occur_as_often_as_their_computations_take_time() -> None:
    line = timeline_of("1F1B", 16, 160)
    text = cells(lines_of(line, width=120)[-2])
    shares = {letter: text.count(letter) / len(text) for letter in "FB·"}
    busy = 1 - line.idle_of(15)
    expected = {"F": busy / 3, "B": busy * 2 / 3, "·": 1 - busy}
    assert shares == pytest.approx(expected, abs=0.03)


def test_heights_show_what_is_held() -> None:
    lines = lines_of(timeline_of("GPipe", 2, 8), width=120)
    heights = lines[2].strip()
    assert list(heights) == sorted(heights[: heights.rindex("█")]) + list(
        heights[heights.rindex("█") :]
    )
    assert heights[0] == heights[-1] == "▁"
    plain = lines_of(timeline_of("GPipe", 2, 8), width=120, plain=True)
    assert all(text.isascii() for text in plain)
    assert "9" in plain[2]


def test_messages_on_their_way_are_seen_in_idle_time() -> None:
    assert "→" not in "".join(lines_of(timeline_of("1F1B", 2, 2), width=44))
    lines = lines_of(timeline_of("1F1B", 2, 2, latency=1.0), width=7 + 22 + 8 + 11)
    assert cells(lines[1]) == "F0F1······→→B0──→→B1──"
    assert cells(lines[3]) == "··→→F0B0──F1B1──······"


def test_colours_are_those_of_the_picture_and_numbers_do_not_run_together() -> None:
    line = timeline_of("Interleaved1F1B", 4, 12)
    found = list(terminal_lines(line, Look(width=110, colours=True)))
    papers = {piece.paper for pieces in found for piece in pieces} - {None}
    kinds = (ActionKind.FORWARD, ActionKind.FULL_BACKWARD)
    assert papers == {shade(kind, chunk, 2) for kind in kinds for chunk in (0, 1)}
    for pieces in found:
        for one, other in itertools.pairwise(pieces):
            if one.paper is not None and one.paper == other.paper:
                assert not (one.words[-1:].isdigit() and other.words[:1].isdigit()) or (
                    len(one.words) == len(other.words) == 1
                )


def test_a_terminal_gets_colours_and_a_pipe_gets_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    take = Take(timeline_of("1F1B", 4, 8))
    coloured = printed(take, force_terminal=True, color_system="truecolor")
    assert "\x1b[" in coloured
    assert "48;2;45;105;214" in coloured
    piped = printed(take)
    assert "\x1b[" not in piped
    assert "F forward   B backward   · idle" in piped
    monkeypatch.setenv("NO_COLOR", "1")
    without = printed(take, force_terminal=True, color_system="truecolor")
    assert "48;2" not in without
    assert "F forward   B backward   · idle" in without


def test_an_ascii_terminal_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    table = compute_table(SCHEDULES["1F1B"], pp_size=4, n_microbatches=8)
    costs = uniform_costs(4, forward=1e-6, backward=2e-6)
    take = Take(planned(table, costs, link=Link(latency=1e-6), unit="s"))
    print_timelines("4 ü µ", [take], console=Console(file=file, width=100))
    file.flush()
    assert raw.getvalue().startswith(b"4 ? u\n4 ranks, 4 stages, 8 microbatches, ")
    assert b"time, us 0" in raw.getvalue()
    assert b"> idle, message on its way" in raw.getvalue()


def test_two_timelines_have_one_scale() -> None:
    table = compute_table(SCHEDULES["1F1B"], pp_size=2, n_microbatches=4)
    short, long = (
        planned(table, uniform_costs(2, forward=f, backward=2 * f), unit="s") for f in (1.0, 2.0)
    )
    text = printed(Take(short, "planned"), Take(long, "recorded", step=7))
    ranks = [line for line in text.splitlines() if line.lstrip().startswith("rank 0")]
    assert "recorded: 2 ranks · 2 stages · 4 microbatches · 20.0 % idle · 30 s · step 7" in text
    above, below = (len(cells(line)) for line in ranks)
    assert above == pytest.approx(below / 2, abs=1)
