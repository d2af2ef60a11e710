"""An export that a full disk or Ctrl-C ends leaves the disk as it was."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli_steps import ONE_THREAD, done, export, tree

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

    def write(self, data: Any) -> int:
        self._size += len(data)
        if self._size > 1000:
            self._stream.write(data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._stream.write(data))


@pytest.mark.parametrize("victim", ["weights.bin", "scale_01.onnx", "manifest.json.tmp"])
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
        if path.name != victim or "w" not in mode:
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


@pytest.mark.parametrize(("old", "call"), [(True, 1), (True, 2), (False, 1)])
def test_ctrl_c_while_the_bundle_is_put_in_place(
    files: Path,
    made: Path,
    tmp_path: Path,
    unchanged: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    old: bool,
    call: int,
) -> None:
    if old:
        shutil.copytree(made, tmp_path / "bundle")
    unchanged()
    real, calls = Path.rename, []

    def rename(path: Path, target: Path) -> Path:
        calls.append(target)
        if "bundle" in target.name and len(calls) == call:
            if old and call == 1:
                real(path, target)  # the old one is aside, and the interrupt comes right after
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    result = export(files, tmp_path / "bundle", "--force")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


HALF_WAY = """
import sys, time
import torch; torch.set_num_threads(1)
from var_deploy.cli import main
from var_deploy.export import weights_bin

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


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process")
def test_ctrl_c_half_way_through_an_export(files: Path, bundle: Path) -> None:
    before = tree(bundle.parent)
    arguments = [
        *("export", "--checkpoint", files / "var.pth", "--tokenizer", files / "vae.pth"),
        *("--out", bundle, "--force"),
    ]
    with subprocess.Popen(
        [sys.executable, "-c", HALF_WAY, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "half-way\n", child.stderr.read()
        partial = [p for p in bundle.parent.iterdir() if p != bundle]
        assert len(partial) == 1, "it writes beside the bundle"
        assert partial[0].name.startswith(".bundle.partial-")
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate(timeout=60)
    assert (child.returncode, stdout, stderr) == (130, "", "interrupted\n")
    assert tree(bundle.parent) == before
    done("generate", bundle, "--labels", 0, "--out", bundle.parent / "x.png")
