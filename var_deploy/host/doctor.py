"""`var-deploy doctor`: what works on this machine, what is missing, and how to install it.

All facts come from a `Machine`; a failed probe becomes a finding and never raises. Versions are
read from package metadata; libraries with native code are imported in a process of their own, to
see whether they load.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from var_deploy import __version__
from var_deploy.host.installation import pip, pip_command, pip_install
from var_deploy.host.machine import (
    NO_DRIVER,
    TEGRA_RELEASE,
    Answer,
    Driver,
    Machine,
    jetson_model,
    memory_of,
    running_elsewhere,
)

State = Literal["ok", "missing", "problem"]

OLDEST_PYTHON = (3, 10)
OLDEST_TENSORRT = (10, 3)
OLDEST_JETPACK, OLDEST_JETSON_LINUX = (6, 1), (36, 4)  # the first with TensorRT 10
OLDEST_SM = 75  # of TensorRT 10
# Jetson Linux → JetPack
JETPACK = {"35": "5", "36": "6", "38": "7", "39": "7"}
SYSTEM_PYTHON = "python3 -m venv --system-site-packages .venv"
FLASH = "flash JetPack 6.1 or newer"
FASTER = "grep POWER_MODEL /etc/nvpmodel.conf; sudo nvpmodel -m ID; sudo jetson_clocks"
TRAINING = ("torch", "onnx", "safetensors")
# extra → its packages, what they are for, and the ability
EXTRAS = {
    "serve": (("fastapi", "uvicorn", "prometheus-client"), "images over HTTP", "serve"),
    "ray": (("ray",), "sample and serve on a Ray cluster", "sample and serve --ray"),
    "parquet": (("pyarrow",), "image sets as Parquet", "sample --format parquet"),
    "text": (("tokenizers",), "prompts of text-to-image models", "prompts to text features"),
    "bench": (("matplotlib",), "figures of bench", "bench --plot"),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        found: what was found, or its problem; "" where it is missing.
        purpose: what it is needed for.
        remedy: a command or a step that fixes it, "" where none is needed.
    """

    name: str
    state: State
    found: str
    purpose: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Ability:
    """A function of var-deploy, and the findings that prevent it on this machine."""

    name: str
    lacks: tuple[str, ...] = ()
    generates: bool = False

    @property
    def here(self) -> bool:
        return not self.lacks


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """The report of `doctor`: all findings in order, and the abilities that follow from them."""

    findings: tuple[Finding, ...]
    abilities: tuple[Ability, ...]

    @property
    def generates(self) -> bool:
        """Whether any backend on this machine can generate images."""
        return any(ability.here and ability.generates for ability in self.abilities)


def examine(machine: Machine) -> DoctorReport:
    """Examine the machine; takes seconds where large libraries are installed."""
    jetson, driver = jetson_model(machine), machine.driver()
    findings = [_ok("var-deploy", __version__, "this program"), _python(machine), _system(machine)]
    if jetson is not None:
        findings.append(_ok("board", jetson, "docs/JETSON.md has the steps"))
        findings += [_jetpack(machine), _power(machine)]
    cuda, gpus = _driver(machine, driver, jetson is not None), _gpus(driver)
    onnxruntime = _onnxruntime(machine)
    int8 = [_int8(machine)] if onnxruntime.state == "ok" else []
    tensorrt = _tensorrt(machine, jetson is not None)
    bindings = _bindings(machine, driver)
    training = [
        _package(machine, name, "export and verify", pip_install("export", name))
        for name in TRAINING
    ]
    hub = "export of a preset whose files are not here"
    optional = [
        _package(machine, "huggingface_hub", hub, pip_install("export", "huggingface_hub")),
        _package(machine, "polygraphy", "look into graphs and engines", pip_command("polygraphy")),
    ]
    extras = {name: _extra(machine, name) for name in EXTRAS}
    findings += [cuda, *gpus, onnxruntime, *int8, tensorrt, bindings, *training]
    findings += [*extras.values(), *optional]
    engines = _lacking([tensorrt, bindings, cuda, *gpus[:1]])
    return DoctorReport(
        findings=tuple(findings),
        abilities=(
            Ability(name="export and verify", lacks=_lacking([*training, onnxruntime])),
            Ability(name="generate on the CPU", lacks=_lacking([onnxruntime]), generates=True),
            Ability(name="build engines", lacks=engines),
            Ability(name="generate with TensorRT", lacks=engines, generates=True),
            *(
                Ability(name=EXTRAS[name][2], lacks=_lacking([finding]))
                for name, finding in extras.items()
            ),
        ),
    )


def _lacking(needed: Sequence[Finding]) -> tuple[str, ...]:
    return tuple(finding.name for finding in needed if finding.state != "ok")


def _ok(name: str, found: str, purpose: str, remedy: str = "") -> Finding:
    return Finding(name=name, state="ok", found=found, purpose=purpose, remedy=remedy)


