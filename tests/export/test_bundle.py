"""Bundles: they compute what the model computes, hold what they should, and appear whole or not."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from var_deploy import names
from var_deploy.bundle import interfaces
from var_deploy.errors import BundleError, ExportError, UsageError
from var_deploy.export import bundle as exporter
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel
from var_deploy.export.checkpoint.presets import PRESETS
from var_deploy.export.verify.bundle import verify_model
from var_deploy.files import folders
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.sampling import Sampling

TESTS = Path(__file__).parents[1]


def generate(bundle: Path, layout: str = "auto", precision: str = "auto", **options: Any) -> Any:
    """Images for labels 0, 1."""
    with Pipeline.load(bundle, layout=layout, precision=precision, threads=1) as pipe:
        return pipe.generate([0, 1], **options)


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- what it computes


@pytest.mark.parametrize("layout", ["per-scale", "shared"])
@pytest.mark.parametrize(("precision", "image_bound"), [("fp32", 2e-4), ("fp16", 5e-3)])
def test_greedy_generation_is_the_published_one(
    seeded_golden: Any,
    golden_bundle: Callable[[str], Path],
    precision: str,
    image_bound: float,
    layout: Any,
) -> None:
    arrays, spec = seeded_golden.arrays, seeded_golden.spec
    bundle = golden_bundle(seeded_golden.name)
    labels = [int(n) for n in arrays["labels"]]
    draws = np.full((len(labels), spec.total_tokens), 0.7, np.float32)
    sampling = Sampling(cfg=float(arrays["greedy.cfg"]), top_k=1, top_p=0.0)
    loop = ScaleLoop(bundle, read_manifest(bundle), OrtCpuBackend(1), precision, layout)
    try:
        image = loop.run(labels, draws, sampling)
        for scale, (found, expected) in enumerate(
            zip(loop.tokens(), seeded_golden.scales("greedy.tokens"), strict=True)
        ):
            np.testing.assert_array_equal(found, expected, err_msg=f"scale {scale}")
        published = arrays["greedy.image"].transpose(0, 2, 3, 1)
        assert np.abs(image - published).max() <= image_bound
        # the last f_hat is a sum of codebook rows: fp32 in either precision
        assert np.abs(loop.f_hat() - arrays["greedy.f_hat"]).max() <= 2e-4
    finally:
        loop.close()
    with Pipeline.load(bundle, precision=precision, layout=layout, threads=1) as pipe:
        pixels = pipe.generate(labels, cfg=sampling.cfg, top_k=1, top_p=0.0)
    assert np.abs(pixels / 255 - published).max() <= image_bound + 0.5 / 255


def test_tokens_of_the_published_encoder(
    seeded_golden: Any, golden_bundle: Callable[[str], Path]
) -> None:
    import onnxruntime

    path = golden_bundle(seeded_golden.name) / "fp32" / names.graph_file(names.ENCODER)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    image = (seeded_golden.arrays["image"].transpose(0, 2, 3, 1) + 1) / 2
    found = session.run(None, {names.IMAGE: image.astype(np.float32)})
    assert [o.name for o in session.get_outputs()] == [
        names.encoder_tokens(k) for k in range(seeded_golden.spec.scales)
    ]
    for tokens, expected in zip(found, seeded_golden.scales("encode.tokens"), strict=True):
        np.testing.assert_array_equal(tokens, expected)


# --- the same input, the same bytes

EXPORT_AGAIN = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:]
from conftest import load_golden
from var_deploy.export.bundle import ExportOptions, export_bundle
options = ExportOptions(precisions=("fp32", "fp16"), batch=1)
export_bundle(load_golden("seeded-shared-aln").model, Path("again"), options)
"""


