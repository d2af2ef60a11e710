"""What `export` refuses: files that are no checkpoints, and places it cannot write to."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cli_steps import GIVEN, refused

pytest.importorskip("torch")


# bad checkpoints


def _garbage(path: Path, good: bytes) -> None:
    path.write_bytes(b"this is a letter, not a checkpoint\n" * 99)


def _truncated(path: Path, good: bytes) -> None:
    path.write_bytes(good[: len(good) * 2 // 3])


def _evil(path: Path, good: bytes) -> None:
    path.write_bytes(pickle.dumps({"a": os.getcwd}))


def _unrelated(path: Path, good: bytes) -> None:
    import torch

    torch.save({"weight": torch.zeros(3)}, path)


def _missing_key(path: Path, good: bytes) -> None:
    import torch

    state = torch.load(path, weights_only=True)
    del state["blocks.1.ffn.fc2.weight"]
    torch.save(state, path)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_garbage, ("var.pth is no checkpoint",)),
        (_truncated, ("var.pth is truncated or damaged", "download it again")),
        (_evil, ("var.pth is refused", "state_dict()")),
        (_unrelated, ("var.pth holds no VAR transformer",)),
        (_missing_key, ("blocks.1.ffn.fc2.weight is missing",)),
        (lambda path, good: path.write_bytes(b""), ("var.pth is empty",)),
        (lambda path, good: path.unlink(), ("var.pth does not exist",)),
    ],
    ids=["garbage", "truncated", "evil", "unrelated", "missing-key", "empty", "missing"],
)
def test_bad_checkpoints(
    files: Path,
    tmp_path: Path,
    unchanged: Callable[[], None],
    damage: Callable[[Path, bytes], None],
    parts: tuple[str, ...],
) -> None:
    bad = Path(shutil.copy(files / "var.pth", tmp_path))
    damage(bad, bad.read_bytes())
    unchanged()
    options = ("--checkpoint", bad, "--tokenizer", files / "vae.pth")
    refused(1, "export", *options, "--out", tmp_path / "b", parts=parts)


def test_a_truncated_safetensors(
    files: Path, tmp_path: Path, unchanged: Callable[[], None]
) -> None:
    bad = Path(shutil.copy(files / "var.safetensors", tmp_path))
    _truncated(bad, bad.read_bytes())
    unchanged()
    options = ("--checkpoint", bad, "--tokenizer", files / "vae.pth")
    refused(
        1, "export", *options, "--out", tmp_path / "b", parts=("truncated", "download it again")
    )


FIT = ("vae.pth does not fit preset var-d16", "[32, 3, 3, 3], expected [160, 3, 3, 3]")


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("var_d16",), 2, ("unknown preset 'var_d16'", "did you mean var-d16?")),
        (("zzz",), 2, ("unknown preset 'zzz'", "known are pocket, var-d16")),
        ((), 2, ("--checkpoint", "--tokenizer")),
        (("--checkpoint", "{files}/var.pth"), 2, ("--tokenizer is missing",)),
        (("--random-weights", "1"), 2, ("--random-weights needs a preset",)),
        (("pocket", "--random-weights", "-1"), 2, ("--random-weights",)),
        (("pocket", "--random-weights", "1", "--checkpoint", "{files}/var.pth"), 2, ("exclude",)),
        (("--checkpoint", "{files}/vae.pth", "--tokenizer", "{files}/var.pth"), 1, ("swapped?",)),
        (("--checkpoint", "{files}", "--tokenizer", "{files}/vae.pth"), 2, ("--checkpoint",)),
        (("var-d16", *GIVEN), 1, FIT),
        (("pocket", "--batch", "0"), 2, ("--batch", "0")),
        (("pocket", "--batch", "two"), 2, ("--batch", "two")),
        (("pocket", "--precision", "fp8"), 2, ("--precision", "fp8")),
    ],
)
def test_export_that_cannot_be(
    files: Path,
    tmp_path: Path,
    unchanged: Callable[[], None],
    arguments: tuple[str, ...],
    code: int,
    parts: tuple[str, ...],
) -> None:
    unchanged()
    filled = [argument.format(files=files) for argument in arguments]
    refused(code, "export", *filled, "--out", tmp_path / "b", parts=parts)


@pytest.mark.parametrize("place", ["{tmp}/file/b", "{tmp}/file", "/proc/self/b", "/dev/null/b"])
def test_export_to_where_nothing_can_be_written(
    files: Path, tmp_path: Path, unchanged: Callable[[], None], place: str
) -> None:
    (tmp_path / "file").write_text("x")
    unchanged()
    out = place.format(tmp=tmp_path)
    weights = ("--checkpoint", files / "var.pth", "--tokenizer", files / "vae.pth")
    refused(2, "export", *weights, "--out", out, parts=(out,))
