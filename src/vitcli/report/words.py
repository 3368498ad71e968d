"""Numbers and names as a report shows them."""

import json
from collections.abc import Iterable
from typing import Any

__all__ = ["in_json", "ordinal", "percent", "short_count", "shown_interval"]


def percent(share: float | None, *, digits: int = 2) -> str:
    """Return a share of 1 as per cent."""
    return "-" if share is None else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def shown_interval(name: str, interval: Iterable[float | None] | None) -> str:
    """Return an interval of the measure `name`."""
    if interval is None:
        return ""
    low, high = interval
    if low is None or high is None:
        return ""
    return f"{low:.4f} – {high:.4f}" if name == "loss" else f"{100 * low:.1f} – {100 * high:.1f}\N{NO-BREAK SPACE}%"


def ordinal(number: int) -> str:
    """Return 2nd for 2."""
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{suffix}"


def short_count(number: int) -> str:
    """Return three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number}"


def in_json(value: Any) -> str:
    """Return a setting as JSON, words as they are."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
