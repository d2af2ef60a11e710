"""Fidelity to the published Infinity: its own arrays, within 1e-4, and its own bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from golden_infinity import CASES, Case, folder_of, load_case
from torch import Tensor

from var_deploy.export.models.bits import draw_bits, greedy_bits, guide, probability_of_one
from var_deploy.export.models.infinity import TextCondition
from var_deploy.export.models.rope import places, rope_tables
from var_deploy.export.models.transformer import Cache

TOLERANCE, IMAGE_TOLERANCE = 1e-4, 1e-3


@pytest.fixture(autouse=True)
def _inference() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what there is to compute is smaller than the cost of sharing it
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Each golden case; those that are not in the repository are skipped where they are absent."""
    folder = folder_of(request.param)
    if not folder.is_dir():
        pytest.skip(f"{request.param} is not here: it holds weights and is not in the repository")
    return load_case(folder)


def assert_near(
    found: Tensor, expected: np.ndarray[Any, Any], what: str, tolerance: float = TOLERANCE
) -> None:
    assert tuple(found.shape) == expected.shape, what
    assert found.dtype == torch.float32, what
    worst = np.abs(found.numpy() - expected).max()
    assert worst <= tolerance, f"{what} differs by {worst}"


def assert_equal(found: Tensor, expected: np.ndarray[Any, Any], what: str) -> None:
    np.testing.assert_array_equal(found.numpy(), expected, err_msg=what)


def tensor(case: Case, name: str) -> Tensor:
    return torch.from_numpy(case.golden[name])


def condition_of(case: Case, transformer: Any, prefix: str) -> TextCondition:
    """The condition of a run, "negative" with the case's negative prompts."""
    negative = None
    if prefix == "negative":
        negative = tensor(case, "negative.text.features"), tensor(case, "negative.text.lengths")
    rows = transformer.guided_rows(
        tensor(case, "text.features"), tensor(case, "text.lengths"), negative
    )
    found: TextCondition = transformer.condition(*rows)
    return found


def compare_condition(case: Case, condition: TextCondition, prefix: str) -> None:
    valid = condition.valid.unsqueeze(-1)
    golden = case.golden
    assert_near(condition.normed * valid, golden[f"{prefix}.text.norm"], "text norm")
    assert_near(condition.text * valid, golden[f"{prefix}.text.kv"], "text tokens")
    assert_near(condition.cond, golden[f"{prefix}.text.cond"], "pooled text")
    assert_near(condition.shared, golden[f"{prefix}.text.ada"], "shared modulation")


def test_all_scales_in_one_pass_give_the_published_logits(case: Case) -> None:
    """Teacher-forced, as in training, on the inputs of the greedy run."""
    _, transformer = case.modules()
    condition = condition_of(case, transformer, "greedy")
    inputs = [tensor(case, f"greedy.next.{k}") for k in range(case.spec.scales - 1)]
    parts = transformer(inputs, condition).split(case.spec.scale_lengths, dim=1)
    settings = zip(case.config["cfg"], case.config["tau"], strict=True)
    for k, (raw, (cfg, tau)) in enumerate(zip(parts, settings, strict=True)):
        logits = guide(raw, cfg, tau, len(case.golden["text.lengths"]))
        assert_near(logits, case.golden[f"greedy.logits.{k}"], f"logits of scale {k}")


Pick = Callable[[int, Tensor], Tensor]  # (scale, logits [B, L_k, 2e]) → bits [B, L_k, e]


def run(case: Case, prefix: str, pick: Pick) -> Tensor:
    """Generate as the published sampler does, and compare every array that the case has.

    Returns f_hat of the last scale.
    """
    tokenizer, transformer = case.modules()
    golden = case.golden
    condition = condition_of(case, transformer, prefix)
    batch, last = len(golden["text.lengths"]), case.spec.scales - 1
    cache, inputs = Cache(case.spec.transformer.depth), None
    f_hat = torch.zeros(batch, case.spec.tokenizer.bits, *case.spec.tokenizer.latent_grid)
    for scale, (cfg, tau) in enumerate(zip(case.config["cfg"], case.config["tau"], strict=True)):

        def compare(
            name: str, found: Tensor, tolerance: float = TOLERANCE, scale: int = scale
        ) -> None:
            key = f"{prefix}.{name}.{scale}"
            if key in golden:
                assert_near(found[: len(golden[key])], golden[key], key, tolerance)

        compare("input", transformer.embed(scale, inputs, condition))
        hidden, raw = transformer.step(scale, inputs, condition, cache)
        for layer in case.config["kv_blocks"]:
            for name, rows in zip(("key", "value"), cache.pairs[layer] or (), strict=True):
                new = rows[-raw.shape[1] :].permute(1, 2, 0, 3)
                compare(f"{name}.{layer}", new)
        compare("hidden", hidden)
        compare("logits_raw", raw)
        logits = guide(raw, cfg, tau, batch)
        compare("logits", logits)
        bits = pick(scale, logits)
        f_hat = f_hat + tokenizer.contribution(scale, bits)
        compare("codes", tokenizer.codes(scale, bits))
        compare("summed", f_hat)
        if scale < last:
            inputs = tokenizer.next_input(scale, f_hat)
            compare("next", inputs)
    return f_hat


