"""The file formats of shards, and the names of images and labels in them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from var_deploy.datasets.spec import TAR


@dataclass(frozen=True, kw_only=True)
class Row:
    """An image of a set. `png` contains only pixels; it has a `label`, a `prompt`, or neither."""

    number: int
    seed: int
    label: int | None
    png: bytes
    prompt: str | None = None


def pack(form: str, rows: Iterable[Row], label_names: Sequence[str] | None) -> bytes:
    """Return the bytes of a shard's file, without time or owner."""
    return _pack_tar(rows) if form == TAR else _pack_parquet(list(rows), label_names)


def read_images(path: Path) -> Iterator[NDArray[np.uint8]]:
    """Yield the images [H, W, C] of a shard's file, in order."""
    for png in _tar_pngs(path) if path.suffix == f".{TAR}" else _parquet_pngs(path):
        with Image.open(io.BytesIO(png)) as image:
            pixels = np.asarray(image)
        yield pixels.reshape(*pixels.shape[:2], -1)


def _pack_tar(rows: Iterable[Row]) -> bytes:
    """Pack as WebDataset reads it: three members per image.

    The members are 000000017.png; .cls, its label in digits, where it has one, or .txt, its prompt
    in UTF-8; .json, with seed, number and label or prompt.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            for suffix, data in _members(row):
                member = tarfile.TarInfo(f"{row.number:09d}.{suffix}")  # no owner, time 0
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def _members(row: Row) -> Iterator[tuple[str, bytes]]:
    """Yield suffix and content of the files of an image."""
    yield "png", row.png
    if row.label is not None:
        yield "cls", str(row.label).encode()
    about: dict[str, Any] = {"label": row.label}
    if row.prompt is not None:
        yield "txt", row.prompt.encode()
        about = {"prompt": row.prompt}
    yield "json", json.dumps({"seed": row.seed, "number": row.number, **about}).encode()


def _tar_pngs(path: Path) -> Iterator[bytes]:
    with tarfile.open(path, mode="r:") as tar:
        for member in tar:
            if member.name.endswith(".png") and (data := tar.extractfile(member)) is not None:
                yield data.read()


def _pack_parquet(rows: Sequence[Row], label_names: Sequence[str] | None) -> bytes:
    """Pack as Parquet: columns image (bytes and path), label or prompt where there are, seed,
    number.

    The metadata makes Hugging Face `datasets` decode the pictures and know the labels' names.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "image": pa.array(
            [{"bytes": row.png, "path": f"{row.number:09d}.png"} for row in rows],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
    }
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if rows[0].label is not None:
        columns["label"] = pa.array([row.label for row in rows], pa.int64())
        named = {"names": list(label_names), "_type": "ClassLabel"} if label_names else None
        features["label"] = named or {"dtype": "int64", "_type": "Value"}
    if rows[0].prompt is not None:
        columns["prompt"] = pa.array([row.prompt for row in rows], pa.string())
        features["prompt"] = {"dtype": "string", "_type": "Value"}
    for name, kind in (("seed", "uint64"), ("number", "int64")):
        columns[name] = pa.array([getattr(row, name) for row in rows], getattr(pa, kind)())
        features[name] = {"dtype": kind, "_type": "Value"}
    about = json.dumps({"info": {"features": features}})
    table = pa.table(columns).replace_schema_metadata({"huggingface": about})
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="none")  # PNGs are compressed already
    return stream.getvalue()


def _parquet_pngs(path: Path) -> Iterator[bytes]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=16, columns=["image"]):
            yield from batch.column("image").field("bytes").to_pylist()
