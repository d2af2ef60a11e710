"""A bundle in the Hugging Face cache: a folder of links into another folder, which holds files that
are named by their hashes."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli_steps import done, refused

pytest.importorskip("torch")


def as_in_the_cache(bundle: Path, root: Path) -> Path:
    """The bundle as `snapshots/REVISION`, whose files are relative links into `blobs/`."""
    snapshot, blobs = root / "snapshots" / "abc", root / "blobs"
    blobs.mkdir(parents=True)
    for file in (path for path in bundle.rglob("*") if path.is_file()):
        data = file.read_bytes()
        blob = blobs / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link = snapshot / file.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture
def linked(made: Path, tmp_path: Path) -> Path:
    return as_in_the_cache(made, tmp_path / "models--x")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    array = np.random.default_rng(5).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_every_command_that_reads_a_bundle(
    made: Path, linked: Path, picture: Path, tmp_path: Path
) -> None:
    """What comes out is what the bundle itself gives."""
    for number, command in enumerate(
        [
            ("generate", "BUNDLE", "--labels", "0,1", "--layout", "per-scale", "--out", "OUT.png"),
            ("edit", "BUNDLE", picture, "--box", "12,2,22,18", "--out", "OUT.png"),
            ("reconstruct", "BUNDLE", picture, "--out", "OUT.png"),
            ("encode", "BUNDLE", picture, "--out", "OUT.npz"),
        ]
    ):
        outs = []
        for bundle in (made, linked):
            stem = str(tmp_path / f"{number}-{len(outs)}")
            given = [str(a).replace("OUT", stem).replace("BUNDLE", str(bundle)) for a in command]
            done(*given)
            outs.append(Path(given[-1]).read_bytes())
        assert outs[0] == outs[1], command
    assert "all intact" in done("inspect", linked).stdout
    done("plan", linked, "--device", "l4")
    done("sample", linked, "--per-class", 1, "--out", tmp_path / "set")
    done("triton", linked, "--out", tmp_path / "models")
    assert not [path for path in (tmp_path / "models").rglob("*") if path.is_symlink()]


def test_verify_runs_the_linked_files(linked: Path, files: Path) -> None:
    given = ("--checkpoint", files / "var.pth", "--tokenizer", files / "vae.pth")
    assert "the deployed graphs are the model" in done("verify", linked, *given).stdout


def test_what_a_link_leads_to_is_hashed(linked: Path, tmp_path: Path) -> None:
    blob = (linked / "fp32" / "weights.bin").resolve()
    data = bytearray(blob.read_bytes())
    data[5000] ^= 1
    shutil.copyfile(blob, tmp_path / "kept")
    blob.write_bytes(data)
    out = ("--labels", 0, "--out", tmp_path / "x.png")
    refused(1, "generate", linked, *out, parts=("weights.bin", "does not match its hash"))
    (linked / "fp32" / "weights.bin").unlink()
    (linked / "fp32" / "weights.bin").symlink_to("/dev/zero")
    refused(1, "generate", linked, *out, parts=("weights.bin", "not a regular file"))
