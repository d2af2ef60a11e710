"""Encoding, decoding and editing on an exported pocket: against PyTorch, and by what is seen."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.errors import BundleError, LabelError, UsageError
from var_deploy.image.editing import box_mask, feather, keep_masks
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.request import ScaleEvent
from var_deploy.sampling import Sampling, uniforms

torch = pytest.importorskip("torch")

Images = NDArray[np.uint8]
SIDE, SCALES, CLASSES = 64, 5, 10
PATCHES = (1, 2, 3, 5, 8)
COUNT = 20
MIDDLE = box_mask((20, 20, 44, 44), SIDE, SIDE)
MOST = box_mask((4, 4, 60, 60), SIDE, SIDE)
RIGHT = box_mask((32, 0, 64, 64), SIDE, SIDE)


@pytest.fixture(scope="module")
def pocket(pocket_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(pocket_bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def modules() -> tuple[Any, Any]:
    """The PyTorch tokenizer and transformer."""
    from var_deploy.export.checkpoint.assemble import build_modules, load_model

    return build_modules(load_model("pocket"))


@pytest.fixture(scope="module")
def drawn() -> tuple[Images, NDArray[np.int64]]:
    """Twenty pictures that pocket was not trained on, and what they show."""
    from tools.pocket.drawings import draw_set

    labels = np.arange(COUNT) % CLASSES
    return draw_set(COUNT, 987, labels=labels)[0], labels


@pytest.fixture(scope="module")
def tokens(pocket: Pipeline, drawn: tuple[Images, Any]) -> list[NDArray[np.int64]]:
    return pocket.encode(drawn[0])


@pytest.fixture(scope="module")
def rebuilt(pocket: Pipeline, tokens: list[NDArray[np.int64]]) -> Images:
    return pocket.decode(tokens)


def decibels(found: Images, wanted: Images, where: NDArray[np.bool_]) -> NDArray[np.float64]:
    """PSNR of each image over the pixels `where` [H, W]."""
    error = np.square(found / 255.0 - wanted / 255.0)[:, where].mean(axis=(1, 2))
    noise: NDArray[np.float64] = -10 * np.log10(error + 1e-12)
    return noise


# tokens


def test_tokens_are_those_of_the_model(
    modules: tuple[Any, Any], drawn: tuple[Images, Any], tokens: list[NDArray[np.int64]]
) -> None:
    images = torch.from_numpy(drawn[0]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = modules[0].encode(images)
    agree = [(found == want.numpy()).mean() for found, want in zip(tokens, expected, strict=True)]
    assert [t.shape for t in tokens] == [(COUNT, patch * patch) for patch in PATCHES]
    assert min(agree) > 0.98, "all but for a rounding that tips a code and what follows from it"


def test_images_of_tokens_are_those_of_the_model(
    modules: tuple[Any, Any], pocket: Pipeline, tokens: list[NDArray[np.int64]]
) -> None:
    for scales in (1, 3, SCALES):
        with torch.no_grad():
            f_hat = modules[0].accumulate([torch.from_numpy(t) for t in tokens[:scales]])
            expected = (modules[0].decode(f_hat).permute(0, 2, 3, 1).numpy() + 1) * 127.5
        assert np.abs(pocket.decode(tokens, scales=scales) - expected).max() <= 1
        np.testing.assert_array_equal(
            pocket.decode(tokens[:scales]), pocket.decode(tokens, scales=scales)
        )


def test_every_scale_adds_to_the_reconstruction(
    pocket: Pipeline, drawn: tuple[Images, Any], tokens: list[NDArray[np.int64]], rebuilt: Images
) -> None:
    everywhere = np.ones((SIDE, SIDE), np.bool_)
    steps = [pocket.decode(tokens, scales=k + 1) for k in range(SCALES)]
    near = [decibels(step, drawn[0], everywhere).mean() for step in steps]
    assert near == sorted(near) and near[0] < 15 and near[-1] > 23
    np.testing.assert_array_equal(steps[-1], rebuilt)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t[:0], "scales must lie between 1 and 0"),
        (lambda t: [*t[:2], t[2][:, :4]], r"scale 2 must be whole numbers \[20, 9\]"),
        (lambda t: [t[0], t[1][:3]], r"scale 1 must be whole numbers \[20, 4\]"),
        (lambda t: [t[0].astype(np.float32)], r"scale 0 .* found float32 \[20, 1\]"),
        (lambda t: [t[0], t[1] - 600], "scale 1 must lie between 0 and 511"),
        (lambda t: [t[0] + 512], "scale 0 must lie between 0 and 511"),
    ],
)
def test_tokens_that_are_none(
    pocket: Pipeline, tokens: list[NDArray[np.int64]], change: Any, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        pocket.decode(change(tokens))


def test_a_bundle_from_before_the_graph(
    pocket_bundle: Path, pocket: Pipeline, tokens: list[NDArray[np.int64]], tmp_path: Path
) -> None:
    manifest = pocket.manifest
    held = {n: g for n, g in manifest.graphs["fp32"].items() if n != names.ACCUMULATE}
    older = Path(shutil.copytree(pocket_bundle, tmp_path / "older"))
    dataclasses.replace(manifest, graphs={"fp32": held}).save(older)
    with Pipeline.load(older, threads=1) as old:
        with pytest.raises(BundleError, match="no graph accumulate in fp32; export it again"):
            old.decode(tokens)
        assert old.encode(np.zeros((SIDE, SIDE, 3), np.uint8))[0].shape == (1, 1)


# edits


def test_an_edit_is_that_of_the_model(
    modules: tuple[Any, Any], pocket: Pipeline, drawn: tuple[Images, Any]
) -> None:
    """The published way in PyTorch: draw every token, and put back those that stay."""
    from var_deploy.export.models.sampler import draw, filter_logits, guide
    from var_deploy.export.models.transformer import Cache

    tokenizer, transformer = modules
    seen: list[NDArray[np.int64]] = []
    seed, label, sampling = 5, 3, Sampling(cfg=3.0, top_k=50, top_p=0.9)
    found = pocket.edit(
        drawn[0][2],
        RIGHT,
        label=label,
        seed=seed,
        cfg=3.0,
        top_k=50,
        top_p=0.9,
        on_scale=lambda event: seen.append(event.tokens),
    )
    stays = keep_masks(RIGHT, PATCHES)
    with torch.no_grad():
        image = torch.from_numpy(drawn[0][2:3]).permute(0, 3, 1, 2).float() / 127.5 - 1
        given = tokenizer.encode(image)
        mod = transformer.modulation(torch.tensor([label, CLASSES]))
        cache, following = Cache(transformer.spec.transformer.depth), None
        draws = torch.from_numpy(uniforms(seed, 0, sum(p * p for p in PATCHES))[None])
        kept: list[Any] = []
        for k, part in enumerate(draws.split([p * p for p in PATCHES], dim=1)):
            logits = transformer.step(k, following, mod, cache)
            logits = guide(logits, sampling.guidance(k, SCALES), 1)
            new, _ = draw(filter_logits(logits, 50, 0.9), part)
            kept.append(torch.where(torch.from_numpy(stays[k][None]), given[k], new))
            f_hat = tokenizer.accumulate(kept)
            if k + 1 < SCALES:
                following = tokenizer.quantize.next_input(k, f_hat)
        expected = (tokenizer.decode(f_hat).permute(0, 2, 3, 1).numpy() + 1) * 127.5
    for k in range(SCALES):
        np.testing.assert_array_equal(seen[k], kept[k].numpy(), err_msg=f"scale {k}")
    assert np.abs(found - expected).max() <= 1


def test_what_is_kept_stays_and_the_rest_changes(
    pocket: Pipeline, drawn: tuple[Images, Any], rebuilt: Images
) -> None:
    """In-painting without a class; the decoder looks far, so a change is felt everywhere."""
    for mask, kept, least in ((MIDDLE, 28, 24), (RIGHT, 22, 17)):
        found = np.concatenate(
            [pocket.edit(image, mask, seed=n) for n, image in enumerate(drawn[0][:10])]
        )
        outside = decibels(found, rebuilt[:10], ~mask)
        inside = decibels(found, rebuilt[:10], mask)
        assert outside.mean() > kept and outside.min() > least
        assert inside.mean() < outside.mean() - 5
        assert (np.abs(found.astype(int) - rebuilt[:10])[:, mask].max(axis=(1, 2)) > 40).all()


def test_tokens_outside_the_mask_are_forced(
    pocket: Pipeline, drawn: tuple[Images, Any], tokens: list[NDArray[np.int64]]
) -> None:
    seen: list[ScaleEvent] = []
    pocket.edit(drawn[0][4], MIDDLE, label="star", seed=[1, 2, 3], on_scale=seen.append)
    assert [(event.first, event.scale) for event in seen] == [
        (n, k) for n in range(3) for k in range(SCALES)
    ]
    stays = keep_masks(MIDDLE, PATCHES)
    for event in seen:
        mask, original = stays[event.scale], tokens[event.scale][4]
        np.testing.assert_array_equal(event.tokens[0][mask], original[mask])
    last = [event.tokens[0][~stays[-1]] for event in seen if event.scale == SCALES - 1]
    assert len({tuple(t) for t in last}) == 3, "every seed draws its own"


def test_a_class_edit_turns_most_objects_into_the_asked_class(
    pocket: Pipeline, drawn: tuple[Images, NDArray[np.int64]], rebuilt: Images
) -> None:
    from var_deploy.export.pocket.classifier import load_classifier

    images, labels = drawn
    asked = (labels + 1 + np.arange(COUNT) // CLASSES) % CLASSES
    found = np.concatenate(
        [pocket.edit(images[n], MOST, label=int(asked[n]), seed=n, cfg=4.0) for n in range(COUNT)]
    )
    judge = load_classifier()
    assert (judge.predict(rebuilt) == labels).mean() > 0.9
    shown = judge.predict(found)
    assert (shown == asked).mean() >= 0.65  # 0.85 of forty
    assert (shown == labels).mean() <= 0.2
    # the border keeps its colours
    assert decibels(found, rebuilt, ~MOST).mean() > decibels(found, rebuilt, MOST).mean() + 2


def test_pixels_are_kept_on_request(pocket: Pipeline, drawn: tuple[Images, Any]) -> None:
    image = drawn[0][7]
    plain = pocket.edit(image, RIGHT, label="sun", seed=3)
    kept = pocket.edit(image, RIGHT, label="sun", seed=3, keep_pixels=True)
    np.testing.assert_array_equal(kept[:, ~RIGHT], image[None][:, ~RIGHT])
    inner = feather(RIGHT, 2) == 1
    assert inner.sum() > 1800
    np.testing.assert_array_equal(kept[:, inner], plain[:, inner])
    assert kept.scales_done.tolist() == [SCALES]


def test_out_painting(pocket: Pipeline, drawn: tuple[Images, Any], rebuilt: Images) -> None:
    outside = box_mask((8, 8, 56, 56), SIDE, SIDE, outside=True)
    found = pocket.edit(drawn[0][1], outside, seed=[1, 2])
    assert decibels(found, rebuilt[1:2], ~outside).min() > 18
    assert decibels(found, rebuilt[1:2], outside).max() < 30
    assert found.shape == (2, SIDE, SIDE, 3)


def test_a_picture_of_another_size_with_its_mask(pocket: Pipeline) -> None:
    large = np.full((100, 150, 3), 128, np.uint8)
    mask = np.zeros((100, 150), np.bool_)
    mask[:, 75:] = True
    found = pocket.edit(large, mask, keep_pixels=True)
    assert (found[0, :, :31] == 128).all() and found[0, :, 40:].std() > 0
    with pytest.raises(UsageError, match="expected those of the picture, 150 × 100"):
        pocket.edit(large, mask.T)


def test_what_an_edit_refuses(pocket: Pipeline, drawn: tuple[Images, Any]) -> None:
    with pytest.raises(LabelError, match="star"):
        pocket.edit(drawn[0][0], MIDDLE, label="stra")
    with pytest.raises(UsageError, match="seed"):
        pocket.edit(drawn[0][0], MIDDLE, seed=-1)
    with pytest.raises(UsageError, match="top_p"):
        pocket.vary(drawn[0][0], 2, top_p=2.0)
    with pytest.raises(UsageError, match="from_scale must lie between 0 and 5, found 6"):
        pocket.vary(drawn[0][0], 6)
    with pytest.raises(UsageError, match="one image, found 2"):
        pocket.vary(drawn[0][:2], 1)  # type: ignore[arg-type]


# variations


def test_variations(pocket: Pipeline, drawn: tuple[Images, Any], rebuilt: Images) -> None:
    everywhere, image = np.ones((SIDE, SIDE), np.bool_), drawn[0][3]
    found = [pocket.vary(image, k, label="tree", seed=[1, 2, 3]) for k in range(SCALES + 1)]
    near = [decibels(f, rebuilt[3:4], everywhere).mean() for f in found]
    assert near[0] < near[2] < near[4] < near[5]
    np.testing.assert_array_equal(found[0], pocket.generate(["tree"] * 3, seed=[1, 2, 3]))
    assert np.abs(found[-1].astype(int) - rebuilt[3]).max() <= 1, "all kept: the reconstruction"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("layout", ["per-scale", "shared"])
def test_every_precision_edits(export_to: Callable[..., Path], precision: str, layout: str) -> None:
    """Tokens stay outside the mask and are drawn within, whatever the graphs compute in."""
    bundle = export_to(precisions=("fp32", "fp16", "int8"))
    picture = np.random.default_rng(3).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    half = np.zeros((8, 8), np.bool_)
    half[:, 4:] = True
    seen: list[ScaleEvent] = []
    with Pipeline.load(
        bundle, "onnxruntime-cpu", precision=precision, layout=layout, threads=1
    ) as pipe:
        given = pipe.encode(picture)
        edited = pipe.edit(picture, half, label=1, seed=[1, 2], on_scale=seen.append)
        whole = pipe.edit(picture, half, label=1, seed=[1, 2], keep_pixels=True)
        rebuilt = pipe.decode(given)
    stays = keep_masks(half, (1, 2, 4))
    for event in seen:
        mask = stays[event.scale]
        assert (event.tokens[0] == given[event.scale][0])[mask].all()
    last = [event.tokens[0] for event in seen if event.scale == 2]
    assert len(last) == 2 and (last[0] != last[1]).any() and (last[0] != given[2][0]).any()
    assert edited.shape == (2, 8, 8, 3) and (edited[0] != rebuilt[0]).any()
    assert (whole[:, :, :2] == picture[:, :2]).all()
