"""Fidelity to the published implementation: its own arrays, within 2e-4, and its own tokens."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from var_deploy.export.checkpoint.assemble import build_modules, empty_modules
from var_deploy.export.checkpoint.presets import PATCH_NUMS_512, PRESETS
from var_deploy.export.models.transformer import Cache
from var_deploy.spec import ModelSpec, TransformerSpec

TOLERANCE = 2e-4
OFFICIAL = Path(__file__).parents[1] / "golden" / "official_state_dicts.json.gz"


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def assert_near(found: torch.Tensor, expected: np.ndarray[Any, Any], what: str) -> None:
    assert tuple(found.shape) == expected.shape, what
    assert found.dtype == torch.float32, what
    worst = np.abs(found.numpy() - expected).max()
    assert worst <= TOLERANCE, f"{what} differs by {worst}"


def test_encode_gives_the_published_tokens(golden: Any) -> None:
    tokenizer, _ = build_modules(golden.model)
    tokens = tokenizer.encode(torch.from_numpy(golden.arrays["image"]))
    assert len(tokens) == golden.spec.scales
    for scale, expected in enumerate(golden.scales("encode.tokens")):
        np.testing.assert_array_equal(tokens[scale].numpy(), expected, err_msg=f"scale {scale}")


def test_reconstruction_after_every_scale(golden: Any) -> None:
    tokenizer, _ = build_modules(golden.model)
    tokens = [torch.from_numpy(t) for t in golden.scales("encode.tokens")]
    for scale, expected in enumerate(golden.scales("reconstruct.image")):
        image = tokenizer.decode(tokenizer.accumulate(tokens[: scale + 1]))
        if expected.ndim == 2:  # between the first and the last scale only channel means are kept
            image = image.mean(dim=(2, 3))
        assert_near(image, expected, f"reconstruction after scale {scale}")


def test_teacher_forced_logits(golden: Any) -> None:
    tokenizer, transformer = build_modules(golden.model)
    tokens = [torch.from_numpy(t) for t in golden.scales("encode.tokens")]
    teacher = tokenizer.teacher_input(tokens)
    assert_near(teacher, golden.arrays["teacher.input"], "teacher input")
    labels = torch.from_numpy(golden.arrays["labels"])
    nothing = torch.full_like(labels, golden.spec.transformer.classes)
    assert_near(transformer(labels, teacher), golden.arrays["teacher.logits"], "logits")
    assert_near(
        transformer(nothing, teacher), golden.arrays["teacher.logits_uncond"], "no-class logits"
    )


def test_greedy_generation_with_guidance_and_cache(golden: Any) -> None:
    tokenizer, transformer = build_modules(golden.model)
    quantizer, spec = tokenizer.quantize, golden.spec
    labels = torch.from_numpy(golden.arrays["labels"])
    batch, cfg = len(labels), float(golden.arrays["greedy.cfg"])
    nothing = torch.full_like(labels, spec.transformer.classes)
    modulation = transformer.modulation(torch.cat((labels, nothing)))
    cache, inputs = Cache(spec.transformer.depth), None
    f_hat = torch.zeros(batch, spec.tokenizer.code_width, *2 * [spec.tokenizer.latent_side])
    for scale in range(spec.scales):
        logits = transformer.step(scale, inputs, modulation, cache)
        t = cfg * scale / (spec.scales - 1)
        guided = (1 + t) * logits[:batch] - t * logits[batch:]
        assert_near(guided, golden.arrays[f"greedy.guided_logits.{scale}"], f"logits {scale}")
        tokens = guided.argmax(-1)
        np.testing.assert_array_equal(tokens.numpy(), golden.arrays[f"greedy.tokens.{scale}"])
        f_hat = f_hat + quantizer.contribution(scale, quantizer.lookup(scale, tokens))
        if scale < spec.scales - 1:
            inputs = quantizer.next_input(scale, f_hat)
    assert_near(f_hat, golden.arrays["greedy.f_hat"], "f_hat")
    image = (tokenizer.decode(f_hat) + 1) / 2
    assert_near(image, golden.arrays["greedy.image"], "image")


def test_cached_generation_equals_the_full_pass(golden: Any) -> None:
    tokenizer, transformer = build_modules(golden.model)
    tokens = [torch.from_numpy(t) for t in golden.scales("encode.tokens")]
    labels = torch.from_numpy(golden.arrays["labels"])
    teacher = tokenizer.teacher_input(tokens)
    full = transformer(labels, teacher)
    modulation, cache = transformer.modulation(labels), Cache(golden.spec.transformer.depth)
    starts = golden.spec.prefix_lengths
    for scale, (start, stop) in enumerate(pairwise(starts)):
        given = None if scale == 0 else teacher[:, start - 1 : stop - 1]
        step = transformer.step(scale, given, modulation, cache)
        assert_near(step, full[:, start:stop].numpy(), f"scale {scale}")


def official(name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    listing = json.loads(gzip.decompress(OFFICIAL.read_bytes()))[name]
    return {key: (tuple(shape), dtype) for key, (shape, dtype) in listing.items()}


def described(module: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        key: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for key, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize("preset", ["var-d16", "var-d20"])
def test_released_transformer_has_these_keys_shapes_and_dtypes(preset: str) -> None:
    _, transformer = empty_modules(PRESETS[preset].spec)
    assert described(transformer) == official(preset.replace("-", "_"))


def test_released_tokenizer_has_these_keys_shapes_and_dtypes() -> None:
    tokenizer, _ = empty_modules(PRESETS["var-d16"].spec)
    assert described(tokenizer) == official("vae_ch160v4096z32")


def test_the_512_px_tokenizer_is_the_same_but_for_its_statistic() -> None:
    small, large = (described(empty_modules(PRESETS[p].spec)[0]) for p in ("var-d16", "var-d36"))
    assert small == large


def test_shared_adaln_pattern_at_512_px() -> None:
    reference = official("shared_aln_pattern_depth4_pn512")
    width = reference["pos_start"][0][-1]
    spec = ModelSpec(
        tokenizer=PRESETS["var-d36"].spec.tokenizer,
        transformer=TransformerSpec(
            depth=4, width=width, heads=4, classes=1000, ffn_width=4 * width, shared_adaln=True
        ),
    )
    assert spec.patch_nums == PATCH_NUMS_512
    _, transformer = empty_modules(spec)
    assert described(transformer) == reference


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("var-d16", 310), ("var-d20", 600), ("var-d24", 1030), ("var-d30", 2010), ("var-d36", 2350)],
)
def test_parameter_counts_of_the_presets(preset: str, millions: int) -> None:
    _, transformer = empty_modules(PRESETS[preset].spec)
    count = sum(p.numel() for p in transformer.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.01)
