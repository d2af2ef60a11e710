"""The manifest of a text encoder from a stranger: bounds, and one line for each fault."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import t5_case
from var_deploy import names
from var_deploy.errors import BundleError
from var_deploy.manifest import FileInfo, GraphInfo, TensorInfo
from var_deploy.text.manifest import (
    TextEncoderManifest,
    read_text_encoder,
    text_encoder_inputs,
    text_encoder_outputs,
)

Change = Callable[[Any], object]


def tensors(listed: Any) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name=name, dtype=kind, shape=shape) for name, kind, shape in listed)


@pytest.fixture
def manifest() -> TextEncoderManifest:
    info = FileInfo(size=1000, sha256="0" * 64)
    graph = GraphInfo(
        file="fp16/text_encoder.onnx",
        inputs=tensors(text_encoder_inputs(t5_case.SPEC)),
        outputs=tensors(text_encoder_outputs(t5_case.SPEC)),
        weight_bytes=10,
    )
    return TextEncoderManifest(
        model=t5_case.SPEC,
        graphs={"fp16": {names.TEXT_ENCODER: graph}},
        files={"tokenizer.json": info, "fp16/text_encoder.onnx": info, "fp16/weights.bin": info},
        checkpoint={"files": {"model.safetensors": "1" * 64}},
        tools={"onnx": "1"},
    )


def test_what_is_written_is_read(manifest: TextEncoderManifest, tmp_path: Path) -> None:
    manifest.save(tmp_path)
    assert read_text_encoder(tmp_path) == manifest
    assert len(manifest.digest()) == 64
    assert json.loads(manifest.to_json())["kind"] == "text-encoder"


def put(*path: Any, value: Any) -> Change:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


def drop(*path: Any) -> Change:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


GRAPH = ("graphs", "fp16", "text_encoder")
WRONG: dict[str, tuple[Change, str]] = {
    "newer": (put("schema_version", value=2), "has schema version 2, this var-deploy reads up to"),
    "version": (put("schema_version", value="1"), "is not the manifest of a text encoder"),
    "kind": (put("kind", value="image-bundle"), "is not the manifest of a text encoder"),
    "more": (put("more", value=1), "more is unknown"),
    "width": (put("model", "width", value=1 << 30), "model.width is 1073741824, expected a whole"),
    "float": (put("model", "depth", value=2.0), "model.depth is 2.0"),
    "length": (put("model", "length", value=5000), "model.length is 5000, expected .* 1 to 4096"),
    "buckets": (put("model", "buckets", value=6), "6 buckets up to distance 128, expected a mult"),
    "distance": (put("model", "max_distance", value=8), "32 buckets up to distance 8"),
    "eps": (put("model", "norm_eps", value=float("nan")), "model.norm_eps is nan"),
    "size": (put("model", "more", value=1), "model.more is unknown"),
    "no tokenizer": (drop("files", "tokenizer.json"), "it has no hash of tokenizer.json"),
    "large tokenizer": (
        put("files", "tokenizer.json", "size", value=1 << 30),
        "tokenizer.json has 1073741824 bytes",
    ),
    "no weights": (drop("files", "fp16/weights.bin"), "it has no hash of fp16/weights.bin"),
    "outside": (
        put("files", "../x", value={"size": 1, "sha256": "0" * 64}),
        "names '../x', which leaves the bundle",
    ),
    "hash": (put("files", "tokenizer.json", "sha256", value="xyz"), "64 hexadecimal digits"),
    "precision": (lambda d: d["graphs"].update(bf16={}), "graphs.'bf16' is unknown"),
    "no graphs": (put("graphs", value={}), "graphs is empty"),
    "graph": (put("graphs", "fp16", "step", value={}), "graphs.fp16.step is unknown"),
    "no graph": (put("graphs", "fp16", value={}), "graphs.fp16.text_encoder is missing"),
    "file": (put(*GRAPH, "file", value="fp32/text_encoder.onnx"), "expected fp16/text_encoder.on"),
    "shape": (
        put(*GRAPH, "outputs", 0, "shape", value=[1, 200, 65]),
        r"expected \[1, 200, 64\], which follows from the sizes",
    ),
    "input": (put(*GRAPH, "inputs", 0, "name", value="labels"), "one of text_ids, text_mask"),
    "dtype": (put(*GRAPH, "inputs", 1, "dtype", value="int64"), "expected bool"),
    "bytes": (put(*GRAPH, "weight_bytes", value=1001), "a whole number from 0 to 1000"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_manifest_that_is_wrong(name: str, manifest: TextEncoderManifest, tmp_path: Path) -> None:
    change, said = WRONG[name]
    data = copy.deepcopy(json.loads(manifest.to_json()))
    change(data)
    (tmp_path / names.MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=said) as caught:
        read_text_encoder(tmp_path)
    message = str(caught.value)
    assert message.isprintable() and names.MANIFEST in message and len(message) < 700


def test_folders_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json"):
        read_text_encoder(tmp_path)
    with pytest.raises(BundleError, match="does not exist"):
        read_text_encoder(tmp_path / "nothing")
    (tmp_path / names.MANIFEST).write_text("[]")
    with pytest.raises(BundleError, match="is not the manifest of a text encoder"):
        read_text_encoder(tmp_path)