def _missing(name: str, purpose: str, remedy: str) -> Finding:
    return Finding(name=name, state="missing", found="", purpose=purpose, remedy=remedy)


def _problem(name: str, found: str, purpose: str, remedy: str) -> Finding:
    return Finding(name=name, state="problem", found=found, purpose=purpose, remedy=remedy)


# the machine


def _python(machine: Machine) -> Finding:
    version = machine.python()
    found = ".".join(map(str, version))
    if version[:2] < OLDEST_PYTHON:
        return _problem("Python", found, "runs everything", "install Python 3.10 or newer")
    return _ok("Python", found, "runs everything")


def _system(machine: Machine) -> Finding:
    memory = memory_of(machine)
    found = f"{machine.platform()}, {machine.threads()} processors"
    if memory:
        found += f", {memory[0] / 1e9:.1f} GB of memory, {memory[1] / 1e9:.1f} GB free"
    if others := running_elsewhere(machine):
        found += f", {others} {'thread' if others == 1 else 'threads'} of other programs running"
    return _ok("system", found, "the machine")


def _jetpack(machine: Machine) -> Finding:
    """The package nvidia-jetpack, and the release of Jetson Linux, whose file always exists:
    "# R36 (release), REVISION: 4.3, GCID: …"."""
    linux = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", machine.read(TEGRA_RELEASE) or "")
    package = machine.run("dpkg-query", "-W", "-f=${Version}", "nvidia-jetpack")
    version, purpose = package.output.strip(), "brings TensorRT and CUDA"
    parts = [f"JetPack {version}"] if version else []
    old = bool(version) and _numbers(version) < OLDEST_JETPACK
    if linux:
        release = f"{linux[1]}.{linux[2]}"
        old = old or _numbers(release) < OLDEST_JETSON_LINUX
        parts.append(f"Jetson Linux R{release}")
        if not version and linux[1] in JETPACK:
            parts.append(f"of JetPack {JETPACK[linux[1]]}")
    found = ", ".join(parts)
    if not found:
        said = f"release unknown: {package.problem or 'no package'}"
        return _problem("JetPack", said, purpose, "sudo apt install nvidia-jetpack")
    if old:
        purpose = f"its TensorRT is older than {_dotted(OLDEST_TENSORRT)}"
        return _problem("JetPack", found, purpose, FLASH)
    return _ok("JetPack", found, purpose)


def _power(machine: Machine) -> Finding:
    """The power mode: `nvpmodel -q` prints "NV Power Mode: MAXN_SUPER" and its number."""
    answer = machine.run("nvpmodel", "-q")
    mode = re.search(r"Power Mode:\s*(\S+)", answer.output)
    purpose = "sets the clocks, and with them the speed"
    if not mode:
        found = answer.problem or "nvpmodel names no mode"
        return _problem("power mode", found, purpose, "sudo nvpmodel -q")
    return _ok("power mode", mode[1], purpose, "" if mode[1].startswith("MAXN") else FASTER)


def _driver(machine: Machine, driver: Driver, jetson: bool) -> Finding:
    """The driver's newest CUDA version, and its own version from the kernel module."""
    module = re.search(
        r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s",
        machine.read("/proc/driver/nvidia/version") or "",
        re.M,
    )
    kernel, purpose = f"driver {module[1]}" if module else "", "GPUs, for engines"
    if driver.problem == NO_DRIVER and not kernel and not driver.gpus:
        remedy = "sudo apt install nvidia-jetpack" if jetson else "install NVIDIA's driver"
        return _missing("CUDA", purpose, remedy)
    said = [f"CUDA {driver.cuda}" if driver.cuda else "", kernel, driver.problem]
    found = ", ".join(filter(None, said))
    if driver.problem or not driver.cuda:
        remedy = "nvidia-smi; a container must be started with the NVIDIA runtime"
        return _problem("CUDA", found, purpose, remedy)
    return _ok("CUDA", found, purpose)


def _gpus(driver: Driver) -> list[Finding]:
    findings = []
    for gpu in driver.gpus:
        shared = " shared with the CPU" if gpu.integrated else ""
        found = f"{gpu.name}, SM {gpu.sm // 10}.{gpu.sm % 10}, {gpu.memory / 1e9:.1f} GB{shared}"
        if gpu.sm < OLDEST_SM:
            purpose = "older than TensorRT 10 takes (SM 7.5)"
            findings.append(_problem("GPU", found, purpose, "generate on the CPU"))
        else:
            findings.append(_ok("GPU", found, "runs the engines"))
    return findings


# libraries


def _onnxruntime(machine: Machine) -> Finding:
    name, purpose = "onnxruntime", "generate on the CPU; verify"
    remedy = pip_install("cpu", name)
    if not machine.has_module(name):
        return _missing(name, purpose, remedy)
    answer = machine.import_module(name)
    if answer.problem:
        return _problem(name, f"does not load: {answer.problem}", purpose, remedy)
    version, providers = _two_lines(answer)
    short = [provider.removesuffix("ExecutionProvider") for provider in providers.split()]
    found = f"{version} ({', '.join(short) or 'no providers'})"
    held = [each for each in (name, f"{name}-gpu") if machine.distribution(each)]
    if len(held) < 2:
        return _ok(name, found, purpose)
    # the two packages overwrite each other's files: the one installed last runs
    remedy = f"{pip()} uninstall {' '.join(held)}, then {remedy}"
    return _ok(name, f"{found}, from one of {' and '.join(held)}", purpose, remedy)


