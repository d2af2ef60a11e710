"""Runs the runtime half of a wheel on 64-bit Arm, under emulation, beside this machine.

    python tests/arm64/emulate.py --wheel FOLDER --bundle build/portable/pocket --pip PYTHON

Run by `make test-arm64` on x86-64 Linux. QEMU translates one process of a Debian system for Arm,
whose packages are unpacked and never installed, with Arm wheels of what a device has; the
processor is a Cortex-A76, the nearest to the A78AE of NVIDIA's Orin boards. `runtime_half.py` runs
there and here. The exit code is 1 where a result lies outside the bounds below; where the
emulator cannot be had (no root, no apt, no network) the reason is printed and the code is 0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("runtime_half.py")
HOME = ROOT / ".venv" / "arm64"
EMULATOR, DEBOOTSTRAP = "qemu-aarch64-static", "debootstrap"
DEBIAN, PYTHON = "bookworm", "3.11"  # the release, and the Python that it has
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 17)] + ["manylinux2014_aarch64"]
CPU = "cortex-a76"
WRONG_INT8 = "max"  # with SME, where a fused int8 product of ONNX Runtime is wrong
# two processes, each with about the same to do
PARTS = (("fp32", "int8"), ("fp16",))
CPUINFO = """\
processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc \
dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""
# Against this machine. fp32: levels of 255, and the share of values that differ at all; tokens are
# the same. fp16 is computed in fp16 there and in fp32 here, and int8 rounds by extremes that
# differ in their last digits: there tokens tip, and what follows is another picture of the same
# thing, so the first scales' tokens are the same and the rest is held in decibels (pictures of
# other seeds give 8 to 16, noise 6).
LEVELS, SHARE, FIRST_SCALES = 2, 1e-3, 1
DRAWN = {"fp16": 16.5, "int8": 20.0}
DECODED = {"fp16": 35.0, "int8": 30.0}


class SkippedError(Exception):
    """Why there is no emulator here."""


def call(*words: object, **options: Any) -> None:
    """Run a program. Raises SkippedError with its last line where it fails."""
    command = [str(word) for word in words]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            **options,
        )
    except OSError as error:
        raise SkippedError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no message"])[-1]
        raise SkippedError(f"{command[0]} ended with {done.returncode}: {last}")


def get_programs() -> None:
    """Have the emulator, and what fetches a Debian system, by apt where they are missing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise SkippedError(f"made for Linux on x86-64, this is {sys.platform} {platform.machine()}")
    names = [EMULATOR] if system().is_dir() else [EMULATOR, DEBOOTSTRAP]
    missing = [name for name in names if not shutil.which(name, path=search_path())]
    if not missing:
        return
    if os.geteuid() or not shutil.which("apt-get"):
        raise SkippedError(f"{' and '.join(missing)} not found, and no root with apt to install it")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    call("apt-get", "update", "-q")
    install = ("apt-get", "install", "-y", "-q", "--no-install-recommends")
    call(*install, "qemu-user-static", "debootstrap", env=environment)


def search_path() -> str:
    """PATH with the folder of programs for root, where Debian puts debootstrap."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin"


def system() -> Path:
    """The Debian system: unpacked packages, and Arm's /proc/cpuinfo, without which importing ONNX
    Runtime crashes."""
    return HOME / "system"


def unpack_system() -> None:
    if system().is_dir():
        return
    if os.geteuid():
        raise SkippedError("debootstrap needs root")
    target, unpacked = HOME / "debootstrap", HOME / "system.partial"
    for folder in (target, unpacked):
        shutil.rmtree(folder, ignore_errors=True)
    HOME.mkdir(parents=True, exist_ok=True)
    options = ("--arch=arm64", "--foreign", "--variant=minbase", "--include=python3")
    call(shutil.which(DEBOOTSTRAP, path=search_path()), *options, DEBIAN, target)
    unpacked.mkdir()
    for package in sorted((target / "var/cache/apt/archives").glob("*.deb")):
        call("dpkg-deb", "-x", package, unpacked)
    (unpacked / "proc").mkdir(exist_ok=True)
    (unpacked / "proc" / "cpuinfo").write_text(CPUINFO)
    shutil.rmtree(target)
    unpacked.rename(system())


