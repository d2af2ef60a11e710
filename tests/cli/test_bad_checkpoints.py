"""What `export` refuses: files that are no checkpoints, and places it cannot write to."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cli_steps import GIVEN, done, edit, refused

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
        (_garbage, ("var.pth is not a checkpoint",)),
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


def _complex(path: Path, good: bytes) -> None:
    import torch

    state = torch.load(path, weights_only=True)
    state["pos_1LC"] = state["pos_1LC"].to(torch.complex64)
    torch.save(state, path)


def _twice(path: Path, good: bytes) -> None:
    import torch

    state = torch.load(path, weights_only=True)
    torch.save({"model": state, "ema": state}, path)


def _parameters_alone(path: Path, good: bytes) -> None:
    import torch

    state = torch.load(path, weights_only=True)
    torch.save({key: tensor for key, tensor in state.items() if key != "lvl_1L"}, path)


def _pipe(path: Path, good: bytes) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("command", ["export", "verify", "bisect"])
@pytest.mark.parametrize(
    ("damage", "options", "code", "parts"),
    [
        (_complex, (), 1, ("pos_1LC is complex64, expected a float type",)),
        (_pipe, (), 1, ("var.pth is a pipe, expected a checkpoint file",)),
        (
            _twice,
            ("--key", "best"),
            1,
            ("no transformer under --key best, expected one of ema, mo",),
        ),
        (
            _twice,
            ("--tokenizer-key", "x"),
            1,
            ("vae.pth holds no tokenizer under --tokenizer-key",),
        ),
        (_parameters_alone, ("--patch-nums", "1,2,3"), 2, ("has 14 tokens", "expected 21 in 3")),
        (_parameters_alone, ("--patch-nums", "1,two"), 2, ("numbers that grow from 1", "'1,two'")),
        (_parameters_alone, ("--patch-nums", ""), 2, ("numbers that grow from 1", "''")),
    ],
    ids=["complex", "pipe", "key", "tokenizer-key", "sum", "text", "empty"],
)
def test_every_command_that_reads_checkpoints(
    files: Path,
    made: Path,
    tmp_path: Path,
    command: str,
    damage: Callable[[Path, bytes], None],
    options: tuple[str, ...],
    code: int,
    parts: tuple[str, ...],
) -> None:
    bad = Path(shutil.copy(files / "var.pth", tmp_path))
    damage(bad, bad.read_bytes())
    if command != "export":
        bundle = made_for(bad, made, tmp_path)
    weights = ("--checkpoint", bad, "--tokenizer", files / "vae.pth", *options)
    if command == "export":
        refused(code, "export", *weights, "--out", tmp_path / "b", parts=parts)
    elif command == "verify":
        refused(code, "verify", bundle, *weights, parts=parts)
    else:
        refused(code, "verify", bundle, *weights, "--bisect", "onnxruntime,pytorch", parts=parts)


def made_for(file: Path, made: Path, folder: Path) -> Path:
    """A copy of a bundle that says that it was made from this file."""
    bundle = Path(shutil.copytree(made, folder / "bundle"))
    if file.is_file():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        edit(bundle, lambda data: data["checkpoint"]["transformer"].update(sha256=digest))
    return bundle


def test_one_of_several_by_its_key(files: Path, tmp_path: Path) -> None:
    """The manifest names the key, and verify takes it from there."""
    import torch

    two = tmp_path / "two.pth"
    whole, other = (
        torch.load(files / f"{name}.pth", weights_only=True) for name in ("var", "other")
    )
    torch.save({"ema": other, "model": whole}, two)
    weights = ("--checkpoint", two, "--tokenizer", files / "vae.pth")
    out = tmp_path / "b"
    choose = "holds 2 transformers (ema, model); choose one with --key NAME"
    refused(1, "export", *weights, "--out", out, parts=(choose,))
    done("export", *weights, "--key", "model", "--out", out, "--layout", "shared")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["checkpoint"]["transformer"]["key"] == "model"
    done("verify", out, *weights)
    report = (out / "manifest.json").read_bytes()
    made = "--key ema: this bundle was made from model"
    refused(2, "verify", out, *weights, "--key", "ema", parts=(made,))
    assert (out / "manifest.json").read_bytes() == report
    done("verify", out, *weights, "--key", "model")


def test_scales_that_a_checkpoint_does_not_tell(files: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copy(files / "var.pth", tmp_path))
    _parameters_alone(bare, b"")
    weights = ("--checkpoint", bare, "--tokenizer", files / "vae.pth")
    out = tmp_path / "b"
    lacks = ("lacks lvl_1L", "no preset has 21 tokens; give them with --patch-nums, such as 1,2,3")
    refused(1, "export", *weights, "--out", out, parts=lacks)
    done("export", *weights, "--patch-nums", "1,2,4", "--out", out, "--layout", "shared")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"]["tokenizer"]["patch_nums"] == [1, 2, 4]
    done("verify", out, *weights)  # the bundle tells
    done("verify", out, *weights, "--patch-nums", "1,2,4")


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
        (("pocket", "--random-weights", "1", "--key", "ema"), 2, ("reads no file", "--key")),
        (("pocket", "--patch-nums", "1,2"), 2, ("--patch-nums 1,2 contradicts preset pocket",)),
        ((*GIVEN, "--patch-nums", "1,2,3"), 2, ("contradicts", "lvl_1L has 1,2,4")),
        (("--checkpoint", "{files}/vae.pth", "--tokenizer", "{files}/var.pth"), 1, ("swapped?",)),
        (("--checkpoint", "{files}", "--tokenizer", "{files}/vae.pth"), 1, ("a folder of shards",)),
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
