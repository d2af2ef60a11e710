"""Turns the body of a request into a `GenerationRequest`, or refuses it."""

from __future__ import annotations

import dataclasses
import warnings

from PIL import Image

from var_deploy import names
from var_deploy.errors import UsageError
from var_deploy.image.editing import Edit, Variation, box_mask
from var_deploy.image.pictures import Mask, frame_of, read_edit, read_pictures, upright
from var_deploy.manifest import Manifest
from var_deploy.runtime.request import Request, label_numbers
from var_deploy.sampling import Sampling, call_keys, series
from var_deploy.serving.backend import GenerationRequest
from var_deploy.serving.bodies import EncodedText
from var_deploy.serving.schemas import Body, EditBody, ImagesBody, Label, VaryBody
from var_deploy.serving.settings import Settings
from var_deploy.text.prompt_tokenizer import check_sent_prompt

FORMATS = ("PNG", "JPEG", "WEBP")


class TooLargeError(UsageError):
    """A picture has more pixels than the service takes."""


def validate_images(
    body: ImagesBody, manifest: Manifest, limits: Settings, previews: bool = False
) -> GenerationRequest:
    """Convert the body of /v1/images to a request.

    Raises UsageError for labels, prompts, seeds, counts or settings out of range.
    """
    if manifest.takes_text:
        prompts = _prompts(body, limits)
        if prompts is None:
            raise UsageError("this bundle takes prompts: send prompts, such as [\"a red fox\"]")
        return _work_in_words(body, manifest, prompts, limits, previews)
    return _work(body, manifest, _labels(body), limits, previews)


def validate_edit(
    body: EditBody, manifest: Manifest, limits: Settings, precision: str, previews: bool = False
) -> GenerationRequest:
    """Convert the body of /v1/edit to a request.

    Decodes the picture, which takes time and much memory: not to be called in an event loop, nor in
    two threads at a time. Raises UsageError as `validate_images` does, and for data that is not a
    picture or not a mask of it.
    """
    if (body.mask is None) == (body.box is None):
        raise UsageError("an edit needs a mask or a box, and not both")
    # all of this before anything is unpacked
    work = _from_picture(body, manifest, limits, precision, previews)
    return dataclasses.replace(work, edit=_edit(body, manifest, limits))


def validate_vary(
    body: VaryBody, manifest: Manifest, limits: Settings, precision: str, previews: bool = False
) -> GenerationRequest:
    """Convert the body of /v1/vary to a request; decodes the picture, see `validate_edit`.

    Raises UsageError as `validate_edit` does, and for a scale that the model does not have.
    """
    scales = manifest.model.scales
    if not 0 <= body.from_scale <= scales:
        raise UsageError(f"from_scale must lie between 0 and {scales}, found {body.from_scale}")
    work = _from_picture(body, manifest, limits, precision, previews)
    tokenizer = manifest.model.tokenizer
    picture = open_picture(body.image, "the picture", limits.pixels)
    pixels = read_pictures(picture, frame_of(tokenizer), tokenizer.image_channels)
    return dataclasses.replace(work, edit=Variation(pixels=pixels, from_scale=body.from_scale))


def _from_picture(
    body: EditBody | VaryBody,
    manifest: Manifest,
    limits: Settings,
    precision: str,
    previews: bool,
) -> GenerationRequest:
    """What all requests with a picture have in common, without the picture."""
    if not can_edit(manifest, precision):
        raise UsageError("the bundle has no encoder, so it cannot edit; export it again")
    if manifest.takes_text:
        prompts = _prompts(body, limits)
        prompts = [""] if prompts is None else prompts
        if len(prompts) > 1:
            raise UsageError(
                f"prompt takes one text here, found {len(prompts)}: send several requests"
            )
        return _work_in_words(body, manifest, prompts, limits, previews)
    labels = _labels(body)
    if len(labels) > 1:
        raise UsageError(f"label takes one class here, found {len(labels)}: send several requests")
    return _work(body, manifest, labels, limits, previews)


def can_edit(manifest: Manifest, precision: str) -> bool:
    return names.ENCODER in manifest.graphs[precision]


def _edit(body: EditBody, manifest: Manifest, limits: Settings) -> Edit:
    tokenizer = manifest.model.tokenizer
    picture = open_picture(body.image, "the picture", limits.pixels)
    picture = upright(picture, tokenizer.image_channels)
    mask: Mask
    if body.box is not None:
        mask = box_mask(body.box, picture.height, picture.width)
    else:
        assert body.mask is not None  # or there is a box
        mask = open_picture(body.mask, "the mask", limits.pixels)
    return read_edit(
        picture, mask, tokenizer, outside=body.outside, keep_pixels=body.keep_pixels
    )