def unpack_wheels(wheel: Path, pip: Path) -> list[Path]:
    """Folders for Python's path: the wheel as it is now, and what it needs, from Arm wheels."""
    constraints = ROOT / "constraints.txt"
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        needs = [n for n in archive.read(metadata).splitlines() if n.startswith(b"Requires-Dist")]
    key = hashlib.sha256(b"\n".join(needs) + constraints.read_bytes()).hexdigest()[:16]
    site = HOME / f"site-{key}"
    if not site.is_dir():
        fetched, partial = HOME / "wheels", HOME / "site.partial"
        for old in (fetched, partial, *HOME.glob("site-*")):
            shutil.rmtree(old, ignore_errors=True)
        options = ["--only-binary=:all:", "--python-version", PYTHON, "-c", constraints]
        options += [word for name in PLATFORMS for word in ("--platform", name)]
        download = (pip, "-m", "pip", "download", "-q", "--disable-pip-version-check")
        call(*download, *options, "-d", fetched, f"{wheel}[cpu]")
        for path in fetched.glob("*.whl"):
            if path.name != wheel.name:
                zipfile.ZipFile(path).extractall(partial)
        partial.rename(site)
    package = HOME / "package"
    shutil.rmtree(package, ignore_errors=True)
    zipfile.ZipFile(wheel).extractall(package)
    return [package, site]


def emulated(cpu: str, folders: list[Path]) -> tuple[Path, dict[str, str]]:
    """A program that is Python on the emulated processor, and its environment.

    It is a script of this machine, so that processes which are started there run there too.
    """
    program = HOME / f"python-{cpu}"
    inner = system() / "usr" / "bin" / f"python{PYTHON}"
    emulator = shutil.which(EMULATOR)
    program.write_text(f'#!/bin/sh\nexec {emulator} -cpu {cpu} -L "{system()}" "{inner}" "$@"\n')
    program.chmod(0o755)
    kept = ("PATH", "HOME", "TMPDIR", "LANG")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    path = os.pathsep.join(map(str, folders))
    return program, {**environment, "PYTHONPATH": path, "ARM64_PYTHON": str(program)}


def run(program: Path | str, work: Path, out: Path, parts: tuple[str, ...], **options: Any) -> str:
    """Run parts of `runtime_half.py`; what went wrong, or ""."""
    out.mkdir(exist_ok=True)
    command = [str(program), "-W", "error", str(SCRIPT), str(work), str(out), *parts]
    done = subprocess.run(
        command,
        cwd=work,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        **options,
    )
    said = f"{done.stdout}{done.stderr}"[-2000:]
    return f"{'+'.join(parts)} ended with {done.returncode}: {said}" if done.returncode else ""


# what came out, compared


