"""The unconditional GPT-2 form: its options, its mathematics, and its way into the exporter."""

from __future__ import annotations

import dataclasses
import inspect
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from var_deploy.errors import UsageError
from var_deploy.export import var as library_call
from var_deploy.export.checkpoint.assemble import as_loaded_model, build_modules
from var_deploy.export.models.gpt2 import Gpt2Transformer
from var_deploy.export.models.transformer import Cache
from var_deploy.export.var import (
    build,
    build_tokenizer,
    next_scale_prediction,
    recommended_defaults,
    total_tokens,
)
from var_deploy.image.resize import bicubic_matrix
from var_deploy.sampling import Sampling

SCALES = (1, 2, 3)
CODES = 24
LENGTHS = [side * side for side in SCALES]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def small(**options: Any) -> Gpt2Transformer:
    """A tiny model whose every parameter matters: GPT-2's own start is close to no function."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "scales": SCALES}
    model = build(**{**sizes, "codebook_size": CODES, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


def drawn_tokens(batch: int = 2) -> list[Tensor]:
    return [torch.randint(CODES, (batch, length)) for length in LENGTHS]


def teacher_forced(model: Gpt2Transformer, tokens: list[Tensor]) -> Tensor:
    logits: Tensor = model(None, model.teacher_input(tokens))
    return logits


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_options_and_defaults_are_the_documented_ones() -> None:
    documented = {
        "hidden_size": 512,
        "num_layers": 12,
        "num_heads": 8,
        "mlp_ratio": 4.0,
        "scales": (1, 2, 4, 8, 16),
        "codebook_size": 1024,
        "dropout": 0.1,
    }
    assert recommended_defaults() == documented
    options = inspect.signature(build_tokenizer).parameters
    assert {name: option.default for name, option in options.items()} == {
        "image_size": 256,
        "scales": (1, 2, 4, 8, 16),
        "codebook_size": 1024,
        "embed_dim": 256,
        "in_channels": 3,
    }
    assert total_tokens() == 341
    assert total_tokens([1, 2, 3]) == 14


def test_the_module_has_five_names_and_each_says_what_it_takes() -> None:
    assert sorted(library_call.__all__) == [
        *("build", "build_tokenizer", "next_scale_prediction", "recommended_defaults"),
        "total_tokens",
    ]
    for name in library_call.__all__:
        function = getattr(library_call, name)
        told = inspect.getdoc(function) or ""
        options = inspect.signature(function).parameters
        assert told and ("Args:" not in told or all(f"{o}: " in told for o in options)), name
    defaults = inspect.getdoc(recommended_defaults) or ""
    assert all(f"{name} {value}" in defaults for name, value in recommended_defaults().items())


def test_the_default_model_has_the_documented_sizes() -> None:
    with torch.device("meta"):
        model = build(**recommended_defaults())
        encoder, decoder = build_tokenizer()
        logits = model(None, torch.zeros(2, 340, 512))
    assert logits.shape == (2, 341, 1024)
    spec = model.spec
    assert (spec.transformer.depth, spec.transformer.heads) == (12, 8)
    assert (spec.transformer.ffn_width, model.dropout) == (2048, 0.1)
    assert not model.training
    assert encoder.tokenizer is decoder.tokenizer
    assert encoder.tokenizer.spec == spec.tokenizer
    assert (spec.tokenizer.image_side, spec.tokenizer.code_width) == (256, 256)
    assert spec.tokenizer.width_multipliers == (1, 1, 2, 2, 4)


def test_logits_equal_the_formula_written_out() -> None:
    """The state dict's names and layouts are those of MODEL.md: computed again from them alone."""
    model, tokens = small(), drawn_tokens(batch=1)
    w: dict[str, NDArray[Any]] = {k: v.double().numpy() for k, v in model.state_dict().items()}
    heads, width = 4, 32

    def norm(x: NDArray[Any], key: str) -> NDArray[Any]:
        h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return h * w[f"{key}.weight"] + w[f"{key}.bias"]

    def linear(x: NDArray[Any], key: str) -> NDArray[Any]:
        return x @ w[f"{key}.weight"].T + w[f"{key}.bias"]

    rows = [w["start"][0]]
    for k, (side, target) in enumerate(pairwise(SCALES)):
        grid = w[f"token_embed.{k}.weight"][tokens[k][0].numpy()].reshape(side, side, width)
        m = bicubic_matrix(side, target).astype(np.float64)
        rows.append(np.einsum("ya,xb,abc->yxc", m, m, grid).reshape(-1, width))
    levels = np.repeat(np.arange(3), LENGTHS)
    x = np.concatenate(rows) + w["positions"][0] + w["levels.weight"][levels]
    visible = levels[:, None] >= levels[None, :]
    for i in range(2):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k_, v = (part.reshape(14, heads, -1) for part in np.split(qkv, 3, axis=-1))
        scores = np.einsum("ihd,jhd->hij", q, k_) / np.sqrt(width // heads)
        mass = np.where(visible, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        mixed = np.einsum("hij,jhd->ihd", mass / mass.sum(-1, keepdims=True), v)
        x = x + linear(mixed.reshape(14, width), f"blocks.{i}.attn.proj")
        h = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.ffn.fc1")
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"blocks.{i}.ffn.fc2")
    expected = linear(norm(x, "norm_out"), "head")
    found = teacher_forced(model, tokens)[0].detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


def test_the_cached_steps_equal_the_teacher_forced_pass() -> None:
    model, tokens = small(), drawn_tokens()
    whole = teacher_forced(model, tokens).split(LENGTHS, dim=1)
    assert whole[-1].std() > 0.5  # far from constant
    mod, cache = model.modulation(torch.zeros(2, dtype=torch.int64)), Cache(2)
    coming = None
    for k, expected in enumerate(whole):
        assert_same(model.step(k, coming, mod, cache), expected)
        if k < len(SCALES) - 1:
            coming = model.next_input(k, tokens[k])
            assert coming.shape == (2, LENGTHS[k + 1], 32)
    past = cache.pairs[0]
    assert past is not None
    assert past[0].shape == (14, 2, 4, 8)


def test_rows_of_a_batch_are_independent_and_labels_mean_nothing() -> None:
    model, tokens = small(), drawn_tokens()
    whole = teacher_forced(model, tokens)
    for row in range(2):
        assert_same(teacher_forced(model, [t[row : row + 1] for t in tokens])[0], whole[row])
    assert torch.equal(model(torch.tensor([3, 5]), model.teacher_input(tokens)), whole)


@pytest.mark.parametrize("scale", [0, 1])
def test_logits_see_earlier_scales_alone(scale: int) -> None:
    model, tokens = small(), drawn_tokens()
    before = teacher_forced(model, tokens).split(LENGTHS, dim=1)
    tokens[scale] = (tokens[scale] + 1) % CODES
    after = teacher_forced(model, tokens).split(LENGTHS, dim=1)
    for k, (a, b) in enumerate(zip(before, after, strict=True)):
        change = (a - b).abs().max()
        assert change < 1e-6 if k <= scale else change > 1e-2


@pytest.mark.parametrize("maps", [True, False], ids=["maps", "flat"])
def test_next_scale_prediction_is_a_slice_of_the_teacher_forced_pass(maps: bool) -> None:
    model, tokens = small(), drawn_tokens()
    whole = teacher_forced(model, tokens).split(LENGTHS, dim=1)
    given: list[Any] = [t.view(2, p, p) if maps else t for t, p in zip(tokens, SCALES, strict=True)]
    for k in (1, 2):
        assert_same(next_scale_prediction(model, given[:k], k), whole[k])
        arrays = [t.numpy().astype(np.int32) for t in given[:k]]
        assert_same(next_scale_prediction(model, arrays, k), whole[k])
    assert_same(next_scale_prediction(model, [], 0), whole[0][:1])


@pytest.mark.parametrize(
    ("arrays", "scale", "part"),
    [
        ([], 1, "expected 1 token arrays, one per scale, found 0"),
        ([[[0]], [[0] * 4]], 1, "expected 1 token arrays, one per scale, found 2"),
        ([[[0]]], 3, "between 0 and 2, found 3"),
        ([[[0]]], -1, "scale_index"),
        ([[[0]], [[0] * 3]], 2, "tokens of scale 1 must be [1, 4] or [1, 2, 2], found [1, 3]"),
        ([[[0]], [[0] * 4] * 2], 2, "found [2, 4]"),
        ([[[[[0]]]]], 1, "found [1, 1, 1, 1]"),
        ([7], 1, "found []"),
        ([[[CODES]]], 1, f"between 0 and {CODES - 1}, found {CODES} to {CODES}"),
        ([[[-1]]], 1, "found -1 to -1"),
        ([[[0.5]]], 1, "must be integers"),
        ([[[0], [0, 1]]], 1, "scale 0"),
        ([["a"]], 1, "scale 0"),
    ],
)
def test_wrong_tokens_are_refused(arrays: list[Any], scale: int, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        next_scale_prediction(small(), arrays, scale)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dropout_acts_in_training_alone() -> None:
    model, tokens = small(dropout=0.5), drawn_tokens()
    assert torch.equal(teacher_forced(model, tokens), teacher_forced(model, tokens))
    model.train()
    first, second = teacher_forced(model, tokens), teacher_forced(model, tokens)
    assert (first - second).abs().max() > 0.1
    without = small(dropout=0.0).train()
    assert torch.equal(teacher_forced(without, tokens), teacher_forced(without, tokens))


def test_training_lowers_the_loss_and_reaches_every_parameter() -> None:
    model = build(32, 2, 4, scales=SCALES, codebook_size=CODES).train()
    tokens = drawn_tokens(batch=4)
    target = torch.cat(tokens, dim=1).flatten()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(teacher_forced(model, tokens).flatten(0, 1), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(CODES), abs=0.2)  # a uniform guess
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def small_tokenizer() -> tuple[Any, Any]:
    return build_tokenizer(image_size=12, scales=SCALES, codebook_size=CODES, embed_dim=16)


def test_images_become_a_map_a_scale_and_images_again() -> None:
    encoder, decoder = small_tokenizer()
    images = torch.rand(2, 12, 12, 3)
    maps = encoder(images)
    assert [tuple(m.shape) for m in maps] == [(2, p, p) for p in SCALES]
    assert all(m.dtype == torch.int64 for m in maps)
    back = decoder(maps)
    assert back.shape == images.shape
    assert back.min() >= 0 and back.max() <= 1
    assert back.std() > 0
    assert torch.equal(decoder([m.flatten(1).numpy() for m in maps]), back)
    tokenizer = encoder.tokenizer
    latent = tokenizer.accumulate([m.flatten(1) for m in maps])
    expected = (tokenizer.decode(latent).permute(0, 2, 3, 1) + 1) / 2
    assert torch.equal(back, expected)


def test_grey_images_and_a_tokenizer_without_halvings() -> None:
    encoder, decoder = build_tokenizer(4, (1, 2, 4), CODES, embed_dim=8, in_channels=1)
    assert encoder.tokenizer.spec.downsample == 1
    assert decoder(encoder(torch.rand(1, 4, 4, 1))).shape == (1, 4, 4, 1)


def test_each_scale_has_its_own_codebook() -> None:
    encoder, _ = small_tokenizer()
    quantizer = encoder.tokenizer.quantize
    tables = [quantizer.codebook(k).weight for k in range(3)]
    assert all(t.shape == (CODES, 16) for t in tables)
    assert not any(torch.equal(tables[a], tables[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    codes = [torch.zeros(1, length, dtype=torch.int64) for length in LENGTHS]
    before = [quantizer.lookup(k, c).clone() for k, c in enumerate(codes)]
    with torch.no_grad():
        tables[1].add_(1.0)
    changed = [not torch.equal(quantizer.lookup(k, c), before[k]) for k, c in enumerate(codes)]
    assert changed == [False, True, False]
    assert quantizer.nearest(2, before[2]).eq(0).all()  # a code is nearest to itself
    assert "quantize.embedding.2.weight" in encoder.tokenizer.state_dict()
    assert not any("quant_resi" in key for key in encoder.tokenizer.state_dict())


@pytest.mark.parametrize(
    ("images", "part"),
    [
        (torch.zeros(1, 3, 12, 12), "found [1, 3, 12, 12]"),
        (torch.zeros(12, 12, 3), "[B, H, W, C]"),
        (torch.zeros(0, 12, 12, 3), "found [0, 12, 12, 3]"),
        (torch.zeros(1, 12, 12, 3, dtype=torch.uint8), "uint8"),
        (torch.full((1, 12, 12, 3), 255.0), "found 255 to 255"),
        (torch.full((1, 12, 12, 3), torch.nan), "found nan"),
    ],
)
def test_wrong_images_are_refused(images: Tensor, part: str) -> None:
    encoder, _ = small_tokenizer()
    with pytest.raises(UsageError) as caught:
        encoder(images)
    assert part in str(caught.value)


def test_wrong_maps_are_refused() -> None:
    _, decoder = small_tokenizer()
    with pytest.raises(UsageError, match="expected 3 token arrays, one per scale, found 2"):
        decoder(drawn_tokens()[:2])
    with pytest.raises(UsageError, match="scale 2"):
        decoder([*drawn_tokens()[:2], torch.zeros(2, 4, dtype=torch.int64)])


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"hidden_size": 30}, "30 is not divisible by 8"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_layers": 1.5}, "num_layers"),
        ({"num_heads": True}, "num_heads"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio"),
        ({"scales": ()}, "scales must grow from 1"),
        ({"scales": (2, 4)}, "scales must grow from 1"),
        ({"scales": (1, 4, 4)}, "scales must grow from 1"),
        ({"scales": 5}, "scales"),
        ({"scales": "124"}, "scale"),
        ({"scales": (1,)}, "two scales"),
        ({"codebook_size": -1}, "codebook_size"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": "0.1"}, "dropout"),
    ],
)
def test_options_that_make_no_model_are_refused(options: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(**options)
    assert part in str(caught.value)


@pytest.mark.parametrize("size", [0, 8, 24, 40, 100, 255, 16.0])
def test_image_sizes_must_fit_the_last_scale(size: Any) -> None:
    with pytest.raises(UsageError, match="image_size"):
        build_tokenizer(image_size=size)


def test_sizes_of_the_other_family_are_refused() -> None:
    spec = small().spec
    for change in ({"family": "var"}, {"qk_l2_norm": True}, {"classes": 10}):
        transformer = dataclasses.replace(spec.transformer, **change)
        with pytest.raises(UsageError, match="gpt2"):
            Gpt2Transformer(dataclasses.replace(spec, transformer=transformer))


def test_a_model_in_memory_is_loaded_as_a_checkpoint_is() -> None:
    model = small()
    encoder, decoder = small_tokenizer()
    loaded = as_loaded_model(model, encoder)
    assert loaded.spec.tokenizer == encoder.tokenizer.spec
    assert loaded.spec.transformer == model.spec.transformer
    assert (loaded.preset, loaded.labels) == ("", ())
    assert loaded.transformer.keys() == model.state_dict().keys()
    assert loaded.source("token_embed.1.weight") is loaded.transformer
    assert loaded.source("quantize.embedding.2.weight") is loaded.tokenizer
    assert loaded.transformer.read("blocks.1.attn.qkv.bias").dtype == np.float32
    tokenizer, transformer = build_modules(loaded)
    assert isinstance(transformer, Gpt2Transformer)
    tokens = drawn_tokens()
    assert torch.equal(teacher_forced(transformer, tokens), teacher_forced(model, tokens))
    images = torch.rand(1, 12, 12, 3)
    found = tokenizer.encode(images.permute(0, 3, 1, 2) * 2 - 1)
    for a, b in zip(found, encoder(images), strict=True):
        assert torch.equal(a, b.flatten(1))
    for other in (decoder, encoder.tokenizer):
        description = as_loaded_model(model, other).tokenizer.description
        assert description == loaded.tokenizer.description
    chosen = Sampling(cfg=0.0, top_k=5)
    assert as_loaded_model(model, encoder, defaults=chosen).defaults == chosen


def test_arrays_of_a_model_in_memory_are_copies_of_what_it_is_now() -> None:
    model = small()
    loaded = as_loaded_model(model, small_tokenizer()[0])
    key, before = "head.bias", model.head.bias.detach().clone()
    described = loaded.transformer.description
    loaded.transformer.read(key)[:] = 7.0
    assert torch.equal(model.head.bias, before)
    assert loaded.transformer.description == described
    with torch.no_grad():
        model.head.bias.add_(1.0)
    np.testing.assert_array_equal(loaded.transformer.read(key), before.numpy() + 1)
    assert loaded.transformer.description != described


def test_a_tokenizer_of_other_sizes_is_refused() -> None:
    others: list[dict[str, Any]] = [
        {"image_size": 12, "scales": (1, 3), "codebook_size": CODES},
        {"image_size": 12, "scales": SCALES, "codebook_size": CODES + 1},
    ]
    for options, field in zip(others, ("patch_nums", "vocab_size"), strict=True):
        encoder, _ = build_tokenizer(**options, embed_dim=16)
        with pytest.raises(UsageError, match=field):
            as_loaded_model(small(), encoder)
