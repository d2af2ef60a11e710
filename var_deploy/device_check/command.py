"""`python -m var_deploy.device_check`: all checks that need a GPU, in one run and one report.

    python -m var_deploy.device_check BUNDLE --out device-report.json

Builds the engines of both layouts, compares them with the fp32 graphs on the CPU, with each other
and with and without CUDA graphs, times them, compares the times with the device's roofline, and
writes a report. A step that fails or cannot run does not stop the others. Without a GPU, the steps
that can run on the CPU do so, as a rehearsal.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from var_deploy.config import TENSORRT, TENSORRT_RTX
from var_deploy.device_check.bundle_check import NO_GPU, BundleCheck, Here
from var_deploy.device_check.measure import BUDGET
from var_deploy.device_check.report import DeviceReport, Found, NotRunError, latency_table
from var_deploy.errors import BackendError, UsageError, VarDeployError, one_line
from var_deploy.host.doctor import examine
from var_deploy.host.installation import module_command, pip_command
from var_deploy.host.machine import Machine
from var_deploy.host.terminal import INTERRUPTED, open_standard_streams, visible
from var_deploy.planning.devices import Device, find_device
from var_deploy.runtime.backends.cuda import Cuda
from var_deploy.runtime.tensorrt.library import load_library

DEFAULT_BUNDLE = Path("build/pocket")
DEFAULT_OUT = Path("device-report.json")
# run as a program, since it needs PyTorch, which this package must not import
PEERS = "var_deploy.export.baselines.torch_peers"
PEER_SECONDS = 1200.0
SHOWN = ("system", "board", "JetPack", "power mode", "CUDA", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a device check.

    Attributes:
        images: least number of images to compare.
        budget: seconds for each series of timings.
        low_memory: build each engine in a process of its own; always done where CPU and GPU share
            their memory.
        library: "tensorrt" or "tensorrt_rtx"; None takes the installed one.
        peers: time PyTorch as well, where it is installed.
    """

    images: int = 2
    budget: float = BUDGET
    low_memory: bool = False
    library: str | None = None
    peers: bool = True


def check_device(
    bundles: Sequence[Path], out: Path, options: Options, machine: Machine | None = None
) -> DeviceReport:
    """Run every step and write the report to `out`.

    Raises BackendError where the report cannot be written; all other errors are in the report.
    """
    machine = machine or Machine()
    names = _names(bundles)
    report = DeviceReport(out, _private(names))
    report.step("machine", partial(_examine, machine))
    here = _look_around(report, options, machine)
    for bundle, name in names.items():
        report.start_bundle(name)
        _check_bundle(bundle, name, report, here, options)
    report.finish()
    return report


def _check_bundle(
    bundle: Path, name: str, report: DeviceReport, here: Here, options: Options
) -> None:
    check = BundleCheck(bundle, name, report, here, options.images, options.budget)
    if check.open():
        check.run()
        report.step("PyTorch", partial(_peers, bundle, check, here, options))
        for line in latency_table([step for step in report.steps if step.bundle == name]):
            print(visible(line))


def _names(bundles: Sequence[Path]) -> dict[Path, str]:
    """Bundle → its name in the report, unique."""
    names: dict[Path, str] = {}
    for bundle in bundles:
        name, count = bundle.absolute().name or "bundle", 1
        while (unique := name if count == 1 else f"{name} ({count})") in names.values():
            count += 1
        names[bundle] = unique
    return names


def _private(names: Mapping[Path, str]) -> dict[str, str]:
    """Folders of this machine → their replacements in the report."""
    found = {str(bundle.absolute()): name for bundle, name in names.items()}
    found |= {str(b): name for b, name in names.items() if len(b.parts) > 1}
    found |= {str(Path.cwd()): ".", str(Path.home()): "~"}
    return {text: stand_in for text, stand_in in found.items() if len(text) > 1}


# the machine


