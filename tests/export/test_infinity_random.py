"""Random weights of Infinity: healthy through every block, and open to their text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray

from var_deploy.config import GraphForm
from var_deploy.export.checkpoint.text_model import build_text_modules, random_text_model
from var_deploy.export.graphs.text_condition import build_unconditional
from var_deploy.export.graphs.weights_bin import plan_layout, write_weights
from var_deploy.export.models.bits import draw_bits, guide, probability_of_one
from var_deploy.export.models.transformer import Cache
from var_deploy.scale_lists import ScaleList
from var_deploy.spec import BitTokenizerSpec, TextModelSpec, TextTransformerSpec

GRIDS = ((1, 1), (2, 2), (3, 3), (4, 4))
SCALES = ScaleList(resolution="", aspect="", grids=GRIDS, rope_grid=(8, 8))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what there is to compute is smaller than the cost of sharing it
    yield
    torch.set_num_threads(threads)


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def spec_of(patch: int) -> TextModelSpec:
    return TextModelSpec(
        tokenizer=BitTokenizerSpec(
            grids=GRIDS,
            bits=12,
            patch=patch,
            base_width=32,
            width_multipliers=(1, 2, 2, 2) if patch == 2 else (1, 2, 2, 2, 2),
        ),
        transformer=TextTransformerSpec(
            depth=16,
            width=128,
            heads=2,
            ffn_width=512,
            text_width=256,
            text_length=24,
            pool_heads=2,
            rope_grid=SCALES.rope_grid,
        ),
    )


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_activations_stay_healthy(patch: int, seed: int) -> None:
    spec = spec_of(patch)
    modules = build_text_modules(random_text_model(spec, seed, scales=SCALES))
    tokenizer, transformer = modules
    stream: list[torch.Tensor] = []
    branches: list[torch.Tensor] = []
    for block in transformer.blocks:
        block.register_forward_hook(lambda _m, _i, out: stream.append(out))
        for branch in ("sa", "ca", "ffn"):
            inner: Any = block.get_submodule(branch)
            inner.register_forward_hook(lambda _m, _i, out: branches.append(out))
    rng = torch.Generator().manual_seed(seed)
    batch = 3
    features = 0.1 * torch.randn(batch, 24, 256, generator=rng)  # T5's are small, and scale-free
    lengths = torch.tensor([24, 9, 3])
    with torch.inference_mode():
        condition = transformer.condition(*transformer.guided_rows(features, lengths))
        cache, inputs, f_hat = Cache(16), None, torch.zeros(1)
        ones: list[torch.Tensor] = []
        for scale in range(spec.scales):
            _, raw = transformer.step(scale, inputs, condition, cache)
            p1 = probability_of_one(guide(raw, 3.0, 1.0, batch))
            ones.append(p1)
            bits, _ = draw_bits(p1, torch.rand(p1.shape, generator=rng))
            f_hat = f_hat + tokenizer.contribution(scale, bits)
            if scale < spec.scales - 1:
                inputs = tokenizer.next_input(scale, f_hat)
        image = tokenizer.decode(f_hat)
        features_again = tokenizer.features(image)
        encoded = tokenizer.encode(image)
    assert len(stream) == 16 * spec.scales
    assert all(0.3 < rms(x) < 10 for x in stream), [rms(x) for x in stream]
    assert all(0.05 < rms(x) < 5 for x in branches), [rms(x) for x in branches]
    p1 = torch.cat(ones, dim=1)
    assert 0.3 < float(p1.mean()) < 0.7
    open_bits = ((p1 > 0.1) & (p1 < 0.9)).float().mean()
    assert 0.05 < float(open_bits) < 0.95
    # prompts and guidance matter
    cond = condition.cond
    assert rms(cond[0] - cond[1]) > 0.2
    assert rms(cond[:batch] - cond[batch:]) > 0.2
    assert rms(raw[0] - raw[1]) > 0.1
    assert 0.1 < float(image.std()) < 0.7
    assert float((image.abs() >= 1).float().mean()) < 0.1  # the clamp hardly bites
    # the encoder's latents are of the size of the codes, so that all scales are used
    assert 0.1 < rms(features_again) < 10
    assert all(0.1 < float(bits.float().mean()) < 0.9 for bits in encoded[1:])


def test_a_seed_draws_the_same_weights_again() -> None:
    first, again, other = (
        random_text_model(spec_of(1), seed, scales=SCALES).transformer.read("cfg_uncond")
        for seed in (7, 7, 8)
    )
    assert (first == again).all()
    assert not (first == other).all()
    assert 0.9 < first.std() < 1.1


def test_what_many_weights_are_made_of_is_read_and_computed_once(tmp_path: Path) -> None:
    """Keys and values of "no prompt" in every block are made of the same projected features."""
    spec, reads = spec_of(1), Counter[str]()
    source = random_text_model(spec, 0, scales=SCALES).transformer

    def read(key: str) -> NDArray[Any]:
        reads[key] += 1
        return source.read(key)

    layout = plan_layout([build_unconditional(spec, GraphForm(precision="fp16"))])
    write_weights(tmp_path / "weights.bin", layout, read, lambda size: None)
    assert reads["text_proj_for_ca.0.weight"] == reads["text_proj_for_ca.2.weight"] == 1
    assert reads["blocks.0.ca.mat_kv.weight"] == 2  # a reader that keeps nothing
