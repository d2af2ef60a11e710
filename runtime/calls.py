"""The images that a call of `Pipeline` asks for, by labels or by prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from var_deploy.errors import UsageError
from var_deploy.manifest import Manifest
from var_deploy.runtime.prompts import PromptRows
from var_deploy.runtime.request import Request, label_numbers
from var_deploy.runtime.text_features import TextFeatures
from var_deploy.sampling import Sampling, call_keys, series

# texts, or their features
Prompts: TypeAlias = str | Sequence[str] | PromptRows


@dataclass(frozen=True, kw_only=True)
class Call:
    """The images of a call.

    Attributes:
        given: labels or prompts of the call, which images repeat in order.
        prompts: one per image, where texts were given.
        negative: the negative prompt, "" where there is none.
    """

    request: Request
    given: int
    prompts: tuple[str, ...] = ()
    negative: str = ""


def call_of(
    manifest: Manifest,
    text: TextFeatures,
    labels: Sequence[int | str | None] | None,
    prompts: Prompts | None,
    negative: str | None,
    seed: int | Sequence[int],
    count: int | None,
    sampling: Sampling,
) -> Call:
    """Return the images of a call of `Pipeline.generate`, whose arguments these are.

    No label is "no class"; a text-to-image model needs prompts. Raises UsageError (LabelError) for
    the wrong kind of condition and as `generate`.
    """
    if manifest.takes_text:
        if labels is not None:
            raise UsageError("this bundle takes prompts, not labels: give prompts=[…]")
        if prompts is None:
            raise UsageError("this bundle takes prompts: give prompts=[…]")
        return _in_words(text, prompts, negative, seed, count, sampling)
    if prompts is not None or negative:
        text([])  # says what the bundle takes
    numbers = label_numbers(manifest, [None] if labels is None else labels)
    numbers, seeds = series(numbers, seed, count)
    request = Request(labels=numbers, rng_keys=call_keys(seeds), sampling=sampling)
    return Call(request=request, given=1 if labels is None else len(labels))


def call_anew(
    manifest: Manifest,
    text: TextFeatures,
    label: int | str | None,
    prompt: str | PromptRows | None,
    negative: str | None,
    seed: int | Sequence[int],
    count: int | None,
    sampling: Sampling,
) -> Call:
    """Return the images of an edit or a variation, which have one label or one prompt."""
    words = manifest.takes_text
    labels = None if words and label is None else [label]
    prompts = "" if words and prompt is None else prompt
    return call_of(manifest, text, labels, prompts, negative, seed, count, sampling)


def _in_words(
    text: TextFeatures,
    prompts: Prompts,
    negative: str | None,
    seed: int | Sequence[int],
    count: int | None,
    sampling: Sampling,
) -> Call:
    texts: list[str] = []
    if isinstance(prompts, PromptRows):
        if negative:
            raise UsageError("the negative prompt of features is part of them: leave it out")
        rows = prompts
    else:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = text(texts, [negative] * len(texts) if negative else None)
    chosen, seeds = series(range(len(rows)), seed, count, what="prompt")
    request = Request(
        labels=[0] * len(chosen),
        rng_keys=call_keys(seeds),
        sampling=sampling,
        prompts=rows.rows(chosen),
    )
    return Call(
        request=request,
        given=len(rows),
        prompts=tuple(texts[n] for n in chosen) if texts else (),
        negative=negative or "",
    )
