"""Sizes of a model."""

from __future__ import annotations

import dataclasses
import json

import pytest

from var_deploy.errors import UsageError
from var_deploy.spec import ModelSpec, TokenizerSpec, TransformerSpec

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
TOKENIZER = TokenizerSpec(patch_nums=SIDES, vocab_size=4096, code_width=32, base_width=160)
TRANSFORMER = TransformerSpec(depth=16, width=1024, heads=16, classes=1000, ffn_width=4096)
D16 = ModelSpec(tokenizer=TOKENIZER, transformer=TRANSFORMER)


def test_sizes_of_d16() -> None:
    assert D16.scales == 10
    assert D16.total_tokens == 680
    assert D16.prefix_lengths == (0, 1, 5, 14, 30, 55, 91, 155, 255, 424, 680)
    assert TOKENIZER.downsample == 16
    assert TOKENIZER.image_side == 256
    assert TRANSFORMER.head_width == 64
    assert D16.input_width == 32


def test_attention_scales() -> None:
    assert TRANSFORMER.attention_scale == 1.0
    plain = dataclasses.replace(TRANSFORMER, qk_l2_norm=False)
    assert plain.attention_scale == pytest.approx(0.25 / 8)
    gpt2 = dataclasses.replace(plain, family="gpt2", classes=0)
    assert gpt2.attention_scale == pytest.approx(1 / 8)
    assert not gpt2.conditional
    assert ModelSpec(tokenizer=TOKENIZER, transformer=gpt2).input_width == 1024


def test_phi_of_every_scale() -> None:
    """Ticks 1/12, 4.33/12, 7.67/12, 11/12 against k/9; k = 2 and 7 are the ties to mind."""
    indices = [TOKENIZER.phi_index(k) for k in range(10)]
    ticks = [1 / 12 + j * 10 / 36 for j in range(4)]
    for k, index in enumerate(indices):
        distances = [abs(t - k / 9) for t in ticks]
        assert distances[index] == pytest.approx(min(distances), abs=1e-12)
    assert indices == sorted(indices)
    assert set(indices) == {0, 1, 2, 3}


def test_phi_counts() -> None:
    def spec(**changes: object) -> TokenizerSpec:
        return dataclasses.replace(TOKENIZER, **changes)  # type: ignore[arg-type]

    assert spec(shared_phi=4).phi_count == 4
    assert spec(shared_phi=0).phi_count == 10
    assert [spec(shared_phi=0).phi_index(k) for k in range(10)] == list(range(10))
    assert spec(shared_phi=1).phi_count == 1
    assert {spec(shared_phi=1).phi_index(k) for k in range(10)} == {0}
    assert spec(phi_ratio=0.0).phi_count == 0


def test_json_round_trip() -> None:
    assert ModelSpec.from_json(json.loads(json.dumps(D16.to_json()))) == D16


def test_json_of_another_shape_is_refused() -> None:
    data = json.loads(json.dumps(D16.to_json()))
    for broken in (
        {},
        {**data, "tokenizer": {}},
        {**data, "transformer": {**data["transformer"], "unknown": 1}},
        {**data, "transformer": {**data["transformer"], "heads": 3}},
        {**data, "tokenizer": {**data["tokenizer"], "patch_nums": [1, "x"]}},
    ):
        with pytest.raises(UsageError):
            ModelSpec.from_json(broken)


@pytest.mark.parametrize(
    "wrong",
    [
        {"patch_nums": ()},
        {"patch_nums": (2, 3)},
        {"patch_nums": (1, 3, 2)},
        {"patch_nums": (1, 2, 2)},
        {"vocab_size": 0},
        {"base_width": 100},
    ],
)
def test_impossible_tokenizers(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=name):
        dataclasses.replace(TOKENIZER, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"heads": 7}, {"ffn_width": -1}])
def test_impossible_transformers(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=name):
        dataclasses.replace(TRANSFORMER, **wrong)  # type: ignore[arg-type]
