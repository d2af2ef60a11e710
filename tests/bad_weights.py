"""Bundles from elsewhere whose weights are not numbers; export would not write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from var_deploy.manifest import file_sha256
from var_deploy.runtime.weights_check import stored_weights


def poke(bundle: Path, out: Path, graph: str, weight: str, value: float, every: int = 1) -> Path:
    """A copy of a bundle in which every `every`-th value of a weight is another one, with the hash
    of its file put right. `graph` is a path without its suffix, as in "fp32/step"."""
    shutil.copytree(bundle, out)
    model = (out / f"{graph}.onnx").read_bytes()
    (place,) = (w for w in stored_weights(model) if w.name == weight)
    path = (out / graph).with_name("weights.bin")
    values: Any = np.memmap(
        path, place.dtype, "r+", place.offset, (place.length // place.dtype.itemsize,)
    )
    values[::every] = value
    values.flush()
    data = json.loads((out / "manifest.json").read_text())
    data["files"][path.relative_to(out).as_posix()]["sha256"] = file_sha256(path)
    (out / "manifest.json").write_text(json.dumps(data))
    return out
