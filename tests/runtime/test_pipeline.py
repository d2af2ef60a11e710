"""The pipeline over exported bundles: what a seed promises, and what a failure leaves behind.

The model is a small member of the family with random weights, whose images differ visibly from
label to label and from seed to seed.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from var_deploy.errors import BackendError, BundleError, LabelError, UsageError
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.sampling import Sampling
from var_deploy.spec import ModelSpec

Images = NDArray[np.uint8]
ExportTo = Callable[..., Path]

LABELS = (3, 0, 4, 1, 2)
NAMES = ("star", "heart", "house", "tree", "fish")
SCALES, SIDE = 3, 8
# another batch size means other matrix shapes, whose sums may round differently: one grey level
ROUNDING = 1
SMAPS = Path("/proc/self/smaps_rollup")
needs_smaps = pytest.mark.skipif(
    not SMAPS.exists(), reason="memory is read from /proc/self/smaps_rollup, which is not here"
)


def random_model(spec: ModelSpec) -> Any:
    from var_deploy.export.checkpoint import assemble, empty_modules
    from var_deploy.export.random_weights import RandomWeights

    drawn = (
        RandomWeights({key: tuple(p.shape) for key, p in module.named_parameters()}, 3)
        for module in empty_modules(spec)
    )
    defaults = Sampling(cfg=2.0, top_k=0, top_p=0.95)
    return assemble(spec, *drawn, labels=NAMES, defaults=defaults)


@pytest.fixture(scope="module")
def export_to(
    tmp_path_factory: pytest.TempPathFactory, family_member: Callable[..., ModelSpec]
) -> ExportTo:
    """Exports the small model once for each set of options, and says where."""
    pytest.importorskip("torch")
    from var_deploy.export.bundle import ExportOptions, export_bundle

    folder = tmp_path_factory.mktemp("bundles")
    model = random_model(family_member())
    made: dict[str, Path] = {}

    def export(**options: Any) -> Path:
        name = json.dumps(options, sort_keys=True)
        if name not in made:
            made[name] = folder / str(len(made))
            export_bundle(model, made[name], ExportOptions(**options))
        return made[name]

    return export


@pytest.fixture(scope="module")
def pipe(export_to: ExportTo) -> Iterator[Pipeline]:
    """Two images a launch, guidance on."""
    with Pipeline.load(export_to(batch=2), threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def expected(pipe: Pipeline) -> Images:
    """Five images of seed 7."""
    return pipe.generate(LABELS, seed=7)


def difference(found: Images, wanted: Images) -> int:
    assert found.shape == wanted.shape
    return int(np.abs(found.astype(int) - wanted).max())


def anonymous() -> int:
    """Bytes that this process alone holds: what others do with shared libraries does not count."""
    lines = SMAPS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


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


def test_an_image_depends_on_its_own_number_and_label(pipe: Pipeline, expected: Images) -> None:
    for count in range(1, 5):  # whatever follows, and however much of the last batch is padding
        np.testing.assert_array_equal(pipe.generate(LABELS[:count], seed=7), expected[:count])
    neighbours = pipe.generate((1, 1, 4, 2, 2), seed=7)
    np.testing.assert_array_equal(neighbours[[2, 4]], expected[[2, 4]])
    assert difference(neighbours[0], expected[0]) > 30, "another label is another image"
    moved = pipe.generate((0, 3), seed=7)
    assert difference(moved[1], expected[0]) > 30, "another number is another image"


def test_seeds_differ(pipe: Pipeline, expected: Images) -> None:
    others = [pipe.generate(LABELS, seed=seed) for seed in (0, 8, 2**64 - 1)]
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
    assert pipe.describe()["layout"] == "shared", "auto on a CPU"
    with Pipeline.load(export_to(batch=2), layout="per-scale", threads=1) as other:
        assert other.describe()["layout"] == "per-scale"
        assert difference(other.generate(LABELS, seed=7), expected) <= ROUNDING


@pytest.mark.parametrize(("layout", "missing"), [("per-scale", "shared"), ("shared", "per-scale")])
def test_a_bundle_of_one_layout(
    export_to: ExportTo, expected: Images, layout: str, missing: str
) -> None:
    bundle = export_to(batch=2, layout=layout)
    with Pipeline.load(bundle, threads=1) as other:
        assert other.describe()["layout"] == layout
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
        assert auto.describe()["precision"] == "fp32"
        np.testing.assert_array_equal(auto.generate(LABELS, seed=7), expected)
    half = export_to(batch=2, precisions=("fp16",))
    with (
        Pipeline.load(both, precision="fp16", threads=1) as asked,
        Pipeline.load(half, threads=1) as only,
    ):
        assert only.describe()["precision"] == "fp16"
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
        assert two.describe()["threads"] == "2"
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


def test_a_graph_that_the_library_refuses(export_to: ExportTo, tmp_path: Path) -> None:
    source = export_to(batch=2)
    bundle = tmp_path / "b"
    (bundle / "fp32").mkdir(parents=True)
    for path in source.rglob("*.*"):
        (bundle / path.relative_to(source)).write_bytes(path.read_bytes())
    decoder = bundle / "fp32" / "decoder.onnx"
    decoder.write_bytes(b"\0" * decoder.stat().st_size)
    with pytest.raises(BackendError, match=r"ONNX Runtime refuses decoder\.onnx") as caught:
        Pipeline.load(bundle, check="sizes")
    assert "\n" not in str(caught.value)


# life of a pipeline


def test_progress_counts_every_launch(pipe: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipe.generate(LABELS, on_progress=lambda done, steps: seen.append((done, steps)))
    launches = 3 * (SCALES + 1)  # five images, two at a time: every scale and the decoder
    assert seen == [(n, launches) for n in range(1, launches + 1)]


def test_close(export_to: ExportTo) -> None:
    with Pipeline.load(export_to(batch=2), threads=1) as closed:
        closed.generate([0])
    with pytest.raises(BackendError, match="this pipeline is closed"):
        closed.generate([0])
    closed.close()
    assert closed.describe()["backend"] == "onnxruntime-cpu"


def test_a_callback_cannot_use_its_own_pipeline(pipe: Pipeline, expected: Images) -> None:
    for use in (pipe.close, lambda: pipe.generate([0])):

        def callback(done: int, steps: int, use: Callable[[], object] = use) -> None:
            use()

        with pytest.raises(UsageError, match="callback"):
            pipe.generate([0], on_progress=callback)
    assert difference(pipe.generate(LABELS, seed=7), expected) == 0


def test_an_exception_passes_through_the_context(export_to: ExportTo) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        Pipeline.load(export_to(batch=2), threads=1) as closed,
    ):
        raise ZeroDivisionError
    with pytest.raises(BackendError, match="closed"):
        closed.generate([0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("when", [1, SCALES + 1, SCALES + 3])
def test_cancelling_leaves_nothing_behind(
    pipe: Pipeline, expected: Images, error: type[BaseException], when: int
) -> None:
    def cancel(done: int, steps: int) -> None:
        if done == when:
            raise error

    with pytest.raises(error):
        pipe.generate([2, 2, 2], seed=1, on_progress=cancel)
    np.testing.assert_array_equal(pipe.generate(LABELS, seed=7), expected)


def test_two_pipelines_at_once(export_to: ExportTo, pipe: Pipeline, expected: Images) -> None:
    with Pipeline.load(export_to(batch=2), threads=1) as other:
        found: list[Images] = []

        def between(done: int, steps: int) -> None:  # one generates inside the other
            found.append(other.generate(LABELS, seed=done))

        np.testing.assert_array_equal(pipe.generate(LABELS, seed=7, on_progress=between), expected)
        for done, images in enumerate(found, start=1):
            np.testing.assert_array_equal(images, pipe.generate(LABELS, seed=done))
    np.testing.assert_array_equal(pipe.generate(LABELS, seed=7), expected)


def test_threads_wait_for_their_turn(pipe: Pipeline) -> None:
    seeds = range(8)
    wanted = [pipe.generate(LABELS, seed=seed) for seed in seeds]
    found: dict[int, Images] = {}

    def work(seed: int) -> None:
        found[seed] = pipe.generate(LABELS, seed=seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    for seed in seeds:
        np.testing.assert_array_equal(found[seed], wanted[seed])


def test_closing_while_another_thread_waits(export_to: ExportTo) -> None:
    shared = Pipeline.load(export_to(batch=2), threads=1)
    running, closing = threading.Event(), threading.Event()
    ended: list[object] = []

    def first(done: int, steps: int) -> None:
        running.set()
        closing.wait(60)

    def work(**options: Any) -> None:
        try:
            ended.append(shared.generate([0], **options).shape)
        except BackendError as error:
            ended.append(str(error))

    workers = [threading.Thread(target=work, kwargs={"on_progress": first})]
    workers[0].start()
    assert running.wait(60)
    workers += [threading.Thread(target=shared.close), threading.Thread(target=work)]
    for worker in workers[1:]:
        worker.start()
    closing.set()
    for worker in workers:
        worker.join(60)
    assert ended[0] == (1, SIDE, SIDE, 3), "what runs is finished first"
    assert ended[1] in ("this pipeline is closed", (1, SIDE, SIDE, 3)), "either order, no crash"


# memory


@needs_smaps
def test_generating_does_not_grow(pipe: Pipeline) -> None:
    def many(count: int) -> int:
        for seed in range(count):
            pipe.generate(LABELS[:2], seed=seed)
        gc.collect()
        return anonymous()

    many(30)  # whatever is allocated on first use
    before = many(30)
    caches = 2 * 2 * (1 + 4) * 4 * 64 * 4  # bytes of the K/V rows of one batch
    assert many(400) - before < 400 * caches / 4, "less than a quarter of a cache a batch"


MEASURE = """
import gc, sys
import numpy, onnxruntime
from var_deploy.pipeline import Pipeline
def pss():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
before = pss()
pipe = Pipeline.load(sys.argv[1], layout=sys.argv[2], threads=1)
pipe.generate([0])
gc.collect()
print(pss() - before)
"""


@needs_smaps
def test_the_shared_layout_holds_the_weights_once(
    tmp_path: Path, family_member: Callable[..., ModelSpec]
) -> None:
    pytest.importorskip("torch")
    from var_deploy.export.bundle import ExportOptions, export_bundle

    spec = family_member(width=640, heads=10, ffn_width=2560)
    model = dataclasses.replace(random_model(spec), labels=())
    export_bundle(model, tmp_path / "b", ExportOptions())
    graphs = read_manifest(tmp_path / "b").graphs["fp32"]
    once = sum(graphs[name].weight_bytes for name in ("condition", "step", "decoder"))
    assert 30e6 < graphs["step"].weight_bytes < once < 100e6
    shared, per_scale = (
        int(subprocess.check_output([sys.executable, "-c", MEASURE, tmp_path / "b", layout]))
        for layout in ("shared", "per-scale")
    )
    assert shared < 1.35 * once + 20e6  # the library's own memory on top
    # and the other layout does hold a copy a scale, or the line above would prove little
    assert per_scale - shared > 1.2 * graphs["step"].weight_bytes
