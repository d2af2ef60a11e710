"""A small set, and a stand-in for the pipeline whose images tell what they were asked with."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from var_deploy.config import Loaded
from var_deploy.datasets.folder import SetFolder
from var_deploy.datasets.spec import PromptSpec, SetSpec
from var_deploy.runtime.request import Request
from var_deploy.sampling import BitSampling, Sampling

DIGEST = "ab" * 32
PROMPTS = ("a red fox", "the sea", "狐狸")


class FakePipeline:
    """Draws noise that depends on seed, number and label of an image; remembers the requests."""

    def __init__(self, batch: int = 2, channels: int = 3) -> None:
        self.manifest = types.SimpleNamespace(batch=batch, labels=(), digest=lambda: DIGEST)
        self.requests: list[Request] = []
        self.before: Callable[[], object] = lambda: None
        self._channels = channels

    def describe(self) -> Loaded:
        return Loaded(precision="fp32", backend="onnxruntime-cpu", layout="shared")

    def describe_text_encoder(self) -> Loaded:
        about = {"digest": DIGEST[::-1]}
        return Loaded(precision="fp16", backend="onnxruntime-cuda", layout="", settings=about)

    def features(self, prompts: Sequence[str], negatives: Sequence[str] | None = None) -> Any:
        return list(prompts), negatives

    def draw(self, request: Request) -> NDArray[np.uint8]:
        self.before()
        self.requests.append(request)
        return np.stack(
            [
                np.random.default_rng([*stream, label]).integers(
                    0, 256, (8, 8, self._channels), np.uint8
                )
                for stream, label in zip(request.rng_keys, request.labels, strict=True)
            ]
        )


@pytest.fixture
def new_spec() -> Callable[..., SetSpec]:
    """Settings of a set of 15 images in shards of 4; keyword arguments override any."""

    def build(**changes: Any) -> SetSpec:
        settings: dict[str, Any] = {
            "bundle": DIGEST,
            "precision": "fp32",
            "backend": "onnxruntime-cpu",
            "layout": "shared",
            "sampling": Sampling(cfg=2.0),
            "seed": 9,
            "classes": 5,
            "per_class": 3,
            "shard_size": 4,
        }
        return SetSpec(**{**settings, **changes})

    return build


@pytest.fixture
def spec(new_spec: Callable[..., SetSpec]) -> SetSpec:
    return new_spec()


@pytest.fixture
def new_prompt_spec(new_spec: Callable[..., SetSpec]) -> Callable[..., SetSpec]:
    """Settings of a set of 6 images of three prompts in shards of 4; keyword arguments override
    any."""

    def build(**changes: Any) -> SetSpec:
        prompts = dataclasses.replace(
            PromptSpec.of(PROMPTS, "fog", DIGEST[::-1]),
            precision="fp16",
            backend="onnxruntime-cuda",
        )
        own = {"sampling": BitSampling(), "classes": 0, "per_class": 2, "prompts": prompts}
        return new_spec(**{**own, **changes})

    return build


@pytest.fixture
def new_pipe() -> Callable[..., Any]:
    return FakePipeline


@pytest.fixture
def pipe() -> Any:
    return FakePipeline()


@pytest.fixture
def folder(tmp_path: Path) -> SetFolder:
    """Of a set that was not begun."""
    return SetFolder(path=tmp_path / "set")
