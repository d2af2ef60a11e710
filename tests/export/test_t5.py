"""The T5 encoder in PyTorch, against the published implementation's outputs."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import t5_case
from var_deploy.errors import CheckpointError
from var_deploy.export.checkpoint.text_encoder import (
    TEXT_ENCODERS,
    build_t5,
    encoder_weights,
    open_text_encoder,
)
from var_deploy.export.models.t5 import T5Encoder, bucket_of, relative_buckets

OFFICIAL = Path(__file__).parents[1] / "golden-infinity" / "official_state_dicts.json.gz"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> T5Encoder:
    folder = t5_case.hub_folder(tmp_path_factory.mktemp("t5") / "hub")
    return build_t5(open_text_encoder(folder, t5_case.SPEC.length))


def test_the_published_features(encoder: T5Encoder) -> None:
    golden = t5_case.arrays()
    mask = torch.from_numpy(golden["attention_mask"]).bool()
    assert tuple(mask.sum(1).tolist()) == t5_case.LENGTHS
    features = encoder(torch.from_numpy(golden["input_ids"]), mask).numpy()
    np.testing.assert_allclose(features, golden["last_hidden_state"], atol=1e-4, rtol=0)
    assert np.abs(golden["last_hidden_state"]).max() > 1, "or the bound would say little"


def test_padding_does_not_matter(encoder: T5Encoder) -> None:
    golden = t5_case.arrays()
    for row, length in enumerate(t5_case.LENGTHS):
        ids = torch.from_numpy(golden["input_ids"][row : row + 1, :length])
        alone = encoder(ids, torch.ones_like(ids, dtype=torch.bool)).numpy()[0]
        np.testing.assert_allclose(
            alone, golden["last_hidden_state"][row, :length], atol=1e-4, rtol=0
        )


def test_the_bucket_of_every_distance() -> None:
    golden = t5_case.arrays()
    found = bucket_of(golden["bucket.relative"], 32, 128)
    np.testing.assert_array_equal(found, golden["bucket.index"])
    matrix = relative_buckets(t5_case.SPEC)
    by_distance = dict(zip(golden["bucket.relative"].tolist(), found.tolist(), strict=True))
    for query, key in ((0, 0), (3, 0), (0, 3), (199, 0), (0, 199), (70, 20)):
        assert matrix[query, key] == by_distance[key - query]


class Listed:
    """The names and shapes of a released state dict, without values."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes, self.description = shapes, {"listed": True}

    def keys(self) -> set[str]:
        return set(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def read(self, key: str) -> np.ndarray:  # type: ignore[type-arg]
        raise KeyError(key)


def released() -> dict[str, tuple[int, ...]]:
    listed = json.loads(gzip.decompress(OFFICIAL.read_bytes()))
    (name,) = (name for name in listed if "t5" in name)
    return {key: tuple(said[0]) for key, said in listed[name].items() if key != "_"}


def test_the_released_encoder_fits() -> None:
    shapes, spec = released(), TEXT_ENCODERS["flan-t5-xl"]
    weights = encoder_weights(Listed(shapes), spec)
    assert set(weights.keys()) == set(shapes) - {"encoder.embed_tokens.weight"}
    count = sum(int(np.prod(weights.shape(key), dtype=np.int64)) for key in set(weights.keys()))
    assert round(count / 1e6, 1) == 1223.5
    # the embedding alone under its other name, as in a file of the encoder half
    alias = {key: shape for key, shape in shapes.items() if key != "shared.weight"}
    alias["encoder.embed_tokens.weight"] = shapes["shared.weight"]
    assert set(encoder_weights(Listed(alias), spec).keys()) == set(weights.keys())


def test_keys_that_do_not_fit_are_listed() -> None:
    shapes = released()
    del shapes["encoder.block.7.layer.1.DenseReluDense.wi_1.weight"]
    shapes["encoder.block.7.layer.1.DenseReluDense.wi.weight"] = (5120, 2048)
    wide = dataclasses.replace(TEXT_ENCODERS["flan-t5-xl"], ffn_width=4096)
    with pytest.raises(CheckpointError) as caught:
        encoder_weights(Listed(shapes), wide)
    message = str(caught.value)
    for said in (
        "wi_0.weight is [5120, 2048], expected [4096, 2048]",
        "block.7.layer.1.DenseReluDense.wi_1.weight is missing",
        "block.7.layer.1.DenseReluDense.wi.weight is unexpected",
    ):
        assert said in message