def _examine(machine: Machine) -> Found:
    doctor = examine(machine)
    facts = {f.name: f.found for f in doctor.findings if f.state == "ok"}
    return Found(
        result={
            "findings": [
                {"name": f.name, "state": f.state, "found": f.found} for f in doctor.findings
            ],
            "abilities": {a.name: list(a.lacks) or True for a in doctor.abilities},
            "python": platform.python_version(),
        },
        headline="; ".join(f"{name} {facts[name]}" for name in SHOWN if name in facts),
    )


def _look_around(report: DeviceReport, options: Options, machine: Machine) -> Here:
    """Run the steps about this machine, and return the facts that other steps need."""
    here = Here()
    report.step("GPU", partial(_find_gpu, here))
    report.step("TensorRT", partial(_find_tensorrt, here, options.library))
    here.low_memory = options.low_memory
    report.step("rates", partial(find_rates, here, machine))
    return here


def _find_gpu(here: Here) -> Found:
    try:
        cuda = Cuda()
    except BackendError as error:
        raise NotRunError(f"no GPU can be used: {error}") from None
    try:
        name, sm = cuda.device_name_and_sm()
        free, total = cuda.free_memory()
    finally:
        cuda.close()
    here.gpu = True
    return Found(
        result={"name": name, "sm": sm, "free": free, "total": total},
        headline=f"{name}, SM {sm // 10}.{sm % 10}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free",
    )


def _find_tensorrt(here: Here, wanted: str | None) -> Found:
    try:
        library = here.library = load_library(wanted)
    except BackendError as error:
        raise NotRunError(str(error)) from None
    found = {"library": library.name, "version": library.version}
    return Found(result=found, headline=f"{library.name} {library.version}")


def find_rates(here: Here, machine: Machine) -> Found:
    """Find the rates of this machine: measured by PyTorch where possible, else published."""
    try:
        device = find_device("this", machine)
    except UsageError as error:
        raise NotRunError(str(error)) from None
    here.published = here.device = device
    here.low_memory = here.low_memory or (device.sm is not None and device.one_memory)
    why, measured = "", dict[str, Any]()
    try:
        if not here.gpu:
            raise NotRunError(NO_GPU)
        _, measured = ask_pytorch("--rates")
        here.device = dataclasses.replace(
            device,
            bandwidth=float(measured["bandwidth"]),
            compute_rate=float(measured["half_rate"]),
            full_rate=float(measured["full_rate"]),
        )
    except (NotRunError, BackendError) as error:
        why = str(error)
    here.rates = "measured by PyTorch" if measured else "published"
    return Found(
        result={
            "used": here.rates,
            "not_measured_because": why,
            "published": _rates_of(device),
            "measured": measured or None,
            "device": dataclasses.asdict(device),
        },
        headline=f"{here.rates}: {here.device.bandwidth / 1e9:.0f} GB/s, "
        f"{here.device.compute_rate / 1e12:.3g} and {here.device.full_rate / 1e12:.3g} TFLOPS",
    )


def _rates_of(device: Device) -> dict[str, float]:
    return {
        "bandwidth": device.bandwidth,
        "half_rate": device.compute_rate,
        "full_rate": device.full_rate,
    }


# PyTorch, in a process of its own


