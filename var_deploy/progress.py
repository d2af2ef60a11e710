"""The callback with which long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

# (message, fraction of the work that is done, 0 to 1)
Progress = Callable[[str, float], None]
