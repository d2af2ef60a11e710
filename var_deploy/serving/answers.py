"""Drawn images as PNG and as JSON."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from var_deploy.images import grid, settings_text
from var_deploy.manifest import Manifest
from var_deploy.sampling import Sampling
from var_deploy.serving.backend import Drawn, Work
from var_deploy.serving.schemas import Answer, DrawnImage


def png(
    image: NDArray[np.uint8], text: Mapping[str, str] | None = None, *, quick: bool = False
) -> bytes:
    """An image [H, W, C] as PNG with `text` as text chunks; `quick` takes more bytes."""
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    stream = io.BytesIO()
    pixels = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    pixels.save(stream, format="png", pnginfo=chunks, compress_level=1 if quick else 6)
    return stream.getvalue()


def as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def label_name(manifest: Manifest, number: int) -> str | int | None:
    """Name or number of a class; None for "no class"."""
    transformer = manifest.model.transformer
    if not transformer.conditional or number >= transformer.classes:
        return None
    return manifest.labels[number] if manifest.labels else number


def label_text(manifest: Manifest, number: int) -> str:
    name = label_name(manifest, number)
    return "none" if name is None else f"{number} {name}" if manifest.labels else str(number)


def about(manifest: Manifest, precision: str, work: Work, images: Sequence[int]) -> dict[str, str]:
    """What a PNG of some of the images says of itself, in the words of `var-deploy generate`."""
    request = work.request
    streams = [request.streams[n] for n in images]
    seeds = list(dict.fromkeys(seed for seed, _ in streams))
    labels = [label_text(manifest, request.labels[n]) for n in images]
    return {
        **settings_text(manifest, precision, request.sampling, seeds),
        "labels": ", ".join(labels),
        "image": ",".join(str(number) for _, number in streams),
    }


def as_png(manifest: Manifest, precision: str, work: Work, drawn: Drawn) -> bytes:
    """One PNG, a grid where there are several images."""
    text = about(manifest, precision, work, range(work.count))
    return png(drawn.images[0] if work.count == 1 else grid(drawn.images), text)


def as_json(
    manifest: Manifest, precision: str, work: Work, drawn: Drawn, seconds: float
) -> Answer:
    images = [
        DrawnImage(
            png=as_text(png(image, about(manifest, precision, work, [n]))),
            label=label_name(manifest, work.request.labels[n]),
            seed=work.request.streams[n][0],
            number=work.request.streams[n][1],
            scales_done=int(drawn.scales_done[n]),
        )
        for n, image in enumerate(drawn.images)
    ]
    return Answer(
        images=images,
        settings=plain_settings(work.request.sampling),
        digest=manifest.digest(),
        seconds=round(seconds, 3),
    )


def plain_settings(sampling: Sampling) -> dict[str, Any]:
    """Numbers, or lists of one a scale."""
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(sampling)
        for value in [getattr(sampling, field.name)]
    }
