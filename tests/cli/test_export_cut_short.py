"""An export that a full disk or Ctrl-C ends leaves the disk as it was."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli_steps import ONE_THREAD, done, export, tree
from var_deploy.files import folders
from var_deploy.manifest import read_manifest

pytest.importorskip("torch")


# export that is cut short


def test_a_disk_that_is_too_small(
    files: Path,
    bundle: Path,
    unchanged: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unchanged()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    result = export(files, bundle, "--force")
    assert result.exit_code == 1
    assert re.fullmatch(
        r"error: the disk has 0 MB free, the bundle needs \d+ MB.*\n", result.stderr
    )


class FullDisk:
    """A file on a disk that has room for its first kilobyte."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._size = stream, 0

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def write(self, data: Any) -> int:
        self._size += len(data)
        if self._size > 1000:
            self._stream.write(data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._stream.write(data))


@pytest.mark.parametrize("victim", ["weights.bin", "scale_01.onnx", r"\.manifest.json\.\w+\.tmp"])
def test_a_disk_that_fills_up_under_way(
    files: Path,
    bundle: Path,
    unchanged: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    victim: str,
) -> None:
    unchanged()
    real_open, hit = Path.open, []

    def limited(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        stream = real_open(path, mode, *arguments, **options)
        if not re.fullmatch(victim, path.name) or not {"w", "x"} & set(mode):
            return stream
        hit.append(path)
        return FullDisk(stream)

    monkeypatch.setattr(Path, "open", limited)
    result = export(files, bundle, "--force")
    monkeypatch.undo()
    assert hit, "the planted failure was never met"
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert re.search("disk is full|No space left", result.stderr)
    done("inspect", bundle)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("can_exchange", [True, False])
def test_ctrl_c_before_the_bundle_is_put_in_place(
    files: Path,
    made: Path,
    tmp_path: Path,
    unchanged: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    old: bool,
    can_exchange: bool,
) -> None:
    """What was at its place is there again, the engines and all; nothing lies beside it."""
    if old:
        shutil.copytree(made, tmp_path / "bundle")
        (tmp_path / "bundle" / "engines").mkdir()
        (tmp_path / "bundle" / "engines" / "x.plan").touch()
    unchanged()
    real = Path.rename

    def swap(one: Path, other: Path) -> bool:
        if can_exchange:
            raise KeyboardInterrupt
        return False

    def rename(path: Path, target: Path) -> Path:
        if path.name == folders.COMPLETE and target.name == "bundle":
            raise KeyboardInterrupt  # the old one lies aside already
        return real(path, target)

    monkeypatch.setattr(folders, "swap", swap)
    monkeypatch.setattr(Path, "rename", rename)
    result = export(files, tmp_path / "bundle", "--force")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_ctrl_c_right_after_the_exchange(
    files: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle / "engines").mkdir()
    (bundle / "engines" / "x.plan").touch()
    real = folders.swap

    def swap(one: Path, other: Path) -> bool:
        real(one, other)
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "swap", swap)
    assert export(files, bundle, "--force").exit_code == 130
    monkeypatch.undo()
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]
    assert (bundle / "engines" / "x.plan").exists()
    assert read_manifest(bundle).batch == 1, "the new one, and whole"
    done("inspect", bundle)


# a signal that the tests' own parent ignores, as nohup does, would be ignored here too
HALF_WAY = """
import signal, sys, time
for name in ("SIGHUP", "SIGTERM"):
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
import torch; torch.set_num_threads(1)
from var_deploy.cli import main
from var_deploy.export.graphs import weights_bin

real, written = weights_bin._cast, []

def slow(weight, value):
    written.append(weight.name)
    if len(written) == 20:  # some weights lie on the disk, more are to come
        print("half-way", flush=True)
        time.sleep(300)
    return real(weight, value)

weights_bin._cast = slow
main(sys.argv[1:], prog_name="var-deploy")
"""


@pytest.mark.skipif(os.name != "posix", reason="sends signals to a process")
@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (signal.SIGINT, 130, "interrupted\n"),
        (signal.SIGTERM, 143, "ended by SIGTERM\n"),
        (signal.SIGHUP, 129, "ended by SIGHUP\n"),
    ],
)
def test_a_signal_half_way_through_an_export(
    files: Path, bundle: Path, number: signal.Signals, code: int, told: str
) -> None:
    before = tree(bundle.parent)
    with half_way(files, bundle, "--force") as child:
        partial = [p for p in bundle.parent.iterdir() if p != bundle]
        assert len(partial) == 1, "it writes beside the bundle"
        assert partial[0].name.startswith(".bundle.partial-")
        child.send_signal(number)
        stdout, stderr = child.communicate(timeout=60)
    assert (child.returncode, stdout, stderr) == (code, "", told)
    assert tree(bundle.parent) == before
    done("generate", bundle, "--labels", 0, "--out", bundle.parent / "x.png")


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_what_a_killed_export_leaves_goes_with_the_next(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with half_way(files, out) as child:
        child.kill()
        child.communicate(timeout=60)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".bundle.partial-"), "nobody could remove it"
    with half_way(files, out) as living:  # somebody's lock is on the work folder of this one
        assert left not in (there := list(tmp_path.iterdir()))
        assert len(there) == 1
        assert export(files, out).exit_code == 0
        assert there[0].exists()
        living.send_signal(signal.SIGTERM)
        living.communicate(timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@contextlib.contextmanager
def half_way(files: Path, out: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A process that exports the small model, and waits with some of the weights written."""
    arguments = [
        *("export", "--checkpoint", files / "var.pth", "--tokenizer", files / "vae.pth"),
        *("--out", out, *options),
    ]
    with subprocess.Popen(
        [sys.executable, "-c", HALF_WAY, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stderr is not None
            assert child.stdout.readline() == "half-way\n", child.stderr.read()
            yield child
        finally:
            child.kill()
