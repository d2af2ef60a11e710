"""Makes the archives from which `var-deploy demo` writes its bundles without PyTorch.

    python -m var_deploy.export.pack_demo build

To be run (`make bundle`) whenever an export of pocket or of pocket-text has other bytes than
before; a test compares them. See `var_deploy.demo` for what is in an archive.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Iterable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.config import GraphForm
from var_deploy.demo import (
    POCKET,
    POCKET_TEXT,
    POCKET_TEXT_ENCODER,
    PRECISION,
    RECIPE,
    STORED,
    PackedBundle,
    as_matrix,
    join_weights,
    safetensors_arrays,
)
from var_deploy.export.bundle import ExportOptions, build_graphs
from var_deploy.export.graphs.builder import GraphBuilder
from var_deploy.export.graphs.text_encoder import build_text_encoder
from var_deploy.export.graphs.weights_bin import plan_layout
from var_deploy.manifest import read_manifest
from var_deploy.text.manifest import read_text_encoder

LONG_AGO = (1980, 1, 1, 0, 0, 0)  # fixed, so that equal bundles give equal archives


def pack_demo(packed: PackedBundle, bundle: Path, out: Path) -> None:
    """Write the archive of `bundle`, which `var-deploy export` has written."""
    manifest = packed.manifest(bundle)
    weights = (bundle / PRECISION / names.WEIGHTS).read_bytes()
    recipe, stored = make_recipe(packed, bundle, weights)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:

        def add(name: str, data: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(name, LONG_AGO), data, zipfile.ZIP_DEFLATED, 9)

        add(names.MANIFEST, (bundle / names.MANIFEST).read_bytes())
        for name in sorted(manifest.files):
            if not name.endswith(names.WEIGHTS):
                add(name, (bundle / name).read_bytes())
        add(RECIPE, json.dumps(recipe).encode())
        add(STORED, stored)


def make_recipe(
    packed: PackedBundle, bundle: Path, weights: bytes
) -> tuple[dict[str, Any], bytes]:
    """Return how weights.bin is put together, and those of its bytes that no tensor of the
    package gives."""
    folder = files(packed.package)
    sources = {name: safetensors_arrays((folder / name).read_bytes()) for name in packed.sources}
    owners = {key: name for name in packed.sources for key in sources[name]}
    layout = plan_layout(_graphs(packed, bundle))
    tensors: list[dict[str, Any]] = []
    stored = b""
    for name, weight in layout.weights.items():
        offset = layout.offsets[name]
        piece = weights[offset : offset + weight.nbytes]
        tensor: dict[str, Any] = {"start": len(stored), "length": len(piece)}
        if name in owners:
            value = sources[owners[name]][name]
            if (taken := how_taken(value, np.frombuffer(piece, weight.dtype))) is not None:
                tensor = {"source": owners[name], "key": name, "dtype": weight.dtype.str, **taken}
        if "start" in tensor:
            stored += piece
        tensors.append({"offset": offset, **tensor})
    recipe = {"size": layout.size, "tensors": tensors}
    assert join_weights(recipe, sources, stored) == weights
    return recipe, stored


def how_taken(value: NDArray[Any], weight: NDArray[Any]) -> dict[str, Any] | None:
    """Return how the flat tensor `weight` of a bundle is made of `value` of a checkpoint, in the
    words of `demo.join_weights`: as it is, transposed, or with its rows in another order, as RoPE's
    pairs are. None where it is made in another way."""
    if value.size != weight.size:
        return None
    matrix = as_matrix(value).astype(weight.dtype)
    for transposed in (False, True):
        found = weight.reshape(matrix.T.shape).T if transposed else weight.reshape(matrix.shape)
        if np.array_equal(found, matrix):
            return {"transposed": transposed}
        places = {row.tobytes(): place for place, row in enumerate(matrix)}
        order = [places.get(row.tobytes()) for row in np.ascontiguousarray(found)]
        if None not in order:
            return {"transposed": transposed, "order": order}
    return None


def _graphs(packed: PackedBundle, bundle: Path) -> Iterable[GraphBuilder]:
    """The graphs of the bundle in the order of its export."""
    if packed.text_encoder:
        form = GraphForm(precision=PRECISION)
        return [build_text_encoder(read_text_encoder(bundle).model, form)]
    return build_graphs(read_manifest(bundle).model, PRECISION, ExportOptions())


def main(build: Path) -> None:
    """Write the archives of all bundles in the folder `build` into the package."""
    for packed in (POCKET, POCKET_TEXT, POCKET_TEXT_ENCODER):
        with as_file(files(packed.package) / packed.archive) as out:
            pack_demo(packed, build / packed.name, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
