"""Files of tokens: bounded before anything is unpacked."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy

from var_deploy.cli import token_files
from var_deploy.cli.token_files import read_tokens, save_tokens
from var_deploy.errors import UsageError

TOKENS = [np.arange(2).reshape(2, 1), np.arange(8).reshape(2, 4)]


def refused(path: Path, words: str) -> None:
    """In one line, without the memory that the file would take."""
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=words) as error:
            read_tokens(path, 5)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)


def head(shape: tuple[int, ...], descr: str = "<i8") -> bytes:
    stream = io.BytesIO()
    npy.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return path


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    save_tokens(tmp_path / "t.npz", TOKENS)
    np.savez_compressed(tmp_path / "c.npz", tokens_00=TOKENS[0], tokens_01=TOKENS[1])
    with (tmp_path / "c.npz").open("ab"), zipfile.ZipFile(tmp_path / "c.npz", "a") as file:
        file.comment = b"a comment behind the directory"
    for name in ("t.npz", "c.npz"):
        for found, expected in zip(read_tokens(tmp_path / name, 5), TOKENS, strict=True):
            np.testing.assert_array_equal(found, expected)
        assert len(read_tokens(tmp_path / name, 1)) == 1


def test_zeros_that_inflate(tmp_path: Path) -> None:
    """Three billion bytes in three million; here in two scales, and a hundred times smaller."""
    half = head((2, 1 << 23)) + bytes(1 << 20)
    path = archive(tmp_path / "bomb.npz", tokens_00=half, tokens_01=half)
    refused(path, r"unpacks to more than 16,777,216 tokens \(tokens_01\.npy is int64 \[2, 8388608")


@pytest.mark.parametrize("shape", [(1, 10**12), (10**9, 10**9), (1,) * 12 + (2**62,)])
def test_sizes_that_are_only_told(tmp_path: Path, shape: tuple[int, ...]) -> None:
    refused(archive(tmp_path / "t.npz", tokens_00=head(shape)), "unpacks to more than 16,777,216")


@pytest.mark.parametrize("descr", ["|O", "<U1000000", "|V100000"])
def test_dtypes_that_are_none_of_tokens(tmp_path: Path, descr: str) -> None:
    data = head((1, 1), descr) + bytes(1000)
    refused(archive(tmp_path / "t.npz", tokens_00=data), "Python objects|unpacks to more than")


def test_no_pickle_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    objects = np.array([[Evil()]], object)
    np.savez(tmp_path / "t.npz", tokens_00=objects)
    refused(tmp_path / "t.npz", "holds Python objects, expected whole numbers")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_head_that_is_too_long(tmp_path: Path, version: int) -> None:
    length = struct.pack("<H" if version == 1 else "<I", 65_000 if version == 1 else 2**31)
    data = npy.MAGIC_PREFIX + bytes([version, 0]) + length + b" " * (30 << 20)
    refused(archive(tmp_path / "t.npz", tokens_00=data), "no file of tokens, or a damaged one")


def test_a_directory_that_is_too_long(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as file:
        for n in range(30_000):
            file.writestr(f"{n:05d}", b"")
    assert (tmp_path / "t.npz").stat().st_size < 4 << 20
    refused(tmp_path / "t.npz", "no file of tokens, or a damaged one")


@pytest.mark.parametrize("data", [b"", b"PK", b"PK\5\6" + bytes(18), b"PK\5\6", b"x" * 100_000])
def test_files_that_are_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t.npz").write_bytes(data)
    refused(tmp_path / "t.npz", "no file of tokens, or a damaged one|holds no tokens")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.npz")
    refused(tmp_path / "t.npz", "is not an ordinary file")


def test_every_byte_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is damaged, the file is read as it was or refused in one line."""
    monkeypatch.setattr(token_files, "MOST_TOKENS", 100)
    save_tokens(tmp_path / "t.npz", TOKENS)
    whole = (tmp_path / "t.npz").read_bytes()
    drawn = np.random.default_rng(0)
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= int(drawn.integers(1, 256))
        (tmp_path / "t.npz").write_bytes(data)
        try:
            read_tokens(tmp_path / "t.npz", 5)
        except UsageError as error:
            assert "\n" not in str(error)
