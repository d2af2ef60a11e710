"""One shard of a set: a tar of PNGs that depends on the set's settings and its number alone.

`make_shard` takes and gives plain data, so that another process, on another machine, can run it.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from var_deploy.errors import UsageError
from var_deploy.images import write_png
from var_deploy.sets.spec import SetSpec

if TYPE_CHECKING:
    from var_deploy.pipeline import Pipeline


def make_shard(
    bundle: str | os.PathLike[str], options: Mapping[str, Any], spec: SetSpec, shard: int
) -> bytes:
    """A shard from nothing: loads the bundle, draws, and lets go of it.

    `options` are those of `Pipeline.load` besides precision, backend and layout, which the set
    decides. Errors are those of `load` and of `draw_shard`. Who makes several keeps a pipeline and
    calls `draw_shard`.
    """
    from var_deploy.pipeline import Pipeline

    chosen = {"precision": spec.precision, "backend": spec.backend, "layout": spec.layout}
    with Pipeline.load(bundle, **{**options, **chosen}) as pipe:
        return draw_shard(pipe, spec, shard)


def draw_shard(
    pipe: Pipeline, spec: SetSpec, shard: int, on_images: Callable[[int], object] | None = None
) -> bytes:
    """The bytes of a shard's file.

    Each image is three members: 000000017.png; .cls, its label in digits, where the model has
    classes; .json, with seed, number and label. Nothing in them tells when or by whom it was made.

    `on_images` is called after each batch with how many images of the shard are done.

    Raises UsageError where pipeline and set are not of one bundle, precision, backend and layout,
    and what `Pipeline.draw` raises.
    """
    from var_deploy.runtime.request import Request

    check_pipeline(pipe, spec)
    numbers, batch = spec.numbers(shard), pipe.manifest.batch
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for first in range(0, len(numbers), batch):
            drawn = numbers[first : first + batch]
            labels = [spec.label(n) or 0 for n in drawn]
            streams = [(spec.seed, n) for n in drawn]
            request = Request(labels=labels, streams=streams, sampling=spec.sampling)
            for number, image in zip(drawn, pipe.draw(request), strict=True):
                for suffix, data in _members(spec, number, image):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")  # of nobody, at time 0
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
            if on_images:
                on_images(first + len(drawn))
    return stream.getvalue()


def check_pipeline(pipe: Pipeline, spec: SetSpec) -> None:
    """Raise UsageError where the pipeline would not draw the images of this set."""
    how = pipe.describe()
    own = {name: how[name] for name in ("precision", "backend", "layout")}
    own["bundle"] = pipe.manifest.digest()
    for name, found in own.items():
        if found != (expected := getattr(spec, name)):
            raise UsageError(f"a pipeline with {name} {found} draws no set with {expected}")


def read_images(path: Path) -> Iterator[NDArray[np.uint8]]:
    """Images [H, W, C] of a shard's file, in order."""
    with tarfile.open(path, mode="r:") as tar:
        for member in tar:
            if member.name.endswith(".png") and (data := tar.extractfile(member)) is not None:
                with Image.open(data) as image:
                    pixels = np.asarray(image)
                yield pixels.reshape(*pixels.shape[:2], -1)


def _members(spec: SetSpec, number: int, image: NDArray[np.uint8]) -> Iterator[tuple[str, bytes]]:
    """Suffix and contents of the files of an image."""
    stream, label = io.BytesIO(), spec.label(number)
    write_png(stream, image, {})
    yield "png", stream.getvalue()
    if label is not None:
        yield "cls", str(label).encode()
    origin = {"seed": spec.seed, "number": number, "label": label}
    yield "json", json.dumps(origin).encode()
