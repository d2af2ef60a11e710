"""`device_check`: the whole path on stand-ins for TensorRT and CUDA, its rehearsal, its bounds."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fake_tensorrt
from fake_machine import FakeMachine, jetson, workstation
from fake_tensorrt import builder as fake
from fake_tensorrt import cudart, engine
from var_deploy import names
from var_deploy.bench.roofline import reached, rooflines
from var_deploy.device_check import agreement, bundle_check, command, variants
from var_deploy.device_check.agreement import (
    Case,
    Reference,
    compare,
    evaluate,
    make_cases,
    observe,
    psnr,
)
from var_deploy.device_check.command import Options, check_device, main
from var_deploy.device_check.measure import time_images
from var_deploy.device_check.report import DeviceReport, Found, NotRunError
from var_deploy.errors import BackendError
from var_deploy.manifest import read_manifest
from var_deploy.planning.devices import DEVICES
from var_deploy.planning.plan import launch_times
from var_deploy.planning.workload import Workload
from var_deploy.runtime.backends.cuda import CudaClock, Graph
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.runtime.measure import LatencyStats, WallClock, clocked
from var_deploy.runtime.tensorrt.engine_files import graph_profiles
from var_deploy.runtime.tensorrt.library import Library
from var_deploy.runtime.tensorrt.session import TensorRtBackend

QUICK = Options(images=1, budget=0.0)
ENGINES = [
    "tensorrt fp16 per-scale",
    "tensorrt fp16 per-scale, no CUDA graph",
    "tensorrt fp16 shared",
    "tensorrt fp16 shared, no CUDA graph",
]
LAUNCHES = ["condition", "scale_00", "scale_01", "scale_02", "decoder"]
RATES = {"bandwidth": 2e12, "half_rate": 5e14, "full_rate": 4e13}
ABOUT = {"torch": "2.13.0", "cuda": "12.8", "device": "Orin"}


# stand-ins


def cuda_module() -> types.ModuleType:
    module = types.ModuleType("cuda.bindings.runtime")
    vars(module).update(vars(cudart))
    return module


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An Orin with TensorRT 10.3; PyTorch finds no GPU."""
    cudart.reset()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda_module())
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    monkeypatch.setattr(command, "ask_pytorch", lambda *a: pytorch_lacks())
    yield
    assert cudart.live() == {}, "something was left on the device"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorrt", "tensorrt_rtx", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, module, None)


def pytorch_lacks() -> list[dict[str, Any]]:
    raise NotRunError("PyTorch 2.13.0+cpu finds no GPU")