def image_of(case: Case, f_hat: Tensor) -> Tensor:
    """f_hat → image [B, 3, H, W] in [0, 1]."""
    tokenizer, _ = case.modules()
    return (tokenizer.decode(f_hat) + 1) / 2


def assert_same_uint8(image: Tensor, expected: np.ndarray[Any, Any]) -> None:
    found = (image * 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert np.abs(found.numpy().astype(int) - expected).max() <= 1


def greedy(case: Case, prefix: str) -> Pick:
    """Pick the likelier bits, which must be the published ones."""

    def pick(scale: int, logits: Tensor) -> Tensor:
        bits = greedy_bits(logits)
        assert_equal(bits, case.golden[f"{prefix}.bits.{scale}"], f"{prefix}.bits.{scale}")
        assert_equal(probability_of_one(logits, top_k=1).round().to(torch.uint8), bits.numpy(), "k")
        assert_equal((probability_of_one(logits, 0, 0.5)).to(torch.uint8), bits.numpy(), "p")
        return bits

    return pick


def test_condition(case: Case) -> None:
    _, transformer = case.modules()
    compare_condition(case, condition_of(case, transformer, "greedy"), "greedy")


def test_condition_with_a_negative_prompt(case: Case) -> None:
    if not case.config["negative"]:
        assert "negative.text.cond" not in case.golden
        return
    _, transformer = case.modules()
    compare_condition(case, condition_of(case, transformer, "negative"), "negative")


def test_text_beyond_its_length_does_not_matter(case: Case) -> None:
    _, transformer = case.modules()
    features, lengths = tensor(case, "text.features"), tensor(case, "text.lengths")
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    beyond = torch.arange(features.shape[1]) >= lengths.unsqueeze(1)
    changed = torch.where(beyond.unsqueeze(-1), noise, features)
    before, after = (transformer.condition(f, lengths) for f in (features, changed))
    assert_near(after.cond, before.cond.numpy(), "pooled text")
    depth = case.spec.transformer.depth
    logits = [transformer.step(0, None, c, Cache(depth)).logits for c in (before, after)]
    assert_near(logits[1], logits[0].numpy(), "logits")


def test_greedy_generation(case: Case) -> None:
    f_hat = run(case, "greedy", greedy(case, "greedy"))
    image = image_of(case, f_hat)
    assert_near(image, case.golden["greedy.image"], "image", IMAGE_TOLERANCE)
    assert_same_uint8(image, case.golden["greedy.uint8"])


def test_greedy_generation_with_a_negative_prompt(case: Case) -> None:
    if not case.config["negative"]:
        assert "negative.bits.0" not in case.golden
        return
    run(case, "negative", greedy(case, "negative"))


def test_sampled_generation_from_the_stored_uniforms(case: Case) -> None:
    def pick(scale: int, logits: Tensor) -> Tensor:
        p1 = probability_of_one(logits, case.config["top_k"], case.config["top_p"])
        assert_near(p1, case.golden[f"sampled.p1.{scale}"], f"p1 {scale}")
        bits, margins = draw_bits(p1, tensor(case, f"sampled.uniforms.{scale}"))
        assert_equal(bits, case.golden[f"sampled.bits.{scale}"], f"sampled.bits.{scale}")
        assert margins.min() > 1e-3
        return bits

    f_hat = run(case, "sampled", pick)
    assert_near(f_hat, case.golden["sampled.summed"], "f_hat")
    assert_same_uint8(image_of(case, f_hat), case.golden["sampled.uint8"])


def map_bits(case: Case, prefix: str) -> list[Tensor]:
    """Stored bits of latent positions, as bits of tokens [B, L_k, e]."""
    tokenizer, _ = case.modules()
    return [
        tokenizer.to_tokens(torch.from_numpy(bits).permute(0, 3, 1, 2))
        for bits in case.scales(prefix)
    ]


def test_generation_with_forced_bits(case: Case) -> None:
    given = map_bits(case, "encode.bits")
    maps = map_bits(case, "forced.map_bits")

    def pick(scale: int, logits: Tensor) -> Tensor:
        bits = given[scale] if scale < case.config["forced_scales"] else greedy_bits(logits)
        assert_equal(bits, maps[scale].numpy(), f"forced.map_bits.{scale}")
        return bits

    run(case, "forced", pick)


def test_encode_gives_the_published_bits(case: Case) -> None:
    tokenizer, _ = case.modules()
    image = tensor(case, "encode.image_u8").float() / 255 * 2 - 1
    features = tokenizer.features(image)
    assert_near(features, case.golden["encode.features"], "features")
    expected = map_bits(case, "encode.bits")
    steps = list(tokenizer.quantize(features))
    for scale, (bits, _) in enumerate(steps):
        assert_equal(bits, expected[scale].numpy(), f"scale {scale}")
    z = steps[-1][1]
    assert_near(z, case.golden["encode.z"], "z")
    assert_near(tokenizer.accumulate(expected), case.golden["encode.z"], "accumulated bits")
    if "encode.reconstruction" in case.golden:
        found = (tokenizer.decode(z[:1]) + 1) / 2
        assert_near(found, case.golden["encode.reconstruction"], "image", IMAGE_TOLERANCE)


def test_layouts_of_bits_are_inverse(case: Case) -> None:
    tokenizer, _ = case.modules()
    for scale, bits in enumerate(map_bits(case, "encode.bits")):
        assert bits.shape[1] == case.spec.scale_lengths[scale]
        assert_equal(tokenizer.to_tokens(tokenizer.to_maps(scale, bits)), bits.numpy(), "tokens")


def test_angles_of_rope(case: Case) -> None:
    for name, tables in zip(("cos", "sin"), zip(*rope_tables(case.spec), strict=True), strict=True):
        found = torch.from_numpy(np.concatenate(tables))
        assert_near(found, case.golden[f"rope.{name}"], name)


def test_places_round_the_exact_rational_half_to_even() -> None:
    assert places(20, 70)[1] == 4  # 3.5
    assert places(4, 6).tolist() == [0, 2, 3, 4]  # 1.5 and 4.5
    assert places(54, 111)[27] == 56  # 55.5, where float64 arithmetic gives 55.49…
    assert places(1, 64).tolist() == [0]


@pytest.mark.parametrize("name", ["tiny-square", "tiny-wide"])
def test_filtered_probabilities(name: str) -> None:
    if not folder_of(name).is_dir():
        pytest.skip(f"{name} is not here: it holds weights and is not in the repository")
    golden = load_case(folder_of(name)).golden
    logits = torch.from_numpy(golden["filter.logits"]).flatten(1)
    cases = [key for key in golden if key.startswith("filter.p1.")]
    assert len(cases) == 20
    for key in cases:
        top_k, top_p = key.removeprefix("filter.p1.k").split(".p", 1)
        found = probability_of_one(logits, int(top_k), float(top_p))
        assert_near(found, golden[key], key, 1e-6)


def test_filters_by_hand() -> None:
    logits = torch.tensor([[0.0, 4.0, 4.0, 0.0, 1.0, 1.0, 0.0, 0.5]])
    likely = 1 / (1 + np.exp(-4))  # 0.982
    half = 1 / (1 + np.exp(-0.5))
    assert probability_of_one(logits)[0].tolist() == pytest.approx([likely, 1 - likely, 0.5, half])
    assert probability_of_one(logits, top_p=0.97)[0].tolist() == pytest.approx([1, 0, 0.5, half])
    assert probability_of_one(logits, top_p=0.5)[0].tolist() == [1, 0, 1, 1]  # a tie keeps 1
    assert probability_of_one(logits, top_k=1)[0].tolist() == [1, 0, 0.5, 1]  # a tie keeps both
    assert greedy_bits(logits)[0].tolist() == [1, 0, 0, 1]


def test_no_guidance_at_strength_one() -> None:
    raw = torch.arange(8.0).view(2, 1, 4)
    assert guide(raw, 1.0, 2.0, 1).tolist() == (raw[:1] / 2).tolist()
    assert guide(raw[:1], 3.0, 2.0, 1).tolist() == (raw[:1] / 2).tolist()