def ask_pytorch(*arguments: str) -> list[dict[str, Any]]:
    """Run the program PEERS and return its lines; after a time-out the last one is a problem.

    Raises NotRunError where PyTorch or its CUDA is missing, BackendError where it fails.
    """
    if importlib.util.find_spec("torch") is None:
        raise NotRunError(
            f"PyTorch is not installed; run {pip_command('torch')}, one built for CUDA"
        )
    late: list[dict[str, Any]] = []
    try:
        done = subprocess.run(
            module_command(PEERS, *arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PEER_SECONDS,
            check=False,
        )
        output = done.stdout
        if done.returncode:
            told = (done.stderr or output).decode(errors="replace").strip().splitlines()
            words = told[-1].strip() if told else f"exit code {done.returncode}"
            raise BackendError(f"PyTorch failed: {words}")
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        late = [{"problem": f"stopped after {PEER_SECONDS:.0f} s"}]
    lines = [line for line in output.decode().splitlines() if line.startswith("{")]
    found = [json.loads(line) for line in lines] + late
    if not found or "problem" in found[0]:
        raise NotRunError(found[0]["problem"] if found else "PyTorch printed nothing")
    return found


def _peers(bundle: Path, check: BundleCheck, here: Here, options: Options) -> Found:
    """Time PyTorch modules on the same GPU, as a multiple of the fastest variant's time."""
    if not options.peers:
        raise NotRunError("left out, as asked for")
    if not here.gpu:
        raise NotRunError(NO_GPU)
    about, *rows = ask_pytorch(str(bundle))
    ours, told = check.best(), []
    for row in rows:
        if "median_ms" not in row:
            continue
        told.append(f"{row['mode']} batch {row['batch']} {row['median_ms']:.1f} ms")
        if ours is not None and row["batch"] == check.manifest.batch:
            row["times_ours"] = round(row["median_ms"] / (ours * 1e3), 2)
            told[-1] += f", {row['times_ours']:.1f} times ours"
    return Found(result={**about, "times": rows}, headline="; ".join(told) or "nothing ran")


# the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 without failures, 1 after a failed step, 2 for bad usage, 130 after Ctrl-C."""
    open_standard_streams()
    parser = argument_parser()
    given = parser.parse_args(arguments)
    try:
        report = check_device(
            given.bundles or [_default_bundle()],
            given.out,
            Options(
                images=given.images,
                budget=given.budget,
                low_memory=given.low_memory,
                library=given.library,
                peers=given.peers,
            ),
        )
    except VarDeployError as error:
        print("error:", visible(one_line(error)), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(visible(f"interrupted; what was found is in {given.out}"), file=sys.stderr)
        return INTERRUPTED
    print(f"\n{_verdict(report)}; the report: {visible(str(given.out))}")
    return 1 if report.failed else 0


def _verdict(report: DeviceReport) -> str:
    count = {state: 0 for state in ("done", "failed", "not run")}
    for step in report.steps:
        count[step.state] += 1
    told = ", ".join(f"{number} {state}" for state, number in count.items() if number)
    if report.failed:
        return f"FAILED ({told})"
    compared = any(step.result.get("agreement") for step in report.steps)
    return f"passed ({told})" if compared else f"nothing was compared ({told})"


def _default_bundle() -> Path:
    if not (DEFAULT_BUNDLE / "manifest.json").is_file():
        raise UsageError(
            f"{DEFAULT_BUNDLE} is not here: name a bundle, or copy one there that was made with "
            "var-deploy export pocket --precision fp32 --precision fp16 --out pocket"
        )
    return DEFAULT_BUNDLE


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the program's options."""
    parser = argparse.ArgumentParser(
        prog="python -m var_deploy.device_check",
        description="Build, compare and time bundles on this machine's GPU, and write a report.",
        epilog="example: python -m var_deploy.device_check pocket --out orin.json",
    )
    parser.add_argument(
        "bundles",
        nargs="*",
        type=Path,
        metavar="BUNDLE",
        help=f"folder with fp32 and fp16 graphs (default: {DEFAULT_BUNDLE})",
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="the report (default: %(default)s)"
    )
    parser.add_argument(
        "--images", type=_at_least_one, default=2, help="images to compare (default: %(default)s)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        metavar="SECONDS",
        help="for each kind of timing (default: %(default)s)",
    )
    parser.add_argument(
        "--low-memory", action="store_true", help="build each engine in a process of its own"
    )
    parser.add_argument(
        "--library",
        choices=(TENSORRT, TENSORRT_RTX),
        help="which TensorRT (default: the one that is installed)",
    )
    parser.add_argument(
        "--no-peers", dest="peers", action="store_false", help="do not time PyTorch"
    )
    return parser


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {number}")
    return number
