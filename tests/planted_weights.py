"""Models and bundles with one weight changed, for tests of what finds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from var_deploy import names
from var_deploy.manifest import FileInfo, file_sha256, read_manifest


def plant(bundle: Path, graph: str, precision: str, weight: str, instead: str) -> None:
    """Let one graph read `instead`'s bytes for `weight`."""
    file = f"{precision}/{names.graph_file(graph)}"
    proto = onnx.load(str(bundle / file), load_external_data=False)
    places = {
        t.name: next(e for e in t.external_data if e.key == "offset")
        for t in proto.graph.initializer
        if t.name in (weight, instead)
    }
    places[weight].value = places[instead].value
    (bundle / file).write_bytes(proto.SerializeToString())
    info = FileInfo(size=(bundle / file).stat().st_size, sha256=file_sha256(bundle / file))
    manifest = read_manifest(bundle)
    dataclasses.replace(manifest, files={**manifest.files, file: info}).save(bundle)


class Changed:
    """A weight source with one tensor changed."""

    def __init__(self, source: Any, key: str, change: Callable[[Any], Any]) -> None:
        self.description, self.keys, self.shape = source.description, source.keys, source.shape
        self._source, self._key, self._change = source, key, change

    def read(self, key: str) -> Any:
        value = self._source.read(key)
        return np.float32(self._change(value)) if key == self._key else value
