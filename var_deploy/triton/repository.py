"""Writes a model repository: NAME/config.pbtxt, and NAME/VERSION/ with model.py and the bundle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from var_deploy import names
from var_deploy.errors import BundleError, UsageError
from var_deploy.folders import check_folder_writable, whole_folder
from var_deploy.manifest import Manifest, check_files
from var_deploy.planning.precisions import CPU, check_gpu_precision
from var_deploy.runtime.tensorrt.engine_files import ENGINES, copy_engines, engine_folders
from var_deploy.triton.config import Runtime, Serving, config_text, version_of
from var_deploy.work_folders import entries_that_count

CONFIG, MODEL, BUNDLE = "config.pbtxt", "model.py", "bundle"
MODEL_TEXT = '''"""The model of this folder's bundle, for Triton's Python backend."""

from var_deploy.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written: bytes of the bundle, and how many of them are copies."""

    folder: Path
    version: int
    size: int
    copied: int


def check_out(out: Path) -> None:
    """Raise UsageError where no repository can be written to `out`: it must be new, or empty."""
    check_folder_writable(out)
    if out.is_dir() and (there := entries_that_count(out)):
        raise UsageError(f"{out} is not empty ({there[0]} is there); choose another --out")


def check_runtime(manifest: Manifest, runtime: Runtime) -> None:
    """Raise what `Pipeline.load` would raise in the server, as far as it can be known here.

    UsageError for options that exclude each other, BundleError for graphs that are not there.
    """
    if runtime.backend not in ("auto", CPU):
        check_gpu_precision(runtime.precision, runtime.backend)
        if runtime.threads is not None:
            raise UsageError(f"threads are for {CPU}, not for {runtime.backend}")
    scale = names.STEP if runtime.layout == "shared" else names.scale_graph(0)
    for precision in manifest.graphs if runtime.precision == "auto" else [runtime.precision]:
        manifest.graph(precision, names.DECODER if runtime.layout == "auto" else scale)


def on_gpu(bundle: Path, runtime: Runtime) -> bool:
    """Whether the instances belong to a GPU: one is asked for, or the bundle has engines."""
    if runtime.backend != "auto":
        return runtime.backend != CPU
    no_cpu = runtime.threads is None and runtime.precision != "int8"
    return no_cpu and (bundle / ENGINES).is_dir()


def write_repository(
    bundle: Path,
    manifest: Manifest,
    out: Path,
    serving: Serving,
    runtime: Runtime,
    progress: Callable[[str, float], object] = lambda message, fraction: None,
) -> Written:
    """Write `out`, whole or not at all. Files of the bundle are hard links where that is possible.

    Raises UsageError as `check_out` and `check_runtime`, BundleError for a damaged bundle,
    VarDeployError where the disk refuses.
    """
    check_out(out)
    check_runtime(manifest, runtime)
    check_files(bundle, manifest, hashes=False)
    size = sum(info.size for info in manifest.files.values())
    read = 0

    def count(chunk: int) -> None:
        nonlocal read
        read += chunk
        progress("reading the bundle", read / max(size, 1))

    version = version_of(manifest.digest())
    with whole_folder(out, check=lambda: check_out(out)) as stage:
        model = stage / serving.name
        place = model / str(version) / BUNDLE
        place.mkdir(parents=True)
        placed = _Placed()
        for name in manifest.files:
            placed.add(bundle / name, place / name)
        # what is published is what was checked, whatever links it came through
        try:
            check_files(place, manifest, progress=count)
        except BundleError as error:
            raise BundleError(str(error).replace(str(place), str(bundle))) from None
        if (bundle / names.MANIFEST).is_symlink():  # no hash speaks for its target
            manifest.save(place)
            placed.copied += (place / names.MANIFEST).stat().st_size
        else:
            placed.add(bundle / names.MANIFEST, place / names.MANIFEST)
        for folder in engine_folders(bundle):
            copy_engines(folder, place, placed.add)
        written = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        (model / str(version) / MODEL).write_text(MODEL_TEXT, encoding="utf-8")
        text = config_text(manifest, serving, runtime)
        (model / CONFIG).write_text(text, encoding="utf-8")
    return Written(
        folder=out / serving.name, version=version, size=written, copied=placed.copied
    )


class _Placed:
    """Links files of a bundle into a new folder, or copies them and counts the bytes."""

    copied = 0

    def add(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        source = source.resolve()  # what a link leads to, not the link
        try:
            os.link(source, target)
        except OSError:  # another file system, one without links, or somebody else's file
            shutil.copyfile(source, target)
            self.copied += target.stat().st_size
