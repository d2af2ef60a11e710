"""Prompts to features through the bundle of a text encoder."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import t5_case
from var_deploy import names
from var_deploy.config import RuntimeConfig
from var_deploy.errors import BackendError, BundleChangedError, BundleError, UsageError
from var_deploy.manifest import FileInfo, file_sha256, read_manifest
from var_deploy.runtime.text_encoder import TextEncoder
from var_deploy.text.feature_cache import FeatureCache
from var_deploy.text.manifest import read_text_encoder

PROMPTS = ["A tiny robot floats above the river at dawn", "", "UPPER lower MiXeD 12345 !?#"]
ONE_THREAD = RuntimeConfig(threads=1, precision="fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden encoder in every precision."""
    pytest.importorskip("torch")
    from var_deploy.export.checkpoint.text_encoder import open_text_encoder
    from var_deploy.export.text_encoder_bundle import export_text_encoder

    base = tmp_path_factory.mktemp("text")
    model = open_text_encoder(t5_case.hub_folder(base / "hub"), t5_case.SPEC.length)
    export_text_encoder(model, base / "encoder", ("fp32", "fp16", "int8"))
    return base / "encoder"


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Any:
    with TextEncoder.open(folder, ONE_THREAD) as opened:
        yield opened


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_from_text_to_the_published_features(encoder: TextEncoder) -> None:
    """Golden strings: the tokens are those of encodings.json, the features those of the graph."""
    import torch

    from var_deploy.export.checkpoint.text_encoder import build_t5, open_text_encoder

    cases = [c for c in t5_case.encodings()["encodings"] if len(c["ids"]) <= t5_case.SPEC.length]
    features, lengths = encoder.encode([case["text"] for case in cases])
    assert features.dtype == np.float32 and features.shape[1:] == (200, 64)
    assert lengths.tolist() == [len(case["ids"]) for case in cases]
    hub = encoder._folder.parent / "hub"
    module = build_t5(open_text_encoder(hub, 200))
    for row, case in zip(features, cases, strict=True):
        ids = torch.tensor([case["ids"]])
        expected = module(ids, torch.ones_like(ids, dtype=torch.bool)).numpy()[0]
        np.testing.assert_allclose(row[: len(expected)], expected, atol=1e-4, rtol=0)
        assert not row[len(expected) :].any()


def test_a_prompt_does_not_depend_on_its_neighbours(folder: Path) -> None:
    for precision in ("fp32", "fp16", "int8"):
        config = dataclasses.replace(ONE_THREAD, precision=precision)
        with TextEncoder.open(folder, config) as one, TextEncoder.open(folder, config) as other:
            together, _ = one.encode(PROMPTS)
            for row, prompt in zip(together, PROMPTS, strict=True):
                np.testing.assert_array_equal(row, other.encode([prompt])[0][0])


def test_a_shorter_length_cuts_the_same_features(encoder: TextEncoder) -> None:
    """Bundles of different text lengths share one encoder."""
    whole, lengths = encoder.encode(PROMPTS)
    short, found = encoder.encode(PROMPTS, 32)
    assert short.shape == (3, 32, 64)
    np.testing.assert_array_equal(found, lengths)
    np.testing.assert_array_equal(short, whole[:, :32])
    cut, found = encoder.encode(PROMPTS, 8)
    assert found.tolist() == [8, 1, 8]
    assert np.abs(cut[0] - whole[0, :8]).max() > 0.01, "other tokens are another prompt"
    assert "this bundle takes 8: it ends at" in encoder.tokenize(PROMPTS[0], 8).truncation
    assert encoder.tokenize(PROMPTS[0]).truncation == ""


def test_no_prompts(encoder: TextEncoder) -> None:
    features, lengths = encoder.encode([])
    assert features.shape == (0, 200, 64) and lengths.shape == (0,)


@pytest.mark.parametrize(
    ("prompts", "length", "said"),
    [
        ("a red fox", None, "prompts must be a list of texts"),
        ([b"fox"], None, "a prompt must be text"),
        (["\ud800"], None, "half a surrogate pair"),
        (["x" * 20_001], None, "has 20001 characters"),
        (["fox"], 0, "takes 1 to 200 tokens, found 0"),
        (["fox"], 201, "takes 1 to 200 tokens, found 201; export it again"),
    ],
    ids=["text", "bytes", "surrogate", "long", "zero", "beyond"],
)
def test_refused(prompts: Any, length: Any, said: str, encoder: TextEncoder) -> None:
    with pytest.raises(UsageError, match=said):
        encoder.encode(prompts, length)