def decibels(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Peak signal to noise; infinite for equal pictures."""
    error = np.square(found.astype(np.float64) - expected).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def tipped(found: Mapping[str, Any], expected: Mapping[str, Any], name: str) -> list[float]:
    """Share of the tokens that differ, scale by scale."""
    keys = sorted(key for key in expected if key.startswith(f"{name}_"))
    return [float(np.mean(found[key] != expected[key])) for key in keys]


def close(name: str, found: NDArray[Any], expected: NDArray[Any]) -> tuple[str, bool]:
    """A line about an fp32 picture, and whether it is the same but for rounding."""
    step = np.abs(found.astype(np.int64) - expected)
    share = float(np.mean(step > 0))
    told = f"{name}: {share:.3%} of the values differ, by up to {step.max()} of 255"
    return told, step.max() <= LEVELS and share <= SHARE


def compare(
    part: str, found: Mapping[str, Any], expected: Mapping[str, Any]
) -> list[tuple[str, bool]]:
    """Lines about a part, and whether each holds."""
    drawn = tipped(found, expected, "drawn")
    told = "tokens that differ, scale by scale: " + ", ".join(f"{share:.0%}" for share in drawn)
    if part == "fp32":
        lines = [(told, not any(drawn))]
        encoded = tipped(found, expected, "encoded")
        lines.append((f"encoded tokens that differ: {max(encoded):.0%}", not any(encoded)))
        lines += [close(n, found[n], expected[n]) for n in ("image", "decoded", "edited")]
        return [*lines, close("sample", *(sample(each) for each in (found, expected)))]
    lines = [(told, not any(drawn[:FIRST_SCALES]))]
    for name, bound in (("image", DRAWN[part]), ("decoded", DECODED[part])):
        reached = decibels(found[name], expected[name])
        lines.append((f"{name}: {reached:.1f} dB, at least {bound:.1f}", reached >= bound))
    if part == "int8":
        same = bool(np.array_equal(found["command"], found["image"][0]))
        lines.append(("the command draws what the library draws", same))
    return lines


def sample(arrays: Mapping[str, Any]) -> NDArray[Any]:
    """The picture of a shard with one image."""
    with tarfile.open(fileobj=BytesIO(arrays["sample"].tobytes())) as archive:
        (member,) = (m for m in archive.getmembers() if m.name.endswith(".png"))
        picture = archive.extractfile(member)
        assert picture is not None
        return np.asarray(Image.open(BytesIO(picture.read())))


def findings(out: Path) -> dict[str, Any]:
    """What doctor found there, by name."""
    report = json.loads((out / "doctor.json").read_text())
    return {each["name"]: each for each in report["findings"]}


def prepare(bundle: Path, work: Path) -> None:
    """The folder that both machines read: the bundle, a photo, and its tokens."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "pocket").symlink_to(bundle.resolve(), target_is_directory=True)
    y, x = np.mgrid[:64, :64]
    values = np.stack([4 * x, 4 * y, 2 * (x + y)], -1).astype(np.uint8)
    Image.fromarray(values).save(work / "photo.png")
    words = ("encode", work / "pocket", work / "photo.png", "--precision", "fp32", "--quiet")
    program = Path(sys.executable).with_name("var-deploy")
    tokens = ("--out", work / "tokens.npz")
    subprocess.run([str(word) for word in (program, *words, *tokens)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wheel", type=Path, required=True, help="folder that holds one wheel")
    parser.add_argument("--bundle", type=Path, required=True, help="pocket: fp32, fp16 and int8")
    parser.add_argument("--pip", type=Path, required=True, help="a Python that has pip")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "arm64")
    given = parser.parse_args()
    (wheel,) = given.wheel.resolve().glob("*.whl")
    try:
        get_programs()
        unpack_system()
        folders = unpack_wheels(wheel, given.pip)
    except SkippedError as reason:
        print(f"arm64: skipped: {reason}")
        return 0
    began = time.perf_counter()
    work = given.work.resolve()
    prepare(given.bundle, work)
    program, environment = emulated(CPU, folders)
    here, there = work / "x86", work / "arm"
    with ThreadPoolExecutor(2) as pool:
        running = [
            pool.submit(run, program, work, there, parts, env=environment) for parts in PARTS
        ]
        problems = [run(sys.executable, work, here, tuple(p for parts in PARTS for p in parts))]
        problems += [each.result() for each in running]
    problems = [problem for problem in problems if problem]
    if not problems:
        for part in (part for parts in PARTS for part in parts):
            with np.load(there / f"{part}.npz") as found, np.load(here / f"{part}.npz") as expected:
                for told, holds in compare(part, dict(found), dict(expected)):
                    print(f"arm64 {part}: {told}")
                    problems += [] if holds else [f"{part}: out of bounds: {told}"]
        doctor = findings(there)
        for name in ("system", "onnxruntime"):
            print(f"arm64 doctor: {name}: {doctor[name]['found']}")
        seen = "aarch64" in doctor["system"]["found"] and doctor["onnxruntime"]["state"] == "ok"
        problems += [] if seen else ["doctor does not see ONNX Runtime on aarch64"]
        if any("int8" in name for name in doctor):  # the package tests int8 before it trusts it
            program, environment = emulated(WRONG_INT8, folders)
            problem = run(program, work, work / "refused", ("refuse",), env=environment)
            problems += [problem] if problem else []
            print(f"arm64 -cpu {WRONG_INT8}: int8 is {'NOT ' if problem else ''}refused")
        else:
            print(f"arm64 -cpu {WRONG_INT8}: not tried, this package does not test int8 kernels")
    for problem in problems:
        print(f"arm64 problem: {problem}")
    seconds = time.perf_counter() - began
    print(f"arm64: {'FAILED' if problems else 'passed'} in {seconds:.0f} s on -cpu {CPU}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
