"""engines/: what is written, what is read back, and every engine that is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from var_deploy import names
from var_deploy.errors import BackendError, UsageError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.manifest import FileInfo, Manifest, read_manifest
from var_deploy.runtime.tensorrt import engine_files
from var_deploy.runtime.tensorrt.engine_files import EngineFolder, EngineRecord
from var_deploy.runtime.tensorrt.target import BuildOptions, Target

TARGET = Target(library="tensorrt", version="10.3.0", device="Orin", sm=87, precision="fp16")
PLAN = b"the plan of step"


@pytest.fixture(scope="module")
def exported(small_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    export_bundle(small_model(), out, ExportOptions(precisions=("fp32", "fp16"), layout="both"))
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


@pytest.fixture
def folder(bundle: Path, manifest: Manifest) -> EngineFolder:
    """One engine, `step`, for TARGET."""
    record = make_record(manifest, PLAN)
    return engine_files.add_engine(engine_files.new_folder(bundle, TARGET), PLAN, record)


def make_record(manifest: Manifest, plan: bytes) -> EngineRecord:
    return EngineRecord(
        graph=names.STEP,
        file="step.plan",
        size=len(plan),
        sha256=engine_files.plan_sha256(plan),
        key=engine_files.engine_key(manifest, names.STEP, "fp16", BuildOptions(), TARGET),
        profiles=3,
        seconds=1.5,
    )


def refusal(call: Callable[..., object], *arguments: object) -> str:
    """The one line of a BackendError."""
    with pytest.raises(BackendError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(folder: EngineFolder, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder.path / "engine.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# targets and options


def test_a_target_has_a_folder_of_its_own() -> None:
    assert TARGET.folder == "tensorrt-10.3.0-sm87-fp16"
    others = {"library": "tensorrt_rtx", "version": "10.7.0", "sm": 89, "precision": "fp32"}
    for name, value in others.items():
        assert dataclasses.replace(TARGET, **{name: value}).folder != TARGET.folder


def test_a_target_serves_itself_and_any_device_where_it_says_so() -> None:
    assert TARGET.serves(TARGET)
    for name, value in {"device": "Xavier", "version": "10.7.0", "sm": 89}.items():
        assert not TARGET.serves(dataclasses.replace(TARGET, **{name: value}))
    ahead = dataclasses.replace(TARGET, library="tensorrt_rtx", device="any", sm=86)
    here = dataclasses.replace(ahead, device="RTX 3060")
    assert ahead.serves(here)
    assert not here.serves(ahead)
    assert not ahead.serves(dataclasses.replace(here, sm=89))


@pytest.mark.parametrize(
    "wrong", [{"workspace_mb": 0}, {"optimization_level": 6}, {"optimization_level": -1}]
)
def test_options_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=str(next(iter(wrong.values())))):
        BuildOptions(**wrong)


# keys


def test_the_key_is_that_of_graph_weights_options_and_target(manifest: Manifest) -> None:
    def key(graph: str = names.STEP, **changes: Any) -> str:
        given: dict[str, Any] = {
            "manifest": manifest,
            "precision": "fp16",
            "options": BuildOptions(),
            "target": TARGET,
            **changes,
        }
        return engine_files.engine_key(graph=graph, **given)

    def changed(file: str) -> Manifest:
        files = {**manifest.files, file: FileInfo(size=1, sha256="0" * 64)}
        return dataclasses.replace(manifest, files=files)

    assert key() == key()
    other_sides = dataclasses.replace(
        manifest.model,
        tokenizer=dataclasses.replace(manifest.model.tokenizer, patch_nums=(1, 3, 4)),
    )
    different = [
        key(),
        key(names.DECODER),
        key(manifest=changed("fp16/step.onnx")),
        key(manifest=changed("fp16/weights.bin")),
        key(manifest=dataclasses.replace(manifest, model=other_sides)),
        key(precision="fp32"),
        key(options=BuildOptions(workspace_mb=64)),
        key(options=BuildOptions(optimization_level=5)),
        key(target=dataclasses.replace(TARGET, device="Xavier")),
        key(target=dataclasses.replace(TARGET, version="10.7.0")),
    ]
    assert len(set(different)) == len(different)
    # what does not go into the engine does not count
    assert key(manifest=changed("fp16/decoder.onnx")) == key()
    assert key(manifest=changed("fp32/weights.bin")) == key()


def test_step_has_a_profile_a_scale_and_a_static_graph_none(manifest: Manifest) -> None:
    profiles = engine_files.graph_profiles(manifest, "fp16", names.STEP)
    assert [shapes[names.INPUT][1] for shapes in profiles] == [1, 4, 16]
    # TensorRT knows no empty past: scale 0 gets a row that it does not use
    assert [shapes[names.past_key(0)][0] for shapes in profiles] == [1, 1, 5]
    assert engine_files.graph_profiles(manifest, "fp16", names.DECODER) == []


# writing and reading


def test_an_engine_is_read_back_as_it_was_written(
    bundle: Path, manifest: Manifest, folder: EngineFolder
) -> None:
    assert folder.path == bundle / "engines" / "tensorrt-10.3.0-sm87-fp16"
    assert sorted(p.name for p in folder.path.iterdir()) == ["engine.json", "step.plan"]
    assert engine_files.read_engines(bundle, TARGET) == folder
    assert engine_files.find_target(bundle, TARGET) == folder
    assert folder.intact(folder.record(names.STEP))
    record, plan = engine_files.load_plan(bundle, manifest, names.STEP, TARGET)
    assert (record, plan) == (folder.engines[names.STEP], PLAN)


def test_a_second_engine_leaves_the_first(folder: EngineFolder, manifest: Manifest) -> None:
    decoder = dataclasses.replace(make_record(manifest, b"D"), graph="decoder", file="decoder.plan")
    both = engine_files.add_engine(folder, memoryview(b"D"), decoder)
    assert list(both.engines) == ["step", "decoder"]
    assert engine_files.read_engines(folder.bundle, TARGET) == both
    assert all(both.intact(record) for record in both.engines.values())


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(
    folder: EngineFolder, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {p.name: p.read_bytes() for p in folder.path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), full)
        message = refusal(engine_files.add_engine, folder, b"N", make_record(manifest, b"N"))
    assert message == f"{folder.path}/step.plan cannot be written: No space left on device"
    assert {p.name: p.read_bytes() for p in folder.path.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_one_line(bundle: Path, manifest: Manifest) -> None:
    (bundle / "engines").write_text("a file")
    folder = engine_files.new_folder(bundle, TARGET)
    message = refusal(engine_files.add_engine, folder, PLAN, make_record(manifest, PLAN))
    assert "step.plan cannot be written: " in message


def test_the_timing_cache_is_checked_against_its_hash(folder: EngineFolder) -> None:
    assert engine_files.read_timing_cache(folder) == b""
    folder = engine_files.add_timing_cache(folder, b"measured")
    assert engine_files.read_engines(folder.bundle, TARGET) == folder
    assert engine_files.read_timing_cache(folder) == b"measured"
    (folder.path / "timing.cache").write_bytes(b"measurec")
    assert engine_files.read_timing_cache(folder) is None
    (folder.path / "timing.cache").unlink()
    assert engine_files.read_timing_cache(folder) is None


def test_nothing_is_written_through_a_link(folder: EngineFolder, tmp_path: Path) -> None:
    """Neither at the name that unfinished files had, nor at the file's own."""
    for name in ("timing.cache", "timing.cache.partial", "engine.json.partial"):
        (tmp_path / name).write_bytes(b"theirs")
        (folder.path / name).symlink_to(tmp_path / name)
    engine_files.add_timing_cache(folder, b"measured")
    assert {path.read_bytes() for path in tmp_path.glob("*.*")} == {b"theirs"}
    assert not (folder.path / "timing.cache").is_symlink()
    assert engine_files.read_timing_cache(engine_files.read_engines(folder.bundle, TARGET))


