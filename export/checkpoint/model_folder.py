"""Opens a folder in the form of the Hugging Face Hub: config.json and weights in one file or many,
which `shards` reads. It is as untrusted as a single file.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from var_deploy.bundle.json_values import Value, read_json
from var_deploy.errors import CheckpointError, one_line
from var_deploy.export.checkpoint.files import MAX_NAME, StoredWeights, check_tensors
from var_deploy.export.checkpoint.formats import shown
from var_deploy.export.checkpoint.shard_index import shard_names
from var_deploy.export.checkpoint.shards import open_stored
from var_deploy.manifest import file_sha256

CONFIG = "config.json"
MAX_JSON = 8 << 20  # bytes; the index of a model of 20 billion parameters has 0.1 MB


class FolderWeights(StoredWeights):
    """The tensors of a folder by key.

    Args:
        ignored: prefixes of keys that are left out: they are neither looked at nor reported.
    """

    def __init__(self, folder: Path, ignored: tuple[str, ...] = ()) -> None:
        self._folder = folder
        _check_folder(folder)
        contents = open_stored(folder)
        tree = contents.tree if isinstance(contents.tree, dict) else {}
        tensors = {
            shown(key, MAX_NAME): contents.tensor(str(key), said)
            for key, said in tree.items()
            if contents.is_tensor(said) and not str(key).startswith(ignored)
        }
        check_tensors(folder, tensors)
        super().__init__(tensors)

    @cached_property
    def description(self) -> Mapping[str, Any]:
        names = sorted(shard_names(self._folder))
        return {"files": {name: file_sha256(self._folder / name) for name in names}}

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