class Counting:
    """Counts the launches of an encoder."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.launches, self._load = 0, encoder._load
        encoder._load = self.load  # type: ignore[method-assign]

    def load(self) -> Any:
        graph = self._load()

        def launch(inputs: Any) -> Any:
            self.launches += 1
            return graph(inputs)

        return launch


def test_a_repeated_prompt_is_not_encoded_again(folder: Path) -> None:
    cache = FeatureCache()
    with TextEncoder.open(folder, ONE_THREAD, cache=cache) as encoder:
        count = Counting(encoder)
        first, _ = encoder.encode(["a fox", "a hat", "a fox"])
        assert count.launches == 2
        first[0] = 7.0  # the caller's own array
        again, _ = encoder.encode(["a hat", "a fox"])
        assert count.launches == 2
        np.testing.assert_array_equal(again[1], first[2])
        encoder.encode(["a fox"], 64)
        assert count.launches == 2, "it fits: the length does not matter"
        encoder.encode(["a fox"], 3)
        assert count.launches == 3, "it is cut off there: another prompt"
    with TextEncoder.open(folder, ONE_THREAD, cache=cache) as encoder:
        count = Counting(encoder)
        np.testing.assert_array_equal(encoder.encode(["a fox"])[0][0], first[2])
        assert count.launches == 0 and encoder._files is None, "nothing was loaded"
    half = dataclasses.replace(ONE_THREAD, precision="fp16")
    with TextEncoder.open(folder, half, cache=cache) as encoder:
        count = Counting(encoder)
        encoder.encode(["a fox"])
        assert count.launches == 1, "another precision"


def test_the_cache_is_bounded() -> None:
    cache, one = FeatureCache(1000), np.zeros((1, 100), np.float32)
    for key in "abc":
        cache.put(key, one)
    assert cache.get("a") is None and cache.get("b") is one
    cache.put("d", one)
    assert cache.get("c") is None and cache.get("b") is one, "b was used last"
    cache.put("b", np.zeros((1, 300), np.float32))
    assert cache.get("b") is None and len(cache) == 1
    cache.put("d", one[:, :50])
    cache.put("e", one)
    cache.put("f", one[:, :100])
    assert len(cache) == 3


def test_released_weights_are_loaded_again(folder: Path) -> None:
    with TextEncoder.open(folder, ONE_THREAD) as encoder:
        before, _ = encoder.encode(["a fox"])
        encoder.release()
        encoder.release()
        assert encoder._graph is None and encoder._files is not None
        np.testing.assert_array_equal(encoder.encode(["a fox"])[0], before)
        assert encoder._graph is None, "kept features need no weights"
        encoder.encode(["a hat"])
        assert encoder._graph is not None
    encoder.close()
    with pytest.raises(BackendError, match="the text encoder is closed"):
        encoder.encode(["a fox"])


MEMORY = """
import sys
from var_deploy.config import RuntimeConfig
from var_deploy.runtime.text_encoder import TextEncoder

def held():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024

with TextEncoder.open(sys.argv[1], RuntimeConfig(threads=1, precision=sys.argv[2])) as small:
    small.encode(["warm"])  # libraries
with TextEncoder.open(sys.argv[3], RuntimeConfig(threads=1, precision=sys.argv[2])) as encoder:
    start = held()
    encoder.encode(["a fox"])
    loaded = held()
    encoder.release()
    print(start, loaded, held())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by /proc")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_release_returns_the_memory(precision: str, folder: Path, tmp_path: Path) -> None:
    from var_deploy.export.checkpoint.text_encoder import random_text_encoder
    from var_deploy.export.text_encoder_bundle import export_text_encoder

    spec = dataclasses.replace(t5_case.SPEC, width=512, ffn_width=2048, depth=8, length=16)
    model = random_text_encoder(spec, t5_case.TOKENIZER_JSON, 0)
    export_text_encoder(model, tmp_path / "large", (precision,))  # type: ignore[arg-type]
    command = [sys.executable, "-c", MEMORY, str(folder), precision, str(tmp_path / "large")]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout
    start, loaded, after = map(float, out.split())
    assert loaded - start > 40, "MiB: the weights are in memory"
    assert after - start < 0.2 * (loaded - start)


def test_auto_takes_int8_on_a_cpu_where_it_is_there(folder: Path) -> None:
    with TextEncoder.open(folder, RuntimeConfig(threads=1)) as encoder:
        loaded = encoder.describe()
        assert (loaded.precision, loaded.backend, loaded.threads) == ("int8", "onnxruntime-cpu", 1)


