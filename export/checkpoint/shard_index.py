"""Finds the files of a checkpoint that lies in a folder of shards with their index.

An index (`model.safetensors.index.json`, `pytorch_model.bin.index.json`) is what Hugging Face's
libraries write for large models: it names the shard of every tensor. This module does without
torch, so that files can be fetched before it is there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from var_deploy.bundle.json_values import DamagedError, Value, read_json, shown
from var_deploy.errors import CheckpointError, one_line
from var_deploy.manifest import file_sha256

INDEX = ".index.json"
MAX_INDEX = 16 << 20  # bytes
MAX_TENSORS = 50_000
MAX_SHARDS = 1000
# in order of preference
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin")  # a model of one shard has no index


def stored_sha256(path: Path) -> str:
    """Return the SHA-256 of a checkpoint file; of a folder, that of the lines `HASH  NAME` of its
    files that hold weights."""
    if not os.path.isdir(path):
        return file_sha256(path)
    lines = (f"{file_sha256(path / name)}  {name}\n" for name in sorted(shard_names(path)))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def stored_size(path: Path) -> int:
    """Return the bytes of a checkpoint file, or of all shards of a folder."""
    if not os.path.isdir(path):
        return path.stat().st_size
    return sum((path / name).stat().st_size for name in shard_names(path))


def shard_names(path: Path) -> list[str]:
    """Return the names of a folder's files that hold weights. Raises CheckpointError where it has
    no index, and no file that stands for a whole model."""
    index = find_index(path)
    return [whole_file(path)] if index is None else list(dict.fromkeys(read_index(index).values()))


def read_index(index: Path) -> Mapping[str, str]:
    """Read an index: name of a tensor → name of its shard, a file in the same folder.

    Raises CheckpointError where it is not an index.
    """
    try:
        stored = Value(read_json(index, MAX_INDEX)).member("weight_map").members(MAX_TENSORS)
        shards = {
            name: shard.text(r"[^/\\:\0]+", "the name of a file") for name, shard in stored.items()
        }
        if not shards:
            raise DamagedError("weight_map is empty")
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # DamagedError is one
        raise CheckpointError(
            f"{index} is not an index of shards ({one_line(error)}); download it again"
        ) from None
    if len(set(shards.values())) > MAX_SHARDS or {".", ".."} & set(shards.values()):
        raise CheckpointError(
            f"{index} is not an index of shards: expected at most {MAX_SHARDS} files beside it"
        )
    return shards


def find_index(path: Path) -> Path | None:
    """Return a folder's index; None where it has none, or a file that holds the whole model.

    The same weights may lie there in several formats, each with its index: safetensors come first.
    Raises CheckpointError where none of several indices is one of INDICES.
    """
    if any(os.path.isfile(path / name) for name in WHOLE):
        return None
    try:
        found = sorted(file for file in path.iterdir() if file.name.endswith(INDEX))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    for name in INDICES:
        if path / name in found:
            return path / name
    if len(found) > 1:
        names = ", ".join(shown(file.name) for file in found[:4])
        raise CheckpointError(f"{path} has {len(found)} indices ({names}), expected one")
    return found[0] if found else None


def whole_file(path: Path) -> str:
    """Return the name of the file that holds a whole model in a folder without an index.

    Raises CheckpointError where there is none.
    """
    for name in WHOLE:
        if os.path.isfile(path / name):
            return name
    raise CheckpointError(
        f"{path} is a folder, expected a checkpoint file, or a folder of shards with their index "
        f"(*{INDEX})"
    )
