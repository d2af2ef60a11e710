"""Opens a folder in the form of the Hugging Face Hub: config.json and weights in one file or many.

The folder is as untrusted as a single file: the index is bounded, and names only files that lie in
the folder itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from var_deploy.bundle.json_values import DamagedError, Value, read_json
from var_deploy.errors import CheckpointError, one_line
from var_deploy.export.checkpoint.files import MAX_NAME, StoredWeights, check_tensors
from var_deploy.export.checkpoint.formats import MAX_NAMES, open_contents, shown
from var_deploy.export.checkpoint.mapped_file import StoredTensor
from var_deploy.export.checkpoint.shard_index import INDICES, MAX_SHARDS, WHOLE
from var_deploy.manifest import file_sha256

CONFIG = "config.json"
MAX_JSON = 8 << 20  # bytes; the index of a model of 20 billion parameters has 0.1 MB
_FILE_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,200}")


class FolderWeights(StoredWeights):
    """The tensors of a folder by key.

    Args:
        ignored: prefixes of keys that are left out: they are neither looked at nor reported.
    """

    def __init__(self, folder: Path, ignored: tuple[str, ...] = ()) -> None:
        self._folder = folder
        self._files = _weight_files(folder)
        tensors: dict[str, StoredTensor] = {}
        for path, listed in self._files.items():
            contents = open_contents(path)
            tree = contents.tree if isinstance(contents.tree, dict) else {}
            found = {str(k): v for k, v in tree.items() if contents.is_tensor(v)}
            for key in listed - found.keys():
                raise CheckpointError(
                    f"{path} lacks {shown(key, MAX_NAME)}, which the index says it holds; "
                    "download it again"
                )
            kept = {
                shown(key, MAX_NAME): contents.tensor(key, said)
                for key, said in found.items()
                if not key.startswith(ignored)
            }
            check_tensors(path, kept)
            for key in kept.keys() & tensors.keys():
                raise CheckpointError(f"{folder} holds {key} in two files; download it again")
            tensors |= kept
        super().__init__(tensors)

    @cached_property
    def description(self) -> Mapping[str, Any]:
        return {"files": {path.name: file_sha256(path) for path in self._files}}

    def __str__(self) -> str:
        return str(self._folder)


def read_folder_json(folder: Path, name: str) -> Value:
    """Read a JSON object of bounded size. Raises CheckpointError where the folder has none."""
    path = folder / name
    try:
        data = read_json(path, MAX_JSON)
    except (FileNotFoundError, NotADirectoryError):
        _check_folder(folder)
        raise CheckpointError(
            f"{folder} has no {name}; expected a folder as the Hugging Face Hub has it"
        ) from None
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or one_line(error)
        raise CheckpointError(f"{path} cannot be read ({words}); download it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return Value(data)


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist")
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is a file, expected the folder that holds {CONFIG} and the weights"
        )


def _weight_files(folder: Path) -> dict[Path, frozenset[str]]:
    """Return the files of weights, each with the keys that an index says it holds."""
    _check_folder(folder)
    for name in WHOLE:
        if (folder / name).exists():
            return {folder / name: frozenset()}
    for name in INDICES:
        if (folder / name).exists():
            return _indexed(folder, name)
    raise CheckpointError(
        f"{folder} has no weights; expected {' or '.join(WHOLE)}, or the index of several files "
        f"({INDICES[0]})"
    )


def _indexed(folder: Path, name: str) -> dict[Path, frozenset[str]]:
    held: dict[str, set[str]] = {}
    try:
        entries = read_folder_json(folder, name).member("weight_map").members(MAX_NAMES)
        for key, file in entries.items():
            held.setdefault(file.text(_FILE_NAME.pattern, "a plain file name"), set()).add(key)
    except DamagedError as error:
        raise CheckpointError(f"{folder / name} is damaged ({error}); download it again") from None
    if not held or len(held) > MAX_SHARDS:
        raise CheckpointError(
            f"{folder / name} names {len(held)} files, expected 1 to {MAX_SHARDS}"
        )
    return {folder / file: frozenset(keys) for file, keys in sorted(held.items())}
