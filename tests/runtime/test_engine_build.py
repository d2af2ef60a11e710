"""The engines of a bundle: which are built, which are kept, and what a cut-off build leaves."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import fake_tensorrt
from fake_tensorrt import builder as fake
from var_deploy import names
from var_deploy.errors import BackendError, BundleError, UsageError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.manifest import FileInfo, file_sha256, read_manifest
from var_deploy.planning.selection import choose_layout
from var_deploy.runtime.tensorrt import build as module
from var_deploy.runtime.tensorrt import engine_files, job
from var_deploy.runtime.tensorrt.build import BuildReport, build_bundle
from var_deploy.runtime.tensorrt.library import Library
from var_deploy.runtime.tensorrt.target import BuildOptions, Target

TARGET = Target(library="tensorrt", version="10.3.0", device="Orin", sm=87, precision="fp16")
OTHERS = ["decoder", "encoder", "accumulate"]
SHARED = ["condition", "step", *OTHERS]
PER_SCALE = ["condition", "scale_00", "scale_01", "scale_02", *OTHERS]


@pytest.fixture(scope="module")
def exported(small_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    export_bundle(small_model(), out, ExportOptions(precisions=("fp32", "fp16"), layout="both"))
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def run(bundle: Path, device: str = "Orin", **options: Any) -> BuildReport:
    given: dict[str, Any] = {
        "library": Library(fake_tensorrt),
        "find_device": lambda: (device, 87),
        "find_memory": lambda: 1,  # of memory this short, "auto" makes the layout that needs least
        **options,
    }
    return build_bundle(bundle, **given)


def refusal(error: type[Exception], bundle: Path, **options: Any) -> str:
    with pytest.raises(error) as caught:
        run(bundle, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def states(report: BuildReport) -> dict[str, str]:
    return {e.graph: "kept" if e.kept else "built" for e in report.engines}


def engines(bundle: Path) -> list[str]:
    """Names of the engines that the runtime would find, each of them intact."""
    folder = engine_files.find_target(bundle, TARGET)
    manifest = read_manifest(bundle)
    for graph in folder.engines:
        engine_files.load_plan(bundle, manifest, graph, TARGET)
    return list(folder.engines)


def files(bundle: Path) -> list[str]:
    return sorted(p.name for p in (bundle / "engines" / TARGET.folder).iterdir())


def plan(bundle: Path, graph: str) -> Any:
    data = (bundle / "engines" / TARGET.folder / f"{graph}.plan").read_bytes()
    return json.loads(data.removeprefix(fake.PLAN))


# what is built


@pytest.mark.parametrize(
    ("layout", "graphs"),
    [
        ("auto", SHARED),
        ("shared", SHARED),
        ("per-scale", PER_SCALE),
        ("both", [*SHARED[:2], *PER_SCALE[1:]]),
    ],
)
def test_a_layout_has_its_engines(bundle: Path, layout: str, graphs: list[str]) -> None:
    report = run(bundle, layout=layout)
    assert states(report) == dict.fromkeys(graphs, "built")
    assert engines(bundle) == graphs
    assert report.folder == bundle / "engines" / "tensorrt-10.3.0-sm87-fp16"
    assert report.target == TARGET
    assert report.layout == ("shared" if layout == "auto" else layout)
    assert files(bundle) == sorted([*(f"{g}.plan" for g in graphs), "engine.json", "timing.cache"])


def test_the_shared_engine_has_a_profile_a_scale(bundle: Path) -> None:
    report = run(bundle)
    profiles = plan(bundle, "step")["profiles"]
    assert [shapes[names.UNIFORMS] for shapes in profiles] == [[1, 1], [1, 4], [1, 16]]
    assert [shapes[names.past_value(1)][0] for shapes in profiles] == [1, 1, 5]
    assert {e.graph: e.profiles for e in report.engines} == {
        **dict.fromkeys(SHARED, 1),
        "step": 3,
    }
    assert plan(bundle, "decoder")["profiles"] == []


def test_the_graphs_are_those_of_the_precision(bundle: Path) -> None:
    run(bundle)
    assert plan(bundle, "step")["onnx"] == str(bundle / "fp16" / "step.onnx")
    report = run(bundle, precision="fp32", encoder=False)
    assert report.folder.name == "tensorrt-10.3.0-sm87-fp32"
    assert [e.graph for e in report.engines] == SHARED[:3]
    assert engines(bundle) == SHARED


def test_a_bundle_without_fp16_is_built_in_fp32(
    small_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = small_model(family="gpt2", codebook_per_scale=True, qk_l2_norm=False, classes=0)
    options = ExportOptions(guidance=False, layout="per-scale")
    export_bundle(model, tmp_path / "b", options)
    report = run(tmp_path / "b")
    assert report.target.precision == "fp32"
    assert (report.layout, report.reason) == ("per-scale", "the bundle holds no other layout")
    assert [e.graph for e in report.engines] == PER_SCALE[1:]  # nothing to be conditioned on
    message = refusal(BundleError, tmp_path / "b", layout="shared")
    assert "no graph step in fp32, which layout shared needs; export it again" in message


def test_the_layout_is_chosen_in_one_place(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    reason = "one copy of the weights for all scales"
    assert choose_layout(manifest, None) == ("shared", reason)
    assert choose_layout(manifest, 1)[0] == "shared"
    assert choose_layout(manifest, 1 << 40)[0] == "per-scale"


def test_progress_names_the_engine_and_ends_at_one(bundle: Path) -> None:
    seen: list[tuple[str, float]] = []
    run(bundle, progress=lambda message, done: seen.append((message, done)))
    messages = [message for message, _ in seen]
    assert messages[0] == "checking the bundle"
    assert "step (2 of 5): Timing graph nodes" in messages
    assert seen[-1] == ("done", 1.0)
    fractions = [done for message, done in seen if " of 5): " in message]
    assert fractions == sorted(fractions)


def test_an_old_tensorrt_with_several_profiles_is_noted(bundle: Path) -> None:
    assert "fixed in 10.8" in run(bundle).notes[0]
    assert run(bundle, layout="per-scale").notes == ()


# what is kept


def test_finished_engines_are_kept(bundle: Path) -> None:
    first = run(bundle, layout="both")
    before = {p: p.stat().st_mtime_ns for p in first.folder.glob("*.plan")}
    again = run(bundle, layout="both")
    assert set(states(again).values()) == {"kept"}
    assert {p: p.stat().st_mtime_ns for p in first.folder.glob("*.plan")} == before
    assert set(states(run(bundle, layout="both", force=True)).values()) == {"built"}


@pytest.mark.parametrize(
    "harm", [Path.unlink, lambda p: p.write_bytes(b"x"), lambda p: p.write_bytes(b"F" * 1439)]
)
def test_a_plan_that_is_not_intact_alone_is_built_again(
    bundle: Path, harm: Callable[[Path], object]
) -> None:
    folder = run(bundle).folder
    harm(folder / "step.plan")
    assert states(run(bundle)) == {**dict.fromkeys(SHARED, "kept"), "step": "built"}
    assert engines(bundle) == SHARED


def test_other_weights_or_options_build_everything_again(bundle: Path) -> None:
    run(bundle)
    weights = bundle / "fp16" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[0] ^= 1
    weights.write_bytes(data)
    manifest = read_manifest(bundle)
    info = FileInfo(size=len(data), sha256=file_sha256(weights))
    changed = {**manifest.files, "fp16/weights.bin": info}
    dataclasses.replace(manifest, files=changed).save(bundle)
    assert set(states(run(bundle)).values()) == {"built"}
    options = BuildOptions(optimization_level=5)
    assert set(states(run(bundle, options=options)).values()) == {"built"}
    assert set(states(run(bundle, options=options)).values()) == {"kept"}
    assert engines(bundle) == SHARED


def test_another_graph_builds_that_engine_again(bundle: Path) -> None:
    run(bundle)
    manifest = read_manifest(bundle)
    path = bundle / "fp16" / "decoder.onnx"
    proto = onnx.load(str(path), load_external_data=False)
    proto.doc_string = "changed"
    path.write_bytes(proto.SerializeToString())
    info = FileInfo(size=path.stat().st_size, sha256=file_sha256(path))
    changed = {**manifest.files, "fp16/decoder.onnx": info}
    dataclasses.replace(manifest, files=changed).save(bundle)
    assert states(run(bundle)) == {**dict.fromkeys(SHARED, "kept"), "decoder": "built"}


def test_another_device_of_the_same_kind_replaces_the_engines(bundle: Path) -> None:
    run(bundle, layout="both", device="Orin Nano")
    report = run(bundle)
    assert states(report) == dict.fromkeys(SHARED, "built")
    assert "held engines for tensorrt 10.3.0 on Orin Nano (sm87), fp16" in report.notes[0]
    assert engines(bundle) == SHARED
    assert "scale_00.plan" not in files(bundle)


def test_a_damaged_engine_json_is_built_anew_with_a_note(bundle: Path) -> None:
    folder = run(bundle).folder
    (folder / "engine.json").write_text("{")
    report = run(bundle)
    assert set(states(report).values()) == {"built"}
    assert "engine.json cannot be read" in report.notes[0]
    assert engines(bundle) == SHARED


def test_the_timing_cache_grows_and_is_used_again(bundle: Path) -> None:
    folder = run(bundle).folder
    cache = json.loads((folder / "timing.cache").read_bytes().removeprefix(fake.CACHE))
    assert cache == {"graphs": SHARED, "sm": 87}
    run(bundle, layout="per-scale")
    cache = json.loads((folder / "timing.cache").read_bytes().removeprefix(fake.CACHE))
    assert cache["graphs"] == [*SHARED, "scale_00", "scale_01", "scale_02"]


def test_a_damaged_timing_cache_is_ignored_with_a_note(bundle: Path) -> None:
    folder = run(bundle).folder
    (folder / "timing.cache").write_bytes(b"FAKECACHE{")
    report = run(bundle, force=True)
    assert sum("timing.cache is damaged and was ignored" in note for note in report.notes) == 1
    assert engines(bundle) == SHARED
    assert all("timing.cache" not in note for note in run(bundle, force=True).notes)


# tensorrt_rtx


def test_rtx_is_built_ahead_of_time_without_a_device(bundle: Path) -> None:
    def no_gpu() -> tuple[str, int]:
        raise AssertionError("nobody asks for a GPU")

    rtx = Library(fake.rtx_module(), "tensorrt_rtx")
    options = BuildOptions(compute_capability=89)
    report = run(bundle, library=rtx, options=options, find_device=no_gpu, layout="both")
    assert report.folder.name == "tensorrt_rtx-1.7.0-sm89-fp16"
    assert report.target.device == "any"
    assert not (report.folder / "timing.cache").exists()
    assert report.notes == ()
    here = dataclasses.replace(report.target, device="RTX 4090")
    manifest = read_manifest(bundle)
    for engine in report.engines:
        _, data = engine_files.load_plan(bundle, manifest, engine.graph, here)
        assert json.loads(data.removeprefix(fake.PLAN))["sm"] == 89


def test_rtx_without_a_capability_takes_that_of_the_device(bundle: Path) -> None:
    rtx = Library(fake.rtx_module(), "tensorrt_rtx")
    report = run(bundle, library=rtx, find_device=lambda: ("RTX 3060", 86))
    assert (report.target.device, report.target.sm) == ("any", 86)


def test_a_capability_asks_for_rtx(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = BuildOptions(compute_capability=86)
    message = refusal(UsageError, bundle, options=options)
    assert "--compute-capability is for tensorrt_rtx alone" in message
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake.rtx_module())
    assert run(bundle, options=options, library=None).target.library == "tensorrt_rtx"


# what is refused


def test_an_unknown_layout_is_bad_usage(bundle: Path) -> None:
    assert "found 'fast'" in refusal(UsageError, bundle, layout="fast")


def test_a_damaged_bundle_is_refused_before_anything_is_built(bundle: Path) -> None:
    (bundle / "fp16" / "weights.bin").write_bytes(b"short")
    assert "weights.bin has 5 bytes" in refusal(BundleError, bundle)
    assert not (bundle / "engines").exists()
    run(bundle, precision="fp32")  # whose files are intact


def test_a_precision_that_the_bundle_lacks_is_refused(
    small_model: Callable[..., Any], tmp_path: Path
) -> None:
    export_bundle(small_model(), tmp_path / "b", ExportOptions(layout="shared"))
    message = refusal(BundleError, tmp_path / "b", precision="fp16")
    assert "no fp16 graphs (it has fp32)" in message


def test_a_full_disk_is_told_before_the_build(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    message = refusal(BackendError, bundle)
    assert "has 0 MB free, the engines need about " in message
    assert files(bundle) == []


def test_a_disk_that_fills_up_keeps_what_is_finished(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(path: Path, data: bytes | memoryview) -> None:
        if path.name == "decoder.plan":
            raise BackendError(f"{path} cannot be written: {errno.ENOSPC}")
        write(path, data)

    write = engine_files._replace_file
    monkeypatch.setattr(engine_files, "_replace_file", fill)
    refusal(BackendError, bundle)
    monkeypatch.undo()
    assert engines(bundle) == SHARED[:2]
    assert states(run(bundle))["step"] == "kept"


def test_a_folder_that_cannot_be_made_is_one_line(bundle: Path) -> None:
    (bundle / "engines").write_text("a file")
    assert "cannot be written: " in refusal(BackendError, bundle)


def test_a_folder_without_write_permission_is_told_before_the_build(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)
    assert "fp16 cannot be written: Permission denied" in refusal(BackendError, bundle)


def test_a_failure_names_the_engine_and_keeps_the_others(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fake.PLANT, "decoder=fail")
    message = refusal(BackendError, bundle)
    assert message.startswith("tensorrt 10.3.0 could not build decoder: ")
    assert "ForeignNode[decoder.mid/Conv_9]" in message
    assert engines(bundle) == ["condition", "step"]
    monkeypatch.delenv(fake.PLANT)
    assert states(run(bundle)) == {
        **dict.fromkeys(SHARED[:2], "kept"),
        **dict.fromkeys(SHARED[2:], "built"),
    }


# Ctrl-C


@pytest.mark.parametrize(
    ("trouble", "finished"),
    [("interrupt", ["condition"]), ("late-interrupt", ["condition", "step"])],
)
def test_ctrl_c_keeps_finished_engines(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, trouble: str, finished: list[str]
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setenv(fake.PLANT, f"step={trouble}")
    with pytest.raises(KeyboardInterrupt):
        run(bundle)
    assert signal.getsignal(signal.SIGINT) is handler
    assert engines(bundle) == finished
    assert not [name for name in files(bundle) if name.endswith(".partial")]
    monkeypatch.delenv(fake.PLANT)
    kept = [graph for graph, state in states(run(bundle)).items() if state == "kept"]
    assert kept == finished


# a process of its own


class TestLowMemory:
    def test_engines_and_cache_are_the_same(self, bundle: Path) -> None:
        seen: list[str] = []
        report = run(bundle, low_memory=True, progress=lambda message, _: seen.append(message))
        assert states(report) == dict.fromkeys(SHARED, "built")
        assert engines(bundle) == SHARED
        assert any("step (2 of 5): " in m and "starting" not in m for m in seen)
        low = {name: (report.folder / name).read_bytes() for name in files(bundle)}
        run(bundle, force=True)
        for name in (*(f"{g}.plan" for g in SHARED), "timing.cache"):
            assert (report.folder / name).read_bytes() == low[name]
        assert set(states(run(bundle, low_memory=True)).values()) == {"kept"}

    def test_nothing_is_built_in_this_process(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def here(*_: object) -> None:
            raise AssertionError("built here")

        monkeypatch.setattr(fake.Builder, "build_serialized_network", here)
        run(bundle, low_memory=True, encoder=False)

    def test_a_failure_has_the_same_words(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(fake.PLANT, "step=fail")
        far = refusal(BackendError, bundle, low_memory=True)
        assert far == refusal(BackendError, bundle)
        assert engines(bundle) == ["condition"]

    def test_a_killed_process_says_what_to_try(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(fake.PLANT, "step=kill")
        message = refusal(BackendError, bundle, low_memory=True)
        assert message.startswith("the build of step was killed (signal 9): memory ran out")
        assert "--workspace" in message
        assert engines(bundle) == ["condition"]

    def test_a_process_that_cannot_start_says_why(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tests = str(Path(fake_tensorrt.__file__).parents[1])
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != tests])
        message = refusal(BackendError, bundle, low_memory=True)
        assert message.startswith("the build of condition ended with exit code 1: ")
        assert "No module named 'fake_tensorrt'" in message

    @pytest.mark.parametrize("trouble", ["interrupt", "interrupt-parent"])
    def test_ctrl_c_reaches_the_process_and_keeps_finished_engines(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
    ) -> None:
        monkeypatch.setenv(fake.PLANT, f"step={trouble}")
        with pytest.raises(KeyboardInterrupt):
            run(bundle, low_memory=True)
        assert engines(bundle) == ["condition"]
        assert not [name for name in files(bundle) if name.endswith(".partial")]


def test_lines_of_other_libraries_are_passed_over() -> None:
    assert job._message("[TRT] [W] lazy loading\n") == {}
    assert job._message("3\n") == {}
    assert job._message('{"notes": []}\n') == {"notes": []}
