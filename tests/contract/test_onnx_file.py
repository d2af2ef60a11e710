"""The look into an ONNX file, against onnx itself: what is written passes, all else is named."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from var_deploy.bundle.onnx_file import inspect_onnx, relocate
from var_deploy.errors import BundleError, one_line
from var_deploy.manifest import read_manifest

onnx = pytest.importorskip("onnx", reason="onnx is not installed, so no graph can be built here")

Change = Callable[[Any], object]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, small_model: Callable[..., Any]) -> Path:
    from var_deploy.export.bundle import ExportOptions, export_bundle

    out = tmp_path_factory.mktemp("onnx") / "bundle"
    precisions = ("fp32", "fp16", "int8")
    export_bundle(small_model(), out, ExportOptions(precisions=precisions, calibration=2))
    return out


@pytest.fixture(scope="module")
def look(bundle: Path) -> Callable[[Change], str]:
    """What is said of the fp32 decoder after a change to it."""

    def refusal(change: Change) -> str:
        path = bundle / "fp32" / "decoder.onnx"
        model = onnx.ModelProto.FromString(path.read_bytes())
        change(model)
        with pytest.raises(BundleError) as caught:
            inspect_onnx(model.SerializeToString(), path.with_name("weights.bin").stat().st_size)
        assert str(caught.value).isprintable()
        return str(caught.value)

    return refusal


def test_every_graph_that_is_written_passes(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    for graphs in manifest.graphs.values():
        for info in graphs.values():
            path = bundle / info.file
            size = path.with_name("weights.bin").stat().st_size
            found = inspect_onnx(path.read_bytes(), size)
            assert list(found.inputs) == [(t.name, t.dtype, t.shape) for t in info.inputs]
            assert list(found.outputs) == [(t.name, t.dtype, t.shape) for t in info.outputs]


@pytest.mark.parametrize("location", ["proc/self/fd/7", "x", "y" * 300])
def test_weights_are_named_anew_and_nothing_else(bundle: Path, location: str) -> None:
    for path in bundle.rglob("*.onnx"):
        expected = onnx.ModelProto.FromString(path.read_bytes())
        for tensor in expected.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        found = onnx.ModelProto.FromString(relocate(path.read_bytes(), location))
        assert found == expected


def first(model: Any, external: bool) -> Any:
    return next(t for t in model.graph.initializer if bool(t.external_data) == external)


def entry(name: str, value: str) -> Change:
    def change(model: Any) -> None:
        for item in first(model, True).external_data:
            if item.key == name:
                item.value = value

    return change


@pytest.mark.parametrize("operator", ["Loop", "If", "Scan", "NonZero", "", "Conv\x1b[31m", "ATen"])
def test_an_operator_that_is_not_written(look: Callable[[Change], str], operator: str) -> None:
    words = look(lambda m: setattr(m.graph.node[3], "op_type", operator))
    assert words.startswith("it has the operator ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m.graph.node[0], "domain", "com.microsoft"), "'com.microsoft.Conv'"),
        (lambda m: m.opset_import.add(domain="com.microsoft", version=1), "expected ONNX 20 alone"),
        (lambda m: setattr(m.opset_import[0], "version", 21), "ONNX 21"),
        (lambda m: m.ClearField("opset_import"), "expected ONNX 20 alone"),
        (lambda m: m.functions.add(name="f", domain="x"), "field 25 of ONNX"),
        (lambda m: m.graph.sparse_initializer.add(), "field 15 of ONNX"),
        (lambda m: m.training_info.add(), "field 20 of ONNX"),
        (lambda m: m.metadata_props.add(key="a", value="b"), "field 14 of ONNX"),
        (lambda m: m.graph.node[0].attribute.add(name="body", type=5).g.node.add(), "field 6 of"),
        (lambda m: m.graph.node[0].attribute.add(name="t", type=4).t.dims.append(1), "field 5 of"),
        (lambda m: setattr(m.graph.node[0], "overload", "x"), "field 8 of ONNX"),
        (lambda m: m.ClearField("graph"), "0 graphs"),
        (entry("location", "../weights.bin"), "does not lie in weights.bin"),
        (entry("location", "/etc/passwd"), "does not lie in weights.bin"),
        (entry("offset", "-1"), "of weights.bin, expected"),
        (entry("offset", "9" * 14), "of weights.bin, expected"),
        (entry("offset", "0x10"), "of weights.bin, expected"),
        (entry("length", "1"), "is 1 bytes at"),
        (lambda m: first(m, True).external_data.add(key="checksum", value="0"), "of weights.bin"),
        (lambda m: first(m, True).external_data.add(key="offset", value="0"), "more than one"),
        (lambda m: setattr(first(m, True), "raw_data", b"1234"), "in more than one place"),
        (lambda m: first(m, True).ClearField("data_location"), "in more than one place"),
        (lambda m: setattr(first(m, False), "raw_data", b""), "has 0 bytes, expected"),
        (lambda m: first(m, False).ClearField("raw_data"), "has no bytes, expected"),
        (lambda m: first(m, False).float_data.append(1.0), "field 4 of ONNX"),
        (lambda m: first(m, False).dims.append(-1), "has the shape"),
        (lambda m: first(m, False).dims.extend([2**40, 2**40]), "has the shape"),
        (lambda m: first(m, False).dims.extend([1] * 20), "has the shape"),
        (lambda m: setattr(first(m, False), "data_type", 8), "has the type 8"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 8), "has no type"),
        (lambda m: m.graph.input[0].type.tensor_type.ClearField("shape"), "no shape"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 0), "has no type"),
        (lambda m: m.graph.input.add(name="x").type.map_type.SetInParent(), "field 5 of ONNX"),
    ],
)
def test_what_is_not_written_is_named(
    look: Callable[[Change], str], change: Change, words: str
) -> None:
    assert words in look(change)


def test_bytes_that_are_not_onnx(bundle: Path) -> None:
    data = (bundle / "fp32" / "condition.onnx").read_bytes()
    size = (bundle / "fp32" / "weights.bin").stat().st_size
    for wrong in (b"", b"no graph", b"\xff" * 50, b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f"):
        with pytest.raises(BundleError):
            inspect_onnx(wrong, size)
    for stop in range(len(data) - 1):  # a cut anywhere is noticed, but between two parts
        try:
            inspect_onnx(data[:stop], size)
        except BundleError:
            continue
        onnx.ModelProto.FromString(data[:stop])


def test_nothing_passes_that_onnx_cannot_read(bundle: Path) -> None:
    """Bytes turned at random: what passes here onnx reads as well, to the same inputs."""
    path = bundle / "fp32" / "condition.onnx"
    data, chance = path.read_bytes(), random.Random(5)
    size = path.with_name("weights.bin").stat().st_size
    passed = 0
    for _ in range(3000):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 2))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        try:
            found = inspect_onnx(bytes(changed), size)
        except BundleError as error:
            assert str(error).isprintable() and len(str(error)) < 500
            continue
        passed += 1
        model = onnx.ModelProto.FromString(bytes(changed))
        assert [value.name for value in model.graph.input] == [t[0] for t in found.inputs]
        assert not model.functions and [o.domain for o in model.opset_import] == [""]
    assert passed > 100


def test_another_librarys_words_cannot_move_the_cursor() -> None:
    assert one_line(ValueError("a\x1b[31m\n b\x07 ü")) == "a\\x1b[31m b\\x07 ü"


