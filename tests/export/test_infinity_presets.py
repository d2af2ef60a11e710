"""Presets of Infinity: names and shapes of every released file, parameter counts, settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_infinity import MODELS, Shapes, official, renamed

from var_deploy.errors import UsageError
from var_deploy.export.checkpoint.infinity_keys import tokenizer_names, transformer_names
from var_deploy.export.checkpoint.presets import TEXT_PRESETS, find_preset, find_text_preset
from var_deploy.export.models.bit_tokenizer import BitTokenizer
from var_deploy.export.models.infinity import InfinityTransformer
from var_deploy.scale_lists import scale_list, with_scales


def shapes_of(module: torch.nn.Module) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


@pytest.mark.parametrize("preset", MODELS)
def test_released_files_have_these_names_and_shapes(preset: str) -> None:
    spec = TEXT_PRESETS[preset].spec
    transformer, tokenizer = map(official, MODELS[preset])
    with torch.device("meta"):
        modules = InfinityTransformer(spec), BitTokenizer(spec.tokenizer)
    assert shapes_of(modules[0]) == renamed(transformer, transformer_names(transformer))
    assert shapes_of(modules[1]) == renamed(tokenizer, tokenizer_names(tokenizer))


def test_every_preset_is_compared() -> None:
    assert ["pocket-text", *MODELS] == list(TEXT_PRESETS)


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("infinity-125m", 125.1), ("infinity-1b", 940.9), ("infinity-2b", 2204.6),
     ("infinity-8b", 8375.8)],
)  # fmt: skip
def test_parameter_counts(preset: str, millions: float) -> None:
    with torch.device("meta"):
        module = InfinityTransformer(TEXT_PRESETS[preset].spec)
    count = sum(p.numel() for p in module.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(
    ("preset", "size", "cfg", "temperature"),
    [("infinity-125m", 256, 4.0, 0.5), ("infinity-1b", 256, 4.0, 0.5),
     ("infinity-2b", 1024, 3.0, 0.5), ("infinity-8b", 1024, 3.0, 1.0),
     ("infinity-8b-512", 512, 3.0, 1.0)],
)  # fmt: skip
def test_sizes_and_settings(preset: str, size: int, cfg: float, temperature: float) -> None:
    found = TEXT_PRESETS[preset]
    assert found.spec.tokenizer.image_size == (size, size)
    assert found.spec.tokenizer.grids == scale_list(found.scales.resolution).grids
    assert found.spec.transformer.rope_grid == (64, 64)
    defaults: Any = found.defaults
    assert (defaults.cfg, defaults.temperature, defaults.top_k, defaults.top_p) == (
        *(cfg, temperature),
        *(0, 0.97),
    )


def test_a_preset_at_another_list() -> None:
    spec = with_scales(TEXT_PRESETS["infinity-8b"].spec, scale_list("0.25M", "4:3"), 128)
    assert spec.tokenizer.image_size == (432, 576)
    assert spec.tokenizer.latent_grid == (54, 72)
    assert spec.transformer.rope_grid == (54, 72)
    assert spec.transformer.text_length == 128


def test_names_of_presets_of_the_other_kind_are_refused_with_a_reason() -> None:
    assert find_text_preset("infinity-2b") is TEXT_PRESETS["infinity-2b"]
    with pytest.raises(UsageError, match="infinity-2b makes images of text"):
        find_preset("infinity-2b")
    with pytest.raises(UsageError, match="var-d16 has no text condition"):
        find_text_preset("var-d16")
    with pytest.raises(UsageError, match=r"'infinity-2'; did you mean infinity-2b\?"):
        find_text_preset("infinity-2")
