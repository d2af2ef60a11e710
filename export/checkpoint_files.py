"""Checkpoint files: named tensors, read one at a time from `.pth` and `.safetensors`.

A file is never trusted: pickles are loaded weights-only, and every way in which a file can be
wrong ends in one CheckpointError line.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from var_deploy.errors import CheckpointError
from var_deploy.manifest import file_sha256

Part = Literal["transformer", "tokenizer"]
OTHER: Mapping[Part, Part] = {"transformer": "tokenizer", "tokenizer": "transformer"}

# keys that only this part has; two of them make a mapping this part, so that a checkpoint which
# lacks one is still recognised, and the one is reported as missing
MARKS: Mapping[Part, tuple[str, ...]] = {
    "transformer": ("pos_1LC", "pos_start", "lvl_embed.weight", "word_embed.weight"),
    "tokenizer": (
        "post_quant_conv.weight",
        "quant_conv.weight",
        "quantize.embedding.weight",
        "quantize.embedding.0.weight",
        "encoder.conv_in.weight",
        "decoder.conv_out.weight",
    ),
}
# what torch.compile and the parallel wrappers insert into the names of the modules they wrap
WRAPPERS = re.compile(r"(?<=\.)(?:_orig_mod|module|_fsdp_wrapped_module)\.")
ZIP_SIGNATURE = b"PK\x03\x04"
LFS_SIGNATURE = b"version https://git-lfs"
MAX_NESTING = 8


class WeightSource(Protocol):
    """Named tensors that are read one at a time, so that a model never lies twice in memory."""

    @property
    def description(self) -> Mapping[str, Any]:
        """Where the weights come from, for the manifest: names and hashes, never paths."""
        ...

    def keys(self) -> Collection[str]:
        """State-dict keys."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Raises KeyError for a key that the source lacks."""
        ...

    def read(self, key: str) -> NDArray[Any]:
        """fp32 for whatever floating type is stored, int64 for integers.

        The array may be a view of the mapped file; writing to it never reaches the file. Raises
        KeyError for a key that the source lacks.
        """
        ...


@dataclass(frozen=True)
class _Stored:
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


class _CheckpointFile:
    """The part of one file, under the keys of the released state dicts."""

    def __init__(self, path: Path, location: str, tensors: Mapping[str, _Stored]) -> None:
        self._path, self._location, self._tensors = path, location, tensors

    @cached_property
    def description(self) -> Mapping[str, Any]:
        nested = {"key": self._location} if self._location else {}
        return {"file": self._path.name, **nested, "sha256": file_sha256(self._path)}

    def __str__(self) -> str:
        return str(self._path)

    def keys(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape

    def read(self, key: str) -> NDArray[Any]:
        tensor = self._tensors[key].load().detach()
        tensor = tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64)
        array: NDArray[Any] = tensor.contiguous().numpy()
        return array


def open_checkpoint(path: Path, part: Part) -> WeightSource:
    """Open a released or a training checkpoint and find the weights of `part` in it.

    Weights may lie under any keys (`{"trainer": {"var_wo_ddp": …}}`) and any prefix (`module.`).
    Zip-format `.pth` and `.safetensors` are mapped, not read; `.pth` of before PyTorch 1.6 are
    held in memory once. Raises CheckpointError for a file that is missing, damaged, wants to run
    code on loading, is no checkpoint, or holds `part` not at all or more than once.
    """
    head = _check_file(path)
    tree = _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path, head)
    found = dict(_find(tree, part))
    if not found:
        if dict(_find(tree, OTHER[part])):
            raise CheckpointError(
                f"{path} holds a {OTHER[part]}, expected a {part}: "
                "were --checkpoint and --tokenizer swapped?"
            )
        raise CheckpointError(
            f"{path} holds no VAR {part}: no keys like {' and '.join(MARKS[part][:2])} in it"
        )
    if len(found) > 1:
        places = ", ".join(place or "the top level" for place in sorted(found))
        raise CheckpointError(
            f"{path} holds {len(found)} {part}s ({places}); save the one to use to its own file"
        )
    [(location, tensors)] = found.items()
    return _CheckpointFile(path, location, tensors)