def test_int8_that_is_computed_wrongly(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = "int8 is wrong here"
    monkeypatch.setattr(
        "var_deploy.runtime.backends.int8_check.int8_problem", lambda backend: problem
    )
    with TextEncoder.open(folder, RuntimeConfig(threads=1)) as encoder:
        assert encoder.describe().precision == "fp32" and encoder.describe().reason == problem
    asked = RuntimeConfig(threads=1, precision="int8")
    with TextEncoder.open(folder, asked) as encoder, pytest.raises(BackendError, match=problem):
        encoder.encode(["a fox"])


def test_backends_that_are_not_here(folder: Path) -> None:
    for backend, said in (
        ("tensorrt", "a text encoder has no engines for tensorrt"),
        ("onnxruntime-cuda", "onnxruntime|cuda"),
    ):
        config = RuntimeConfig(backend=backend)
        with TextEncoder.open(folder, config) as encoder, pytest.raises(BackendError, match=said):
            encoder.encode(["a fox"])


def test_a_precision_that_the_bundle_lacks(tmp_path: Path) -> None:
    from var_deploy.export.text_encoder_bundle import export_text_encoder

    export_text_encoder(t5_case.random_model(), tmp_path / "out", ("fp16",))
    with (
        TextEncoder.open(tmp_path / "out", ONE_THREAD) as encoder,
        pytest.raises(BundleError, match=r"the text encoder has no fp32 graphs \(it has fp16\)"),
    ):
        encoder.encode(["a fox"])


# folders that cannot be trusted, as with image bundles


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["fp32/weights.bin", "fp32/text_encoder.onnx", "tokenizer.json"])
@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(b"x")])
def test_damaged_files(name: str, damage: Callable[[Path], None], copy: Path) -> None:
    damage(copy / name)
    said = pytest.raises(BundleError, match=name.replace(".", r"\."))
    with said, TextEncoder.open(copy, ONE_THREAD) as encoder:
        encoder.encode(["a fox"])


def test_another_encoder_at_the_place(copy: Path) -> None:
    from var_deploy.export.text_encoder_bundle import export_text_encoder

    with TextEncoder.open(copy, ONE_THREAD) as encoder:
        encoder.encode(["a fox"])
        export_text_encoder(t5_case.random_model(), copy)
        encoder.encode(["a hat"])  # its files are the ones that were checked
        encoder.release()
        with pytest.raises(BundleChangedError, match="was replaced since it was loaded"):
            encoder.encode(["a hut"])
    with TextEncoder.open(copy, ONE_THREAD) as encoder:
        assert encoder.encode(["a fox"])[0].shape == (1, 32, 32)
    digest = read_text_encoder(copy).digest()
    TextEncoder.open(copy, digest=digest).close()
    export_text_encoder(t5_case.random_model(seed=4), copy)
    with pytest.raises(BundleError, match=r"has the digest .* expected"):
        TextEncoder.open(copy, digest=digest)


def test_weights_that_were_overwritten(copy: Path) -> None:
    with TextEncoder.open(copy, ONE_THREAD) as encoder:
        encoder.encode(["a fox"])
        flip(copy / "fp32" / names.WEIGHTS)
        with pytest.raises(BundleChangedError, match="was overwritten since"):
            encoder.encode(["a hat"])


def listed_again(folder: Path, name: str) -> None:
    """Bring the manifest's hash of a file up to date."""
    manifest = read_text_encoder(folder)
    path = folder / name
    info = FileInfo(size=path.stat().st_size, sha256=file_sha256(path))
    dataclasses.replace(manifest, files={**manifest.files, name: info}).save(folder)


def test_a_tokenizer_of_a_larger_vocabulary(copy: Path) -> None:
    data = json.loads((copy / names.TOKENIZER_JSON).read_text())
    data["model"]["vocab"] += [[f"piece{n}", -20.0] for n in range(40)]
    (copy / names.TOKENIZER_JSON).write_text(json.dumps(data))
    listed_again(copy, names.TOKENIZER_JSON)
    with pytest.raises(BundleError, match=r"tokenizer\.json gives .* has only 288 tokens"):
        TextEncoder.open(copy)


def test_weights_that_are_not_numbers(copy: Path) -> None:
    weights = np.memmap(copy / "fp32" / names.WEIGHTS, np.float32, "r+")
    weights[1000] = np.nan
    weights.flush()
    del weights
    listed_again(copy, f"fp32/{names.WEIGHTS}")
    with (
        TextEncoder.open(copy, ONE_THREAD) as encoder,
        pytest.raises(BundleError, match="is nan, which var-deploy export refuses"),
    ):
        encoder.encode(["a fox"])


def test_features_that_overflow(copy: Path) -> None:
    """With check="sizes" nobody has looked at the weights."""
    weights = np.memmap(copy / "fp32" / names.WEIGHTS, np.float32, "r+")
    weights[: 4 * 64] = np.inf
    weights.flush()
    del weights
    config = dataclasses.replace(ONE_THREAD, check="sizes")
    with (
        TextEncoder.open(copy, config) as encoder,
        pytest.raises(BackendError, match=r"the text features .* hold"),
    ):
        encoder.encode(["</s><pad>"])


def test_the_two_kinds_of_bundle_are_told_apart(folder: Path, pocket_bundle: Path) -> None:
    with pytest.raises(BundleError, match="is an image bundle, expected a text encoder"):
        TextEncoder.open(pocket_bundle)
    with pytest.raises(BundleError, match="is a bundle of the kind 'text-encoder', expected one t"):
        read_manifest(folder)


def test_the_runtime_needs_no_pytorch(folder: Path) -> None:
    code = (
        "import sys\n"
        "from var_deploy.runtime.text_encoder import TextEncoder\n"
        f"with TextEncoder.open({str(folder)!r}) as encoder:\n"
        "    encoder.encode(['a fox'])\n"
        "assert not {'torch', 'onnx', 'safetensors', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
