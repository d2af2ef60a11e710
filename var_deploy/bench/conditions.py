"""The labels or prompts that every worker of `bench` generates images for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from var_deploy.labels import spread_labels
from var_deploy.manifest import Manifest
from var_deploy.runtime.prompts import PromptRows
from var_deploy.runtime.request import Request
from var_deploy.sampling import call_keys
from var_deploy.spec import TextModelSpec

SEED = 0
PROMPT_TOKENS = 32  # tokens of each prompt, as far as the bundle takes them: two or three sentences
PROMPT = "a photograph of a lighthouse on a cliff at night, seen from the sea, number"


def bench_prompts(spec: TextModelSpec, images: int) -> PromptRows:
    """Return text features of `images` prompts, each of PROMPT_TOKENS tokens.

    The features are random, not encoded: the time of a generation does not depend on them, and a
    text encoder is measured by a worker of its own.
    """
    t = spec.transformer
    random = np.random.Generator(np.random.Philox(SEED))
    features = random.standard_normal((images, t.text_length, t.text_width), dtype=np.float32)
    lengths = np.full(images, min(PROMPT_TOKENS, t.text_length), np.int64)
    return PromptRows(features=features, lengths=lengths)


def bench_texts(first: int, count: int) -> list[str]:
    """Return `count` prompts from number `first` on; no two are equal, so that no features of an
    earlier one can be used again."""
    return [f"{PROMPT} {number}" for number in range(first, first + count)]


def bench_request(
    manifest: Manifest, images: int, forced: Sequence[NDArray[np.int64]] = ()
) -> Request:
    """Return the request for `images` images with the bundle's default settings.

    `forced`: tokens of the first scales that replace the sampled ones, see `Request`.
    """
    model = manifest.model
    return Request(
        labels=spread_labels(model.transformer.classes, images),
        prompts=bench_prompts(model, images) if isinstance(model, TextModelSpec) else None,
        rng_keys=call_keys(SEED, images),
        sampling=manifest.defaults,
        forced=tuple(forced),
    )
