"""What runs in Triton's Python backend, against a stand-in for the backend's module."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cli_steps import edit
from var_deploy.errors import BackendError
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.request import Request


@dataclass
class Tensor:
    label: str
    array: NDArray[Any]

    def name(self) -> str:
        return self.label

    def as_numpy(self) -> NDArray[Any]:
        return self.array


@dataclass
class TritonError:
    message: str
    code: int

    INVALID_ARG, INTERNAL = 3, 1


@dataclass
class InferenceResponse:
    tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None


@dataclass
class Asked:
    arrays: dict[str, NDArray[Any]]

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self.arrays.items()]


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    """var_deploy.triton.model, imported as the server does."""
    backend: Any = types.ModuleType("triton_python_backend_utils")
    backend.Tensor, backend.TritonError, backend.InferenceResponse = (
        Tensor,
        TritonError,
        InferenceResponse,
    )
    backend.TritonModelException = type("TritonModelException", (Exception,), {})
    sys.modules[backend.__name__] = backend
    yield importlib.import_module("var_deploy.triton.model")
    del sys.modules[backend.__name__], sys.modules["var_deploy.triton.model"]


Start = Callable[..., Any]


@pytest.fixture
def start(module: Any, repository: Path) -> Start:
    """Initializes the model of a repository as Triton does; keyword arguments are parameters."""

    def begin(folder: Path = repository / "small", **parameters: str) -> Any:
        (version,) = [path.name for path in folder.iterdir() if path.is_dir()]
        given = {"threads": "1", "backend": "onnxruntime-cpu", **parameters}
        config = {"parameters": {k: {"string_value": v} for k, v in given.items()}}
        model = module.TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps(config),
                "model_repository": str(folder),
                "model_version": version,
            }
        )
        return model

    return begin


@pytest.fixture
def model(start: Start) -> Iterator[Any]:
    made = start()
    yield made
    made.finalize()


@pytest.fixture
def text_model(start: Start, text_repository: Path) -> Iterator[Any]:
    """Of a bundle that takes prompts."""
    made = start(text_repository / "text")
    yield made
    made.finalize()


def asked(label: int, seed: int = 1, **settings: float) -> Asked:
    return Asked(
        {
            "LABEL": np.array([[label]], np.int64),
            "SEED": np.array([[seed]], np.uint64),
            **{name: np.array([[value]]) for name, value in settings.items()},
        }
    )


def test_equal_settings_are_drawn_together(
    model: Any, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Request] = []
    draw = Pipeline.draw

    def note(self: Pipeline, request: Request) -> Any:
        drawn.append(request)
        return draw(self, request)

    monkeypatch.setattr(Pipeline, "draw", note)
    answers = model.execute(
        [asked(0), asked(1, CFG=1.5), asked(9), asked(2, seed=6), asked(3, CFG=1.5)]
    )
    assert [request.labels for request in drawn] == [[0, 2], [1, 3]]
    assert answers[2].error.code == TritonError.INVALID_ARG
    assert "label 9 is out of range" in answers[2].error.message
    for place, label, seed, cfg in ((0, 0, 1, None), (1, 1, 1, 1.5), (3, 2, 6, None)):
        (image,) = answers[place].tensors
        assert image.label == "IMAGE" and answers[place].error is None
        np.testing.assert_array_equal(image.array, pipe.generate([label], seed, cfg=cfg))


def test_a_failure_is_that_of_its_group(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Pipeline.draw

    def fail(self: Pipeline, request: Request) -> Any:
        if request.sampling.cfg == 3:
            raise BackendError("the logits of scale 0 are not numbers")
        return draw(self, request)

    monkeypatch.setattr(Pipeline, "draw", fail)
    answers = model.execute([asked(0, CFG=3), asked(0)])
    assert answers[0].error == TritonError("the logits of scale 0 are not numbers", 1)
    assert answers[1].error is None and len(answers[1].tensors) == 1


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"CFG": float("nan")}, "cfg must lie between"),
        ({"TOP_P": 1.5}, "top_p must lie between"),
        ({"TOP_K": -1}, "top_k must lie between"),
        ({"NUMBER": -3}, "NUMBER must be 0 or more, found -3"),
    ],
)
def test_a_value_out_of_range(model: Any, settings: dict[str, float], part: str) -> None:
    (answer,) = model.execute([asked(0, **settings)])
    assert part in answer.error.message


def test_a_wrong_number_of_scales(model: Any) -> None:
    request = asked(0)
    request.arrays["CFG"] = np.ones((1, 2))
    (answer,) = model.execute([request])
    assert "cfg has 2 values, but the model has 3 scales" in answer.error.message


@pytest.mark.parametrize(
    ("parameters", "part"),
    [
        ({"threads": "many"}, "threads of the model cannot be 'many'"),
        ({"cuda_graph": "1"}, "cuda_graph of the model cannot be '1'"),
        ({"precision": "fp64"}, "precision must be one of"),
        ({"precision": "fp16"}, "has no fp16 graphs"),
    ],
)
def test_parameters_that_were_changed(start: Start, parameters: dict[str, str], part: str) -> None:
    with pytest.raises(Exception, match=part) as caught:
        start(**parameters)
    assert caught.type.__name__ == "TritonModelException"


def test_another_bundle_in_the_folder(start: Start, repository: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(repository / "small", tmp_path / "small"))
    (bundle,) = folder.glob("*/bundle")

    def exchange(data: dict[str, Any]) -> None:
        next(iter(data["files"].values()))["sha256"] = "0" * 64

    edit(bundle, exchange)
    with pytest.raises(Exception, match="another bundle lies there"):
        start(folder)


def in_words(prompt: bytes, negative: bytes | None = None, seed: int = 1, **more: float) -> Asked:
    texts = {"PROMPT": prompt, **({} if negative is None else {"NEGATIVE": negative})}
    return Asked(
        {
            **{name: np.array([[text]], np.object_) for name, text in texts.items()},
            "SEED": np.array([[seed]], np.uint64),
            **{name: np.array([[value]]) for name, value in more.items()},
        }
    )


FOX, SEA = "a red fox", "狐狸 at sea"


def test_prompts_and_their_settings(
    text_model: Any, text_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with a negative prompt are drawn together, and those without one: so launches are."""
    drawn: list[Request] = []
    draw = Pipeline.draw

    def note(self: Pipeline, request: Request) -> Any:
        drawn.append(request)
        return draw(self, request)

    monkeypatch.setattr(Pipeline, "draw", note)
    sea = SEA.encode()
    answers = text_model.execute(
        [
            in_words(FOX.encode()),
            in_words(sea, b"fog"),
            in_words(sea, b"", 4),
            in_words(sea, CFG=1.5),
            in_words(b"", b"rain", 2),
        ]
    )
    assert [[key[0] for key in request.rng_keys] for request in drawn] == [[1, 4], [1, 2], [1]]
    with Pipeline.load(text_bundle, threads=1) as pipe:
        expected = [
            pipe.generate(prompts=FOX, seed=1),
            pipe.generate(prompts=SEA, negative="fog", seed=1),
            pipe.generate(prompts=SEA, seed=4),
            pipe.generate(prompts=SEA, seed=1, cfg=1.5),
            pipe.generate(prompts="", negative="rain", seed=2),
        ]
    for answer, images in zip(answers, expected, strict=True):
        (image,) = answer.tensors
        np.testing.assert_array_equal(image.array, images)


@pytest.mark.parametrize(
    ("request_", "part"),
    [
        (in_words(b"\xff"), "PROMPT is not UTF-8 text"),
        (in_words(b"a\0b"), "character 1 of PROMPT is the control character U+0000"),
        (in_words(b"a", b"x" * 20_001), "NEGATIVE has 20001 characters, at most 20000"),
        (in_words(b"a", TOP_P=2.0), "top_p must lie between"),
    ],
)
def test_a_prompt_that_is_refused(text_model: Any, request_: Asked, part: str) -> None:
    """Alone: what the text encoder refuses would fail the launch that others share."""
    answer, other = text_model.execute([request_, in_words(b"a boat")])
    assert (answer.error.code, part in answer.error.message) == (TritonError.INVALID_ARG, True)
    assert other.error is None


def test_another_text_encoder_in_the_folder(
    start: Start, text_repository: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(text_repository / "text", tmp_path / "text"))
    digest = "ab" * 32
    with pytest.raises(Exception, match=r"text_encoder has the digest .*, expected abab"):
        start(folder, text_encoder=digest)
    (encoder,) = folder.glob("*/text_encoder")
    shutil.rmtree(encoder)
    with pytest.raises(Exception, match="a text encoder t5"):
        start(folder)
