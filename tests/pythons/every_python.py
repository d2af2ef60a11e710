"""Tries an installed wheel on every supported Python, with the newest dependencies.

    python tests/pythons/every_python.py --wheel FOLDER --bundle build/portable/pocket

Run by `make test-pythons`, which builds the wheel and the bundle. Each Python gets an environment
without PyTorch under .venv/pythons, goes through `runtime_half.py` there, and is compared with the
others: the same files, byte by byte where the same ONNX Runtime computed them. Prints a line for
each Python; the exit code is 1 where one fails, and where none was found.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("runtime_half.py")
ENVIRONMENTS = ROOT / ".venv" / "pythons"
EXPECTED = ("3.10", "3.12", "3.13")
WELCOME = ("3.14",)  # tried where it is at hand, not missed elsewhere
EXTRAS = ("cpu", "serve", "parquet")
SECONDS_A_DAY = 86400  # after which an environment is made anew, so that it holds the newest
DECOYS = ("json", "numpy", "onnxruntime", "random", "runpy", "subprocess", "typing")
# two releases of ONNX Runtime may round differently: levels of 255, and the share of the values
# of a fp32 picture that may be one off; decibels between fp16 and int8 pictures, where a token
# that tips makes another picture of the same thing (other seeds give 8 to 16)
LEVELS, SHARE, DECIBELS, TOKENS = 1, 1e-3, 17.0, 0.02


@dataclass
class Result:
    """What happened on one Python.

    Attributes:
        problems: one line each; none where everything holds.
        notes: differences that are allowed.
        about: what `runtime_half.py` tells of versions and seconds.
    """

    python: str
    out: Path
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def onnxruntime(self) -> str:
        return str(self.about["versions"]["onnxruntime"])


def find_python(version: str) -> str | None:
    """A program of this version: one of pyenv's, or one on the PATH."""
    homes = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    programs = [str(path) for path in sorted(homes.glob(f"{version}.*/bin/python"))[::-1]]
    programs += filter(None, [shutil.which(f"python{version}")])
    ask = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for program in programs:  # pyenv puts programs on the PATH that only say how to be chosen
        done = subprocess.run([program, "-c", ask], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() == version:
            return program
    return None


def call(*words: object, **options: Any) -> str:
    """Run a program; the end of what it said where it fails, else ""."""
    done = subprocess.run(
        [str(word) for word in words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        **options,
    )
    said = [line for line in done.stdout.splitlines() if not line.startswith("WARNING: ")]
    return "" if done.returncode == 0 else "\n".join(said)[-2000:] or f"exit {done.returncode}"


def prepare(version: str, program: str, wheel: Path) -> tuple[Path, str, str]:
    """The Python of an environment with the wheel; a note; what went wrong, or ""."""
    home = ENVIRONMENTS / version
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    stamp = home / "made-for.txt"
    needs = f"{program}\n{requirements(wheel)}"
    fresh = stamp.is_file() and time.time() - stamp.stat().st_mtime < SECONDS_A_DAY
    install = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    if not fresh or stamp.read_text().partition("\n\n")[0] != needs:
        shutil.rmtree(home, ignore_errors=True)
        if problem := call(program, "-m", "venv", home):
            return python, "", problem
        note, extras = "", EXTRAS
        if call(*install, "--only-binary=:all:", "pyarrow"):
            note, extras = "no pyarrow for this Python: without Parquet", EXTRAS[:-1]
        if problem := call(*install, f"{wheel}[{','.join(extras)}]"):
            return python, note, problem
        stamp.write_text(f"{needs}\n\n{note}")
    problem = call(*install, "--no-deps", "--force-reinstall", wheel)
    return python, stamp.read_text().partition("\n\n")[2], problem


def requirements(wheel: Path) -> str:
    """What the wheel's metadata say it needs."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    return "\n".join(line for line in lines if line.startswith("Requires-Dist: "))


def decoy_checkout(folder: Path) -> Path:
    """A folder that shadows this package and others for whoever looks there first."""
    (folder / "var_deploy").mkdir(parents=True)
    (folder / "var_deploy" / "__init__.py").touch()
    for name in DECOYS:
        (folder / f"{name}.py").write_text(f"raise ImportError('the wrong {name}')\n")
    return folder


def attempt(version: str, program: str, wheel: Path, bundle: Path, work: Path) -> Result:
    """Install and run on one Python."""
    result = Result(version, work / version)
    python, note, problem = prepare(version, program, wheel)
    result.notes += [note] if note else []
    if problem:
        result.problems.append(f"cannot be installed: {problem}")
        return result
    checkout = decoy_checkout(work / f"{version}-checkout")
    words = (python, "-W", "error", SCRIPT, bundle, checkout, result.out)
    if problem := call(*words, cwd=work):
        result.problems.append(problem)
        return result
    result.about = json.loads((result.out / "about.json").read_text())
    return result


# what they made, compared


def compare(result: Result, reference: Result) -> None:
    """Add to `result` what differs from the files of `reference`."""
    names = [sorted(p.name for p in r.out.iterdir() if p.is_file()) for r in (result, reference)]
    if names[0] != names[1]:
        result.problems.append(f"made {names[0]}, expected {names[1]}")
        return
    same_library = result.onnxruntime == reference.onnxruntime
    for name in names[0]:
        if name == "about.json":
            continue
        found, expected = ((r.out / name).read_bytes() for r in (result, reference))
        if found == expected or content(name, found) == content(name, expected):
            if found != expected and name.endswith(".png"):
                result.notes.append(f"{name}: other bytes of the same pixels")
            continue
        told, allowed = difference(name, found, expected)
        if allowed and not same_library:
            result.notes.append(f"{name}: {told}")
        else:
            result.problems.append(f"{name} is not that of {reference.python}: {told}")


def arrays(name: str, data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of a PNG or npz; none of other files."""
    if name.endswith(".png"):
        return {"pixels": np.asarray(Image.open(io.BytesIO(data)))}
    if name.endswith(".npz"):
        with np.load(io.BytesIO(data)) as loaded:
            return dict(loaded)
    return {}


def content(name: str, data: bytes) -> str:
    """Hash of what a file means: pixels of a PNG, arrays of an npz, whose heads differ."""
    digest = hashlib.sha256()
    for key, value in sorted(arrays(name, data).items()) or [("", np.frombuffer(data, np.uint8))]:
        digest.update(f"{key} {value.dtype} {value.shape} ".encode() + value.tobytes())
    return digest.hexdigest()


def difference(name: str, found: bytes, expected: bytes) -> tuple[str, bool]:
    """What differs, in words, and whether another ONNX Runtime may be why."""
    one, other = arrays(name, found), arrays(name, expected)
    if not one or {k: v.shape for k, v in one.items()} != {k: v.shape for k, v in other.items()}:
        return "other bytes", False
    flat = [np.concatenate([each[k].ravel() for k in sorted(each)]) for each in (one, other)]
    step = np.abs(flat[0].astype(np.int64) - flat[1])
    share = float(np.mean(step > 0))
    if name.endswith(".npz"):
        return f"{share:.2%} of the tokens", share <= TOKENS
    if name.startswith("fp32"):
        told = f"{share:.3%} of the values, up to {step.max()} of 255"
        return told, step.max() <= LEVELS and share <= SHARE
    decibels = 10 * np.log10(255**2 / np.mean(np.square(step)))
    return f"{decibels:.1f} dB", decibels >= DECIBELS


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wheel", type=Path, required=True, help="folder that holds one wheel")
    parser.add_argument("--bundle", type=Path, required=True, help="pocket: fp32, fp16 and int8")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "pythons")
    given = parser.parse_args()
    (wheel,) = given.wheel.resolve().glob("*.whl")
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    programs = {version: find_python(version) for version in (*EXPECTED, *WELCOME)}
    with ThreadPoolExecutor(2) as pool:
        running = [
            pool.submit(
                attempt, version, program, wheel, given.bundle.resolve(), given.work.resolve()
            )
            for version, program in programs.items()
            if program
        ]
        results = [each.result() for each in running]
    finished = [result for result in results if not result.problems]
    for result in finished[:-1]:  # with the last, whose libraries are the newest
        compare(result, finished[-1])
    for version in EXPECTED:
        if not programs[version]:
            print(f"Python {version}: not on this machine, so not tested")
    for result in results:
        versions = ", ".join(f"{k} {v}" for k, v in result.about.get("versions", {}).items())
        seconds = result.about.get("seconds", 0)
        state = "FAILED" if result.problems else f"passed in {seconds:.0f} s"
        print(f"Python {result.python}: {state}; {versions or 'nothing was compared'}")
        for line in [*result.notes, *result.problems]:
            print(f"    {line}")
    if not results:
        print("no Python was found")
    return int(not results or any(result.problems for result in results))


if __name__ == "__main__":
    sys.exit(main())
