"""`doctor`: what it finds on a board, a PC and a bare machine, and that no probe can stop it."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli_steps import run
from fake_machine import DPKG, H100_GPU, ORIN_GPU, FakeMachine, jetson, workstation
from var_deploy.host import machine as machine_module
from var_deploy.host.cuda_driver import describe
from var_deploy.host.doctor import EXTRAS, DoctorReport, Finding, examine, gpu_problem
from var_deploy.host.installation import pip, pip_command, pip_install
from var_deploy.host.machine import NO_DRIVER, Answer, Driver, Gpu, Machine

ENGINES = ("build engines", "generate with TensorRT")


def changed(machine: FakeMachine, **changes: Any) -> FakeMachine:
    """A copy of the machine; dictionaries are merged, None deletes an entry."""
    merged: dict[str, Any] = {}
    for name, change in changes.items():
        old = getattr(machine, name)
        if isinstance(change, dict):
            change = {k: v for k, v in {**old, **change}.items() if v is not None}
        merged[name] = change
    return dataclasses.replace(machine, **merged)


def finding(report: DoctorReport, name: str) -> Finding:
    (found,) = (f for f in report.findings if f.name == name)
    return found


def able(report: DoctorReport) -> dict[str, tuple[str, ...]]:
    """What each ability lacks."""
    return {ability.name: ability.lacks for ability in report.abilities}


# a board


def test_a_jetson_with_everything() -> None:
    report = examine(jetson())
    assert finding(report, "board").found.endswith("Kit Super")
    assert finding(report, "JetPack").found == "JetPack 6.2+b77, Jetson Linux R36.4.3"
    assert finding(report, "power mode") == Finding(
        name="power mode",
        state="ok",
        found="MAXN_SUPER",
        purpose="sets the clocks, and with them the speed",
    )
    assert finding(report, "GPU").found == "Orin, SM 8.7, 8.0 GB shared with the CPU"
    assert finding(report, "CUDA").found == "CUDA 12.6"
    assert finding(report, "TensorRT").found == "tensorrt 10.3.0"
    assert "8.0 GB of memory, 6.5 GB free" in finding(report, "system").found
    assert [able(report)[name] for name in ENGINES] == [(), ()]
    assert able(report)["generate on the CPU"] == ("onnxruntime",)
    assert able(report)["export and verify"] == ("torch", "onnx", "safetensors", "onnxruntime")
    assert report.generates


def test_a_virtual_environment_that_hides_the_system_tensorrt() -> None:
    report = examine(changed(jetson(), modules={"tensorrt": None}))
    found = finding(report, "TensorRT")
    assert found.state == "problem"
    assert found.found.startswith("10.3.0.30-1+cuda12.5 of the system")
    assert found.remedy == "python3 -m venv --system-site-packages .venv"
    assert able(report)["build engines"] == ("TensorRT",)
    assert not report.generates

    nothing = changed(
        jetson(), modules={"tensorrt": None}, programs={(*DPKG, "python3-libnvinfer"): None}
    )
    found = finding(examine(nothing), "TensorRT")
    assert (found.state, found.remedy.partition(";")[0]) == (
        "missing",
        "sudo apt install python3-libnvinfer",
    )


@pytest.mark.parametrize(
    ("package", "release", "state", "said"),
    [
        ("5.1.2-b104", "R35 (release), REVISION: 4.1", "problem", "JetPack 5.1.2-b104"),
        ("6.0+b106", "R36 (release), REVISION: 3.0", "problem", "R36.3.0"),
        ("", "R36 (release), REVISION: 3.0", "problem", "of JetPack 6"),
        ("", "R36 (release), REVISION: 5.2", "ok", "Jetson Linux R36.5.2, of JetPack 6"),
        ("7.0-b128", "R38 (release), REVISION: 2.0", "ok", "JetPack 7.0-b128"),
        ("", "R99 (release), REVISION: 1.0", "ok", "Jetson Linux R99.1.0"),
        ("", "", "problem", "release unknown: no packages found"),
    ],
)
def test_releases_of_jetpack(package: str, release: str, state: str, said: str) -> None:
    answer = Answer(output=package) if package else Answer(problem="no packages found")
    board = changed(
        jetson(),
        files={"/etc/nv_tegra_release": f"# {release}, GCID: 1" if release else None},
        programs={(*DPKG, "nvidia-jetpack"): answer},
    )
    found = finding(examine(board), "JetPack")
    assert found.state == state
    assert said in found.found
    assert bool(found.remedy) == (state == "problem")


def test_extras_are_rows_and_abilities() -> None:
    bare = examine(jetson())
    lacks = able(bare)
    for name, (packages, _, ability) in EXTRAS.items():
        assert finding(bare, name).state == "missing"
        assert all(package in finding(bare, name).remedy for package in packages)
        assert lacks[ability] == (name,)
    packages = {"fastapi": "0.115", "uvicorn": "0.30", "ray": "2.60", "pyarrow": "15"}
    some = examine(changed(jetson(), packages=packages))
    serve = finding(some, "serve")
    assert (serve.state, serve.found) == (
        "problem",
        "fastapi 0.115, uvicorn 0.30, without prometheus-client",
    )
    assert "prometheus-client" in serve.remedy and "fastapi" not in serve.remedy
    assert finding(some, "ray").found == "ray 2.60"
    left = {name for name, lack in able(some).items() if {*lack} & {*EXTRAS}}
    assert left == {"serve", "bench --plot", "prompts to text features"}
    others = {"prometheus-client": "0.2", "matplotlib": "3.8", "tokenizers": "0.21"}
    whole = changed(jetson(), packages={**packages, **others})
    assert not {lack for lacks in able(examine(whole)).values() for lack in lacks} & {*EXTRAS}


def test_extras_are_those_of_the_project() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for name, (packages, _, _) in EXTRAS.items():
        listed = re.search(rf"^{name} = \[(.*)\]$", text, re.M)
        assert listed is not None
        assert tuple(re.findall(r'"([\w-]+)', listed[1])) == packages


def test_why_no_gpu_can_run_engines() -> None:
    assert gpu_problem(jetson()) == ""
    said = gpu_problem(FakeMachine())
    assert "no CUDA driver is installed; install NVIDIA's driver" in said
    pascal = dataclasses.replace(H100_GPU, sm=61)
    old = changed(workstation(), cuda=Driver(cuda="12.8", gpus=(pascal,)))
    assert "SM 6.1" in gpu_problem(old) and "generate on the CPU" in gpu_problem(old)


def test_a_slow_power_mode_is_told() -> None:
    found = finding(examine(jetson(mode="15W")), "power mode")
    assert (found.state, found.found) == ("ok", "15W")
    assert "nvpmodel -m" in found.remedy


def test_a_probe_that_hangs_is_reported() -> None:
    hanging = Answer(problem="no answer within 20 seconds")
    report = examine(changed(jetson(), programs={("nvpmodel", "-q"): hanging}))
    found = finding(report, "power mode")
    assert (found.state, found.found) == ("problem", "no answer within 20 seconds")
    silent = changed(jetson(), programs={("nvpmodel", "-q"): Answer(output="NVPM WARN: ?\n")})
    assert finding(examine(silent), "power mode").found == "nvpmodel names no mode"


def test_thor_has_two_digits_before_the_point() -> None:
    gpu = dataclasses.replace(ORIN_GPU, name="NVIDIA Thor", sm=110)
    report = examine(changed(jetson(), cuda=Driver(cuda="13.0", gpus=(gpu,))))
    assert "SM 11.0" in finding(report, "GPU").found


# a PC


def test_a_workstation_without_tensorrt() -> None:
    report = examine(workstation())
    names = [f.name for f in report.findings]
    assert not {"board", "JetPack", "power mode"} & set(names)
    assert finding(report, "CUDA").found == "CUDA 12.8, driver 570.86.15"
    assert finding(report, "onnxruntime").found == "1.23.2 (CUDA, CPU)"
    assert finding(report, "TensorRT").remedy == pip_install("tensorrt", "tensorrt")
    assert finding(report, "cuda-python").remedy == pip_command("cuda-python>=12.6,<13")
    extras = {ability: (name,) for name, (_, _, ability) in EXTRAS.items()}
    assert able(report) == {
        **extras,
        "export and verify": (),
        "generate on the CPU": (),
        "build engines": ("TensorRT", "cuda-python"),
        "generate with TensorRT": ("TensorRT", "cuda-python"),
    }


def test_tensorrt_for_rtx_stands_in_for_a_tensorrt_that_does_not_load() -> None:
    broken = Answer(problem="ImportError: libnvinfer.so.10: cannot open shared object file")
    modules = {"tensorrt": broken, "cuda.bindings.runtime": Answer(output="12.9.0\n")}
    report = examine(changed(workstation(), modules=modules))
    found = finding(report, "TensorRT")
    assert found.state == "problem"
    assert found.found.startswith("tensorrt does not load: ImportError: libnvinfer.so.10")
    rtx = {**modules, "tensorrt_rtx": Answer(output="1.7.1.116\n\n")}
    report = examine(changed(workstation(), modules=rtx))
    assert finding(report, "TensorRT").found == "tensorrt_rtx 1.7.1.116"
    assert able(report)["generate with TensorRT"] == ()


@pytest.mark.parametrize(
    ("version", "state"), [("8.6.2", "problem"), ("10.2.0.post1", "problem"), ("11.1.0", "ok")]
)
def test_versions_of_tensorrt(version: str, state: str) -> None:
    report = examine(changed(workstation(), modules={"tensorrt": Answer(output=f"{version}\n")}))
    found = finding(report, "TensorRT")
    assert found.state == state
    assert ("needs 10.3" in found.purpose) == (state == "problem")


def test_cuda_bindings_that_the_driver_cannot_serve() -> None:
    modules = {"cuda.bindings.runtime": Answer(output="13.0.1\n")}
    found = finding(examine(changed(workstation(), modules=modules)), "cuda-python")
    assert (found.state, found.purpose) == ("problem", "newer than the driver's CUDA 12.8")
    # another package of the same namespace is no binding
    report = examine(changed(workstation(), modules={"cuda.core": Answer(output="0.3\n")}))
    assert "No module named" in finding(report, "cuda-python").found


def test_two_packages_of_onnxruntime() -> None:
    both = {"onnxruntime": "1.20", "onnxruntime-gpu": "1.23.2"}
    found = finding(examine(changed(workstation(), packages=both)), "onnxruntime")
    assert "from one of onnxruntime and onnxruntime-gpu" in found.found
    assert found.remedy.startswith(f"{pip()} uninstall onnxruntime onnxruntime-gpu")


def test_a_gpu_that_is_too_old() -> None:
    old = dataclasses.replace(H100_GPU, name="Tesla P100", sm=60)
    report = examine(changed(workstation(), cuda=Driver(cuda="12.8", gpus=(old,))))
    assert finding(report, "GPU").state == "problem"
    assert "GPU" in able(report)["build engines"]


def test_a_container_without_the_drivers_library() -> None:
    """The kernel module or nvidia-smi shows a GPU, but nothing can be run on it."""
    report = examine(changed(workstation(), cuda=Driver(gpus=(H100_GPU,), problem=NO_DRIVER)))
    found = finding(report, "CUDA")
    assert (found.state, found.found) == ("problem", f"driver 570.86.15, {NO_DRIVER}")
    assert "container" in found.remedy
    assert able(report)["generate with TensorRT"][-1] == "CUDA"


# nothing


def test_a_bare_machine() -> None:
    report = examine(FakeMachine(version=(3, 9, 2)))
    assert not report.generates
    assert all(lacks for lacks in able(report).values())
    assert finding(report, "Python").state == "problem"
    missing = [f for f in report.findings if f.state == "missing"]
    assert {f.name for f in missing} >= {"CUDA", "onnxruntime", "TensorRT", "torch", "polygraphy"}
    assert all(f.remedy and f.purpose for f in missing)


def test_an_onnxruntime_that_does_not_load() -> None:
    modules = {"onnxruntime": Answer(problem="ImportError: GLIBC_2.38 not found")}
    report = examine(FakeMachine(modules=modules))
    assert "GLIBC_2.38" in finding(report, "onnxruntime").found
    assert not report.generates


# the command


def on(monkeypatch: pytest.MonkeyPatch, machine: FakeMachine) -> None:
    monkeypatch.setattr(machine_module, "Machine", lambda: machine)


def test_the_table_of_a_board(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, jetson(mode="25W"))
    result = run("doctor")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert any(line.startswith("TensorRT") and "tensorrt 10.3.0" in line for line in lines)
    assert any(line.startswith("onnxruntime") and "missing" in line for line in lines)
    assert any(line.split() == ["generate", "with", "TensorRT", "yes"] for line in lines)
    assert any(re.fullmatch("generate on the CPU +no: onnxruntime", line) for line in lines)
    remedies = lines[lines.index("What would change it:") :]
    assert any(line.split()[:2] == ["power", "mode"] for line in remedies)
    assert any('pip install "onnxruntime>=' in line for line in remedies)


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, workstation())
    result = run("doctor", "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    states = {f["name"]: f["state"] for f in data["findings"]}
    assert (states["CUDA"], states["TensorRT"]) == ("ok", "missing")
    assert data["generates"] is True
    assert {a["name"]: a["here"] for a in data["abilities"]}["build engines"] is False


def test_exit_code_where_nothing_can_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, FakeMachine())
    result = run("doctor")
    assert result.exit_code == 1
    assert result.stderr == ""
    assert "onnxruntime" in result.stdout


# the probes themselves


def test_programs_that_fail_hang_or_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Machine()
    code = "import sys; print('out'); print('a\\nwhy', file=sys.stderr); sys.exit({})"
    assert here.run(sys.executable, "-c", code.format(0)) == Answer(output="out\n")
    assert here.run(sys.executable, "-c", code.format(3)) == Answer(problem="why")
    assert here.run(sys.executable, "-c", "exit(4)") == Answer(problem="exit code 4")
    assert here.run("no-such-program-here").problem == "no-such-program-here is not installed"
    monkeypatch.setattr(machine_module, "SECONDS", 0.3)
    assert (
        "no answer within" in here.run(sys.executable, "-c", "import time; time.sleep(60)").problem
    )


def test_imports_in_a_process_of_their_own() -> None:
    here = Machine()
    assert here.import_module("numpy").output.splitlines()[0].count(".") >= 1
    assert here.import_module("json.decoder", "json").output.startswith("2.0")
    assert "no_such_module" in here.import_module("no_such_module").problem
    assert here.has_module("json") and not here.has_module("no_such_module")
    assert here.distribution("numpy") and here.distribution("no-such-package") is None
    assert here.read("/no/such/file") is None


def test_answers_of_the_driver() -> None:
    class Answering(Machine):
        answers: tuple[Answer, Answer]

        def run(self, *command: str) -> Answer:
            return self.answers[0 if "var_deploy.host.cuda_driver" in command else 1]

    here = Answering()
    smi = Answer(output="NVIDIA RTX A2000, 6138, 8.6\n")
    gpu = dataclasses.asdict(H100_GPU)
    here.answers = (Answer(output=json.dumps({"cuda": "12.8", "gpus": [gpu]})), smi)
    assert here.driver() == Driver(cuda="12.8", gpus=(H100_GPU,))
    here.answers = (Answer(output=json.dumps({"problem": NO_DRIVER})), smi)
    listed = Gpu(name="NVIDIA RTX A2000", memory=6138 << 20, sm=86)
    assert here.driver() == Driver(gpus=(listed,), problem=NO_DRIVER)
    here.answers = (Answer(problem="no answer within 20 seconds"), Answer(problem="no such"))
    assert here.driver() == Driver(problem="no answer within 20 seconds")
    here.answers = (Answer(output="Segmentation fault"), Answer())
    assert "cannot be read" in here.driver().problem
    here.answers = (Answer(output='{"gpus": [{"colour": "green"}]}'), Answer())
    assert "cannot be read" in here.driver().problem


class FakeLibrary:
    """libcuda: writes its answers through the pointers that it is given."""

    def __init__(self, failing: dict[str, int] | None = None) -> None:
        self.failing = failing or {}
        self.attributes = {13: 1_980_000, 16: 132, 18: 0, 36: 2_619_000, 37: 5120, 75: 9, 76: 0}

    def __getattr__(self, call: str) -> Callable[..., int]:
        def answer(*arguments: Any) -> int:
            if call in self.failing:
                return self.failing[call]
            if call == "cuDeviceGetName":
                buffer, size, _ = arguments
                ctypes.memmove(buffer, b"H100\0", min(size, 5))
            elif call != "cuInit":
                values = {
                    "cuDriverGetVersion": 12080,
                    "cuDeviceGetCount": 1,
                    "cuDeviceGet": 7,
                    "cuDeviceTotalMem_v2": 80 << 30,
                }
                value = values.get(call)
                if call == "cuDeviceGetAttribute":
                    _, which, device = arguments
                    assert device == 7
                    value = self.attributes[which]
                arguments[0]._obj.value = value
            return 0

        return answer


def test_what_the_driver_says() -> None:
    assert describe(lambda name: FakeLibrary()) == {
        "cuda": "12.8",
        "gpus": [
            {
                "name": "H100",
                "memory": 80 << 30,
                "sm": 90,
                "multiprocessors": 132,
                "clock": 1.98e9,
                "memory_clock": 2.619e9,
                "bus_bits": 5120,
                "integrated": False,
            }
        ],
    }


@pytest.mark.parametrize(
    ("failing", "problem"),
    [
        ({"cuInit": 100}, "the CUDA driver sees no GPU"),
        ({"cuInit": 803}, "cuInit failed with CUDA error 803"),
        ({"cuDeviceGetAttribute": 1}, "cuDeviceGetAttribute failed with CUDA error 1"),
    ],
)
def test_a_driver_that_refuses(failing: dict[str, int], problem: str) -> None:
    assert describe(lambda name: FakeLibrary(failing)) == {"cuda": "12.8", "problem": problem}


def test_no_driver() -> None:
    def load(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    assert describe(load) == {"problem": NO_DRIVER}


def test_nothing_heavy_is_imported() -> None:
    code = (
        "from var_deploy.host.doctor import examine; from var_deploy.host.machine import Machine\n"
        "examine(Machine())\n"
        "import sys; print(*{n.split('.')[0] for n in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    heavy = {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "polygraphy"}
    assert not heavy & set(done.stdout.split())
