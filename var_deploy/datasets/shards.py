"""Generates one shard of a set; its bytes depend on the set's settings and its number alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from var_deploy.datasets.formats import Row, pack
from var_deploy.datasets.spec import DECIDED, SetSpec
from var_deploy.errors import UsageError
from var_deploy.image.images import write_png

if TYPE_CHECKING:
    from var_deploy.pipeline import Pipeline


def draw_shard(
    pipe: Pipeline, spec: SetSpec, shard: int, on_images: Callable[[int], object] | None = None
) -> bytes:
    """Generate a shard and return the bytes of its file, packed by `datasets.formats`.

    `on_images` is called after each batch with how many images of the shard are done.

    Raises UsageError where pipeline and set are not of one bundle, precision, backend and layout,
    and what `Pipeline.draw` raises.
    """
    check_pipeline(pipe, spec)
    rows = _draw(pipe, spec, shard, on_images or (lambda done: None))
    return pack(spec.format, rows, pipe.manifest.labels)


def check_pipeline(pipe: Pipeline, spec: SetSpec) -> None:
    """Raise UsageError where the pipeline would not generate the images of this set."""
    how = pipe.describe()
    found = {**{name: getattr(how, name) for name in DECIDED}, "bundle": pipe.manifest.digest()}
    for name, own in found.items():
        if own != (expected := getattr(spec, name)):
            raise UsageError(f"the pipeline has {name} {own}, the set needs {expected}")


def _draw(
    pipe: Pipeline, spec: SetSpec, shard: int, on_images: Callable[[int], object]
) -> Iterator[Row]:
    from var_deploy.runtime.request import Request

    numbers, batch = spec.numbers(shard), pipe.manifest.batch
    for first in range(0, len(numbers), batch):
        drawn = numbers[first : first + batch]
        labels = [spec.label(n) or 0 for n in drawn]
        streams = [(spec.seed, n) for n in drawn]
        request = Request(labels=labels, rng_keys=streams, sampling=spec.sampling)
        for number, image in zip(drawn, pipe.draw(request), strict=True):
            stream = io.BytesIO()
            write_png(stream, image, {})
            label, png = spec.label(number), stream.getvalue()
            yield Row(number=number, seed=spec.seed, label=label, png=png)
        on_images(first + len(drawn))
