"""manifest.json: what is written is read again, and what cannot be trusted is refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from var_deploy import files, names
from var_deploy.errors import BundleChangedError, BundleError
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
                    inputs=(TensorInfo(name="f_hat", dtype="float32", shape=(1, 4, 2, 2)),),
                    outputs=(TensorInfo(name="image", dtype="float32", shape=(1, 32, 32, 3)),),
                    weight_bytes=5,
                )
            }
        },
        labels=("Stern", "café, 星", ""),
        defaults=Sampling(cfg=1.5, top_k=7, top_p=0.25, temperature=0.5),
        checkpoint={"tokenizer": {}, "transformer": {"sha256": "00", "random_weights": 7}},
        tools={"onnx": "1.19"},
        parity={
            "passed": False,
            "failure": "fp32/decoder: too far",
            "checks": [
                {
                    "precision": "fp32",
                    "graph": "decoder",
                    "tensor": "image",
                    "tokens": "",
                    "relative": 1e-5,
                    "bound": None,
                    "passed": False,
                }
            ],
        },
    )
    manifest.save(bundle)
    again = read_manifest(bundle)
    assert again == manifest
    assert again.to_json() == manifest.to_json()
    assert again.graph("fp32", "decoder").input("f_hat").shape == (1, 4, 2, 2)
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
    refusal(path, f"{path} {'does not exist' if place == 'nothing' else 'is not a bundle'}")


def test_a_preset_is_not_a_bundle_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from var_deploy.export.checkpoint.presets import PRESETS, TEXT_PRESETS

    monkeypatch.chdir(tmp_path)
    assert (*PRESETS, *TEXT_PRESETS) == names.PRESETS
    for name in names.PRESETS:
        said = f"{name} is a preset: export it first"
        refusal(Path(name), said, f"(var-deploy export {name} --out build/{name})")
    Path("pocket").mkdir()
    refusal(Path("pocket"), "pocket is not a bundle: it has no manifest.json")
    refusal(Path("nope"), "nope does not exist; give the folder of a bundle")


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


ODD_NAMES = ["./x", "a//b", "a/", "C:/x", "a/./b", "x\0y", "x\ny", "\x1b[31m", "x" * 1001]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_path_that_is_not_plain(bundle: Path, name: str) -> None:
    edit(bundle, lambda data: data["files"].update({name: data["files"][WEIGHTS]}))
    assert refusal(bundle, "which leaves the bundle or is not a plain path").isprintable()


@pytest.mark.parametrize("file", ["./fp32/decoder.onnx", "fp32/other.onnx", "fp16/decoder.onnx"])
def test_a_graph_in_another_place(bundle: Path, file: str) -> None:
    def change(data: dict[str, Any]) -> None:
        data["graphs"]["fp32"]["decoder"]["file"] = file
        data["files"][file] = data["files"][WEIGHTS]

    edit(bundle, change)
    refusal(bundle, "manifest.json", repr(file))


def test_weights_that_are_not_among_the_checked_files(bundle: Path) -> None:
    edit(bundle, lambda data: data["files"].pop(WEIGHTS))
    refusal(bundle, f"no hash of {WEIGHTS}", "export the bundle again")


LARGE = "9" * 5000


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        ("model.transformer.depth", 10**7, "depth is 10000000, expected a whole number from 1 to"),
        ("model.transformer.depth", True, "depth is True"),
        ("model.transformer.width", 8.0, "width is 8.0"),
        ("model.transformer.classes", None, "classes is None"),
        ("model.transformer.family", "bert", "family is 'bert', expected var or gpt2"),
        ("model.transformer.norm_eps", float("nan"), "norm_eps is nan"),
        ("model.tokenizer.patch_nums", [1, 2.0], "patch_nums[1] is 2.0"),
        ("model.tokenizer.patch_nums", [1, 10**6], "patch_nums[1] is 1000000"),
        ("model.tokenizer.width_multipliers", [], "width_multipliers is empty"),
        ("batch", 10**5, "batch is 100000"),
        ("batch", 4, "shape is [1, 4, 2, 2], expected [4, 4, 2, 2]"),
        ("batches", {"fp32": 2}, "batches.fp32 is 2, expected a whole number from 1 to 1"),
        ("batches", {"bf16": 1}, "batches.bf16 is unknown, expected fp32, fp16, int8"),
        ("batches", [1], "batches is [1], expected an object"),
        ("guidance", 1, "guidance is 1, expected true or false"),
        ("labels", ["a", "b"], "labels has 2 names, expected none or 3"),
        ("labels", [1, 2, 3], "labels[0] is 1"),
        ("labels", ["x" * 2000] * 3, "labels[0] is 'x"),
        ("preset", None, "preset is None"),
        ("tools", {"onnx": 1}, "tools.onnx is 1"),
        ("parity", "passed", "parity is 'passed', expected an object"),
        ("parity", {"passed": 1}, "parity.passed is 1"),
        ("parity", {"passed": True, "checks": [{"passed": True}]}, "checks[0].precision is miss"),
        ("checkpoint.transformer.random_weights", "x", "random_weights is 'x'"),
        ("checkpoint", [], "checkpoint is [], expected an object"),
        ("defaults.colour", 1, "colour is unknown"),
        ("graphs.fp64", {}, "graphs.'fp64' is unknown"),
        ("graphs.fp32.scale_07", {}, "scale_07 is not a graph of this model"),
        ("graphs.fp32.decoder.weight_bytes", 8, "weight_bytes is 8, expected a whole number"),
        ("graphs.fp32.decoder.inputs", [], "inputs lacks f_hat"),
        ("files.fp32/weights\\.bin.size", 1.5, "size is 1.5"),
        ("files.fp32/weights\\.bin.sha256", "00", "sha256 is '00'"),
    ],
)
def test_values_out_of_bounds(bundle: Path, path: str, value: object, part: str) -> None:
    keys = [key.replace("\0", ".") for key in path.replace("\\.", "\0").split(".")]
    edit(bundle, _set(*keys, value=value))
    assert part in refusal(bundle, "manifest.json is damaged", "export the bundle again")


def test_sizes_whose_product_is_out_of_bounds(bundle: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["model"]["transformer"].update(depth=512, width=1 << 16, heads=1)
        data["model"]["tokenizer"]["patch_nums"] = [1, 512]
        data["batch"] = 4096

    edit(bundle, change)
    refusal(bundle, "bytes of buffers")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"schema_version": 1, "batch": ' + LARGE + "}", "cannot be read"),
        ('{"schema_version": 1, "schema_version": 1}', "'schema_version' is there twice"),
        ('{"schema_version": 1, "preset": "\\ud800"}', "cannot be read"),
        ('{"schema_version": true}', "is not a var-deploy manifest"),
        ('{"schema_version": 0}', "is not a var-deploy manifest"),
    ],
    ids=["digits", "twice", "surrogate", "true", "zero"],
)
def test_json_that_is_odd(bundle: Path, text: str, part: str) -> None:
    (bundle / "manifest.json").write_text(text)
    refusal(bundle, part)


@pytest.mark.parametrize("kind", ["fifo", "zero", "folder", "loop", "large", "socket"])
def test_a_manifest_that_is_not_a_regular_file(
    bundle: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle / "manifest.json"
    path.unlink()
    monkeypatch.chdir(bundle)  # a socket's path must be short
    with contextlib.ExitStack() as stack:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "zero":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "large":
            with path.open("wb") as stream:
                stream.truncate(1 << 33)  # takes no room on the disk
        else:
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind("manifest.json")
        refusal(bundle, "manifest.json cannot be read", "export the bundle again")


def test_a_bundle_path_with_a_nul() -> None:
    with pytest.raises(BundleError, match="null byte"):
        read_manifest(Path("a\0b"))


@pytest.mark.parametrize("hashes", [True, False])
def test_a_listed_file_that_is_a_fifo(bundle: Path, hashes: bool) -> None:
    (bundle / WEIGHTS).unlink()
    os.mkfifo(bundle / WEIGHTS)
    with pytest.raises(BundleError, match="not a regular file"):
        check_files(bundle, read_manifest(bundle), hashes=hashes)


def test_a_file_that_keeps_changing_while_it_is_hashed(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, content = os.read, (bundle / WEIGHTS).read_bytes()

    def touch(file: int, most: int) -> bytes:
        (bundle / WEIGHTS).write_bytes(content)
        return read(file, most)

    manifest = read_manifest(bundle)
    monkeypatch.setattr(os, "read", touch)
    with pytest.raises(BundleChangedError, match="changed while it was read"):
        check_files(bundle, manifest, prefix=WEIGHTS)


def test_a_file_that_changes_once_while_it_is_hashed(bundle: Path) -> None:
    def touch(count: int) -> None:
        (bundle / WEIGHTS).write_bytes(b"WEIGHTS")

    with pytest.raises(BundleError, match="does not match its hash"):
        check_files(bundle, read_manifest(bundle), prefix=WEIGHTS, progress=touch)


def test_a_file_that_gets_a_hard_link_while_it_is_hashed(bundle: Path) -> None:
    """Its times change and its content does not, so it is read once more."""
    links = list[Path]()

    def link(count: int) -> None:
        links.append(bundle / f"link-{len(links)}")
        os.link(bundle / WEIGHTS, links[-1])

    check_files(bundle, read_manifest(bundle), prefix=WEIGHTS, progress=link)
    assert links


def test_a_write_right_after_a_hash_is_noticed(bundle: Path) -> None:
    """Within one tick of the clock that stamps files, too."""
    manifest = read_manifest(bundle)
    for _ in range(20):
        (bundle / WEIGHTS).write_bytes(b"weights")
        check_files(bundle, manifest)
        (bundle / WEIGHTS).write_bytes(b"WEIGHTS")
        with pytest.raises(BundleError, match="does not match its hash"):
            check_files(bundle, manifest)


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
def test_what_a_link_leads_to_is_checked_by_its_content(bundle: Path, link: str) -> None:
    """As in the Hugging Face cache, whose snapshots are links into another folder."""
    outside = bundle.parent / "outside"
    if link == "file":
        (bundle / WEIGHTS).rename(outside)
        (bundle / WEIGHTS).symlink_to(outside)
    else:
        (bundle / "fp32").rename(outside)
        (bundle / "fp32").symlink_to(outside)
    check_files(bundle, read_manifest(bundle))
    (bundle / WEIGHTS).resolve().write_bytes(b"weightr")
    refusal(bundle, WEIGHTS, "does not match its hash")


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
