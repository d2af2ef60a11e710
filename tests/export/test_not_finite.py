"""Weights that are not finite, or do not fit their type, stop an export by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from var_deploy.config import GraphForm
from var_deploy.errors import ExportError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel, WeightSource
from var_deploy.export.graphs.builder import GraphBuilder
from var_deploy.export.graphs.weights_bin import make_weight
from var_deploy.export.int8.operators import (
    ConvRanges,
    Kernel,
    Range,
    kernel_rows,
    static_conv,
    weight_scale,
)
from var_deploy.finite import describe_not_finite, is_finite

Model = Callable[..., LoadedModel]
PRECISIONS = ("fp32", "fp16", "int8")


class Changed:
    """A weight source of which one tensor is another one."""

    def __init__(
        self, source: WeightSource, key: str, change: Callable[[NDArray[Any]], object]
    ) -> None:
        self._source, self._key, self._change = source, key, change

    @property
    def description(self) -> Mapping[str, Any]:
        return self._source.description

    def keys(self) -> Collection[str]:
        return self._source.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._source.shape(key)

    def read(self, key: str) -> NDArray[Any]:
        value = self._source.read(key)
        if key == self._key:
            value = value.copy()
            self._change(value)
        return value


def changed(model: LoadedModel, key: str, change: Callable[[NDArray[Any]], object]) -> LoadedModel:
    part = "transformer" if key in model.transformer.keys() else "tokenizer"  # noqa: SIM118
    return dataclasses.replace(model, **{part: Changed(getattr(model, part), key, change)})


def put(value: float) -> Callable[[NDArray[Any]], object]:
    """Makes the second and the last value of a tensor `value`."""

    def change(tensor: NDArray[Any]) -> None:
        tensor.reshape(-1)[[1, -1]] = value

    return change


def export(model: LoadedModel, out: Path, precision: Any) -> Path:
    options = ExportOptions(precisions=(precision,), layout="shared", calibration=1)
    export_bundle(model, out, options)
    return out


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        # int8 would round a matrix by its largest value and hide NaN
        ("blocks.1.ffn.fc1.weight", np.nan, "nan at [0, 1]"),
        ("decoder.conv_out.bias", np.nan, "nan at [1]"),
        ("decoder.mid.block_1.conv1.weight", np.inf, "inf at [0, 0, 0, 1]"),
        ("head.bias", -np.inf, "-inf at [1]"),
        ("class_emb.weight", np.nan, "nan at [0, 1]"),
        ("encoder.conv_in.weight", np.inf, "inf at [0, 0, 0, 1]"),
        ("quantize.embedding.weight", np.nan, "nan at [0, 1]"),
    ],
)
def test_the_tensor_is_named(
    small_model: Model, tmp_path: Path, precision: str, key: str, value: float, said: str
) -> None:
    model = changed(small_model(), key, put(value))
    with pytest.raises(ExportError) as caught:
        export(model, tmp_path / "bundle", precision)
    message = str(caught.value)
    assert f"the checkpoint's {key}" in message
    assert f"2 values that are not finite (the first is {said})" in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_both_names_where_a_weight_is_made_of_another(small_model: Model, tmp_path: Path) -> None:
    key = "blocks.0.attn.q_bias"
    with pytest.raises(ExportError, match=rf"{key}, of which blocks\.0\.\S+ is made, holds"):
        export(changed(small_model(), key, put(np.nan)), tmp_path / "bundle", "fp32")


def test_what_no_graph_reads_may_be_anything(small_model: Model, tmp_path: Path) -> None:
    """Masks of training hold -inf by right."""
    key = "attn_bias_for_masking"
    model = small_model()
    assert not is_finite(model.transformer.read(key)) and key in set(model.transformer.keys())
    export(model, tmp_path / "bundle", "fp32")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_large_values_are_no_infinity(small_model: Model, tmp_path: Path, precision: str) -> None:
    """A sum of them overflows; the values are as finite as any. fp16 names what it cannot hold."""
    model = changed(small_model(), "pos_1LC", lambda tensor: tensor.fill(3e38))
    export(model, tmp_path / precision, precision)
    if precision == "fp16":
        key = "blocks.0.ffn.fc2.weight"
        with pytest.raises(ExportError, match=rf"{key} holds values that fp16 cannot.*3e\+38"):
            export(changed(model, key, put(3e38)), tmp_path / "bundle", precision)


@pytest.mark.parametrize("pruned", [0.0, 1e-9])
def test_a_pruned_channel_keeps_its_bias_in_int8(pruned: float) -> None:
    """Weights of next to nothing ask for steps in which int32 could not count a bias."""
    rng = np.random.default_rng(0)
    held = {
        "conv.weight": rng.standard_normal((4, 6, 3, 3), np.float32),
        "conv.bias": np.array([0.1, -40.0, 3.0, 0.0], np.float32),
    }
    held["conv.weight"][1:3] *= pruned
    b = GraphBuilder("graph", GraphForm(precision="int8"))
    kernel = Kernel(name="conv.weight", shape=(4, 6, 3, 3), make=lambda read: read("conv.weight"))
    ranges = ConvRanges(input=Range(low=-1, high=4), output=Range(low=-50, high=50))
    static_conv(b, "x", "conv", kernel, ranges, [1, 1, 1, 1])
    made = {name: make_weight(weight, held.__getitem__) for name, weight in b.weights.items()}
    step = made["conv.weight.scale"].astype(np.float64) * ranges.input.scale
    np.testing.assert_allclose(made["conv.weight.bias"] * step, held["conv.bias"], atol=1e-3)
    plain = weight_scale(kernel_rows(held["conv.weight"]))
    np.testing.assert_array_equal(made["conv.weight.scale"][[0, 3]], plain[[0, 3]])


def test_is_finite_agrees_with_numpy() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float16, np.float32, np.float64):
        for value in (0.0, np.finfo(dtype).max, -np.finfo(dtype).max, np.nan, np.inf, -np.inf):
            for shape in ((), (1,), (3, 5), (0, 4)):
                array = rng.standard_normal(shape).astype(dtype)
                if array.size:
                    array[...] = array if value == 0 else value
                assert is_finite(array) == bool(np.isfinite(array).all())
    assert is_finite(np.arange(3)) and is_finite(np.array([True]))
    assert describe_not_finite(np.array([[1, -np.inf]])) == (
        "1 value that is not finite (the first is -inf at [0, 1])"
    )
