"""Damaged bundles and requests out of range: one line, and nothing half-written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cli_steps import GIVEN, done, edit, refused, run
from var_deploy.manifest import file_sha256, read_manifest

pytest.importorskip("torch")


# bad bundles


def _truncate_weights(bundle: Path) -> None:
    path = bundle / "fp32" / "weights.bin"
    path.write_bytes(path.read_bytes()[:-100])


def _flip_a_bit(bundle: Path) -> None:
    path = bundle / "fp32" / "weights.bin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 4
    path.write_bytes(data)


def _escape(bundle: Path) -> None:
    (bundle.parent / "weights.bin").write_bytes((bundle / "fp32" / "weights.bin").read_bytes())

    def change(data: dict[str, Any]) -> None:
        data["files"]["fp32/../../weights.bin"] = data["files"].pop("fp32/weights.bin")

    edit(bundle, change)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_truncate_weights, ("weights.bin has", "bytes, expected", "export the bundle again")),
        (_flip_a_bit, ("weights.bin does not match its hash", "export the bundle again")),
        (_escape, ("'fp32/../../weights.bin', which leaves the bundle",)),
        (lambda b: (b / "fp32" / "decoder.onnx").unlink(), ("decoder.onnx is missing",)),
        (lambda b: (b / "manifest.json").unlink(), ("is not a bundle",)),
        (lambda b: (b / "manifest.json").write_text("{"), ("manifest.json cannot be read",)),
        (
            lambda b: edit(b, lambda data: data.update(schema_version=99)),
            ("schema version 99", "upgrade var-deploy"),
        ),
        (lambda b: edit(b, lambda data: data.pop("labels")), ("manifest.json is damaged",)),
    ],
    ids=["truncated", "bit", "escape", "missing", "no-manifest", "not-json", "newer", "field"],
)
@pytest.mark.parametrize("command", ["generate", "inspect", "verify"])
def test_bad_bundles(
    files: Path,
    bundle: Path,
    unchanged: Callable[[], None],
    command: str,
    damage: Callable[[Path], object],
    parts: tuple[str, ...],
) -> None:
    damage(bundle)
    unchanged()
    options: dict[str, tuple[object, ...]] = {
        "generate": ("--labels", 0, "--out", bundle.parent / "x.png"),
        "inspect": (),
        "verify": ("--checkpoint", files / "var.pth", "--tokenizer", files / "vae.pth"),
    }
    refused(1, command, bundle, *options[command], parts=parts)


def test_verify_with_another_file(
    files: Path, bundle: Path, unchanged: Callable[[], None]
) -> None:
    unchanged()
    parts = ("is not the file this bundle was made from: its {} comes from {}, sha256 ",)
    other = ("--checkpoint", files / "other.pth", "--tokenizer", files / "vae.pth")
    told = refused(2, "verify", bundle, *other)
    assert f"{files / 'other.pth'} {parts[0].format('transformer', 'var.pth')}" in told
    swapped = ("--checkpoint", files / "var.pth", "--tokenizer", files / "vae.safetensors")
    told = refused(2, "verify", bundle, *swapped)
    assert f"{files / 'vae.safetensors'} {parts[0].format('tokenizer', 'vae.pth')}" in told
    refused(2, "verify", bundle, *other, "--bisect", "onnxruntime,pytorch", parts=("not the file",))


def test_a_file_is_not_random_weights(
    files: Path, named: Path, unchanged: Callable[[], None]
) -> None:
    unchanged()
    parts = ("is not the file this bundle was made from: its transformer has random weights of",)
    refused(2, "verify", named, "--checkpoint", files / "var.pth", parts=parts)


def test_verify_with_other_weights(files: Path, bundle: Path) -> None:
    """The bundle says that it was made from the file; that is all that speaks for it."""
    digest = read_manifest(bundle).digest()
    sha256 = file_sha256(files / "other.pth")
    edit(bundle, lambda data: data["checkpoint"]["transformer"].update(sha256=sha256))
    options = ("--checkpoint", files / "other.pth", "--tokenizer", files / "vae.pth")
    result = run("verify", bundle, *options)
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert result.stderr.startswith("error: fp32/condition: ")
    assert result.stderr.count("\n") == 1
    inspected = done("inspect", bundle).stdout
    assert "verify failed: fp32/condition" in inspected
    assert read_manifest(bundle).digest() == digest


@pytest.mark.parametrize(
    ("options", "code", "parts"),
    [
        ((), 2, ("--checkpoint", "--tokenizer")),
        (("--checkpoint", "{files}/none.pth", "--tokenizer", "{files}/vae.pth"), 1, ("not exist",)),
        ((*GIVEN, "--precision", "fp16"), 1, ("no fp16 graphs (it has fp32)", "--precision fp16")),
    ],
)
def test_verify_that_cannot_be(
    files: Path,
    bundle: Path,
    unchanged: Callable[[], None],
    options: tuple[str, ...],
    code: int,
    parts: tuple[str, ...],
) -> None:
    unchanged()
    refused(code, "verify", bundle, *(o.format(files=files) for o in options), parts=parts)


# bad requests


@pytest.mark.parametrize(
    ("options", "part"),
    [
        *[
            ((option, value), option.strip("-").replace("-", "_"))
            for option, values in {
                "--cfg": ("nan", "inf", "-inf", "-0.1", "1001"),
                "--top-p": ("nan", "inf", "-0.1", "1.1"),
                "--temperature": ("nan", "inf", "0", "-1", "1e9"),
                "--top-k": ("-1", "99999999999999999999"),
                "--seed": ("-1", str(2**64)),
            }.items()
            for value in values
        ],
        (("--cfg", "strong"), "cfg 'strong' is not a number"),
        (("--cfg", "1,2"), "cfg has 2 values, but the model has"),
        (("--cfg", "1:2:3"), "a ramp has two ends"),
        (("--top-k", "2.5"), "top_k '2.5' is not a whole number"),
        (("--top-p", "0:0.9"), "0 keeps every code"),
        (("--seed", "nan"), "seed 'nan' is not a whole number"),
        (("--seed", "1,2,3", "--count", "2"), "3 seeds for 2 images"),
        (("--count", "0"), "--count"),
        (("--count", "-3"), "--count"),
        (("--threads", "0"), "--threads"),
        (("--labels", ""), "no label"),
        (("--labels", "10"), "0 to 9"),
        (("--labels", "-1"), "0 to 9"),
        (("--precision", "int3"), "int3"),
    ],
)
def test_requests_out_of_range(
    named: Path,
    tmp_path: Path,
    unchanged: Callable[[], None],
    options: tuple[str, str],
    part: str,
) -> None:
    unchanged()
    asked = options if options[0] == "--labels" else ("--labels", "0", *options)
    refused(2, "generate", named, *asked, "--out", tmp_path / "x.png", parts=(part,))


def test_a_label_that_is_nearly_right(
    named: Path, tmp_path: Path, unchanged: Callable[[], None]
) -> None:
    unchanged()
    wanted = read_manifest(named).labels[2]
    wrong = wanted[:-1] + "x"
    options = ("--labels", f"0,{wrong}", "--out", tmp_path / "x.png")
    refused(2, "generate", named, *options, parts=(repr(wrong), f"did you mean {wanted}"))


def test_a_precision_that_the_bundle_lacks(
    made: Path, tmp_path: Path, unchanged: Callable[[], None]
) -> None:
    unchanged()
    options = ("--labels", 0, "--precision", "fp16", "--out", tmp_path / "x.png")
    refused(1, "generate", made, *options, parts=("no fp16 graphs", "--precision fp16"))


@pytest.mark.parametrize(
    ("out", "part"),
    [
        ("{tmp}/file/x.png", "is not a folder"),
        ("{tmp}/file/", "is a file"),
        ("{tmp}/file", "is a file"),
        ("/proc/self/x.png", "cannot be written"),
        ("/dev/null/x.png", "cannot be written"),
        ("{tmp}/x.gif", "images are written as .png, .jpg, .jpeg or .webp, found x.gif"),
    ],
)
def test_generate_to_where_nothing_can_be_written(
    made: Path, tmp_path: Path, unchanged: Callable[[], None], out: str, part: str
) -> None:
    (tmp_path / "file").write_text("x")
    unchanged()
    refused(2, "generate", made, "--labels", 0, "--out", out.format(tmp=tmp_path), parts=(part,))


def test_a_name_that_the_disk_refuses(
    made: Path, tmp_path: Path, unchanged: Callable[[], None]
) -> None:
    unchanged()
    out = tmp_path / ("x" * 300 + ".png")
    parts = (f"{out} cannot be written: a name in it has 304 bytes", "choose a shorter one")
    refused(2, "generate", made, "--labels", 0, "--out", out, parts=parts)


def test_a_failed_generation_keeps_the_old_picture(
    made: Path, tmp_path: Path, unchanged: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.png"
    done("generate", made, "--labels", 0, "--out", out)
    unchanged()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    request = ("--labels", "0,1", "--seed", 5)
    for target in (out, tmp_path / "many"):
        parts = (f"{target} cannot be written: No space left",)
        refused(1, "generate", made, *request, "--out", target, parts=parts)
