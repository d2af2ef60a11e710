"""Makes the archive from which `var-deploy demo` writes pocket's bundle without PyTorch.

    python -m var_deploy.export.pocket.pack_demo build/pocket

To be run (`make bundle`) whenever an export of pocket has other bytes than before; a test compares
the two. See `var_deploy.demo` for what is in the archive.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

from var_deploy import names
from var_deploy.demo import (
    ARCHIVE,
    PRECISION,
    RECIPE,
    SOURCES,
    STORED,
    as_matrix,
    join_weights,
    safetensors_arrays,
)
from var_deploy.export.bundle import ExportOptions, build_graphs
from var_deploy.export.checkpoint.assemble import load_model
from var_deploy.export.checkpoint.presets import POCKET_FOLDER
from var_deploy.export.graphs.weights_bin import plan_layout
from var_deploy.manifest import read_manifest

LONG_AGO = (1980, 1, 1, 0, 0, 0)  # fixed, so that equal bundles give equal archives


def pack_demo(bundle: Path, out: Path) -> None:
    """Write the archive of `bundle`, which `var-deploy export pocket` has written."""
    manifest = read_manifest(bundle)
    weights = (bundle / PRECISION / names.WEIGHTS).read_bytes()
    recipe, stored = make_recipe(weights)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:

        def add(name: str, data: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(name, LONG_AGO), data, zipfile.ZIP_DEFLATED, 9)

        add(names.MANIFEST, (bundle / names.MANIFEST).read_bytes())
        for name in sorted(manifest.files):
            if not name.endswith(names.WEIGHTS):
                add(name, (bundle / name).read_bytes())
        add(RECIPE, json.dumps(recipe).encode())
        add(STORED, stored)


def make_recipe(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """Return how weights.bin is put together, and those of its bytes that no tensor of pocket
    gives."""
    sources = {name: safetensors_arrays((POCKET_FOLDER / name).read_bytes()) for name in SOURCES}
    owners = {key: name for name in SOURCES for key in sources[name]}
    graphs = build_graphs(load_model("pocket").spec, PRECISION, ExportOptions())
    layout = plan_layout(graphs)
    tensors: list[dict[str, Any]] = []
    stored = b""
    for name, weight in layout.weights.items():
        offset = layout.offsets[name]
        piece = weights[offset : offset + weight.nbytes]
        tensor: dict[str, Any] = {"start": len(stored), "length": len(piece)}
        if name in owners:
            value, dtype = sources[owners[name]][name], weight.dtype.str
            taken = {"source": owners[name], "key": name, "dtype": dtype}
            for transposed in (False, True):
                there = as_matrix(value).T if transposed else value
                if there.astype(dtype).tobytes() == piece:
                    tensor = {**taken, "transposed": transposed}
                    break
        if "start" in tensor:
            stored += piece
        tensors.append({"offset": offset, **tensor})
    recipe = {"size": layout.size, "tensors": tensors}
    assert join_weights(recipe, sources, stored) == weights
    return recipe, stored


if __name__ == "__main__":
    pack_demo(Path(sys.argv[1]), POCKET_FOLDER / ARCHIVE)
