"""Writes pocket's bundle without PyTorch, from an archive in the package.

The archive lies beside pocket's weights and holds all files of `var-deploy export pocket` but
weights.bin: manifest, graphs, and a recipe that names for each tensor of weights.bin the tensor of
the weights that it is made of, or the bytes in the archive. The written files have the hashes of
the manifest, so they equal that export byte by byte. `var_deploy.export.pocket.pack_demo` makes the
archive.
"""

from __future__ import annotations

import io
import json
import zipfile
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.bundle.place import BUNDLE, check_place
from var_deploy.config import Precision
from var_deploy.errors import BundleError, VarDeployError
from var_deploy.files import disk_errors
from var_deploy.files.folders import whole_folder
from var_deploy.manifest import Manifest, check_files, read_manifest

if TYPE_CHECKING:
    from importlib.abc import Traversable  # of importlib.resources.abc from Python 3.11 on

PRESET = "pocket"
PACKAGE = "var_deploy.export.pocket"  # only its files are read: nothing of it is imported
ARCHIVE = "bundle.zip"
RECIPE, STORED = "weights.json", "weights.rest"  # in the archive
SOURCES = ("transformer.safetensors", "tokenizer.safetensors")
PRECISION: Precision = "fp32"
SAFETENSORS_TYPES = {"F16": "<f2", "F32": "<f4", "I64": "<i8"}


def write_demo_bundle(out: Path) -> Manifest:
    """Write pocket's bundle to `out`, which must be new or empty.

    Raises UsageError for an `out` that holds anything, VarDeployError where this installation
    lacks a file or the disk refuses.
    """
    folder = files(PACKAGE)

    def check() -> None:
        check_place(out, replace=False)

    with whole_folder(out, check=check, index=BUNDLE) as work:
        with disk_errors(out), zipfile.ZipFile(io.BytesIO(_content(folder, ARCHIVE))) as archive:
            for name in archive.namelist():
                if name not in (RECIPE, STORED):
                    path = work / name
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(archive.read(name))
            weights = work / PRECISION / names.WEIGHTS
            weights.write_bytes(
                join_weights(
                    json.loads(archive.read(RECIPE)),
                    {name: safetensors_arrays(_content(folder, name)) for name in SOURCES},
                    archive.read(STORED),
                )
            )
        manifest = read_manifest(work)
        try:
            check_files(work, manifest)
        except BundleError as error:
            raise VarDeployError(
                f"{PRESET} is damaged in this installation, install var-deploy again: {error}"
            ) from None
    return manifest


def join_weights(
    recipe: dict[str, Any], sources: dict[str, dict[str, NDArray[Any]]], stored: bytes
) -> bytes:
    """Return the bytes of weights.bin: `size` bytes, with the values of each tensor at its
    `offset`.

    A tensor is either `length` bytes of `stored` from `start` on, or the tensor `key` of the file
    `source` in the type `dtype`, `transposed` or as it is.
    """
    data = bytearray(recipe["size"])
    for each in recipe["tensors"]:
        if "source" in each:
            value = sources[each["source"]][each["key"]]
            value = as_matrix(value).T if each["transposed"] else value
            piece = value.astype(each["dtype"]).tobytes()
        else:
            piece = stored[each["start"] : each["start"] + each["length"]]
        data[each["offset"] : each["offset"] + len(piece)] = piece
    return bytes(data)


def as_matrix(value: NDArray[Any]) -> NDArray[Any]:
    """Reshape [out, …] → [out, in]."""
    return value.reshape(len(value), -1) if value.ndim else value.reshape(1, 1)


def safetensors_arrays(data: bytes) -> dict[str, NDArray[Any]]:
    """Return the arrays of a safetensors file of this package, by key, without a copy.

    The file is part of this package, so it is not examined as a stranger's checkpoint is.
    """
    length = int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :]
    return {
        key: np.frombuffer(
            values[slice(*about["data_offsets"])], SAFETENSORS_TYPES[about["dtype"]]
        ).reshape(about["shape"])
        for key, about in header.items()
        if key != "__metadata__"
    }


def _content(folder: Traversable, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError:
        raise VarDeployError(
            f"{PRESET}'s {name} is not in this installation: install var-deploy again"
        ) from None
