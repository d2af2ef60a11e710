"""The model for Triton's Python backend: requests → images of a `Pipeline`.

The backend imports the class from model.py in the version's folder, creates one instance per
process, and calls it from one thread. The tensors are declared in config.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from var_deploy.errors import BundleError, UsageError, VarDeployError
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.request import Request, label_numbers
from var_deploy.sampling import Sampling
from var_deploy.text.manifest import read_text_encoder
from var_deploy.text.prompt_tokenizer import check_sent_prompt
from var_deploy.triton.config import (
    IMAGE,
    LABEL,
    NEGATIVE,
    NO_CLASS,
    NUMBER,
    PROMPT,
    SEED,
    SETTINGS,
    TEXT_ENCODER,
    read_config,
    version_of,
)
from var_deploy.triton.repository import BUNDLE

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image of a request: label or prompts, RNG key and settings."""

    label: int
    rng_key: tuple[int, int]
    sampling: Sampling
    prompt: str = ""
    negative: str = ""

    @property
    def launch(self) -> tuple[Sampling, bool]:
        """Equal for rows that can share a launch: of its images all have a negative prompt, or none
        has."""
        return self.sampling, bool(self.negative)


class TritonPythonModel:
    """The model in one instance of the server; Triton requires the name of the class."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle. Raises TritonModelException where that fails."""
        try:
            self._pipe = _load(args)
        except VarDeployError as error:
            raise pb_utils.TritonModelException(str(error)) from None

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return one response per request: IMAGE uint8 [n, height, width, C], or its error."""
        answers: list[Any] = [None] * len(requests)
        groups: dict[tuple[Sampling, bool], list[tuple[int, int, Row]]] = {}
        images: dict[int, NDArray[np.uint8]] = {}
        for place, request in enumerate(requests):
            given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            try:
                rows = read_rows(given, self._pipe.manifest)
            except UsageError as error:
                answers[place] = _error(error, pb_utils.TritonError.INVALID_ARG)
                continue
            images[place] = self._blank(len(rows))
            for number, row in enumerate(rows):
                groups.setdefault(row.launch, []).append((place, number, row))
        for members in groups.values():
            try:
                drawn = self._pipe.draw(self._request([row for _, _, row in members]))
            except VarDeployError as error:
                for place, _, _ in members:
                    answers[place] = _error(error, pb_utils.TritonError.INTERNAL)
                continue
            for image, (place, number, _) in zip(drawn, members, strict=True):
                images[place][number] = image
        return [
            answer or pb_utils.InferenceResponse([pb_utils.Tensor(IMAGE, images[place])])
            for place, answer in enumerate(answers)
        ]

    def finalize(self) -> None:
        """Close the pipeline."""
        self._pipe.close()

    def _request(self, rows: Sequence[Row]) -> Request:
        """The request for the images of rows that can share a launch."""
        prompts = None
        if self._pipe.manifest.takes_text:
            negatives = [row.negative for row in rows]
            prompts = self._pipe.features(
                [row.prompt for row in rows], negatives if any(negatives) else None
            )
        return Request(
            labels=[row.label for row in rows],
            rng_keys=[row.rng_key for row in rows],
            sampling=rows[0].sampling,
            prompts=prompts,
        )

    def _blank(self, count: int) -> NDArray[np.uint8]:
        tokenizer = self._pipe.manifest.model.tokenizer
        return np.empty((count, *tokenizer.image_size, tokenizer.image_channels), np.uint8)


def read_rows(given: Arrays, manifest: Manifest) -> list[Row]:
    """Convert the inputs [n, 1] (settings: [n, 1] or [n, K]) of a request to n rows.

    Raises UsageError for a value out of range.
    """
    seeds = given[SEED][:, 0].tolist()
    numbers = given[NUMBER][:, 0].tolist() if NUMBER in given else [0] * len(seeds)
    if min(numbers) < 0:
        raise UsageError(f"{NUMBER} must be 0 or more, found {min(numbers)}")
    labels, prompts, negatives = [0] * len(seeds), [""] * len(seeds), [""] * len(seeds)
    if manifest.takes_text:
        prompts = _texts(given, PROMPT)
        negatives = _texts(given, NEGATIVE) if NEGATIVE in given else negatives
    else:
        labels = [_label(label, manifest) for label in given[LABEL][:, 0].tolist()]
    return [
        Row(
            label=labels[n],
            prompt=prompts[n],
            negative=negatives[n],
            rng_key=(seeds[n], numbers[n]),
            sampling=manifest.sampling(
                **{
                    argument: _setting(given[name][n]) if name in given else None
                    for name, argument in SETTINGS.items()
                },
            ),
        )
        for n in range(len(seeds))
    ]


def _texts(given: Arrays, name: str) -> list[str]:
    """The texts of an input of bytes [n, 1], checked as the HTTP service checks them."""
    texts = []
    for data in given[name][:, 0].tolist():
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            raise UsageError(f"{name} is not UTF-8 text") from None
        check_sent_prompt(text, name)
        texts.append(text)
    return texts


def _label(label: int, manifest: Manifest) -> int:
    if label == NO_CLASS:
        return manifest.model.transformer.classes
    return label_numbers(manifest, [label])[0]


def _setting(values: NDArray[Any]) -> Any:
    """A setting of one row: one number, or a list with one number per scale."""
    listed = values.tolist()
    return listed[0] if len(listed) == 1 else listed


def _error(error: VarDeployError, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))


def _load(args: Mapping[str, str]) -> Pipeline:
    """Load the pipeline of the version that Triton requests."""
    folder = Path(args["model_repository"]) / args["model_version"] / BUNDLE
    parameters = json.loads(args["model_config"])["parameters"]
    config = read_config({k: v["string_value"] for k, v in parameters.items()})
    digest = read_manifest(folder).digest()
    if version_of(digest) != int(args["model_version"]):
        raise BundleError(
            f"{folder} has digest {digest[:13]}…, which is version {version_of(digest)}: another "
            "bundle lies there; write the repository again with var-deploy triton"
        )
    text, expected = folder.with_name(TEXT_ENCODER), parameters.get(TEXT_ENCODER)
    if expected and text.is_dir():
        read_text_encoder(text).check_digest(text, expected["string_value"])
    given = text if text.is_dir() else None
    pipe = Pipeline.open(folder, config, digest=digest, text_encoder=given)
    pipe.check_text_encoder()
    return pipe
