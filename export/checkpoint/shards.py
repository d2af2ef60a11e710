"""Opens checkpoints that lie in one file, or in a folder of shards with their index.

An index (`model.safetensors.index.json`, `pytorch_model.bin.index.json`) is what Hugging Face's
libraries write for large models: it names the shard of every tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from var_deploy.bundle.json_values import DamagedError, Value, read_json
from var_deploy.errors import CheckpointError, one_line
from var_deploy.export.checkpoint.formats import (
    MAX_NAMES,
    Contents,
    check_names,
    open_contents,
    shown,
)
from var_deploy.export.checkpoint.mapped_file import StoredTensor
from var_deploy.manifest import file_sha256

INDEX = ".index.json"
MAX_INDEX = 16 << 20  # bytes
MAX_SHARDS = 1000
WHOLE = ("model.safetensors", "pytorch_model.bin")  # a model of one shard has no index


def open_stored(path: Path) -> Contents:
    """Open a checkpoint file, or a folder of shards, and return its contents.

    Raises CheckpointError as `formats.open_contents` does, and for a folder whose index is missing,
    damaged, or does not agree with the shards.
    """
    return open_contents(path) if not path.is_dir() else _shards(path)


def stored_sha256(path: Path) -> str:
    """Return the SHA-256 of a checkpoint file; of a folder, that of the lines `HASH  NAME` of its
    files that hold weights."""
    if not path.is_dir():
        return file_sha256(path)
    lines = (f"{file_sha256(path / name)}  {name}\n" for name in sorted(shard_names(path)))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def stored_size(path: Path) -> int:
    """Return the bytes of a checkpoint file, or of all shards of a folder."""
    if not path.is_dir():
        return path.stat().st_size
    return sum((path / name).stat().st_size for name in shard_names(path))


def shard_names(path: Path) -> list[str]:
    """Return the names of a folder's files that hold weights. Raises CheckpointError where it has
    no index, and no file that stands for a whole model."""
    index = _index(path)
    return [_whole(path)] if index is None else list(dict.fromkeys(read_index(index).values()))


def read_index(index: Path) -> Mapping[str, str]:
    """Read an index: name of a tensor → name of its shard, a file in the same folder.

    Raises CheckpointError where it is not an index.
    """
    try:
        stored = Value(read_json(index, MAX_INDEX)).member("weight_map").members(MAX_NAMES)
        shards = {
            name: shard.text(r"[^/\\\0]+", "the name of a file") for name, shard in stored.items()
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


def _index(path: Path) -> Path | None:
    """Return a folder's index; None where it has none. Raises CheckpointError for several."""
    found = sorted(file for file in path.iterdir() if file.name.endswith(INDEX))
    if len(found) > 1:
        names = ", ".join(shown(file.name, 60) for file in found[:4])
        raise CheckpointError(f"{path} has {len(found)} indices ({names}), expected one")
    return found[0] if found else None


def _whole(path: Path) -> str:
    for name in WHOLE:
        if (path / name).is_file():
            return name
    raise CheckpointError(
        f"{path} is a folder, expected a checkpoint file, or a folder of shards with their index "
        f"(*{INDEX})"
    )


def _shards(path: Path) -> Contents:
    index = _index(path)
    if index is None:
        return open_contents(path / _whole(path))
    listed = read_index(index)
    names = dict.fromkeys(listed.values())
    absent = [name for name in names if not (path / name).exists()]
    if absent:
        raise CheckpointError(
            f"{path} lacks {len(absent)} of the {len(names)} shards that {index.name} lists, "
            f"{shown(absent[0], 60)} first; download it again"
        )
    tree: dict[str, StoredTensor] = {}
    for name in names:
        shard = open_contents(path / name)
        if not isinstance(shard.tree, dict):
            raise CheckpointError(f"{path / name} is not a shard: expected names and tensors")
        for key, leaf in shard.tree.items():
            if not shard.is_tensor(leaf):
                raise CheckpointError(
                    f"{path / name} is not a shard: {shown(key, 60)} is not a tensor"
                )
            if listed.get(key) != name:
                raise CheckpointError(
                    f"{path / name} holds {shown(key, 60)}, which {index.name} does not list there"
                )
            tree[key] = shard.tensor(key, leaf)
        check_names(path, len(tree))
    missing = sorted(set(listed) - set(tree))
    if missing:
        raise CheckpointError(
            f"{path} lacks {shown(missing[0], 60)}, which {index.name} lists in "
            f"{shown(listed[missing[0]], 60)}; download it again"
        )
    return Contents(tree, lambda leaf: isinstance(leaf, StoredTensor), lambda _, leaf: leaf)
