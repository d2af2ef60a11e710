"""Writes the bundles of the models that come with var-deploy, without PyTorch, from archives in the
package.

An archive lies beside its model's weights and holds all files of `var-deploy export` but
weights.bin: manifest, graphs, and a recipe that names for each tensor of weights.bin the tensor of
the weights that it is made of, or the bytes in the archive. The written files have the hashes of
the manifest, so they equal that export byte by byte. `var_deploy.export.pack_demo` makes the
archives.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
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
from var_deploy.text.manifest import TextEncoderManifest, read_text_encoder

if TYPE_CHECKING:
    from importlib.abc import Traversable  # of importlib.resources.abc from Python 3.11 on


@dataclass(frozen=True, kw_only=True)
class PackedBundle:
    """A bundle that the package holds without its weights.bin.

    Attributes:
        name: of its folder, and of what an error complains about.
        package: holds the archive and the weights. Only its files are read: nothing is imported.
        archive: file of the package.
        sources: the package's files of weights, in safetensors' format.
        text_encoder: whether it is a text encoder, not an image bundle.
    """

    name: str
    package: str
    archive: str
    sources: tuple[str, ...]
    text_encoder: bool = False

    def manifest(self, folder: Path) -> Manifest | TextEncoderManifest:
        """Read the manifest of the bundle in `folder`. Raises BundleError."""
        return read_text_encoder(folder) if self.text_encoder else read_manifest(folder)


_IMAGE_WEIGHTS = ("transformer.safetensors", "tokenizer.safetensors")
POCKET = PackedBundle(
    name="pocket",
    package="var_deploy.export.pocket",
    archive="bundle.zip",
    sources=_IMAGE_WEIGHTS,
)
POCKET_TEXT = PackedBundle(
    name="pocket-text",
    package="var_deploy.export.pocket_text",
    archive="bundle.zip",
    sources=_IMAGE_WEIGHTS,
)
# named as `export pocket-text` names it, beside the other
POCKET_TEXT_ENCODER = PackedBundle(
    name="pocket-text-text",
    package="var_deploy.export.pocket_text",
    archive="text_encoder.zip",
    sources=("text/model.safetensors",),
    text_encoder=True,
)
RECIPE, STORED = "weights.json", "weights.rest"  # in an archive
PRECISION: Precision = "fp32"
SAFETENSORS_TYPES = {"F16": "<f2", "F32": "<f4", "I64": "<i8"}


def write_demo_bundle(packed: PackedBundle, out: Path) -> Manifest | TextEncoderManifest:
    """Write a bundle of the package to `out`, which must be new or empty; return its manifest.

    Raises UsageError for an `out` that holds anything, VarDeployError where this installation
    lacks a file or the disk refuses.
    """
    folder = files(packed.package)

    def check() -> None:
        check_place(out, replace=False)

    def content(name: str) -> bytes:
        return _content(folder, packed, name)

    with whole_folder(out, check=check, index=BUNDLE) as work:
        archived = io.BytesIO(content(packed.archive))
        with disk_errors(out), zipfile.ZipFile(archived) as archive:
            for name in archive.namelist():
                if name not in (RECIPE, STORED):
                    path = work / name
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(archive.read(name))
            weights = work / PRECISION / names.WEIGHTS
            weights.write_bytes(
                join_weights(
                    json.loads(archive.read(RECIPE)),
                    {name: safetensors_arrays(content(name)) for name in packed.sources},
                    archive.read(STORED),
                )
            )
        manifest = packed.manifest(work)
        try:
            check_files(work, manifest)
        except BundleError as error:
            raise VarDeployError(
                f"{packed.name} is damaged in this installation, install var-deploy again: {error}"
            ) from None
    return manifest


def join_weights(
    recipe: dict[str, Any], sources: dict[str, dict[str, NDArray[Any]]], stored: bytes
) -> bytes:
    """Return the bytes of weights.bin: `size` bytes, with the values of each tensor at its
    `offset`.

    A tensor is either `length` bytes of `stored` from `start` on, or the tensor `key` of the file
    `source` in the type `dtype`: as a matrix, with its rows in `order`, then `transposed`.
    """
    data = bytearray(recipe["size"])
    for each in recipe["tensors"]:
        if "source" in each:
            value = as_matrix(sources[each["source"]][each["key"]])
            value = value[each["order"]] if "order" in each else value
            value = value.T if each["transposed"] else value
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


def _content(folder: Traversable, packed: PackedBundle, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError:
        raise VarDeployError(
            f"{packed.name}'s {name} is not in this installation: install var-deploy again"
        ) from None
