"""Golden cases of Infinity through exported bundles: graphs on ONNX Runtime, in the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_infinity import CASES, Case, folder_of, load_case, token_bits
from numpy.typing import NDArray

from var_deploy.config import CPU, LAYOUTS, Layout, RuntimeConfig
from var_deploy.errors import BackendError, UsageError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.image.editing import Kept
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.backends.choice import choose_backend
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.runtime.prompts import PromptRows
from var_deploy.sampling import BitSampling, Sampling

GREEDY = 0.1  # top_p up to 0.5 takes the likelier value of every bit


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    folder = folder_of(request.param)
    if not folder.is_dir():
        pytest.skip(f"the golden case {request.param} is not at hand")
    return load_case(folder)


@pytest.fixture(scope="module")
def bundle(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("infinity") / case.name
    precisions: Any = ("fp32", "fp16", "int8") if case.name == "seeded-small" else ("fp32",)
    export_bundle(
        case.model(),
        out,
        ExportOptions(precisions=precisions, batch=2, guidance=None, calibration=1),
    )
    return out


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    found: Layout = request.param
    return found


@pytest.fixture
def pipe(bundle: Path, layout: Layout) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, precision="fp32", layout=layout) as pipe:
        yield pipe


@pytest.fixture
def loop(bundle: Path, layout: Layout) -> Iterator[ScaleLoop]:
    loop = loop_of(bundle, "fp32", layout)
    yield loop
    loop.close()


def loop_of(bundle: Path, precision: str, layout: Layout) -> ScaleLoop:
    manifest = read_manifest(bundle)
    config = RuntimeConfig(backend=CPU, precision=precision, layout=layout)
    backend = choose_backend(bundle, manifest, config).backend
    return ScaleLoop(bundle, manifest, backend, precision, layout)


def rows(case: Case) -> PromptRows:
    return PromptRows(
        features=case.golden["text.features"], lengths=case.golden["text.lengths"]
    )


def settings(case: Case, top_p: float) -> BitSampling:
    return BitSampling(
        cfg=tuple(case.config["cfg"]), temperature=tuple(case.config["tau"]), top_p=top_p
    )


def draws(case: Case) -> NDArray[np.float32]:
    return np.concatenate([u.reshape(2, -1) for u in case.scales("sampled.uniforms")], axis=1)


def assert_bits(found: list[NDArray[np.int64]], expected: list[NDArray[Any]]) -> None:
    for scale, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_array_equal(ours, theirs, err_msg=f"scale {scale}")


def test_sampled_bits_and_image(case: Case, loop: ScaleLoop) -> None:
    image = loop.run(rows(case), draws(case), settings(case, case.config["top_p"]))
    assert_bits(loop.tokens(), case.scales("sampled.bits"))
    # published images are cut off, not rounded, so rounding may tip a value over
    assert np.abs(np.floor(image * 255) - case.golden["sampled.uint8"]).max() <= 1
    f_hat = case.golden["sampled.summed"]
    np.testing.assert_allclose(loop.decode(f_hat), image, atol=1e-5)


def test_greedy_bits_and_image(case: Case, loop: ScaleLoop) -> None:
    image = loop.run(rows(case), draws(case), settings(case, GREEDY))
    assert_bits(loop.tokens(), case.scales("greedy.bits"))
    expected = case.golden["greedy.image"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(image, expected, atol=1e-3)


def test_negative_prompt(case: Case, loop: ScaleLoop) -> None:
    if not case.config["negative"]:
        pytest.skip("this case has no negative prompt")
    negative = PromptRows(
        features=case.golden["negative.text.features"],
        lengths=case.golden["negative.text.lengths"],
    )
    both = dataclasses.replace(rows(case), negative=negative)
    loop.run(both, draws(case), settings(case, GREEDY))
    assert_bits(loop.tokens(), case.scales("negative.bits"))
    # and the next call without one is as if there had been none
    loop.run(rows(case), draws(case), settings(case, GREEDY))
    assert_bits(loop.tokens(), case.scales("greedy.bits"))


def test_forced_scales(case: Case, loop: ScaleLoop) -> None:
    forced = [token_bits(case, k, "encode.bits") for k in range(case.config["forced_scales"])]
    loop.run(rows(case), draws(case), settings(case, GREEDY), forced=forced)
    found = loop.tokens()
    assert_bits(found, [token_bits(case, k, "forced.map_bits") for k in range(len(found))])


def test_encoder_and_accumulate(case: Case, pipe: Pipeline) -> None:
    pixels = case.golden["encode.image_u8"].transpose(0, 2, 3, 1)
    tokens = pipe.encode(pixels)
    assert_bits(tokens, [token_bits(case, k, "encode.bits") for k in range(case.spec.scales)])
    images = pipe.decode(tokens)
    if "encode.reconstruction" in case.golden:
        expected = case.golden["encode.reconstruction"][0].transpose(1, 2, 0)
        assert np.abs(images[0] - np.rint(expected * 255)).max() <= 1


def test_precisions_draw_nearly_the_same_bits(case: Case, bundle: Path) -> None:
    if case.name != "seeded-small":
        pytest.skip("the other cases are exported in fp32 alone")
    least = {"fp16": 0.99, "int8": 0.9}
    for precision, share in least.items():
        loop = loop_of(bundle, precision, "shared")
        loop.run(rows(case), draws(case), settings(case, 0.97))
        pairs = zip(loop.tokens(), case.scales("sampled.bits"), strict=True)
        same = np.concatenate([(a == b).ravel() for a, b in pairs])
        loop.close()
        assert same.mean() >= share, (precision, same.mean())


def test_an_image_is_made_again_alone(case: Case, pipe: Pipeline) -> None:
    both = pipe.generate(prompts=rows(case), seed=3)
    alone = pipe.generate(prompts=rows(case).rows([1]), seed=4)
    np.testing.assert_array_equal(both[1], alone[0])
    assert both.shape == (2, *case.spec.tokenizer.image_size, 3)


def test_edit_and_vary_keep_what_they_should(case: Case, pipe: Pipeline) -> None:
    pixels = case.golden["encode.image_u8"][0].transpose(1, 2, 0)
    height, width = case.spec.tokenizer.image_size
    new = np.zeros((height, width), np.bool_)
    new[:, width // 2 :] = True
    features = rows(case).rows([0])
    edited = pipe.edit(pixels, new, prompt=features, seed=1, keep_pixels=True)
    np.testing.assert_array_equal(edited[0][~new], pixels[~new])
    assert (edited[0][new] != pixels[new]).any()
    same = pipe.vary(pixels, case.spec.scales, prompt=features, seed=1)
    np.testing.assert_array_equal(same, pipe.decode(pipe.encode(pixels)))


def test_kept_tokens_stay(case: Case, loop: ScaleLoop) -> None:
    tokens = [token_bits(case, k, "encode.bits") for k in range(case.spec.scales)]
    masks = [np.zeros(t.shape[:2], np.bool_) for t in tokens]
    masks[-1][:, ::2] = True
    keep = Kept(masks=tuple(masks), tokens=tuple(tokens))
    loop.run(rows(case), draws(case), settings(case, 0.97), keep=keep)
    np.testing.assert_array_equal(loop.tokens()[-1][:, ::2], tokens[-1][:, ::2])


def test_words_for_the_wrong_condition(case: Case, pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match="takes prompts, not labels"):
        pipe.generate([0])
    with pytest.raises(UsageError, match="takes prompts"):
        pipe.generate()
    with pytest.raises(UsageError, match="text encoder"):
        pipe.generate(prompts="a red star")
    with pytest.raises(UsageError, match="top_k must be 0"):
        pipe.generate(prompts=rows(case), top_k=3)
    with pytest.raises(UsageError, match="2 prompts for 1 image"):
        pipe.generate(prompts=rows(case), count=1)


def test_logits_that_are_not_numbers_are_told(case: Case, pipe: Pipeline) -> None:
    broken = rows(case)
    broken = dataclasses.replace(broken, features=np.full_like(broken.features, np.nan))
    with pytest.raises(BackendError, match="not numbers"):
        pipe.generate(prompts=broken)


def test_settings_of_the_other_kind_of_model_are_taken_over(case: Case, bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.sampling(cfg=2.0) == case.model().defaults.replace(cfg=2.0)
    taken = manifest.sampling(Sampling(cfg=2.0, top_k=0, top_p=0.5, temperature=1.5))
    assert taken == BitSampling(cfg=2.0, top_p=0.5, temperature=1.5)
    assert [taken.guidance(k, 4) for k in range(4)] == [2.0] * 4
