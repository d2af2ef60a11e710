"""How long work reports its progress, and how long it will take, in words."""

from __future__ import annotations

from collections.abc import Callable

# (message, fraction of the work that is done, 0 to 1)
Progress = Callable[[str, float], object]


def speed(rate: float) -> str:
    """Images per second, or seconds per image: "3.1/s", "4.0 s each"."""
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


def span(seconds: float) -> str:
    """Return a waiting time in words, as roughly as it is known: "8 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
