"""Answers of the service: generated images as PNG and as JSON."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy.image.images import grid, label_text, prompt_text, settings_text, write_png
from var_deploy.manifest import Manifest
from var_deploy.sampling import Sampling
from var_deploy.serving.backend import Drawn, GenerationRequest
from var_deploy.serving.schemas import Answer, DrawnImage


def png(
    image: NDArray[np.uint8], text: Mapping[str, str] | None = None, *, quick: bool = False
) -> bytes:
    """Encode an image [H, W, C] as PNG with `text` as text chunks; `quick`: faster, larger."""
    stream = io.BytesIO()
    write_png(stream, image, text or {}, quick=quick)
    return stream.getvalue()


def as_text(data: bytes) -> str:
    """Encode bytes as base64."""
    return base64.b64encode(data).decode()


def label_of(manifest: Manifest, number: int) -> int | None:
    """Return the label of a class number; None for the number that stands for "no class"."""
    transformer = manifest.model.transformer
    return number if transformer.conditional and number < transformer.classes else None


def label_name(manifest: Manifest, number: int) -> str | int | None:
    """Return the name of a class, else its number; None for "no class"."""
    label = label_of(manifest, number)
    return label if label is None or not manifest.labels else manifest.labels[label]


def about(
    manifest: Manifest, precision: str, work: GenerationRequest, images: Sequence[int]
) -> dict[str, str]:
    """Return the text chunks for a PNG of some of the images, as `var-deploy generate` has them."""
    request = work.request
    seeds = [request.rng_keys[n][0] for n in images]
    text = settings_text(manifest, precision, request.sampling, seeds)
    if work.negative:
        text["negative"] = work.negative
    if work.prompts:
        return {**text, "prompt": prompt_text([work.prompts[n] for n in images])}
    labels = [label_text(label_of(manifest, request.labels[n]), manifest) for n in images]
    return {**text, "labels": ", ".join(labels)}


def as_png(manifest: Manifest, precision: str, work: GenerationRequest, drawn: Drawn) -> bytes:
    """Encode the images of a request as one PNG: a grid where there are several."""
    text = about(manifest, precision, work, range(work.count))
    return png(drawn.images[0] if work.count == 1 else grid(drawn.images), text)


def as_json(
    manifest: Manifest, precision: str, work: GenerationRequest, drawn: Drawn, seconds: float
) -> Answer:
    """Return the JSON answer to a request; `seconds` since it was received."""
    images = [
        DrawnImage(
            png=as_text(png(image, about(manifest, precision, work, [n]))),
            label=label_name(manifest, work.request.labels[n]),
            prompt=work.prompts[n] if work.prompts else None,
            seed=work.request.rng_keys[n][0],
            number=work.request.rng_keys[n][1],
            scales_done=int(drawn.scales_done[n]),
        )
        for n, image in enumerate(drawn.images)
    ]
    return Answer(
        images=images,
        settings=plain_settings(work.request.sampling),
        digest=manifest.digest(),
        seconds=round(seconds, 3),
        remarks=list(drawn.remarks),
        unknown=list(drawn.unknown),
    )


def plain_settings(sampling: Sampling) -> dict[str, Any]:
    """Return each setting as JSON: a number, or a list of one number per scale."""
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(sampling)
        for value in [getattr(sampling, field.name)]
    }
