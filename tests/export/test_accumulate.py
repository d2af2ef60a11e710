"""The graph that adds up the tokens of all scales, against the PyTorch tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from var_deploy import names
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel, build_modules
from var_deploy.manifest import read_manifest

BATCH = 2


def run(bundle: Path, precision: str, tokens: list[Any]) -> Any:
    path = bundle / read_manifest(bundle).graph(precision, names.ACCUMULATE).file
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {names.encoder_tokens(k): drawn for k, drawn in enumerate(tokens)}
    return session.run([names.F_HATS], given)[0]


def drawn_tokens(model: LoadedModel, seed: int) -> list[Any]:
    random, spec = np.random.default_rng(seed), model.spec
    vocab = spec.tokenizer.vocab_size
    return [random.integers(0, vocab, (BATCH, length)) for length in spec.scale_lengths]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared_phi": 1},
        {"shared_phi": 0, "patch_nums": (1, 2, 3, 5)},
        {"phi_ratio": 0.0},
        {"codebook_per_scale": True},
        {"patch_nums": (1,)},
    ],
    ids=str,
)
def test_every_sum_is_that_of_the_tokenizer(
    small_model: Callable[..., LoadedModel], tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = small_model(**changes)
    options = ExportOptions(precisions=("fp32", "fp16"), batch=BATCH, layout="shared")
    export_bundle(model, tmp_path / "out", options)
    tokenizer, _ = build_modules(model)
    tokens = drawn_tokens(model, seed=5)
    sums = run(tmp_path / "out", "fp32", tokens)
    side = model.spec.tokenizer.latent_side
    assert sums.shape == (model.spec.scales, BATCH, model.spec.tokenizer.code_width, side, side)
    for k in range(model.spec.scales):
        with torch.no_grad():
            expected = tokenizer.accumulate([torch.from_numpy(t) for t in tokens[: k + 1]])
        assert expected.abs().max() > 0.5, "or the bound below would say little"
        np.testing.assert_allclose(sums[k], expected.numpy(), atol=1e-5, rtol=0)
    # fp32 in every precision
    np.testing.assert_array_equal(run(tmp_path / "out", "fp16", tokens), sums)


def test_the_published_reconstruction(
    seeded_golden: Any, golden_bundle: Callable[[str], Path]
) -> None:
    """Decoded, the sums of the first and of the last scale are the published reconstructions."""
    tokens = seeded_golden.scales("encode.tokens")
    sums = run(golden_bundle(seeded_golden.name), "fp32", tokens)
    tokenizer, _ = build_modules(seeded_golden.model)
    for k in (0, seeded_golden.spec.scales - 1):
        with torch.no_grad():
            image = tokenizer.decode(torch.from_numpy(sums[k])).numpy()
        published = seeded_golden.arrays[f"reconstruct.image.{k}"]
        assert np.abs(image - published).max() <= 2e-4
