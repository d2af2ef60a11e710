"""Writes a model repository: NAME/config.pbtxt, and NAME/VERSION/ with model.py and the bundle,
and for one that takes prompts the text encoder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from var_deploy import names
from var_deploy.bundle.graph_refs import generation_graphs
from var_deploy.config import AUTO, Layout, RuntimeConfig
from var_deploy.errors import BundleError, UsageError
from var_deploy.files.folders import check_folder_writable, whole_folder
from var_deploy.files.work_folders import entries_that_count
from var_deploy.manifest import Manifest, check_files
from var_deploy.planning.selection import check_options, select
from var_deploy.runtime.backends.choice import facts_here
from var_deploy.runtime.tensorrt.engine_files import copy_engines, engine_folders
from var_deploy.runtime.text_features import checked_text_encoder, text_encoder_folder
from var_deploy.text.manifest import TextEncoderManifest
from var_deploy.triton.config import TEXT_ENCODER, Serving, config_text, version_of

CONFIG, MODEL, BUNDLE = "config.pbtxt", "model.py", "bundle"
MODEL_TEXT = '''"""The model of this folder's bundle, for Triton's Python backend."""

from var_deploy.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True, kw_only=True)
class Written:
    """Result of `write_repository`; `size`: bytes of the bundle, `copied`: bytes not linked."""

    folder: Path
    version: int
    size: int
    copied: int


def check_out(out: Path) -> None:
    """Raise UsageError where no repository can be written to `out`: it must be new, or empty."""
    check_folder_writable(out)
    if out.is_dir() and (there := entries_that_count(out)):
        raise UsageError(f"{out} is not empty ({there[0]} is there); choose another --out")


def check_config(manifest: Manifest, config: RuntimeConfig) -> None:
    """Check that `Pipeline.load` in the server can use the config, as far as it is known here.

    Raises UsageError for options that exclude each other, BundleError for missing graphs.
    """
    check_options(config)
    for precision in manifest.graphs if config.precision == AUTO else [config.precision]:
        manifest.graph(precision, names.DECODER)
        if config.layout != AUTO:
            for graph in generation_graphs(manifest.model, cast(Layout, config.layout)):
                manifest.graph(precision, graph.name)


def on_gpu(bundle: Path, manifest: Manifest, config: RuntimeConfig) -> bool:
    """Whether the model's instances should run on a GPU.

    They should where a pipeline on this machine would run on a GPU, or the bundle has engines.

    Raises what `select` raises.
    """
    return select(config, manifest, facts_here(bundle)).on_gpu


def write_repository(
    bundle: Path,
    manifest: Manifest,
    out: Path,
    serving: Serving,
    config: RuntimeConfig,
    text_encoder: Path | None = None,
    progress: Callable[[str, float], object] = lambda message, fraction: None,
) -> Written:
    """Write a repository to `out` atomically, with hard links to the bundle where possible.

    `text_encoder` is the folder of that of a bundle that takes prompts; None looks in the bundle
    and beside it.

    Raises UsageError as `check_out` and `check_config`, and where no text encoder is found,
    BundleError for a damaged bundle or text encoder, VarDeployError where the disk cannot be
    written.
    """
    check_out(out)
    check_config(manifest, config)
    folders: list[tuple[str, Path, Manifest | TextEncoderManifest]] = [(BUNDLE, bundle, manifest)]
    if manifest.takes_text:
        folders.append((TEXT_ENCODER, *checked_text_encoder(bundle, manifest, text_encoder)))
    else:
        text_encoder_folder(bundle, manifest, text_encoder)  # refuses one that is given
    for _, source, listed in folders:
        check_files(source, listed, hashes=False)
    size = sum(info.size for _, _, listed in folders for info in listed.files.values())
    read = 0

    def count(chunk: int) -> None:
        nonlocal read
        read += chunk
        progress("reading the bundle", read / max(size, 1))

    version = version_of(manifest.digest())
    with whole_folder(out, check=lambda: check_out(out)) as stage:
        model = stage / serving.name
        inside = model / str(version)
        placed = _Placed()
        for title, source, listed in folders:
            place = inside / title
            place.mkdir(parents=True)
            for name in listed.files:
                placed.add(source / name, place / name)
            # check the new files, which may have been reached through links
            try:
                check_files(place, listed, progress=count)
            except BundleError as error:
                raise BundleError(str(error).replace(str(place), str(source))) from None
            if (source / names.MANIFEST).is_symlink():  # the link's target has no hash
                listed.save(place)
                placed.copied += (place / names.MANIFEST).stat().st_size
            else:
                placed.add(source / names.MANIFEST, place / names.MANIFEST)
        for folder in engine_folders(bundle):
            copy_engines(folder, inside / BUNDLE, placed.add)
        written = sum(path.stat().st_size for path in inside.rglob("*") if path.is_file())
        (inside / MODEL).write_text(MODEL_TEXT, encoding="utf-8")
        digests = {title: listed.digest() for title, _, listed in folders}
        text = config_text(manifest, serving, config, digests.get(TEXT_ENCODER, ""))
        (model / CONFIG).write_text(text, encoding="utf-8")
    return Written(
        folder=out / serving.name, version=version, size=written, copied=placed.copied
    )


class _Placed:
    """Links files of a bundle into a new folder, or copies them and counts the bytes."""

    copied = 0

    def add(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        source = source.resolve()  # link to the target of a symbolic link
        try:
            os.link(source, target)
        except OSError:  # another file system, one without links, or a file of another user
            shutil.copyfile(source, target)
            self.copied += target.stat().st_size