def test_the_same_input_gives_the_same_bytes(
    golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    first = hashes(golden_bundle("seeded-shared-aln"))
    subprocess.run(
        [sys.executable, "-c", EXPORT_AGAIN, str(TESTS), str(TESTS.parent)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "99"},
        check=True,
        timeout=300,
    )
    assert hashes(tmp_path / "again") == first


def test_another_weight_gives_another_digest(
    small_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    options = ExportOptions(layout="shared")
    digests = {
        export_bundle(small_model(seed), tmp_path / str(n), options).digest()
        for n, seed in enumerate((1, 1, 2))
    }
    assert len(digests) == 2


# --- options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "batch must be at least 1, found 0"),
        ({"batch": -3}, "batch"),
        ({"precisions": ()}, "precision"),
        ({"precisions": ("int4",)}, "fp32, fp16, int8, found ('int4',)"),
        ({"precisions": ("int8",), "calibration": 0}, "at least 1 image, found 0"),
        ({"layout": "scales"}, "layout must be both, per-scale or shared, found 'scales'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        ExportOptions(**options)


def test_layouts_hold_their_graphs_and_no_others(
    small_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    images = {}
    for layout, other in (("per-scale", "shared"), ("shared", "per-scale")):
        out = tmp_path / layout
        manifest = export_bundle(small_model(), out, ExportOptions(layout=layout, batch=2))
        held = set(manifest.graphs["fp32"])
        assert (names.STEP in held) == (layout == "shared")
        assert (names.scale_graph(0) in held) == (layout == "per-scale")
        assert {names.CONDITION, names.DECODER, names.ENCODER} <= held
        images[layout] = generate(out, seed=4)  # auto finds the one that is there
        with pytest.raises(BundleError, match="export it again"):
            generate(out, layout=other)
    difference = images["shared"].astype(int) - images["per-scale"]
    assert np.abs(difference).max() <= 1


def test_without_guidance_there_is_one_row_an_image(
    small_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    options = ExportOptions(guidance=False, batch=2)
    manifest = export_bundle(small_model(), tmp_path / "out", options)
    assert manifest.rows == 2
    for name, graph in manifest.graphs["fp32"].items():
        assert names.CFG not in [t.name for t in graph.inputs], name
    guided = export_bundle(small_model(), tmp_path / "guided", ExportOptions(batch=2))
    assert guided.rows == 4
    # cfg 0 of a guided bundle is the same thing at twice the work
    plain = generate(tmp_path / "out", seed=9, cfg=0.0)
    assert np.abs(plain.astype(int) - generate(tmp_path / "guided", seed=9, cfg=0.0)).max() <= 1
    with pytest.raises(UsageError, match="no-guidance"):
        generate(tmp_path / "out", cfg=2.0)


def test_int8_graphs_of_a_large_model_take_one_image(
    small_model: Callable[..., LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = PRESETS["var-d16"].spec, PRESETS["pocket"].spec
    eight = ExportOptions(batch=8)
    assert [eight.form(name, large).batch for name in ("fp32", "fp16", "int8")] == [8, 8, 1]
    assert eight.form("int8", small).batch == 8, "where operators as such take time"

    monkeypatch.setattr(interfaces, "ALONE_BYTES", 0)
    model, both, one = small_model(), tmp_path / "both", tmp_path / "one"
    options = ExportOptions(batch=2, precisions=("fp32", "int8"), layout="shared")
    written = export_bundle(model, both, options)
    assert (written.batches, written.schema_version) == ({"int8": 1}, 4)
    assert read_manifest(both) == written
    export_bundle(model, one, ExportOptions(precisions=("int8",), layout="shared"))
    assert hashes(both / "int8") == hashes(one / "int8"), "as without --batch"

    with Pipeline.load(both, precision="int8", threads=1) as pipe:
        events: list[tuple[int, int]] = []
        images = pipe.generate(
            [0, 1, 2], seed=4, on_scale=lambda e: events.append((e.first, len(e.tokens)))
        )
        assert pipe.manifest.batch == pipe.sizes.batch == 1
    assert events == [(n, 1) for n in range(3) for _ in range(model.spec.scales)], "no padding"
    with Pipeline.load(one, threads=1) as pipe:
        assert np.array_equal(pipe.generate([0, 1, 2], seed=4), images)
    with Pipeline.load(both, precision="fp32", threads=1) as pipe:
        assert pipe.manifest.batch == 2

    report = verify_model(both, model, images=3, samples=0)
    assert report.passed, report.table()
    assert report.images == len(report.labels) == 4, "whole batches, the same in both precisions"
    tokens = {c.precision: c.tokens for c in report.checks if c.graph == "loop shared"}
    total = 4 * model.spec.total_tokens
    assert all(found.endswith(f"/{total}") for found in tokens.values()) and len(tokens) == 2


def test_guidance_of_an_unconditional_model_is_refused(tmp_path: Path) -> None:
    from var_deploy.export.checkpoint.assemble import as_loaded_model
    from var_deploy.export.var import build, build_tokenizer

    model = as_loaded_model(
        build(hidden_size=16, num_layers=1, num_heads=1, scales=(1, 2), codebook_size=8),
        build_tokenizer(image_size=4, scales=(1, 2), codebook_size=8, embed_dim=4)[0],
    )
    with pytest.raises(UsageError, match="unconditional model has no guidance"):
        export_bundle(model, tmp_path / "out", ExportOptions())
    assert not list(tmp_path.iterdir())


# --- whole or not at all


class Spoiled:
    """A weight source with some tensors exchanged."""

    def __init__(self, source: Any, **changes: Callable[[Any], Any]) -> None:
        self._source, self._changes = source, changes
        self.description = source.description

    def keys(self) -> Any:
        return self._source.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        shape: tuple[int, ...] = self._source.shape(key)
        return shape

    def read(self, key: str) -> Any:
        return self._changes.get(key, lambda value: value)(self._source.read(key))


@pytest.fixture
def old(small_model: Callable[..., LoadedModel], tmp_path: Path) -> Iterator[Path]:
    """A bundle at tmp_path/place/bundle that must still be there, and work, after the test."""
    place = tmp_path / "place"
    export_bundle(small_model(), place / "bundle", ExportOptions(batch=2))
    before = hashes(place)
    image = generate(place / "bundle", seed=3)
    yield place / "bundle"
    assert hashes(place) == before
    assert [p.name for p in place.iterdir()] == ["bundle"]
    np.testing.assert_array_equal(generate(place / "bundle", seed=3), image)


class FullDisk:
    """A file that takes `room` bytes and then none."""

    def __init__(self, stream: Any, room: int) -> None:
        self._stream, self._room = stream, room

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def write(self, data: Any) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written: int = self._stream.write(data)
        return written


@pytest.mark.parametrize("file", [names.WEIGHTS, names.graph_file(names.STEP)])
def test_a_full_disk_leaves_the_old_bundle(
    file: str,
    old: Path,
    small_model: Callable[..., LoadedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    really_open, full = Path.open, []

    def opened(self: Path, *args: Any, **kwargs: Any) -> Any:
        stream = really_open(self, *args, **kwargs)
        if self.name != file or (args or [kwargs.get("mode")])[0] != "wb":
            return stream
        full.append(self)
        return FullDisk(stream, 10_000)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        with pytest.raises(ExportError) as caught:
            export_bundle(small_model(2), old, ExportOptions(batch=2))
    assert full
    assert re.search("disk is full|No space left", str(caught.value))
    assert "\n" not in str(caught.value)


def test_ctrl_c_leaves_the_old_bundle(old: Path, small_model: Callable[..., LoadedModel]) -> None:
    seen: list[float] = []

    def progress(message: str, fraction: float) -> None:
        seen.append(fraction)
        if fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(small_model(2), old, ExportOptions(batch=2), progress)
    assert 0.5 < seen[-1] < 0.9
    assert len(seen) > 10


def test_ctrl_c_without_an_old_bundle_leaves_nothing(
    small_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    def progress(message: str, fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(small_model(), tmp_path / "bundle", ExportOptions(), progress)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "failure", [OSError(errno.EACCES, "Permission denied"), KeyboardInterrupt()]
)
def test_a_failed_rename_puts_the_old_bundle_back(
    failure: BaseException,
    old: Path,
    small_model: Callable[..., LoadedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    really_rename = Path.rename

    def rename(self: Path, target: Any) -> Path:
        if self.name == folders.COMPLETE:
            raise failure
        return really_rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "swap", lambda one, other: False)  # a system that cannot exchange
        patch.setattr(Path, "rename", rename)
        with pytest.raises((ExportError, KeyboardInterrupt)) as caught:
            export_bundle(small_model(2), old, ExportOptions(batch=2))
    if isinstance(failure, OSError):
        assert f"{old} cannot be written: Permission denied" in str(caught.value)


def test_too_little_space_is_refused_before_anything_is_written(
    old: Path, small_model: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(old)._replace(free=1_000_000)
    told: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(exporter.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ExportError, match=r"the disk has 1 MB free, the bundle needs \d+ MB"):
            export_bundle(
                small_model(2), old, ExportOptions(), lambda message, _: told.append(message)
            )
    assert not told


def test_a_weight_that_fp16_cannot_hold_is_named(
    old: Path, small_model: Callable[..., LoadedModel]
) -> None:
    key = "blocks.1.ffn.fc1.weight"
    model = small_model(2)

    def overflow(value: Any) -> Any:
        value = value.copy()
        value[3, 4] = -1e5
        return value

    model = dataclasses.replace(model, transformer=Spoiled(model.transformer, **{key: overflow}))
    with pytest.raises(ExportError) as caught:
        export_bundle(model, old, ExportOptions(precisions=("fp32", "fp16")))
    assert str(caught.value).startswith(key)
    assert "1e+05" in str(caught.value) and "--precision fp32" in str(caught.value)


def test_a_new_bundle_takes_the_place_of_the_old_one(
    small_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "bundle"
    first = export_bundle(small_model(1), out, ExportOptions(precisions=("fp16",)))
    told: list[tuple[str, float]] = []
    second = export_bundle(
        small_model(2), out, ExportOptions(), lambda message, f: told.append((message, f))
    )
    assert [p.name for p in out.parent.iterdir()] == ["bundle"]
    assert read_manifest(out) == second != first
    assert not (out / "fp16").exists()
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions) and told[-1] == ("done", 1.0)
    assert json.loads((out / names.MANIFEST).read_text())["schema_version"] == 1


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_is_honoured(
    small_model: Callable[..., LoadedModel], tmp_path: Path, mask: int
) -> None:
    before = os.umask(mask)
    try:
        export_bundle(small_model(), tmp_path / "bundle", ExportOptions(layout="shared"))
    finally:
        os.umask(before)
    for path in (tmp_path / "bundle", *(tmp_path / "bundle").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_a_place_that_cannot_be_written(
    small_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="file is not a folder"):
        export_bundle(small_model(), tmp_path / "file" / "bundle", ExportOptions())


def test_pocket_is_exported_and_generates(pocket_bundle: Path) -> None:
    manifest = read_manifest(pocket_bundle)
    assert manifest.preset == "pocket"
    assert len(manifest.labels) == 10
    assert generate(pocket_bundle).shape == (2, 64, 64, 3)
