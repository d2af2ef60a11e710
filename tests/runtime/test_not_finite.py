"""What the graphs give is looked at: values that a model cannot give end in one error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_weights import poke

from var_deploy.errors import BackendError, BundleError
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.plausible import check_encoded, check_f_hat, check_image, check_tokens
from var_deploy.runtime.protobuf import fields, varints
from var_deploy.runtime.weights_check import stored_weights

ExportTo = Callable[..., Path]
NAN, INF = float("nan"), float("inf")
LABELS = (3, 0, 4)


@pytest.fixture(scope="module")
def bundle(export_to: ExportTo) -> Path:
    options: dict[str, Any] = {"precisions": ("fp32", "fp16", "int8"), "calibration": 1}
    return export_to(batch=2, layout="shared", **options)


# weights, before anything runs

# the image would not tell of any of these: int8 rounds NaN away, clamping makes a number of
# infinity, and the code nearest to NaN is the first one
HIDDEN = [
    ("int8/decoder", "decoder.conv_in.bias", NAN),
    ("fp32/decoder", "decoder.conv_out.bias", INF),
    ("fp16/encoder", "encoder.conv_in.weight", NAN),
    ("fp32/accumulate", "quantize.embedding.weight", -INF),
    ("fp16/step", "head.bias", -INF),
]


@pytest.mark.parametrize(("graph", "weight", "value"), HIDDEN)
def test_weights_that_are_not_finite_are_refused_by_name(
    bundle: Path, tmp_path: Path, graph: str, weight: str, value: float
) -> None:
    bad = poke(bundle, tmp_path / "bad", graph, weight, value)
    precision = graph.split("/")[0]
    with pytest.raises(BundleError) as caught:
        Pipeline.load(bad, precision=precision, backend="onnxruntime-cpu", threads=1)
    said = f"{precision}/weights.bin: value 0 of {weight} is {value}, which var-deploy export"
    assert said in str(caught.value) and "\n" not in str(caught.value)
    Pipeline.load(bundle, precision=precision, backend="onnxruntime-cpu", threads=1).close()


def test_the_place_of_a_value_is_told(bundle: Path, tmp_path: Path) -> None:
    bad = poke(bundle, tmp_path / "bad", "fp16/step", "blocks.1.ffn.fc1.weight", NAN, every=10**6)
    again = poke(bad, tmp_path / "again", "fp16/step", "head.weight", INF, every=10**6)
    for folder in (bad, again):
        with pytest.raises(BundleError, match=r"value 0 of blocks\.1\.ffn\.fc1\.weight is nan"):
            Pipeline.load(folder, precision="fp16", threads=1)


def test_graphs_that_are_cut_short_are_refused(bundle: Path) -> None:
    model = (bundle / "fp32/step.onnx").read_bytes()
    found = list(stored_weights(model))
    assert {w.dtype for w in found} == {np.dtype(np.float32)}
    assert {"head.weight", "head.bias", "pos_1LC"} <= {w.name for w in found}
    for end in range(0, len(model), 997):
        try:
            assert len(list(stored_weights(model[:end]))) <= len(found)
        except ValueError as error:
            assert "cut short" in str(error)


def test_protobuf_fields() -> None:
    message = memoryview(b"\x08\x96\x01\x12\x02hi\x1d\x01\x02\x03\x04\x21" + bytes(8))
    assert [(n, v if isinstance(v, int) else bytes(v)) for n, v in fields(message)] == [
        (1, 150),
        (2, b"hi"),
        (3, b"\x01\x02\x03\x04"),
        (4, bytes(8)),
    ]
    assert varints(memoryview(b"\x96\x01\x05")) == [150, 5] and varints(7) == [7]
    for bad in (b"\x08", b"\x12\x05hi", b"\x0b", b"\x08" + b"\xff" * 11, b"\x21\x00"):
        with pytest.raises(ValueError, match=r"cut short|wire type"):
            list(fields(memoryview(bad)))


# a run: as if such values came up in it


@pytest.fixture
def poisoned(bundle: Path, tmp_path: Path) -> Iterator[Callable[..., Pipeline]]:
    """Loads a bundle with other weights, which are not looked at."""
    opened: list[Pipeline] = []

    def load(graph: str, weight: str, value: float, every: int = 1, **options: Any) -> Pipeline:
        bad = poke(bundle, tmp_path / str(len(opened)), graph, weight, value, every)
        precision = graph.split("/")[0]
        given = {"precision": precision, "backend": "onnxruntime-cpu", "threads": 1, **options}
        opened.append(Pipeline.load(bad, check="sizes", **given))
        return opened[-1]

    yield load
    for pipe in opened:
        pipe.close()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("graph", "weight", "said"),
    [
        ("fp32/decoder", "decoder.conv_in.bias", r"image decoded after scale 2 \(graph decoder\)"),
        ("fp16/decoder", "post_quant_conv.bias", r"image decoded after scale 2 \(graph decoder\)"),
        ("fp32/step", "head.bias", r"logits of scale 0 are not numbers \(graph step\)"),
        ("int8/step", "word_embed.bias", r"logits of scale 1 are not numbers \(graph step\)"),
        ("fp16/condition", "class_emb.weight", r"logits of scale 0 are not numbers"),
    ],
)
def test_a_run_says_where(
    poisoned: Callable[..., Pipeline], graph: str, weight: str, value: float, said: str
) -> None:
    pipe = poisoned(graph, weight, value)
    for _ in range(2):  # it is as usable afterwards as before
        with pytest.raises(BackendError, match=said) as caught:
            pipe.generate(LABELS, seed=7)
        assert "try precision fp32, and var-deploy verify names the layer" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_f_hat_that_is_not_finite(poisoned: Callable[..., Pipeline]) -> None:
    """The φ of the last scale: its tokens are fine, and an int8 decoder makes an image of it."""
    pipe = poisoned("int8/step", "quantize.quant_resi.qresi_ls.3.bias", NAN)
    with pytest.raises(BackendError, match=r"f_hat after scale \d \(graph step\) holds \d+ values"):
        pipe.generate(LABELS, seed=7)


def test_previews_decoding_and_deadlines_too(poisoned: Callable[..., Pipeline]) -> None:
    pipe = poisoned("fp32/decoder", "decoder.conv_out.bias", NAN, every=2)
    with pytest.raises(BackendError, match=r"after scale 0 \(graph decoder\).*first is nan at \[0"):
        pipe.generate([0], on_scale=lambda event: event.preview())
    with pytest.raises(BackendError, match="graph decoder"):
        pipe.generate([0], deadline=1e-6)
    with pytest.raises(BackendError, match=r"the image \(graph decoder\) holds"):
        pipe.decode([np.zeros((1, n), np.int64) for n in (1, 4)])
    broken = poisoned("fp32/accumulate", "quantize.quant_resi.qresi_ls.0.bias", INF)
    with pytest.raises(BackendError, match=r"f_hat after scale 0 \(graph accumulate\)"):
        broken.decode([np.zeros((1, 1), np.int64)])
    logits = poisoned("fp32/step", "head.bias", NAN)
    seen: list[Any] = []
    with pytest.raises(BackendError, match="logits of scale 0"):
        logits.generate([0], on_scale=seen.append)
    assert not seen, "tokens that are none reach no callback"


def test_an_encoder_that_overflows_in_fp16(poisoned: Callable[..., Pipeline]) -> None:
    pipe = poisoned("fp16/encoder", "encoder.conv_in.bias", NAN)
    with pytest.raises(BackendError, match=r"graph encoder gave the first code alone.*fp32"):
        pipe.encode(np.full((8, 8, 3), 90, np.uint8))


# the checks by themselves


def test_tokens() -> None:
    good = np.array([[0, 47], [5, 6]])
    check_tokens(good, 48, 1, "step")
    check_tokens(good[:0], 48, 1, "step")
    for wrong, said in (
        (48, "the logits of scale 1 are not numbers (graph step)"),
        (49, "graph step gave token 49 at scale 1, expected 0 to 47"),
        (-1, "graph step gave token -1 at scale 1, expected 0 to 47"),
    ):
        with pytest.raises(BackendError, match=re.escape(said)):
            check_tokens(np.where(good == 5, wrong, good), 48, 1, "step")


def test_images() -> None:
    image = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    check_image(image, 3, half=True)
    check_image(np.clip(image, 0.2, 0.6), 3, half=True)
    edge = image.copy()
    edge[0, 0, 0], edge[0, 0, 1] = -0.0005, 1.0005  # rounding
    check_image(edge, 3, half=False)
    for value, said in (
        (NAN, "1 value that is not finite (the first is nan at [1, 2, 3, 0])"),
        (INF, "is not finite (the first is inf at"),
        (-0.01, "reaches from -0.01 to"),
        (1.5, "to 1.5, expected 0 to 1"),
    ):
        bad = image.copy()
        bad[1, 2, 3, 0] = value
        with pytest.raises(BackendError, match=re.escape(said)):
            check_image(bad, 3, half=False)


def test_an_image_of_nothing_but_clamped_values() -> None:
    """Some devices make -1 of NaN where they clamp. In fp32 nothing overflows, and black may be
    what was meant."""
    image = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    image[1] = 0
    check_image(image, 3, half=False)
    with pytest.raises(BackendError, match=r"clamped to 0 or 1 at every value.*try precision fp32"):
        check_image(image, 3, half=True)
    image[1, 7, 3, 2] = 0.5
    check_image(image, 3, half=True)


def test_f_hat_and_encoded_tokens() -> None:
    f_hat = np.full((1, 4, 2, 2), 3e38, np.float32)
    check_f_hat(f_hat, 2, "step")  # its sum overflows, it does not
    f_hat[0, 1, 0, 1] = -INF
    with pytest.raises(BackendError, match=r"after scale 2 \(graph step\) holds 1 value.*-inf at"):
        check_f_hat(f_hat, 2, "step")
    tokens = [np.array([[0], [1]]), np.array([[0, 0, 0, 0], [0, 0, 0, 0]])]
    check_encoded(tokens, 48, half=False)
    with pytest.raises(BackendError, match="the first code alone"):
        check_encoded(tokens, 48, half=True)
    tokens[1][0, 3] = 1
    check_encoded(tokens, 48, half=True)
    tokens[1][0, 3] = -5
    with pytest.raises(BackendError, match="graph encoder gave token -5 at scale 1"):
        check_encoded(tokens, 48, half=False)
