"""Draws docs/schedule.svg, the picture at the top of the README: python docs/draw_schedule.py."""

from pathlib import Path

from hfpp.plan.render import schedule_svg
from hfpp.plan.schedules import compute_table, find_schedule

PICTURE = Path(__file__).with_name("schedule.svg")


def draw() -> str:
    """The schedule of `make demo`: 8 stages on 4 ranks, 8 microbatches."""
    spec = find_schedule("Interleaved1F1B")
    return schedule_svg(compute_table(spec, pp_size=4, stages_per_rank=2, n_microbatches=8))


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