def test_leftovers_go_and_the_rest_stays(folder: EngineFolder) -> None:
    dead = f".step.plan.{'0' * 16}.tmp"
    for name in ("step.plan.partial", dead, "scale_00.plan", "timing.cache", "note.txt"):
        (folder.path / name).write_text("left")
    engine_files.remove_leftovers(folder)
    left = sorted(p.name for p in folder.path.iterdir())
    assert left == ["engine.json", "note.txt", "step.plan"]


# refusals


@pytest.mark.parametrize(
    ("field", "value", "found", "needed"),
    [
        ("device", "Xavier", "Orin (sm87)", "Xavier (sm87)"),
        ("version", "10.7.0", "tensorrt 10.3.0", "tensorrt 10.7.0"),
        ("precision", "fp32", "fp16", "fp32"),
        ("sm", 89, "sm87", "sm89"),
    ],
)
def test_another_target_is_refused_with_both_sides(
    folder: EngineFolder, field: str, value: object, found: str, needed: str
) -> None:
    wanted = dataclasses.replace(TARGET, **{field: value})
    record = folder.record(names.STEP)
    message = refusal(engine_files.check_engine, folder, record, wanted, record.key)
    built, _, rest = message.partition(", needed is ")
    assert found in built
    assert needed in rest
    command = f"run var-deploy build {folder.bundle} --precision {wanted.precision}"
    assert message.endswith(command)


