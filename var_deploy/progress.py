"""How long work that is under way will take, in words."""

from __future__ import annotations


def speed(rate: float) -> str:
    """Images in a second, or seconds for an image: "3.1/s", "4.0 s each"."""
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


def span(seconds: float) -> str:
    """A time to wait, as roughly as it is known: "8 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
