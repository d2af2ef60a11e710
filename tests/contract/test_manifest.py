"""manifest.json: what is written is read again, and what cannot be trusted is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from var_deploy import files
from var_deploy.errors import BundleError
from var_deploy.manifest import (
    SCHEMA_VERSION,
    FileInfo,
    GraphInfo,
    TensorInfo,
    check_files,
    file_sha256,
    read_manifest,
)
from var_deploy.sampling import Sampling

WEIGHTS = "fp32/weights.bin"


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def refusal(bundle: Path, *parts: str) -> str:
    """The message that reading and checking the bundle ends in: one line, with these parts."""
    with pytest.raises(BundleError) as caught:
        check_files(bundle, read_manifest(bundle))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def test_what_is_saved_is_read_again(bundle: Path) -> None:
    manifest = dataclasses.replace(
        read_manifest(bundle),
        graphs={
            "fp32": {
                "decoder": GraphInfo(
                    file="fp32/decoder.onnx",
                    inputs=(TensorInfo(name="f_hat", dtype="float32", shape=(1, 4, "L", 2)),),
                    outputs=(),
                    weight_bytes=7,
                )
            }
        },
        labels=("Stern", "café, 星"),
        defaults=Sampling(cfg=1.5, top_k=7, top_p=0.25, temperature=0.5),
        checkpoint={"transformer": {"sha256": "00"}},
        tools={"onnx": "1.19"},
        parity={"passed": True, "checks": [{"error": 1e-5}]},
    )
    manifest.save(bundle)
    again = read_manifest(bundle)
    assert again == manifest
    assert again.to_json() == manifest.to_json()
    assert again.graph("fp32", "decoder").input("f_hat").shape == (1, 4, "L", 2)
    assert sorted(p.name for p in bundle.iterdir()) == ["fp32", "manifest.json"]
    check_files(bundle, again)


def test_defaults_may_be_one_value_a_scale(bundle: Path) -> None:
    defaults = Sampling(cfg=(0.0, 1 / 3), top_k=(0, 7), top_p=0.25, temperature=(2.0, 0.1))
    manifest = dataclasses.replace(read_manifest(bundle), defaults=defaults)
    manifest.save(bundle)
    again = read_manifest(bundle)
    assert again == manifest
    assert again.to_json() == manifest.to_json()
    assert [type(k) for k in again.defaults.top_k] == [int, int]  # type: ignore[union-attr]


def test_the_digest_follows_the_files_alone(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    digest = manifest.digest()
    assert dataclasses.replace(manifest, parity={"passed": True}).digest() == digest
    changed = {**manifest.files, WEIGHTS: FileInfo(size=7, sha256="0" * 64)}
    assert dataclasses.replace(manifest, files=changed).digest() != digest


def test_rows_follow_guidance(bundle: Path) -> None:
    manifest = dataclasses.replace(read_manifest(bundle), batch=3)
    assert dataclasses.replace(manifest, guidance=True).rows == 6
    assert dataclasses.replace(manifest, guidance=False).rows == 3


def test_a_graph_or_precision_that_is_not_there(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    with pytest.raises(BundleError, match=r"no fp16 graphs \(it has fp32\).*--precision fp16"):
        manifest.graph("fp16", "decoder")
    with pytest.raises(BundleError, match="no graph encoder in fp32; export it again"):
        manifest.graph("fp32", "encoder")


def test_a_newer_schema(bundle: Path) -> None:
    newer = SCHEMA_VERSION + 1
    # a newer manifest may look like anything: the version is told before the rest is read
    (bundle / "manifest.json").write_text(json.dumps({"schema_version": newer, "model": "all new"}))
    refusal(bundle, f"schema version {newer}", f"up to {SCHEMA_VERSION}", "upgrade var-deploy")


@pytest.mark.parametrize(
    "content",
    [b"", b"not json", b"\xff\xfe\x00", b'{"schema_version": 1', b"[" * 100_000],
    ids=["empty", "text", "binary", "truncated", "deep"],
)
def test_a_manifest_that_is_not_json(bundle: Path, content: bytes) -> None:
    (bundle / "manifest.json").write_bytes(content)
    refusal(bundle, "manifest.json cannot be read", "export the bundle again")


@pytest.mark.parametrize("content", ["[]", "null", "7", "{}", '{"schema_version": "1"}'])
def test_json_that_is_no_manifest(bundle: Path, content: str) -> None:
    (bundle / "manifest.json").write_text(content)
    refusal(bundle, "manifest.json is not a var-deploy manifest")


def test_a_truncated_manifest(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(path.read_bytes()[:-40])
    refusal(bundle, "manifest.json cannot be read", "export the bundle again")


@pytest.mark.parametrize("place", ["nothing", "a file", "a folder"])
def test_what_is_no_bundle(tmp_path: Path, place: str) -> None:
    path = tmp_path / "b"
    if place == "a file":
        path.write_text("x")
    elif place == "a folder":
        path.mkdir()
    refusal(path, f"{path} is no bundle")


def _set(*keys: str, value: object) -> Callable[[dict[str, Any]], object]:
    def change(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("files"),
        lambda data: data["model"]["tokenizer"].pop("vocab_size"),
        _set("model", "transformer", "colour", value="red"),
        _set("model", "transformer", "heads", value=0),
        _set("defaults", "cfg", value=float("nan")),
        _set("defaults", "top_p", value=2),
        _set("defaults", "top_p", value=[0.5, "many"]),
        _set("defaults", "cfg", value=[0, 1, 2]),  # of a model with two scales
        _set("batch", value="many"),
        _set("batch", value=0),
        _set("graphs", value=[]),
        _set("graphs", value={}),
        _set("graphs", "fp32", "decoder", value="decoder.onnx"),
        _set("files", value=None),
        _set("labels", value=3),
    ],
)
def test_a_damaged_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(bundle, change)
    refusal(bundle, "manifest.json is damaged", "export the bundle again")


@pytest.mark.parametrize(
    "name",
    ["../weights.bin", "fp32/../../weights.bin", "/etc/hostname", "fp32\\weights.bin", "", "."],
)
@pytest.mark.parametrize("place", ["files", "graphs"])
def test_a_path_that_leaves_the_bundle(bundle: Path, name: str, place: str) -> None:
    (bundle.parent / "weights.bin").write_bytes(b"weights")  # it is there, of the right size

    def change(data: dict[str, Any]) -> None:
        if place == "files":
            data["files"][name] = data["files"][WEIGHTS]
        else:
            data["graphs"]["fp32"]["decoder"]["file"] = name

    edit(bundle, change)
    refusal(bundle, "manifest.json", repr(name), "leaves the bundle")


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_link_that_leaves_the_bundle(bundle: Path, link: str) -> None:
    outside = bundle.parent / "outside"
    if link == "file":
        (bundle / WEIGHTS).rename(outside)
        (bundle / WEIGHTS).symlink_to(outside)
    else:
        (bundle / "fp32").rename(outside)
        (bundle / "fp32").symlink_to(outside)
    refusal(bundle, "leaves the bundle")


def test_links_to_and_inside_the_bundle_are_fine(bundle: Path) -> None:
    (bundle / WEIGHTS).rename(bundle / "w")
    (bundle / WEIGHTS).symlink_to("../w")
    (bundle.parent / "link").symlink_to(bundle)
    check_files(bundle.parent / "link", read_manifest(bundle.parent / "link"))


def test_a_graph_that_is_not_among_the_checked_files(bundle: Path) -> None:
    edit(bundle, lambda data: data["files"].pop("fp32/decoder.onnx"))
    refusal(bundle, "fp32/decoder.onnx", "export the bundle again")


def test_a_missing_file(bundle: Path) -> None:
    (bundle / WEIGHTS).unlink()
    refusal(bundle, str(bundle / WEIGHTS), "is missing", "export the bundle again")


@pytest.mark.parametrize("content", [b"weight", b"", b"weights and more"])
def test_a_file_of_another_size(bundle: Path, content: bytes) -> None:
    (bundle / WEIGHTS).write_bytes(content)
    refusal(bundle, WEIGHTS, f"has {len(content)} bytes, expected 7", "export the bundle again")


def test_a_flipped_bit(bundle: Path) -> None:
    (bundle / WEIGHTS).write_bytes(b"weightr")
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, hashes=False)
    refusal(bundle, WEIGHTS, "does not match its hash", "export the bundle again")


def test_only_what_is_asked_for_is_checked(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    (bundle / WEIGHTS).unlink()
    check_files(bundle, manifest, prefix="fp16/")
    with pytest.raises(BundleError, match="is missing"):
        check_files(bundle, manifest, prefix="fp32/")


def test_progress_counts_every_byte(bundle: Path) -> None:
    read: list[int] = []
    check_files(bundle, read_manifest(bundle), progress=read.append)
    assert sum(read) == 14


def test_a_hash_of_a_file_longer_than_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(256)) * 10)
    whole = file_sha256(path)
    monkeypatch.setattr("var_deploy.manifest.HASH_CHUNK", 100)
    assert file_sha256(path) == whole


def test_saving_writes_through_no_link(bundle: Path, tmp_path: Path) -> None:
    """Neither at the name that the temporary file had, nor at the manifest's own."""
    (tmp_path / "theirs").write_text("theirs")
    (bundle / "manifest.json.tmp").symlink_to(tmp_path / "theirs")
    (bundle / "manifest.json").rename(bundle / "blob")
    (bundle / "manifest.json").symlink_to("blob")
    before = (bundle / "blob").read_bytes()
    manifest = dataclasses.replace(read_manifest(bundle), parity={"passed": True})
    manifest.save(bundle)
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert (bundle / "blob").read_bytes() == before, "others share it"
    assert read_manifest(bundle) == manifest and not (bundle / "manifest.json").is_symlink()


def test_saving_is_whole_or_not_at_all(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (bundle / "manifest.json").read_bytes()
    manifest = dataclasses.replace(read_manifest(bundle), parity={"passed": True})

    def full(stream: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(BundleError, match="No space left on device"):
        manifest.save(bundle)
    assert (bundle / "manifest.json").read_bytes() == before
    assert sorted(p.name for p in bundle.iterdir()) == ["fp32", "manifest.json"]
