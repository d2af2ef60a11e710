"""The pipeline over exported bundles: what a seed promises, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from var_deploy.errors import BackendError, BundleError, LabelError, UsageError
from var_deploy.pipeline import Pipeline

Images = NDArray[np.uint8]
ExportTo = Callable[..., Path]

LABELS = (3, 0, 4, 1, 2)
NAMES = ("star", "heart", "house", "tree", "fish")
SCALES, SIDE = 3, 8
# another batch size means other matrix shapes, whose sums may round differently: one grey level
ROUNDING = 1


def difference(found: Images, wanted: Images) -> int:
    assert found.shape == wanted.shape
    return int(np.abs(found.astype(int) - wanted).max())


# what a seed promises


def test_images_are_images(expected: Images) -> None:
    assert expected.shape == (5, SIDE, SIDE, 3)
    assert expected.dtype == np.uint8
    assert expected.flags.writeable
    for n in range(5):
        assert expected[n].std() > 10, "a flat image would make every comparison here hollow"
        for other in range(n):
            assert difference(expected[n], expected[other]) > 30


def test_the_same_call_gives_the_same_bytes(pipe: Pipeline, expected: Images) -> None:
    again = pipe.generate(LABELS, seed=7)
    np.testing.assert_array_equal(again, expected)
    again[...] = 0  # the caller's own: nothing done to it reaches the pipeline
    np.testing.assert_array_equal(pipe.generate(LABELS, seed=7), expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_batch_size_does_not_show(export_to: ExportTo, expected: Images, batch: int) -> None:
    with Pipeline.load(export_to(batch=batch), threads=1) as other:
        assert difference(other.generate(LABELS, seed=7), expected) <= ROUNDING


def test_an_image_depends_on_its_own_seed_and_label(pipe: Pipeline, expected: Images) -> None:
    for count in range(1, 5):  # whatever follows, and however much of the last batch is padding
        np.testing.assert_array_equal(pipe.generate(LABELS[:count], seed=7), expected[:count])
    neighbours = pipe.generate((1, 1, 4, 2, 2), seed=7)
    np.testing.assert_array_equal(neighbours[[2, 4]], expected[[2, 4]])
    assert difference(neighbours[0], expected[0]) > 30, "another label is another image"
    moved = pipe.generate((0, 3), seed=7)
    assert difference(moved[1], expected[0]) > 30, "another seed is another image"
    for n, label in enumerate(LABELS):
        alone = pipe.generate([label], seed=7 + n)
        assert difference(alone[0], expected[n]) <= ROUNDING, "image n of a call has seed + n"


def test_labels_fill_the_count(pipe: Pipeline, expected: Images) -> None:
    images = pipe.generate(LABELS, seed=7, count=7)
    np.testing.assert_array_equal(images[:5], expected)
    alone = pipe.generate([LABELS[1]], seed=13)
    assert difference(images[6], alone[0]) <= ROUNDING
    assert pipe.generate([LABELS[0]], seed=[7, 9]).shape[0] == 2
    assert pipe.generate(seed=7, count=3).shape[0] == 3


def test_seeds_differ(pipe: Pipeline, expected: Images) -> None:
    others = [pipe.generate(LABELS, seed=seed) for seed in (0, 8, 2**64 - 5)]
    for other in others:
        assert difference(other, expected) > 30
    assert difference(others[0], others[2]) > 30


def test_the_most_likely_code_needs_no_seed(pipe: Pipeline, expected: Images) -> None:
    greedy = pipe.generate(LABELS, seed=7, top_k=1)
    np.testing.assert_array_equal(pipe.generate(LABELS, seed=8, top_k=1), greedy)
    # and it is what any filter that keeps one code leaves
    assert difference(pipe.generate(LABELS, seed=9, top_p=1e-6), greedy) <= ROUNDING
    assert difference(pipe.generate(LABELS, seed=9, temperature=1e-3), greedy) <= ROUNDING
    assert difference(greedy, expected) > 30


@pytest.mark.parametrize(
    "change", [{"cfg": 0.0}, {"cfg": 9.0}, {"top_k": 2}, {"top_p": 0.2}, {"temperature": 2.5}]
)
def test_settings_act_without_another_export(
    pipe: Pipeline, expected: Images, change: dict[str, Any]
) -> None:
    changed = pipe.generate(LABELS, seed=7, **change)
    assert difference(changed, expected) > 30
    np.testing.assert_array_equal(pipe.generate(LABELS, seed=7), expected)


def test_what_is_not_given_is_the_bundles_default(pipe: Pipeline, expected: Images) -> None:
    spelled = pipe.generate(LABELS, seed=7, cfg=2.0, top_k=0, top_p=0.95, temperature=1.0)
    np.testing.assert_array_equal(spelled, expected)


def test_a_filter_wider_than_the_codebook_keeps_all(pipe: Pipeline) -> None:
    everything = pipe.generate(LABELS, seed=7, top_k=0, top_p=0)
    for top_k, top_p in ((48, 0.0), (10_000, 0.0), (2**31 - 1, 1.0)):
        wide = pipe.generate(LABELS, seed=7, top_k=top_k, top_p=top_p)
        np.testing.assert_array_equal(wide, everything)


# labels


def test_labels_by_name_and_number(pipe: Pipeline, expected: Images) -> None:
    for labels in (["tree", "star", "fish", "heart", "house"], ["Tree", 0, np.int64(4), "1", 2]):
        np.testing.assert_array_equal(pipe.generate(labels, seed=7), expected)


def test_no_label_is_one_image_without_a_class(pipe: Pipeline) -> None:
    image = pipe.generate(seed=7)
    assert image.shape == (1, SIDE, SIDE, 3)
    for label in range(5):
        assert difference(pipe.generate([label], seed=7), image) > 0
    # guidance towards nothing changes nothing
    assert difference(pipe.generate(seed=7, cfg=0), image) <= ROUNDING


@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        ({"labels": []}, LabelError, "no label"),
        ({"labels": [5]}, LabelError, "0 to 4"),
        ({"labels": [-1]}, LabelError, "0 to 4"),
        ({"labels": ["hose"]}, LabelError, "house"),
        ({"labels": [1.5]}, LabelError, "1.5"),
        ({"labels": [0], "seed": -1}, UsageError, "seed"),
        ({"labels": [0], "seed": 2**64}, UsageError, "seed"),
        ({"labels": [0], "seed": 1.0}, UsageError, "seed"),
        ({"labels": [0, 1], "seed": 2**64 - 1}, UsageError, "the last seed is"),
        ({"labels": [0, 1], "seed": [1, 2, 3], "count": 2}, UsageError, "3 seeds for 2 images"),
        ({"labels": [0, 1], "count": 1}, LabelError, "2 labels for 1 image: give a count of 2"),
        ({"labels": [0], "count": 0}, UsageError, "count must be a whole number above 0, found 0"),
        ({"labels": [0], "count": 1.5}, UsageError, "count"),
        ({"labels": [0], "count": True}, UsageError, "count"),
        ({"labels": [0], "cfg": float("nan")}, UsageError, "cfg"),
        ({"labels": [0], "cfg": -1}, UsageError, "cfg"),
        ({"labels": [0], "temperature": float("inf")}, UsageError, "temperature"),
        ({"labels": [0], "temperature": 0}, UsageError, "temperature"),
        ({"labels": [0], "top_p": 1.01}, UsageError, "top_p"),
        ({"labels": [0], "top_k": -1}, UsageError, "top_k"),
        ({"labels": [0], "top_k": 10**30}, UsageError, "top_k"),
        ({"labels": [0], "top_k": 2.5}, UsageError, "top_k"),
    ],
)
def test_what_is_out_of_range_is_refused(
    pipe: Pipeline,
    expected: Images,
    arguments: dict[str, Any],
    error: type[Exception],
    part: str,
) -> None:
    with pytest.raises(error, match=part) as caught:
        pipe.generate(**arguments)
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(pipe.generate(LABELS, seed=7), expected)


# layouts, precisions, guidance


def test_layouts_agree(export_to: ExportTo, pipe: Pipeline, expected: Images) -> None:
    assert pipe.describe().layout == "shared", "auto on a CPU"
    with Pipeline.load(export_to(batch=2), layout="per-scale", threads=1) as other:
        assert other.describe().layout == "per-scale"
        assert difference(other.generate(LABELS, seed=7), expected) <= ROUNDING


@pytest.mark.parametrize(("layout", "missing"), [("per-scale", "shared"), ("shared", "per-scale")])
def test_a_bundle_of_one_layout(
    export_to: ExportTo, expected: Images, layout: str, missing: str
) -> None:
    bundle = export_to(batch=2, layout=layout)
    with Pipeline.load(bundle, threads=1) as other:
        assert other.describe().layout == layout
        assert difference(other.generate(LABELS, seed=7), expected) <= ROUNDING
    with pytest.raises(BundleError, match="has no graph"):
        Pipeline.load(bundle, layout=missing, threads=1)


def test_without_guidance(export_to: ExportTo, pipe: Pipeline) -> None:
    bundle = export_to(batch=2, guidance=False)
    with Pipeline.load(bundle, threads=1) as other:
        assert other.manifest.rows == 2
        plain = other.generate(LABELS, seed=7, cfg=0)
        assert difference(plain, pipe.generate(LABELS, seed=7, cfg=0)) <= ROUNDING
        np.testing.assert_array_equal(other.generate(LABELS, seed=7), plain)
        assert other.manifest.defaults.cfg == 0, "the default must be one that the bundle can do"
        with pytest.raises(UsageError, match=r"--no-guidance.*cfg must be 0"):
            other.generate(LABELS, cfg=1.0)


def test_fp16(export_to: ExportTo, expected: Images) -> None:
    both = export_to(batch=2, precisions=("fp32", "fp16"))
    with Pipeline.load(both, threads=1) as auto:
        assert auto.describe().precision == "fp32"
        np.testing.assert_array_equal(auto.generate(LABELS, seed=7), expected)
    half = export_to(batch=2, precisions=("fp16",))
    with (
        Pipeline.load(both, precision="fp16", threads=1) as asked,
        Pipeline.load(half, threads=1) as only,
    ):
        assert only.describe().precision == "fp16"
        greedy = only.generate(LABELS, seed=7, top_k=1)
        np.testing.assert_array_equal(asked.generate(LABELS, seed=7, top_k=1), greedy)
        assert greedy.std() > 10
    with pytest.raises(BundleError, match=r"no fp32 graphs.*--precision fp32"):
        Pipeline.load(half, precision="fp32")


@pytest.mark.parametrize("option", ["backend", "precision", "layout"])
def test_unknown_options(tmp_path: Path, option: str) -> None:
    wrong: dict[str, Any] = {option: "best"}
    with pytest.raises(UsageError, match=rf"{option} must be one of auto, .*, found 'best'"):
        Pipeline.load(tmp_path, **wrong)


def test_threads(export_to: ExportTo, expected: Images) -> None:
    with pytest.raises(UsageError, match="threads must be at least 1, found 0"):
        Pipeline.load(export_to(batch=2), threads=0)
    with Pipeline.load(export_to(batch=2), threads=2) as two:
        assert two.describe().settings["threads"] == "2"
        assert difference(two.generate(LABELS, seed=7), expected) <= ROUNDING


def test_one_thread_is_one_thread(export_to: ExportTo) -> None:
    if not Path("/proc/self/task").exists():
        pytest.skip("threads are counted in /proc/self/task, which is not here")
    code = (
        "import os, sys; import numpy, onnxruntime; from var_deploy.pipeline import Pipeline\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "pipe = Pipeline.load(sys.argv[1], threads=int(sys.argv[2])); pipe.generate([0])\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    started = [
        int(subprocess.check_output([sys.executable, "-c", code, export_to(batch=2), str(n)]))
        for n in (1, 3)
    ]
    assert started[0] == 0
    assert started[1] > 0, "or the count above would prove nothing"


# checks before anything is loaded


def test_damage_is_found_before_loading(export_to: ExportTo, tmp_path: Path) -> None:
    source = export_to(batch=2)
    bundle = tmp_path / "b"
    (bundle / "fp32").mkdir(parents=True)
    for path in source.rglob("*.*"):
        (bundle / path.relative_to(source)).write_bytes(path.read_bytes())
    weights = bundle / "fp32" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.bin does not match its hash"):
        Pipeline.load(bundle)
    Pipeline.load(bundle, threads=1, check="sizes").close()
    weights.write_bytes(data[:-1])
    with pytest.raises(BundleError, match=rf"has {len(data) - 1} bytes, expected {len(data)}"):
        Pipeline.load(bundle, check="sizes")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: bytes(len(data)), "decoder.onnx is not a graph of a bundle"),
        # well-formed and of known operators, but a value that is read is made nowhere
        (lambda data: data.replace(b"Softmax_", b"softmaX_", 1), "ONNX Runtime refuses decoder"),
    ],
)
def test_a_graph_that_cannot_be_loaded(
    export_to: ExportTo, tmp_path: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    source = export_to(batch=2)
    bundle = tmp_path / "b"
    (bundle / "fp32").mkdir(parents=True)
    for path in source.rglob("*.*"):
        (bundle / path.relative_to(source)).write_bytes(path.read_bytes())
    decoder = bundle / "fp32" / "decoder.onnx"
    decoder.write_bytes(damage(decoder.read_bytes()))
    with pytest.raises((BundleError, BackendError), match=words) as caught:
        Pipeline.load(bundle, check="sizes")
    assert "\n" not in str(caught.value)