def open_picture(text: EncodedText, what: str, pixels: int) -> Image.Image:
    """A picture that was sent as base64, its header read and its size looked at.

    Raises TooLargeError, and UsageError for what is no base64 or no picture.
    """
    try:
        data = text.base64()
    except ValueError:
        raise UsageError(f"{what} is no base64") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(data, formats=FORMATS)
        if image.width * image.height > pixels:
            raise Image.DecompressionBombError
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLargeError(
            f"{what} has more than the {pixels} pixels that this service takes; make it smaller"
        ) from None
    except Exception:  # a damaged file raises whatever its decoder stumbles over
        raise UsageError(f"{what} is no PNG, JPEG or WebP, or a damaged one") from None
    return image


def _labels(body: ImagesBody | EditBody | VaryBody) -> list[Label | None]:
    """Return the labels in a body, by either name of the field; [None] where it has none."""
    if {"label", "labels"} <= body.model_fields_set:
        raise UsageError("label and labels are two names of one field: send one of them")
    given = body.labels if body.label is None else body.label
    if given == []:
        raise UsageError("labels is empty: name some, or leave it out to draw without a class")
    if given is None or isinstance(given, list):
        return given or [None]
    return [given]


def _work(
    body: ImagesBody | EditBody | VaryBody,
    manifest: Manifest,
    labels: list[Label | None],
    limits: Settings,
    previews: bool,
) -> GenerationRequest:
    """Convert a body for a bundle that takes labels, or no condition at all."""
    if body.prompt is not None or body.prompts is not None or body.negative:
        takes = "labels" if manifest.model.transformer.conditional else "no condition"
        raise UsageError(f"this bundle takes {takes}, not prompts: leave prompts and negative out")
    wanted, each = series(labels, body.seed, _count(body, len(labels), limits))
    numbers = label_numbers(manifest, wanted)
    request = Request(
        labels=numbers, rng_keys=call_keys(each), sampling=_sampling(body, manifest)
    )
    return GenerationRequest(request=request, previews=previews, deadline=_deadline(body))


def _work_in_words(
    body: ImagesBody | EditBody | VaryBody,
    manifest: Manifest,
    prompts: list[str],
    limits: Settings,
    previews: bool,
) -> GenerationRequest:
    """Convert a body for a bundle that takes prompts; the backend computes their features."""
    if body.label is not None or body.labels is not None:
        raise UsageError("this bundle takes prompts, not labels: send prompts")
    negative = _text(body.negative or "", "negative", limits)
    count = _count(body, len(prompts), limits)
    wanted, each = series(prompts, body.seed, count, what="prompt")
    request = Request(
        labels=[0] * count, rng_keys=call_keys(each), sampling=_sampling(body, manifest)
    )
    return GenerationRequest(
        request=request,
        prompts=tuple(wanted),
        negative=negative,
        previews=previews,
        deadline=_deadline(body),
    )


def _prompts(body: ImagesBody | EditBody | VaryBody, limits: Settings) -> list[str] | None:
    """Return the prompts in a body, by either name of the field; None where it has none."""
    if body.prompt is not None and body.prompts is not None:
        raise UsageError("prompt and prompts are two names of one field: send one of them")
    given = body.prompts if body.prompt is None else body.prompt
    if given is None:
        return None
    if given == []:
        raise UsageError("prompts is empty: send one text or more")
    texts = given if isinstance(given, list) else [given]
    return [_text(text, "prompt", limits) for text in texts]


def _text(text: str, what: str, limits: Settings) -> str:
    """Return the text of a prompt. Raises UsageError as `check_sent_prompt`: at the text encoder it
    would fail the whole launch."""
    check_sent_prompt(text, what, limits.prompt)
    return text


def _count(body: ImagesBody | EditBody | VaryBody, given: int, limits: Settings) -> int:
    """Return the number of images; by default one per label, prompt or seed."""
    seeds = len(body.seed) if isinstance(body.seed, list) else 1
    count = max(given, seeds) if body.count is None else body.count
    if not 1 <= count <= limits.count:
        raise UsageError(f"count must lie between 1 and {limits.count}, found {count}")
    return count


def _sampling(body: Body, manifest: Manifest) -> Sampling:
    return manifest.sampling(
        cfg=body.cfg, top_k=body.top_k, top_p=body.top_p, temperature=body.temperature
    )


def _deadline(body: Body) -> float | None:
    """Return the deadline in seconds; bounded above too, since a clock cannot hold any number."""
    if body.deadline is not None and not 0 < body.deadline <= 86400:
        raise UsageError(
            f"deadline must be a number of seconds above 0 and up to 86400, found {body.deadline}"
        )
    return body.deadline