def test_a_changed_source_is_refused(
    bundle: Path, manifest: Manifest, folder: EngineFolder
) -> None:
    files = {**manifest.files, "fp16/weights.bin": FileInfo(size=1, sha256="0" * 64)}
    changed = dataclasses.replace(manifest, files=files)
    new = engine_files.engine_key(changed, names.STEP, "fp16", BuildOptions(), TARGET)
    message = refusal(engine_files.load_plan, bundle, changed, names.STEP, TARGET)
    old = folder.record(names.STEP).key
    assert f"key {old[:12]}, expected {new[:12]}" in message
    assert message.endswith(f"; run var-deploy build {bundle} --precision fp16")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda p: p.write_bytes(PLAN[:-1]), "has 15 bytes, expected 16: it is truncated"),
        (lambda p: p.write_bytes(b"T" + PLAN[1:]), "does not match its hash in engine.json"),
        (lambda p: p.unlink(), "step.plan is missing"),
    ],
)
def test_a_damaged_plan_is_refused(
    bundle: Path,
    manifest: Manifest,
    folder: EngineFolder,
    harm: Callable[[Path], object],
    words: str,
) -> None:
    harm(folder.path / "step.plan")
    assert not folder.intact(folder.record(names.STEP))
    message = refusal(engine_files.load_plan, bundle, manifest, names.STEP, TARGET)
    assert words in message
    assert message.endswith(f"; run var-deploy build {bundle} --precision fp16")


def test_an_engine_that_was_not_built_is_named_with_its_layout(folder: EngineFolder) -> None:
    message = refusal(folder.record, names.scale_graph(0))
    assert "has no engine of scale_00 (it has step)" in message
    assert message.endswith("--precision fp16 --layout per-scale")
    assert refusal(folder.record, names.ENCODER).endswith("--precision fp16")


def test_a_bundle_without_the_target_lists_those_it_has(bundle: Path, folder: EngineFolder) -> None:
    wanted = dataclasses.replace(TARGET, version="10.7.0")
    message = refusal(engine_files.find_target, bundle, wanted)
    assert "no engines for tensorrt 10.7.0 on Orin (sm87), fp16" in message
    assert "(it has tensorrt-10.3.0-sm87-fp16)" in message
    assert message.endswith(f"run var-deploy build {bundle} --precision fp16")
    shutil.rmtree(bundle / "engines")
    assert "(nothing was built yet)" in refusal(engine_files.find_target, bundle, TARGET)


def test_a_renamed_folder_fools_nobody(bundle: Path, folder: EngineFolder) -> None:
    wanted = dataclasses.replace(TARGET, version="10.7.0")
    folder.path.rename(folder.path.with_name(wanted.folder))
    message = refusal(engine_files.find_target, bundle, wanted)
    assert f"{wanted.folder} was built for tensorrt 10.3.0" in message


def test_the_command_for_tensorrt_rtx_names_it() -> None:
    ahead = dataclasses.replace(TARGET, library="tensorrt_rtx", device="any", sm=86)
    command = engine_files.build_command(Path("my bundle"), ahead)
    assert command == (
        "var-deploy build 'my bundle' --precision fp16 --library tensorrt_rtx "
        "--compute-capability 86"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(schema_version=2), "schema version 2, this var-deploy reads up to 1"),
        (lambda d: d.pop("target"), "is damaged (target is missing)"),
        (lambda d: d["engines"][0].pop("key"), "is damaged (engines[0].key is missing)"),
        (lambda d: d["engines"][0].update(size="1"), "engines[0].size is '1', expected a whole"),
        (lambda d: d["engines"][0].update(sha256=1), "engines[0].sha256 is 1, expected text"),
        (lambda d: d["target"].update(sm=10**30), "target.sm is 1000"),
        (lambda d: d["engines"][0].update(file="../../fp16/weights.bin"), "the name of a plan"),
        (lambda d: d["engines"][0]["options"].update(optimization_level=9), "is damaged"),
        (lambda d: d.update(engines=None), "engines is None, expected an array"),
    ],
)
def test_a_damaged_engine_json_is_refused(
    folder: EngineFolder, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    edit(folder, change)
    message = refusal(engine_files.read_engines, folder.bundle, TARGET)
    assert words in message
    assert message.endswith(f"run var-deploy build {folder.bundle} --precision fp16")


def test_an_engine_json_that_is_a_fifo_is_refused(folder: EngineFolder) -> None:
    (folder.path / "engine.json").unlink()
    os.mkfifo(folder.path / "engine.json")
    message = refusal(engine_files.read_engines, folder.bundle, TARGET)
    assert "engine.json cannot be read (not a regular file)" in message


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "3"])
def test_an_engine_json_that_is_none_is_refused(folder: EngineFolder, text: str) -> None:
    (folder.path / "engine.json").write_text(text)
    message = refusal(engine_files.read_engines, folder.bundle, TARGET)
    assert "engine.json" in message
