"""Keeps the features of the last prompts, so that a repeated prompt needs no text encoder."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 64 << 20  # 16 prompts of 512 tokens of width 2048, or some hundred short ones


class FeatureCache:
    """Features [len, Ct] by key, least recently used ones dropped beyond `max_bytes`.

    A key holds the prompt and the digest of the text encoder, so one cache may serve several.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._held: OrderedDict[Hashable, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> NDArray[np.float32] | None:
        """Return the features, which the caller must not change; None where they are not here."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def put(self, key: Hashable, features: NDArray[np.float32]) -> None:
        """Keep features, unless they alone are larger than the cache."""
        with self._lock:
            old = self._held.pop(key, None)
            self._bytes -= 0 if old is None else old.nbytes
            if features.nbytes > self._max_bytes:
                return
            self._held[key] = features
            self._bytes += features.nbytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._held.popitem(last=False)[1].nbytes

    def __len__(self) -> int:
        return len(self._held)
