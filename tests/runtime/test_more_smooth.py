"""Bundles that mix codes, through `Pipeline`: noise of the image's own, and what is not mixed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fake_tensorrt
from fake_tensorrt import cudart
from var_deploy import names
from var_deploy.image.editing import box_mask
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.request import ScaleEvent
from var_deploy.runtime.tensorrt import library as libraries
from var_deploy.runtime.tensorrt.build import build_bundle
from var_deploy.runtime.tensorrt.library import Library
from var_deploy.spec import ModelSpec

pytest.importorskip("torch")

Images = NDArray[np.uint8]
LABELS, SIDE = (3, 0, 4), 8


@pytest.fixture(scope="module")
def bundle(export_to: Callable[..., Path]) -> Path:
    return export_to(precisions=("fp32", "fp16"), batch=2, more_smooth=True)


@pytest.fixture(scope="module")
def smooth(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, threads=1, precision="fp32") as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def drawn(smooth: Pipeline) -> Images:
    return np.asarray(smooth.generate(LABELS, seed=7))


def test_an_image_depends_on_its_seed_number_and_label(smooth: Pipeline, drawn: Images) -> None:
    np.testing.assert_array_equal(smooth.generate(LABELS, seed=7), drawn)
    np.testing.assert_array_equal(smooth.generate(LABELS[:1], seed=7), drawn[:1])
    mixed = smooth.generate([LABELS[0]] * 5, seed=[1, 2, 7, 3, 4])
    np.testing.assert_array_equal(mixed[2], drawn[0])
    assert np.abs(smooth.generate(LABELS, seed=8).astype(int) - drawn).mean() > 5


def test_the_batch_does_not_matter(export_to: Callable[..., Path], drawn: Images) -> None:
    with Pipeline.load(export_to(batch=1, more_smooth=True), threads=1) as one:
        # what a batch of another size rounds otherwise is felt in a mix
        assert np.abs(one.generate(LABELS, seed=7).astype(int) - drawn).max() <= 2


def test_both_layouts_draw_the_same(bundle: Path, drawn: Images) -> None:
    with Pipeline.load(bundle, threads=1, precision="fp32", layout="per-scale") as static:
        assert np.abs(static.generate(LABELS, seed=7).astype(int) - drawn).max() <= 2


def test_the_image_of_pytorch(
    smooth: Pipeline,
    drawn: Images,
    family_member: Callable[..., ModelSpec],
    random_model: Callable[[ModelSpec], Any],
) -> None:
    from var_deploy.export.checkpoint.assemble import build_modules
    from var_deploy.export.verify.reference import trace_generation
    from var_deploy.sampling import gumbel, uniforms

    model = random_model(family_member())
    total, codes = model.spec.total_tokens, model.spec.tokenizer.vocab_size
    trace = trace_generation(
        *build_modules(model),
        LABELS,
        np.stack([uniforms(7 + n, 0, total) for n in range(3)]),
        smooth.manifest.defaults,
        True,
        noise=[gumbel(7 + n, 0, total, codes) for n in range(3)],
    )
    assert np.abs(trace.image * 255 - drawn).max() <= 2


def test_the_first_tokens_are_those_without_it(
    smooth: Pipeline, pipe: Pipeline, drawn: Images
) -> None:
    """Noise takes nothing from the uniforms; from the second scale on the input is another."""
    seen: dict[Pipeline, list[ScaleEvent]] = {smooth: [], pipe: []}
    for pipeline, events in seen.items():
        plain = pipeline.generate(LABELS, seed=7, on_scale=events.append)
    first = [[e.tokens for e in events if e.scale == 0] for events in seen.values()]
    np.testing.assert_array_equal(np.concatenate(first[0]), np.concatenate(first[1]))
    assert np.abs(plain.astype(int) - drawn).mean() > 1, "another way to draw"


def test_the_last_preview_is_the_image(smooth: Pipeline, drawn: Images) -> None:
    """Tokens do not tell of the mix, so they decode to something else."""
    last: list[Images] = []
    tokens: list[list[NDArray[np.int64]]] = []

    def watch(event: ScaleEvent) -> None:
        tokens.append([event.tokens])
        if event.scale == event.scales - 1:
            last.append(event.preview())

    smooth.generate(LABELS[:2], seed=7, on_scale=watch)
    np.testing.assert_array_equal(last[0], drawn[:2])
    decoded = smooth.decode([scale for (scale,) in tokens])
    assert np.abs(decoded.astype(int) - drawn[:2]).max() > 10


def test_what_is_given_is_not_mixed(smooth: Pipeline, drawn: Images) -> None:
    """All tokens kept: the reconstruction, to the last bit of the sums."""
    tokens = smooth.encode(drawn[0])
    rebuilt = smooth.decode(tokens)
    kept = smooth.vary(drawn[0], len(tokens), label=1, seed=[1, 2])
    assert np.abs(kept.astype(int) - rebuilt).max() <= 1
    nothing = np.asarray(smooth.vary(drawn[0], 0, label=3, seed=[1, 2]))
    np.testing.assert_array_equal(nothing, smooth.generate([3, 3], seed=[1, 2]))


def test_an_edit_keeps_tokens_and_mixes_the_rest(smooth: Pipeline, drawn: Images) -> None:
    half = box_mask((4, 0, SIDE, SIDE), SIDE, SIDE)
    seen: list[ScaleEvent] = []
    edits = smooth.edit(drawn[0], half, label=2, seed=[1, 2], on_scale=seen.append)
    again = smooth.edit(drawn[0], half, label=2, seed=[2])
    np.testing.assert_array_equal(edits[1], again[0])
    assert (edits[0] != edits[1]).any()
    tokens = smooth.encode(drawn[0])[-1].reshape(4, 4)
    np.testing.assert_array_equal(seen[-1].tokens[0].reshape(4, 4)[:, :2], tokens[:, :2])


def test_engines_draw_the_same(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The noise crosses to the device with everything else."""
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    cudart.reset()
    monkeypatch.setattr("var_deploy.runtime.backends.cuda.load_api", lambda: cudart)
    monkeypatch.setattr(libraries, "load_library", lambda name=None: Library(fake_tensorrt))
    build_bundle(folder, library=Library(fake_tensorrt), layout="shared")
    with Pipeline.load(folder) as pipe:
        assert pipe.describe().backend == "tensorrt"
        images = pipe.generate(LABELS, seed=7)
    assert cudart.live() == {}
    with Pipeline.load(folder, backend="onnxruntime-cpu", precision="fp16", threads=1) as pipe:
        np.testing.assert_array_equal(images, pipe.generate(LABELS, seed=7))
    assert names.NOISE in {t.name for t in pipe.manifest.graph("fp16", names.STEP).inputs}
