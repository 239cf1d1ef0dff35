"""Spans of bars, as users write them."""

from __future__ import annotations

import re


def bar_span(text: str, count: int) -> tuple[int, int]:
    """Read ``9:12``, the bars 9 to 12 with both of them, or ``9``, that bar alone.

    Args:
        text: What the user wrote; a side that is left out is the first or last bar.
        count: Bars that there are.

    Returns:
        First and last bar, counted from 1.

    Raises:
        ValueError: If it is no span, or there are no such bars.
    """
    found = re.fullmatch(r"\s*(\d*)\s*(:?)\s*(\d*)\s*", text)
    if not found or not any(found.groups()):
        raise ValueError(f"bars are written 9:12, or 9 for one, got {text!r}.")
    first = int(found[1] or 1)
    last = int(found[3] or count) if found[2] else first
    if not 1 <= first <= last <= count:
        raise ValueError(f"the file has bars 1 to {count}, got {text!r}.")
    return first, last
