"""Generates one shard of a set; its bytes depend on the set's settings and its number alone."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from var_deploy.config import Loaded
from var_deploy.datasets.formats import Row, pack
from var_deploy.datasets.spec import DECIDED, DECIDED_OF_TEXT, PromptSpec, SetSpec
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
    or not of one text encoder, and what `Pipeline.features` and `Pipeline.draw` raise.
    """
    check_pipeline(pipe, spec)
    rows = _draw(pipe, spec, shard, on_images or (lambda done: None))
    return pack(spec.format, rows, pipe.manifest.labels)


def described(pipe: Pipeline, spec: SetSpec) -> Loaded:
    """Return `Pipeline.describe`, for a set of prompts with the text encoder, which is loaded.

    Raises what `Pipeline.describe_text_encoder` raises.
    """
    how = pipe.describe()
    if spec.prompts is None:
        return how
    return dataclasses.replace(how, text_encoder=pipe.describe_text_encoder())


def check_pipeline(pipe: Pipeline, spec: SetSpec) -> None:
    """Raise UsageError where the pipeline would not generate the images of this set."""
    how = described(pipe, spec)
    found = {**{name: getattr(how, name) for name in DECIDED}, "bundle": pipe.manifest.digest()}
    _compare("pipeline", found, spec)
    if spec.prompts is not None:
        assert how.text_encoder is not None
        text = {name: getattr(how.text_encoder, name) for name in DECIDED_OF_TEXT}
        text["text_encoder"] = how.text_encoder.settings["digest"]
        _compare("pipeline's text encoder", text, spec.prompts)


def _compare(what: str, found: Mapping[str, str], expected: SetSpec | PromptSpec) -> None:
    for name, own in found.items():
        if own != (needed := getattr(expected, name)):
            title = "digest" if name == "text_encoder" else name
            raise UsageError(f"the {what} has {title} {own}, the set needs {needed}")


def _draw(
    pipe: Pipeline, spec: SetSpec, shard: int, on_images: Callable[[int], object]
) -> Iterator[Row]:
    from var_deploy.runtime.request import Request

    numbers, batch = spec.numbers(shard), pipe.manifest.batch
    for first in range(0, len(numbers), batch):
        drawn = numbers[first : first + batch]
        texts = [text for n in drawn if (text := spec.prompt(n)) is not None]
        negatives = [spec.negative] * len(texts) if spec.negative else None
        request = Request(
            labels=[spec.label(n) or 0 for n in drawn],
            rng_keys=[(spec.seed, n) for n in drawn],
            sampling=spec.sampling,
            prompts=pipe.features(texts, negatives) if texts else None,
        )
        for number, image in zip(drawn, pipe.draw(request), strict=True):
            stream = io.BytesIO()
            write_png(stream, image, {})
            yield Row(
                number=number,
                seed=spec.seed,
                label=spec.label(number),
                prompt=spec.prompt(number),
                png=stream.getvalue(),
            )
        on_images(first + len(drawn))