def _check_file(path: Path) -> bytes:
    """The first bytes of a file that is there and is no placeholder."""
    try:
        with path.open("rb") as stream:
            head = stream.read(len(LFS_SIGNATURE))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, expected a checkpoint file") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not head:
        raise CheckpointError(f"{path} is empty; download it again")
    if head == LFS_SIGNATURE:
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`")
    return head


def _open_safetensors(path: Path) -> Mapping[str, _Stored]:
    try:
        handle: Any = safe_open(path, framework="pt")
        keys: list[str] = list(handle.keys())
        return {
            key: _Stored(tuple(handle.get_slice(key).get_shape()), partial(handle.get_tensor, key))
            for key in keys
        }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file or is truncated ({_line(error)}); download it again"
        ) from None


def _open_torch(path: Path, head: bytes) -> object:
    zipped = head.startswith(ZIP_SIGNATURE)
    if zipped and not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is truncated or damaged ({path.stat().st_size} bytes, the archive's "
            "directory at its end is missing); download it again"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks about foreign pickles
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except MemoryError:
        raise
    except Exception as error:  # garbage makes the unpickler fail in any way at all
        raise CheckpointError(_refusal(path, head, error)) from None


def _refusal(path: Path, head: bytes, error: Exception) -> str:
    """Why torch would not load the file; its own text advises to switch the protection off."""
    advice = "save its state_dict() alone and give that"
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and wanted:
        return (
            f"{path} is refused: loading it would run {wanted[1]}, and only tensors are "
            f"accepted; {advice}"
        )
    if head.startswith(b"\x80") and isinstance(error, pickle.UnpicklingError):
        return f"{path} is refused: a pickle that holds more than tensors can run code; {advice}"
    if head.startswith(b"\x80"):
        return f"{path} is truncated or damaged ({_line(error)}); download it again"
    if head.startswith(ZIP_SIGNATURE):
        return f"{path} is an archive, but no PyTorch checkpoint ({_line(error)})"
    return f"{path} is no checkpoint: expected a PyTorch .pth or a .safetensors file"


def _line(error: Exception) -> str:
    """First sentence of an error, or its type where it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")


def _in_memory(tensor: Tensor) -> _Stored:
    return _Stored(tuple(tensor.shape), lambda: tensor)


def _find(
    node: object, part: Part, path: str = "", depth: int = 0
) -> Iterator[tuple[str, Mapping[str, _Stored]]]:
    """Yield (where, tensors) of every mapping, at any depth, that holds the part."""
    if not isinstance(node, Mapping) or depth > MAX_NESTING:
        return
    tensors = {
        str(key): _in_memory(value) if isinstance(value, Tensor) else value
        for key, value in node.items()
        if isinstance(value, (Tensor, _Stored))
    }
    prefixes = _prefixes(tensors, part)
    foreign = [p for p in (*prefixes, *_prefixes(tensors, OTHER[part])) if p]
    for prefix in prefixes:
        others = tuple(p for p in foreign if p != prefix and p.startswith(prefix))
        yield (
            (path + prefix).rstrip("."),
            {
                WRAPPERS.sub("", "." + key[len(prefix) :])[1:]: stored
                for key, stored in tensors.items()
                if key.startswith(prefix) and not key.startswith(others)
            },
        )
    for key, value in node.items():
        yield from _find(value, part, f"{path}{key}.", depth + 1)


def _prefixes(keys: Collection[str], part: Part) -> list[str]:
    """Prefixes under which at least two marks of the part appear."""
    hits = [
        key[: len(key) - len(mark)]
        for mark in MARKS[part]
        for key in keys
        if key == mark or key.endswith("." + mark)
    ]
    return sorted({prefix for prefix in hits if hits.count(prefix) > 1})