@pytest.fixture(scope="module")
def exported(small_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both precisions and layouts; also another model of these sizes, and one of which the
    transformer alone is another."""
    from var_deploy.export.bundle import ExportOptions, export_bundle
    from var_deploy.export.checkpoint.assemble import LoadedModel

    folder = tmp_path_factory.mktemp("device")
    ours, other = small_model(seed=1), small_model(seed=2)
    mixed = LoadedModel(**{**vars(ours), "transformer": other.transformer})
    options = ExportOptions(precisions=("fp32", "fp16"), layout="both")
    for name, model in (("small", ours), ("other", other), ("mixed", mixed)):
        export_bundle(model, folder / name, options)
    return folder


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy, to be built into."""
    return Path(shutil.copytree(exported / "small", tmp_path / "small"))


def plant(monkeypatch: pytest.MonkeyPatch, wrong: Path, graphs: Sequence[str]) -> None:
    """Let the engines of some graphs compute what those of another bundle do."""

    def swapped(self: Any, plan: dict[str, Any]) -> Any:
        path = Path(plan["onnx"])
        if path.stem in graphs:
            plan = {**plan, "onnx": str(wrong / path.parent.name / path.name)}
        return engine.ICudaEngine(self, plan)

    monkeypatch.setattr(engine.Runtime, "_engine", swapped)


def check(bundle: Path, machine: FakeMachine | None = None, **options: Any) -> dict[str, Any]:
    """The report of a check, by step name; `failed` and `passed` beside them."""
    out = bundle.parent / "report.json"
    given = Options(**{**vars(QUICK), **options})
    check_device([bundle], out, given, machine or workstation())
    data = json.loads(out.read_text())
    return {**{step["name"]: step for step in data["steps"]}, "report": data}


def states(found: dict[str, Any]) -> dict[str, str]:
    return {name: step["state"] for name, step in found.items() if name != "report"}


# the whole way


def test_on_a_gpu_everything_is_built_compared_and_timed(gpu: None, bundle: Path) -> None:
    found = check(bundle)
    others = [
        f"onnxruntime-cuda {precision} {layout}"
        for precision in ("fp16", "fp32")
        for layout in ("per-scale", "shared")
    ]
    assert [name for name, state in states(found).items() if state != "done"] == [
        *(name + graphs for name in others for graphs in ("", ", no CUDA graph")),
        "onnxruntime-cpu fp16 per-scale",
        "onnxruntime-cpu fp16 shared",
        *(f"CUDA graph changes nothing, {name}" for name in others),
        "PyTorch",
    ]
    assert found["GPU"]["result"]["name"].startswith("Orin")
    assert found["TensorRT"]["result"] == {"library": "tensorrt", "version": "10.3.0"}
    built = found["build per-scale"]["result"]["engines"]
    assert [e["graph"] for e in built] == LAUNCHES
    assert not any(e["kept"] for e in built)
    kept = {e["graph"]: e["kept"] for e in found["build encoder"]["result"]["engines"]}
    new = ("encoder", "accumulate")
    assert kept == dict.fromkeys(("condition", "step", "decoder"), True) | dict.fromkeys(new, False)
    assert "accuracy bug" in found["build shared"]["result"]["notes"][0]
    for name in ENGINES:
        result = found[name]["result"]
        assert result["clock"] == "CUDA events"
        assert result["runs_on"]["cuda_graph"] == ("off" if "no CUDA graph" in name else "on")
        agreed = result["agreement"]
        assert agreed["tokens"] == 21
        assert agreed["beyond"] == 0
        assert agreed["repeats"]
        assert agreed["psnr_forced_db"][0] > 50
        assert list(result["latency"]["launches"]) == LAUNCHES
        parts = [p["median_ms"] for p in result["latency"]["launches"].values()]
        assert 0 < max(parts) < result["latency"]["image"]["p95_ms"] * 3
        assert result["latency"]["call"]["median_ms"] >= result["latency"]["image"]["p10_ms"]
        assert result["memory"]["held"] > result["floor"]["launches"][0]["bytes"] / 100
        assert [row["launch"] for row in result["floor"]["launches"]] == LAUNCHES
        assert result["floor"]["rates"] == "published"
    for layout in ("per-scale", "shared"):
        assert found[f"CUDA graph changes nothing, tensorrt fp16 {layout}"]["result"]["equal"]
    assert found["layouts agree"]["result"]["between"] == [ENGINES[0], ENGINES[2]]
    assert found["generate"]["result"]["runs_on"]["backend"] == "tensorrt"
    assert found["plan"]["result"]["device"]["sm"] == 90, "the machine that was asked"
    assert found["report"]["passed"]
    assert found["report"]["finished"]
    assert found["report"]["schema_version"] == 1


@pytest.mark.parametrize(
    ("model", "graphs", "broken", "words"),
    [
        # the tokens that are given decide the image: only what is drawn gives it away
        ("mixed", ["step"], ENGINES[2:], "differ beyond rounding"),
        ("mixed", ["scale_01"], ENGINES[:2], "tokens of scale 1 differ beyond rounding"),
        ("other", ["decoder"], ENGINES, "an image with all tokens given has"),
    ],
)
def test_a_wrong_engine_shows(
    gpu: None,
    bundle: Path,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    graphs: list[str],
    broken: list[str],
    words: str,
) -> None:
    plant(monkeypatch, exported / model, graphs)
    found = check(bundle)
    failed = [name for name in ENGINES if found[name]["state"] == "failed"]
    assert failed == broken
    for name in failed:
        assert words in found[name]["reason"]
        assert found[name]["result"]["latency"], "it is timed all the same"
    assert found["report"]["failed"] == [f"small: {name}" for name in broken]
    assert not found["report"]["passed"]
    equally_wrong = found["CUDA graph changes nothing, tensorrt fp16 shared"]
    assert equally_wrong["state"] == "done"


def test_layouts_that_differ_are_seen(
    gpu: None, bundle: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, exported / "other", ["step"])
    found = check(bundle)
    assert found["layouts agree"]["state"] == "failed"
    assert "dB apart, at least 50 is due" in found["layouts agree"]["reason"]
    assert not found["layouts agree"]["result"]["equal"]


def test_recorded_graphs_that_do_nothing_are_seen(
    gpu: None, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Graph, "__call__", lambda self: None)
    found = check(bundle)
    for name in ENGINES:
        assert found[name]["state"] == ("done" if "no CUDA graph" in name else "failed")
    assert "do not keep the tokens" in found[ENGINES[0]]["reason"]
    assert found["CUDA graph changes nothing, tensorrt fp16 shared"]["state"] == "not run"


def test_a_build_that_fails_does_not_stop_the_rest(
    gpu: None, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fake.PLANT, "scale_01=fail")
    found = check(bundle)
    assert found["build per-scale"]["state"] == "failed"
    assert "could not build scale_01" in found["build per-scale"]["reason"]
    assert states(found)["build shared"] == states(found)[ENGINES[2]] == "done"
    for name in ENGINES[:2]:
        assert found[name]["state"] == "not run"
        assert found[name]["reason"] == "its engines were not built"
    assert found["layouts agree"]["state"] == "not run"
    assert not found["report"]["passed"]


def test_onnxruntime_on_the_gpu_and_pytorch_beside_it(
    gpu: None, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(bundle)

    def backend(cuda: Any, cuda_graph: bool) -> TensorRtBackend:
        """What computes there is a stand-in, in the precision whose turn it is."""
        precision = turns.pop(0)

        def plan(graph: str) -> bytes:
            data = {
                "onnx": str(bundle / manifest.graph(precision, graph).file),
                "graph": graph,
                "profiles": graph_profiles(manifest, precision, graph),
                "version": fake.__version__,
                "sm": 87,
            }
            return fake.PLAN + json.dumps(data).encode()

        return TensorRtBackend(
            Library(fake_tensorrt), plan, cuda=cuda, cuda_graph=cuda_graph
        )

    # of each precision both layouts, with and without CUDA graphs
    turns = [precision for precision in manifest.graphs for _ in range(4)]
    assert set(turns) == {"fp16", "fp32"}
    monkeypatch.setattr(variants, "OrtCudaBackend", backend)
    monkeypatch.setattr(bundle_check, "onnxruntime_lacks", lambda manifest, variant: "")
    asked: list[tuple[str, ...]] = []

    def pytorch(*arguments: str) -> list[dict[str, Any]]:
        asked.append(arguments)
        if arguments == ("--rates",):
            return [ABOUT, RATES]
        return [
            ABOUT,
            {"mode": "eager", "batch": 1, "median_ms": 1e6},
            {"mode": "eager", "batch": 8, "median_ms": 2e6},
            {"mode": "torch.compile", "batch": 1, "problem": "no compiler"},
        ]

    monkeypatch.setattr(command, "ask_pytorch", pytorch)
    found = check(bundle)
    assert asked == [("--rates",), (str(bundle),)]
    assert found["rates"]["result"]["used"] == "measured by PyTorch"
    for precision in ("fp16", "fp32"):
        step = found[f"onnxruntime-cuda {precision} shared"]
        assert step["state"] == "done"
        least = rooflines(Workload(model=manifest.model, precision=precision), measured_device())
        assert step["result"]["floor"]["floor_ms"] == pytest.approx(
            1e3 * sum(roofline.seconds for roofline in least), rel=1e-2
        )
    assert found["onnxruntime-cuda fp32 shared"]["result"]["agreement"]["psnr_bound_db"] == 60
    best = min(
        step["result"]["latency"]["image"]["median_ms"]
        for name, step in found.items()
        if name.startswith(("tensorrt", "onnxruntime-cuda"))
    )
    times = found["PyTorch"]["result"]["times"]
    assert times[0]["times_ours"] == pytest.approx(1e6 / best, rel=1e-3)
    assert "times_ours" not in times[1], "the bundle has another batch"


def measured_device() -> Any:
    import dataclasses

    changed = {"bandwidth": 2e12, "compute_rate": 5e14, "full_rate": 4e13}
    return dataclasses.replace(DEVICES["h100"], **changed)


# the rehearsal


def test_without_a_gpu_it_runs_what_it_can(
    no_gpu: None, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = bundle.parent / "r.json"
    assert main([str(bundle), "--out", str(out), "--images", "1", "--budget", "0"]) == 0
    data = json.loads(out.read_text())
    found = {step["name"]: step for step in data["steps"]}
    done = [name for name, step in found.items() if step["state"] == "done"]
    assert done == [
        "machine",
        "rates",
        "bundle",
        "plan",
        "reference",
        "onnxruntime-cpu fp16 per-scale",
        "onnxruntime-cpu fp16 shared",
        "layouts agree",
        "generate",
    ]
    assert all(step["reason"] for step in found.values() if step["state"] == "not run")
    assert "cuda-python is not installed" in found["GPU"]["reason"]
    assert "neither tensorrt nor tensorrt_rtx" in found["TensorRT"]["reason"]
    assert found["build shared"]["reason"] == "there is no GPU, see the step GPU"
    result = found["onnxruntime-cpu fp16 shared"]["result"]
    assert result["clock"] == "wall clock"
    assert list(result["latency"]["launches"]) == LAUNCHES
    assert result["agreement"]["tokens"] == 21
    assert found["layouts agree"]["result"]["between"][0].startswith("onnxruntime-cpu")
    text = capsys.readouterr().out
    assert "passed (9 done, 24 not run)" in text
    assert "  not run GPU: no GPU can be used" in text


def test_a_rehearsal_can_fail(no_gpu: None, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(agreement.FORCED_PSNR, "fp16", 199.0)
    out = bundle.parent / "r.json"
    assert main([str(bundle), "--out", str(out), "--images", "1", "--budget", "0"]) == 1
    failed = json.loads(out.read_text())["failed"]
    assert failed == [f"small: onnxruntime-cpu fp16 {kind}" for kind in ("per-scale", "shared")]


def test_without_fp32_graphs_nothing_is_compared(
    no_gpu: None, bundle: Path, tmp_path: Path, small_model: Callable[..., Any]
) -> None:
    from var_deploy.export.bundle import ExportOptions, export_bundle

    out = tmp_path / "half"
    export_bundle(small_model(), out, ExportOptions(precisions=("fp16",), layout="shared"))
    found = check(out)
    assert "--precision fp32 --precision fp16" in found["reference"]["reason"]
    assert "agreement" not in found["onnxruntime-cpu fp16 shared"]["result"]
    assert "has no layout per-scale" in found["onnxruntime-cpu fp16 per-scale"]["reason"]


def test_a_damaged_bundle_is_told_and_the_next_one_checked(
    no_gpu: None, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(bundle, bundle.parent / "again" / "small"))
    (bundle / "fp16" / "weights.bin").write_bytes(b"short")
    out = bundle.parent / "r.json"
    given = [str(bundle), str(other), "--out", str(out), "--images", "1", "--budget", "0"]
    assert main(given) == 1
    data = json.loads(out.read_text())
    assert data["failed"] == ["small: bundle"]
    assert [s["name"] for s in data["steps"] if s["bundle"] == "small"] == ["bundle"]
    assert len([s for s in data["steps"] if s["bundle"] == "small (2)"]) > 10
    assert "FAILED (" in capsys.readouterr().out


def test_bad_usage_and_no_bundle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: build/pocket is not here")
    assert told.count("\n") == 1
    for wrong in (["--images", "0"], ["--library", "openvino"], ["--images", "x"]):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2
    capsys.readouterr()
    (tmp_path / "file").touch()
    assert main(["nothing", "--out", str(tmp_path / "file" / "r.json")]) == 1
    assert "r.json cannot be written" in capsys.readouterr().err


# PyTorch in its process


def test_pytorch_without_a_gpu_is_a_reason() -> None:
    pytest.importorskip("torch")
    with pytest.raises(NotRunError, match="finds no GPU"):
        command.ask_pytorch("--rates")


def test_what_pytorch_prints_is_kept_when_time_runs_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "slow_peer.py").write_text(
        'print(\'{"torch": "1"}\\n{"mode": "eager"}\', flush=True)\nimport time\ntime.sleep(60)\n'
    )
    (tmp_path / "broken_peer.py").write_text('raise SystemExit("CUDA went away")\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(command, "PEER_SECONDS", 1.5)
    monkeypatch.setattr(command, "PEERS", "slow_peer")
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())
    assert command.ask_pytorch("x") == [
        {"torch": "1"},
        {"mode": "eager"},
        {"problem": "stopped after 2 s"},
    ]
    monkeypatch.setattr(command, "PEERS", "broken_peer")
    with pytest.raises(BackendError, match="PyTorch failed: CUDA went away"):
        command.ask_pytorch("x")


def test_boards_build_one_engine_at_a_time() -> None:
    for machine, expected in ((jetson(), True), (workstation(), False)):
        here = bundle_check.Here()
        command.find_rates(here, machine)
        assert here.low_memory is expected


# the report


def test_the_report_tells_nothing_of_the_machine(no_gpu: None, bundle: Path) -> None:
    (bundle / "fp16" / "decoder.onnx").unlink()
    found = check(bundle)
    text = json.dumps(found["report"])
    assert found["bundle"]["reason"].startswith("small/fp16/decoder.onnx is missing")
    for private in (str(bundle), str(bundle.parent), str(Path.home()), str(Path.cwd())):
        assert len(private) < 3 or private not in text
    assert len(platform.node()) < 3 or platform.node() not in text


def test_paths_are_cut_to_their_last_name(tmp_path: Path) -> None:
    report = DeviceReport(tmp_path / "r.json", {}, say=lambda line: None)
    told = "libx.so: cannot open /opt/lib/libx.so.10: 68 GB/s, fp16/step, /proc/cpuinfo"

    def work() -> Found:
        raise BackendError(told)

    report.step("one", work)
    assert report.steps[0].reason == (
        "libx.so: cannot open …/libx.so.10: 68 GB/s, fp16/step, /proc/cpuinfo"
    )


def test_the_file_says_where_the_process_was(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    report = DeviceReport(out, {}, say=lambda line: None)
    seen: list[dict[str, Any]] = []

    def interrupted() -> Found:
        seen.append(json.loads(out.read_text()))
        raise KeyboardInterrupt

    report.step("first", lambda: Found(result={"n": 1}))
    with pytest.raises(KeyboardInterrupt):
        report.step("second", interrupted)
    assert [step["state"] for step in seen[0]["steps"]] == ["done", "running"]
    assert not seen[0]["finished"]
    after = json.loads(out.read_text())
    assert after["steps"][1]["reason"] == "ended by KeyboardInterrupt"
    assert (after["finished"], after["passed"]) == (False, False)


def test_ctrl_c_ends_with_130(
    no_gpu: None, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle_check, "observe", pressed)
    out = bundle.parent / "r.json"
    assert main([str(bundle), "--out", str(out)]) == 130
    assert capsys.readouterr().err == f"interrupted; what was found is in {out}\n"
    assert json.loads(out.read_text())["steps"][-1]["reason"] == "ended by KeyboardInterrupt"


def test_an_unexpected_error_is_a_failed_step(tmp_path: Path) -> None:
    report = DeviceReport(tmp_path / "r.json", {}, say=lambda line: None)
    assert report.step("one", lambda: Found(result={"n": 1 // 0})) is None
    assert report.steps[0].reason.startswith("ZeroDivisionError: ")
    assert [step.name for step in report.failed] == ["one"]


# agreement


@pytest.fixture(scope="module")
def reference(exported: Path) -> Reference:
    folder = exported / "small"
    return Reference(lambda: cpu_loop(folder), make_cases(read_manifest(folder), 2))


def cpu_loop(folder: Path) -> ScaleLoop:
    return ScaleLoop(folder, read_manifest(folder), OrtCpuBackend(1), "fp32", "shared")


@pytest.mark.parametrize(("shift", "within"), [(0.0, True), (0.04, True), (0.3, False)])
def test_tokens_may_differ_by_rounding_and_no_further(
    exported: Path, reference: Reference, shift: float, within: bool
) -> None:
    """Uniforms that are moved stand for a distribution that is moved by rounding."""
    moved = Reference.__new__(Reference)
    vars(moved).update(vars(reference))
    moved.cases = [
        Case(
            labels=case.labels,
            uniforms=np.clip(case.uniforms + np.float32(shift), 0, agreement.LARGEST_UNIFORM),
            sampling=case.sampling,
        )
        for case in reference.cases
    ]
    loop = cpu_loop(exported / "small")
    outcome = observe(loop, moved, "fp16")
    loop.close()
    result, problems = evaluate(outcome, reference)
    assert (result["forced_equal"] == result["tokens"]) == (shift == 0)
    assert (result["beyond"] == 0) == within
    assert (not problems) == within
    assert result["psnr_forced_db"] == [200.0, 200.0], "the tokens are given: no difference"
    assert sum(row["tokens"] for row in result["scales"]) == result["tokens"] == 2 * 21


def test_margins_are_asked_once(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    real = reference._open
    monkeypatch.setattr(reference, "_open", lambda: opened.append(1) or real())
    first = reference.near([(0, 1), (1, 2)], 0.01)
    again = reference.near([(1, 2)], 0.01)
    assert len(opened) == 1
    assert again[1, 2] is first[1, 2]
    low, high = first[0, 1]
    tokens = reference.tokens[0][1]
    assert low.shape == high.shape == tokens.shape
    assert ((low <= tokens) & (tokens <= high)).all()


def test_images_that_are_no_numbers_fail(exported: Path, reference: Reference) -> None:
    loop = cpu_loop(exported / "small")
    outcome = observe(loop, reference, "fp32")
    loop.close()
    assert evaluate(outcome, reference)[1] == []
    same, nothing = compare(outcome, outcome)
    assert (same["equal"], same["largest_difference"], nothing) == (True, 0.0, [])
    outcome.forced_images[1][0, 0, 0, 0] = np.nan
    problems = evaluate(outcome, reference)[1]
    assert problems == ["an image with all tokens given has -200.0 dB, at least 60 is due"]
    json.dumps(evaluate(outcome, reference)[0], allow_nan=False)


def test_psnr() -> None:
    image: NDArray[np.float32] = np.full((4, 4, 3), 0.5, np.float32)
    assert psnr(image, image) == 200.0
    assert psnr(image + np.float32(0.01), image) == pytest.approx(40.0, abs=0.01)


def test_the_bounds_are_those_of_verify() -> None:
    pytest.importorskip("torch")
    from var_deploy.export.verify import bundle as verify

    assert agreement.MARGIN["fp16"] == verify.COIN_TOSS["fp16"]
    assert agreement.MARGIN["fp32"] > verify.COIN_TOSS["fp32"]
    bound = -20 * np.log10(verify.IMAGE_BOUNDS["fp32"])
    assert agreement.FORCED_PSNR["fp32"] == pytest.approx(bound)


# timing


def test_a_spread() -> None:
    spread = LatencyStats.of([0.001 * n for n in range(101)])
    assert (spread.median, spread.p10, spread.p95) == pytest.approx((0.05, 0.01, 0.095))
    assert spread.to_json() == {"median_ms": 50.0, "p10_ms": 10.0, "p95_ms": 95.0, "count": 101}


def test_launches_are_timed_one_by_one() -> None:
    clock = WallClock(lambda: None)
    slow = clocked(lambda: time.sleep(0.004), clock, first=True)
    quick = clocked(lambda: None, clock, last=True)

    def run() -> None:
        slow()
        time.sleep(0.004)  # between two launches
        quick()
        time.sleep(0.004)  # after the last launch: copies, checks

    latency = time_images(run, clock, ["slow", "quick"], budget=0.1)
    assert latency.launches["slow"].median > 0.004 > latency.launches["quick"].median
    assert 0.008 < latency.image.median < latency.call.median - 0.003
    assert latency.image.count >= 5
    assert not clock.each
    assert time_images(run, clock, ["only one name"], budget=0.0).launches == {}


def test_events_are_read_when_the_work_is_done() -> None:
    cudart.reset()
    api = cuda_module()
    stream = int(cudart.cudaStreamCreateWithFlags(1)[1])
    clock = CudaClock(stream, api)
    assert clock.laps() == []
    for seconds in (0.0, 0.003, 0.001):
        cudart.enqueue(stream, lambda seconds=seconds: time.sleep(seconds))
        clock.mark()
    first, second = clock.laps()
    assert first >= 0.003 and second >= 0.001
    clock.mark()
    assert clock.laps() == []
    assert cudart.live()["event"] == 3, "they are used again"
    clock.close()
    assert "event" not in cudart.live()
    cudart.reset()


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("device", ["orin-nano-8gb", "h100"])
def test_rooflines_are_what_plan_says(exported: Path, precision: Any, device: str) -> None:
    workload = Workload(model=read_manifest(exported / "small").model, precision=precision)
    times = launch_times(workload, DEVICES[device])
    least = rooflines(workload, DEVICES[device])
    assert [roofline.name for roofline in least] == [time.work.name for time in times] == LAUNCHES
    for roofline, planned in zip(least, times, strict=True):
        assert roofline.seconds == pytest.approx(planned.seconds)
        assert (roofline.moving >= roofline.computing) == (planned.bound == "memory")


def test_what_part_of_the_roofline_is_reached(exported: Path) -> None:
    workload = Workload(model=read_manifest(exported / "small").model)
    least = rooflines(workload, DEVICES["orin-nano-8gb"])
    doubled = {roofline.name: LatencyStats.of([2 * roofline.seconds]) for roofline in least}
    whole = LatencyStats.of([4 * sum(roofline.seconds for roofline in least)])
    found = reached(doubled, whole, least)
    assert found["reached"] == pytest.approx(0.25)
    assert {row["reached"] for row in found["launches"]} == {0.5}
    assert found["launches"][-1]["launch"] == names.DECODER
