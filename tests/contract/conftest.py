"""A bundle for whatever reads one but does not run it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from var_deploy.bundle.interfaces import interfaces_of
from var_deploy.manifest import FileInfo, GraphInfo, Manifest, TensorInfo
from var_deploy.sampling import Sampling
from var_deploy.spec import ModelSpec, TokenizerSpec, TransformerSpec

NAMES = ("star", "heart", "house/hut")


def write_bundle(folder: Path, *, family: str = "var", names: Sequence[str] = NAMES) -> Path:
    """A bundle of two small files with true hashes; no graph in it runs."""
    folder.mkdir()
    (folder / "fp32").mkdir()
    data = b"weights"
    (folder / "fp32" / "weights.bin").write_bytes(data)
    file = "fp32/decoder.onnx"
    (folder / file).write_bytes(data)
    info = FileInfo(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    model = ModelSpec(
        tokenizer=TokenizerSpec(patch_nums=(1, 2), vocab_size=8, code_width=4, base_width=32),
        transformer=TransformerSpec(
            family=family,  # type: ignore[arg-type]
            depth=1,
            width=8,
            heads=2,
            classes=len(names) if family == "var" else 0,
            ffn_width=16,
        ),
    )
    guided = family == "var"
    sizes = interfaces_of(model, precision="fp32", batch=1, guidance=guided)
    inputs, outputs = (
        tuple(TensorInfo(name=name, dtype=dtype, shape=shape) for name, dtype, shape in tensors)
        for tensors in (sizes.inputs("decoder"), sizes.outputs("decoder"))
    )
    graph = GraphInfo(file=file, inputs=inputs, outputs=outputs, weight_bytes=7)
    Manifest(
        model=model,
        preset="pocket",
        batch=1,
        guidance=guided,
        graphs={"fp32": {"decoder": graph}},
        files={"fp32/weights.bin": info, file: info},
        checkpoint={"tokenizer": {}, "transformer": {}},
        tools={},
        defaults=Sampling(cfg=2.0, top_k=3),
        labels=tuple(names) if len(names) < 1000 and family == "var" else (),
    ).save(folder)
    return folder


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Path]:
    return write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")
