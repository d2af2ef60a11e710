"""All images as one array: what NumPy reads, written without holding it."""

from __future__ import annotations

import errno
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from var_deploy.datasets.folder import SetFolder
from var_deploy.datasets.npz import write_npz
from var_deploy.datasets.shards import draw_shard
from var_deploy.datasets.spec import SetSpec
from var_deploy.errors import VarDeployError


@pytest.fixture
def made(folder: SetFolder, spec: SetSpec, pipe: Any) -> SetFolder:
    folder.begin(spec)
    for shard in range(spec.shards):
        folder.write(spec, shard, draw_shard(pipe, spec, shard))
    return folder


def test_numpy_reads_it(made: SetFolder, spec: SetSpec, pipe: Any) -> None:
    seen: list[int] = []
    path = write_npz(made, spec, seen.append)
    expected = np.concatenate([pipe.draw(request) for request in pipe.requests[:]])
    with np.load(path) as arrays:
        assert arrays.files == ["arr_0"]
        found = arrays["arr_0"]
    assert (found.dtype, found.shape) == (np.uint8, (15, 8, 8, 3))
    np.testing.assert_array_equal(found, expected)
    assert seen == [1, 2, 3, 4]


def test_the_same_set_gives_the_same_bytes(made: SetFolder, spec: SetSpec) -> None:
    first = write_npz(made, spec).read_bytes()
    assert write_npz(made, spec).read_bytes() == first
    with zipfile.ZipFile(made.path / "images.npz") as archive:
        (member,) = archive.infolist()
    assert member.date_time == (1980, 1, 1, 0, 0, 0)
    assert member.compress_type == zipfile.ZIP_STORED


def test_grey_images(
    folder: SetFolder, new_spec: Callable[..., SetSpec], new_pipe: Callable[..., Any]
) -> None:
    spec, pipe = new_spec(classes=0), new_pipe(channels=1)
    folder.begin(spec)
    folder.write(spec, 0, draw_shard(pipe, spec, 0))
    with np.load(write_npz(folder, spec)) as arrays:
        assert arrays["arr_0"].shape == (3, 8, 8, 1)


def test_it_is_not_held_in_memory(
    folder: SetFolder, new_spec: Callable[..., SetSpec], pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from var_deploy.datasets import npz

    spec = new_spec(classes=0, per_class=64, shard_size=16)
    folder.begin(spec)
    for shard in range(4):
        folder.write(spec, shard, b"stands for large images")
    image = np.zeros((256, 256, 3), np.uint8)
    monkeypatch.setattr(npz, "read_images", lambda path: iter([image] * 16))
    monkeypatch.setattr(SetFolder, "whole_shard", lambda self, spec, shard: Path(str(shard)))
    tracemalloc.start()
    path = write_npz(folder, spec)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 64 * image.nbytes
    assert peak < 8 * image.nbytes


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_shard_that_is_not_whole(made: SetFolder, spec: SetSpec, how: str) -> None:
    path = made.path / "000002.tar"
    path.unlink() if how == "missing" else path.write_bytes(b"")
    words = "is missing; run" if how == "missing" else "does not match its hash"
    with pytest.raises(VarDeployError, match=f"000002.tar {words}"):
        write_npz(made, spec)
    assert not [p for p in made.path.iterdir() if "npz" in p.name]


def test_a_full_disk(made: SetFolder, spec: SetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(done: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(VarDeployError, match=r"images.npz cannot be written: No space .*are kept"):
        write_npz(made, spec, full)
    assert not [p for p in made.path.iterdir() if "npz" in p.name]
    assert made.missing(spec, range(4)) == []
