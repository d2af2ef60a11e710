"""Previews of images after each scale, saved as a strip (PNG) or as a GIF."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from var_deploy.image.images import BACKGROUND, grid, save_gif, save_image
from var_deploy.manifest import Manifest

if TYPE_CHECKING:
    from var_deploy.runtime.request import ScaleEvent

MOST_IMAGES = 32  # every one is kept K times
SCALE_MS, LAST_MS = 350, 1800  # how long a GIF shows a scale, and the image


class Filmstrip:
    """Remembers N images after each scale; `see` is for `on_scale`."""

    def __init__(self, manifest: Manifest, count: int) -> None:
        tokenizer, scales = manifest.model.tokenizer, manifest.model.scales
        size = tokenizer.image_size
        shape = (scales, count, *size, tokenizer.image_channels)
        self._frames = np.full(shape, BACKGROUND, np.uint8)
        self._done = np.zeros(count, np.int64)

    def see(self, event: ScaleEvent) -> None:
        rows = slice(event.first, event.first + len(event.tokens))
        self._done[rows] = event.scale + 1
        if event.scale + 1 < event.scales:  # what comes after the last one is the image itself
            self._frames[event.scale, rows] = event.preview()

    def finish(self, images: NDArray[np.uint8]) -> None:
        """Add the images [N, H, W, C]: what each looks like after its last scale, and from there
        on where it was stopped early."""
        for n, done in enumerate(self._done):
            self._frames[done - 1 :, n] = images[n]

    def save_strip(self, path: Path, text: Mapping[str, str]) -> None:
        """Save a grid: a row per image, a column per scale; white where an image was stopped."""
        rows = self._frames.swapaxes(0, 1).copy()  # [N, K, H, W, C]
        scales = rows.shape[1]
        rows[np.arange(scales) >= self._done[:, None]] = BACKGROUND
        save_image(path, grid(rows.reshape(-1, *rows.shape[2:]), columns=scales), text)

    def save_gif(self, path: Path, columns: int | None = None) -> None:
        """Save a GIF with a frame per scale; each shows the grid of all images."""
        frames = np.stack(
            [frame[0] if len(frame) == 1 else grid(frame, columns) for frame in self._frames]
        )
        save_gif(path, frames, [SCALE_MS] * (len(frames) - 1) + [LAST_MS])
