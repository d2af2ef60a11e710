"""The record of hashes that spares the next process from reading weights again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from var_deploy.bundle import hash_record
from var_deploy.bundle.hash_record import MOST_ENTRIES, RECENT, HashRecord
from var_deploy.files import held_files
from var_deploy.files.cache import cache_folder
from var_deploy.files.held_files import HeldFile

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no time of change")

CONTENT = b"weights" * 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "hashes.json"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "weights.bin"
    found.write_bytes(CONTENT)
    return found


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock of the record so many seconds ahead."""

    def ahead(seconds: float) -> None:
        moment = time.time() + seconds
        monkeypatch.setattr(hash_record.time, "time", lambda: moment)

    return ahead


@pytest.fixture(autouse=True)
def fresh() -> None:
    """As in a process that has hashed nothing yet."""
    held_files.discard_hashes()


def bytes_hashed(file: Path, path: Path | None) -> int:
    """Bytes that a new process reads to know a file's hash, which is compared with the content."""
    held_files.discard_hashes()
    record, read = HashRecord(path), list[int]()
    held = HeldFile(file)
    real = os.read

    def counted(*arguments: int) -> bytes:
        data = real(*arguments)
        read.append(len(data))
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "read", counted)
        found = held.sha256(record=record)
    held.close()
    record.save()
    assert found is not None
    assert found[0] == hashlib.sha256(file.read_bytes()).hexdigest()
    return sum(read)


def test_an_unchanged_file_is_read_once(
    file: Path, path: Path, later: Callable[[float], None]
) -> None:
    later(RECENT + 1)
    assert bytes_hashed(file, path) == len(CONTENT)
    assert bytes_hashed(file, path) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("seconds", [0.0, RECENT - 1, -1000.0])
def test_a_file_that_changed_a_moment_ago_is_not_remembered(
    seconds: float, file: Path, path: Path, later: Callable[[float], None]
) -> None:
    """Nor one from the future."""
    later(seconds)
    assert bytes_hashed(file, path) == bytes_hashed(file, path) == len(CONTENT)
    assert not path.exists()


def overwrite(file: Path) -> None:
    """Other content of the same size, and the old time of the last write."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.write(b"others!")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(file: Path) -> None:
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(CONTENT[::-1])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


def truncate(file: Path) -> None:
    before = file.stat()
    os.truncate(file, 700)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [overwrite, replace, truncate, Path.touch])
def test_a_file_that_changed_is_read_again(
    change: Callable[[Path], None], file: Path, path: Path, later: Callable[[float], None]
) -> None:
    later(RECENT + 1)
    bytes_hashed(file, path)
    change(file)
    later(2 * RECENT)
    assert bytes_hashed(file, path) == file.stat().st_size


def test_times_without_a_fraction_are_not_believed(
    path: Path, later: Callable[[float], None]
) -> None:
    """FAT has no time of change, and keeps two seconds of the time of the last write."""
    later(RECENT)
    now = int(time.time() - 10 * RECENT) * 1_000_000_000
    record = HashRecord(path)
    for identity in ((1, 2, 3, now, now), (0, 2, 3, now, now + 1), (1, 0, 3, now, now + 1)):
        record.add_sha256(identity, "0" * 64)
        assert record.sha256(identity) is None
    record.add_sha256((1, 2, 3, now, now + 1), "0" * 64)
    assert record.sha256((1, 2, 3, now, now + 1)) == "0" * 64


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: "[" * 100_000,
        lambda text: " " * (1 << 20) + text,
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: json.dumps({"version": 1, "entries": [1]}),
        lambda text: json.dumps({"version": 1, "entries": {"a" * 64: "b" * 64}}),
        lambda text: "\0",
    ],
)
def test_a_damaged_record_is_none(
    damage: Callable[[str], str], file: Path, path: Path, later: Callable[[float], None]
) -> None:
    later(RECENT + 1)
    bytes_hashed(file, path)
    path.write_text(damage(path.read_text()))
    assert bytes_hashed(file, path) == len(CONTENT)
    assert bytes_hashed(file, path) == 0, "it was written anew"


def test_a_record_that_others_can_write_is_none(
    file: Path, path: Path, later: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    later(RECENT + 1)
    bytes_hashed(file, path)
    path.chmod(0o622)
    assert bytes_hashed(file, path) == len(CONTENT)
    assert path.stat().st_mode & 0o777 == 0o600
    user = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert bytes_hashed(file, path) == len(CONTENT)


def test_a_link_in_place_of_the_record_is_replaced(
    file: Path, path: Path, tmp_path: Path, later: Callable[[float], None]
) -> None:
    later(RECENT + 1)
    path.parent.mkdir()
    path.symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("kept")
    assert bytes_hashed(file, path) == len(CONTENT)
    assert (tmp_path / "precious").read_text() == "kept"
    assert not path.is_symlink()


@pytest.mark.parametrize("kind", ["file", "pipe", "folder"])
def test_a_cache_that_cannot_be_written_does_no_harm(
    kind: str, file: Path, path: Path, later: Callable[[float], None]
) -> None:
    later(RECENT + 1)
    if kind == "file":
        path.parent.write_text("in the way of the folder")
    else:
        path.parent.mkdir()
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    assert bytes_hashed(file, path) == bytes_hashed(file, path) == len(CONTENT)


def test_the_oldest_entries_go(path: Path, later: Callable[[float], None]) -> None:
    later(RECENT)
    then = time.time_ns() - 10**12
    for first in (0, MOST_ENTRIES - 10):
        record = HashRecord(path)
        for number in range(first, first + 20):
            record.add_sha256((1, number + 1, 3, then, then + 1), f"{number:064x}")
        record.save()
    record = HashRecord(path)
    for number in range(MOST_ENTRIES):
        record.add_fact(f"{number:064x}")
    record.save()
    found = HashRecord(path)
    assert found.sha256((1, 1, 3, then, then + 1)) is None
    assert all(found.has_fact(f"{number:064x}") for number in range(MOST_ENTRIES))
    assert path.stat().st_size <= hash_record.MOST_BYTES


WRITER = """
import sys
from pathlib import Path
from var_deploy.bundle.hash_record import HashRecord
for number in range(20):
    record = HashRecord(Path(sys.argv[1]))
    record.add_fact(f"{int(sys.argv[2]) * 1000 + number:064x}")
    record.save()
"""


def test_writers_at_once_leave_a_whole_record(path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, str(number)]) for number in range(3)]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            assert json.loads(path.read_text())["entries"]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_cache_is_where_users_expect_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "var-deploy"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    home = tmp_path / "home"
    assert cache_folder() in (home / ".cache/var-deploy", home / "Library/Caches/var-deploy")


def test_without_a_home_there_is_no_record(
    file: Path, monkeypatch: pytest.MonkeyPatch, later: Callable[[float], None]
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    later(RECENT + 1)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert bytes_hashed(file, None) == bytes_hashed(file, None) == len(CONTENT)
