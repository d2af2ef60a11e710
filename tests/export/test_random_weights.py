"""Random weights: reproducible, drawn on demand, and healthy through every block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from var_deploy.export.checkpoint.assemble import assemble, build_modules, empty_modules, load_model
from var_deploy.export.checkpoint.presets import PRESETS
from var_deploy.export.checkpoint.random_weights import RandomWeights
from var_deploy.spec import ModelSpec

Member = Callable[..., ModelSpec]


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def random_modules(spec: ModelSpec, seed: int) -> Any:
    weights = [
        RandomWeights({k: tuple(p.shape) for k, p in m.named_parameters()}, seed)
        for m in empty_modules(spec)
    ]
    return build_modules(assemble(spec, *weights))


def test_a_tensor_depends_on_its_key_and_the_seed() -> None:
    shapes = {"a.weight": (64, 32), "b.weight": (64, 32)}
    first, again, other = (RandomWeights(shapes, seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first.read("a.weight"), again.read("a.weight"))
    assert not np.array_equal(first.read("a.weight"), first.read("b.weight"))
    assert not np.array_equal(first.read("a.weight"), other.read("a.weight"))
    assert first.read("a.weight").dtype == np.float32
    assert first.description == {"random_weights": 7}
    with pytest.raises(KeyError):
        first.read("c.weight")


def test_seeds_reach_to_64_bits() -> None:
    source = RandomWeights({"w": (3,)}, 2**64 - 1)
    assert np.isfinite(source.read("w")).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_drawn(preset: str) -> None:
    model = load_model(preset, random_weights=1)
    assert model.preset == preset
    assert model.defaults == PRESETS[preset].defaults
    for module, source in zip(
        empty_modules(model.spec), (model.tokenizer, model.transformer), strict=True
    ):
        assert list(source.keys()) == list(module.state_dict())
    assert model.transformer.read("lvl_1L").shape == (1, model.spec.total_tokens)
    assert model.transformer.read("blocks.0.attn.q_bias").std() > 0


@pytest.mark.parametrize("shared_adaln", [False, True])
@pytest.mark.parametrize("qk_l2_norm", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_activations_stay_healthy(
    shared_adaln: bool, qk_l2_norm: bool, seed: int, family_member: Member
) -> None:
    spec = family_member(
        depth=16, width=128, heads=2, ffn_width=512, classes=10, vocab_size=512, code_width=32,
        patch_nums=(1, 2, 3, 4), width_multipliers=(1, 1, 2, 2, 4), res_blocks=2,
        shared_adaln=shared_adaln, qk_l2_norm=qk_l2_norm,
    )  # fmt: skip
    tokenizer, transformer = random_modules(spec, seed)
    stream: list[torch.Tensor] = []
    branches: list[torch.Tensor] = []
    for block in transformer.blocks:
        block.register_forward_hook(lambda _m, _i, out: stream.append(out))
        block.attn.register_forward_hook(lambda _m, _i, out: branches.append(out))
        block.ffn.register_forward_hook(lambda _m, _i, out: branches.append(out))
    rng = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(512, (4, n), generator=rng) for n in spec.scale_lengths]
    labels = torch.arange(4)
    with torch.inference_mode():
        logits = transformer(labels, tokenizer.teacher_input(tokens))
        image = tokenizer.decode(tokenizer.accumulate(tokens))
    assert len(stream) == 16
    assert all(0.1 < rms(x) < 30 for x in stream), [rms(x) for x in stream]
    assert all(0.05 < rms(x) < 10 for x in branches), [rms(x) for x in branches]
    spread = float(logits.std(dim=-1).mean())
    assert 1.5 < spread < 4
    # tokens, places and labels matter: rows are not alike
    assert rms(logits[0] - logits[1]) > 0.5
    assert rms(logits[:, 5] - logits[:, 6]) > 0.5
    assert 0.1 < float(image.std()) < 0.7
    assert float((image.abs() >= 1).float().mean()) < 0.1  # the clamp hardly bites
    # the encoder's latents are of the size of the codes, so that all scales are used
    with torch.inference_mode():
        features = tokenizer.features(image)
    assert 0.1 < rms(features) < 10