def _int8(machine: Machine) -> Finding:
    """Whether int8 works: its kernels differ by instruction set, and run on known numbers."""
    name, purpose = "int8", "bundles exported with --precision int8, on the CPU"
    answer = machine.int8()
    problem = answer.problem or answer.output.strip()
    if problem:
        newer = pip_install("cpu", "onnxruntime")
        remedy = f"--precision fp32, or another version: {newer} --upgrade"
        return _problem(name, problem, purpose, remedy)
    return _ok(name, "computed correctly", purpose)


def _tensorrt(machine: Machine, jetson: bool) -> Finding:
    """TensorRT: the first of `tensorrt` and `tensorrt_rtx` that loads."""
    name, purpose, broken = "TensorRT", "build engines and run them", ""
    remedy = FLASH if jetson else pip_install("tensorrt", "tensorrt")
    for module in ("tensorrt", "tensorrt_rtx"):
        if not machine.has_module(module):
            continue
        answer = machine.import_module(module)
        if answer.problem:
            broken = broken or f"{module} does not load: {answer.problem}"
            continue
        version, _ = _two_lines(answer)
        found = f"{module} {version}"
        if module == "tensorrt" and (0,) < _numbers(version) < OLDEST_TENSORRT:
            needed = f"needs {_dotted(OLDEST_TENSORRT)} or newer"
            return _problem(name, found, needed, remedy)
        return _ok(name, found, purpose)
    if not jetson:
        if broken:
            return _problem(name, broken, purpose, remedy)
        return _missing(name, purpose, remedy)
    package = machine.run("dpkg-query", "-W", "-f=${Version}", "python3-libnvinfer")
    version = package.output.strip()
    if version:
        found = broken or f"{version} of the system, which this virtual environment does not see"
        return _problem(name, found, purpose, SYSTEM_PYTHON)
    return _missing(name, purpose, f"sudo apt install python3-libnvinfer; {SYSTEM_PYTHON}")


def _bindings(machine: Machine, driver: Driver) -> Finding:
    """cuda-python, whose major version must not be newer than the driver's CUDA."""
    name, purpose = "cuda-python", "device memory and CUDA graphs for TensorRT"
    newest = _numbers(driver.cuda)[0]
    below = f",<{newest + 1}" if newest else ""
    remedy = pip_command(f"cuda-python>=12.6{below}")
    if not machine.has_module("cuda"):
        return _missing(name, purpose, remedy)
    answer = machine.import_module("cuda.bindings.runtime", "cuda.bindings")
    if answer.problem:
        return _problem(name, f"does not load: {answer.problem}", purpose, remedy)
    version, _ = _two_lines(answer)
    if newest and _numbers(version)[0] > newest:
        return _problem(name, version, f"newer than the driver's CUDA {driver.cuda}", remedy)
    return _ok(name, version, purpose)


def _package(machine: Machine, name: str, purpose: str, remedy: str) -> Finding:
    version = machine.distribution(name)
    return _missing(name, purpose, remedy) if version is None else _ok(name, version, purpose)


def _extra(machine: Machine, name: str) -> Finding:
    """The packages of an optional extra, on one line."""
    packages, purpose, _ = EXTRAS[name]
    versions = {package: machine.distribution(package) for package in packages}
    found = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    absent = [package for package, version in versions.items() if version is None]
    if not absent:
        return _ok(name, found, purpose)
    remedy = pip_install(name, *absent)
    if not found:
        return _missing(name, purpose, remedy)
    return _problem(name, f"{found}, without {', '.join(absent)}", purpose, remedy)


def gpu_problem(machine: Machine) -> str:
    """Why no GPU of this machine can run engines, and what to do, in one line; "" where nothing is
    wrong with driver and GPU."""
    driver, jetson = machine.driver(), jetson_model(machine) is not None
    for finding in (_driver(machine, driver, jetson), *_gpus(driver)[:1]):
        if finding.state != "ok":
            found = finding.found or driver.problem
            return f"no GPU for engines: {found}; {finding.remedy} (var-deploy doctor shows more)"
    return ""


def _two_lines(answer: Answer) -> tuple[str, str]:
    """(version, second line) of an answer of `Machine.import_module`."""
    first, _, rest = answer.output.strip().partition("\n")
    return first.strip(), rest.strip()


def _numbers(version: str) -> tuple[int, ...]:
    """Numbers of a version: "10.3.0.post1" → (10, 3, 0); (0,) without a number."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(n) for n in found[0].split(".")) if found else (0,)


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))
