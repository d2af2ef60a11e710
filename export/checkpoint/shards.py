"""Opens checkpoints that lie in one file, or in a folder of shards with their index."""

from __future__ import annotations

import os
from pathlib import Path

from var_deploy.errors import CheckpointError
from var_deploy.export.checkpoint.formats import Contents, check_names, open_contents, shown
from var_deploy.export.checkpoint.mapped_file import StoredTensor
from var_deploy.export.checkpoint.shard_index import find_index, read_index, whole_file


def open_stored(path: Path) -> Contents:
    """Open a checkpoint file, or a folder of shards, and return its contents.

    Raises CheckpointError as `formats.open_contents` does, and for a folder whose index is missing,
    damaged, or does not agree with the shards.
    """
    # unlike Path.is_dir, False for a name that no file can have, which `open_contents` refuses
    return _shards(path) if os.path.isdir(path) else open_contents(path)


def _shards(path: Path) -> Contents:
    index = find_index(path)
    if index is None:
        return open_contents(path / whole_file(path))
    listed = read_index(index)
    names = dict.fromkeys(listed.values())
    absent = [name for name in names if not os.path.exists(path / name)]
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
