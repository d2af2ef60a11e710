"""Tokens of images as files: an .npz with one array [N, L_k] per scale, named as in the graphs."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.errors import UsageError
from var_deploy.files import whole_file

SUFFIX = ".npz"
MOST_TOKENS = 1 << 24  # of a file: 128 MiB; a reconstruction shows far fewer
LONGEST_HEAD = 10_000  # bytes before an array's own, as numpy bounds them after it has read them
# the end of a zip archive, and what stands before it where the archive needs 64 bits
END, END_LENGTH, END_LOCATOR_64 = b"PK\5\6", 22, b"PK\6\7"
LONGEST_DIRECTORY = 1 << 20


def save_tokens(path: Path, tokens: Sequence[NDArray[np.int64]]) -> None:
    """Write the tokens of every scale; see `files.whole_file`."""
    arrays: dict[str, Any] = {names.encoder_tokens(k): t for k, t in enumerate(tokens)}
    with whole_file(path) as stream:
        np.savez(stream, **arrays)


def read_tokens(path: Path, scales: int) -> list[NDArray[Any]]:
    """What `save_tokens` wrote, of at most this many scales; whether a model has such tokens is
    not known here.

    Nothing is unpacked before its size is known: the archive's directory and the heads of the
    arrays come first. Raises UsageError for another file, and for more than MOST_TOKENS tokens.
    """
    try:
        if not path.is_file() and path.exists():
            raise UsageError(f"{path} is not an ordinary file; var-deploy encode writes one")
        with path.open("rb") as stream:
            _check_directory(stream)
            with zipfile.ZipFile(stream) as archive:
                tokens = _read_arrays(archive, scales, path)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except UsageError:
        raise
    except Exception as error:  # a damaged file raises whatever its reader stumbles over
        why = getattr(error, "strerror", None) or "it is no file of tokens, or a damaged one"
        raise UsageError(f"{path} cannot be read: {why}; var-deploy encode writes one") from None
    if not tokens:
        raise UsageError(f"{path} holds no tokens; var-deploy encode writes such a file")
    return tokens


def _read_arrays(archive: zipfile.ZipFile, scales: int, path: Path) -> list[NDArray[Any]]:
    there = set(archive.namelist())
    members: list[str] = []
    for name in map(names.encoder_tokens, range(scales)):
        if f"{name}.npy" not in there:
            break
        members.append(f"{name}.npy")
    total = 0
    for member in members:
        with archive.open(member) as stream:
            shape, dtype = _read_head(stream)
        total += math.prod(shape)
        if dtype.hasobject:
            raise UsageError(f"{path}: {member} holds Python objects, expected whole numbers")
        if total > MOST_TOKENS or dtype.itemsize > 8:
            raise UsageError(
                f"{path} unpacks to more than {MOST_TOKENS:,} tokens ({member} is {dtype} "
                f"{list(shape)}): split it"
            )
    tokens = []
    for member in members:
        with archive.open(member) as stream:
            tokens.append(npy.read_array(stream, allow_pickle=False))
    return tokens


def _read_head(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an array in the format .npy. Raises ValueError for another one."""
    start = stream.read(12)
    if len(start) < 12 or start[:6] != npy.MAGIC_PREFIX:
        raise ValueError("no array")
    wide = start[6] > 1  # the length of the head takes four bytes
    if int.from_bytes(start[8 : 12 if wide else 10], "little") > LONGEST_HEAD:
        raise ValueError("its head is too long")
    stream.seek(0)
    version = npy.read_magic(stream)
    read = npy.read_array_header_2_0 if version > (1, 0) else npy.read_array_header_1_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _check_directory(stream: IO[bytes]) -> None:
    """Raise ValueError where the directory of a zip archive is longer than that of any file of
    tokens: a few million entries fit into one that is small on disk. Its place is found as
    `zipfile` finds it."""
    length = stream.seek(0, 2)
    stream.seek(max(0, length - END_LENGTH - 0xFFFF))
    tail = stream.read()
    end = len(tail) - END_LENGTH
    if end < 0 or tail[end : end + 4] != END or tail[-2:] != b"\0\0":
        end = tail.rfind(END)  # with a comment behind it
    size = int.from_bytes(tail[end + 12 : end + 16], "little")
    if end < 0 or size > LONGEST_DIRECTORY or tail[max(end - 20, 0) : end][:4] == END_LOCATOR_64:
        raise ValueError("no archive, or one with a directory that is too long")
    stream.seek(0)
