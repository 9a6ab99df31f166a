"""A picture as a part of an HTML page."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from hfpp.plan.render.svg import facts, timeline_svg

if TYPE_CHECKING:
    from hfpp.plan.render.timeline import Timeline

__all__ = ["timeline_html"]


def timeline_html(
    timeline: Timeline, *, title: str | None = None, caption: str | None = None
) -> str:
    """A figure with the picture of a timeline in it, for a page that loads nothing from outside.

    Args:
        timeline: simulated or recorded.
        title: the picture's heading; None: the timeline's name.
        caption: plain text under it; None: what the timeline is, in a line.

    Returns:
        A ``<figure>`` that scrolls where the page is narrower than the picture; it has no ids, so
        that a page can hold several.
    """
    picture = timeline_svg(timeline, title=title)
    words = escape(facts(timeline) if caption is None else caption)
    return (
        '<figure class="schedule" style="margin:1em 0;overflow-x:auto">\n'
        f"{picture}<figcaption>{words}</figcaption>\n</figure>\n"
    )
