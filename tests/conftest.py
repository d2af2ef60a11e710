"""Shared by all tests: the golden cases and small members of the family.

torch is imported inside the fixtures, so that the runtime's tests run on machines without it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import tempfile
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from slow_files import FILES

from var_deploy.spec import ModelSpec, TokenizerSpec, TransformerSpec

if TYPE_CHECKING:
    from var_deploy.export.checkpoint.assemble import LoadedModel

# a shell starts what runs in its background with Ctrl-C ignored, and what a test starts
# would inherit that; tests that press it need it to work
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# the user's own cache stays out of the tests, and what one run found out of the next
CACHE = tempfile.TemporaryDirectory(prefix="var-deploy-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name

# pytest-xdist tells its workers how wide the terminal is, and tables would be fitted to that
os.environ.pop("COLUMNS", None)

# beside another process of tests, a second thread of PyTorch only waits for a processor
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

GOLDEN = Path(__file__).parent / "golden"
# the larger cases hold weights and lie beside the repository, where they are at hand at all
SHARED_GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
SEEDS = {"seeded-adaln": 1000, "seeded-shared-aln": 2000}
TINY = ("tiny-adaln", "tiny-shared-aln")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow files, so that `-m "not slow"` is a quick run.

    The longest files go first, since beside the last file the other process has nothing left to do:
    those at the top, which install and build, take minutes each; then all that are slow.
    """
    tests = Path(__file__).parent
    rank = {}
    for item in items:
        slow = item.path.relative_to(tests).as_posix() in FILES
        rank[item] = 0 if item.path.parent == tests else 1 if slow else 2
        if slow:
            item.add_marker(pytest.mark.slow)
    items.sort(key=rank.__getitem__)


class SeededWeights:
    """Weight source of the seeded cases: each tensor is drawn from its key."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        self._shapes, self._seed = shapes, seed
        self.description: Mapping[str, Any] = {"golden_seed": seed}

    def keys(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def read(self, key: str) -> NDArray[np.float32]:
        shape = self._shapes[key]
        stream = np.random.RandomState((zlib.crc32(key.encode()) + self._seed) % 2**32)
        z = stream.standard_normal(shape).astype(np.float32)
        if "scale_mul" in key:
            return np.float32(np.log(4)) + np.float32(0.3) * z
        if "norm" in key and key.endswith("weight"):
            return 1 + np.float32(0.1) * z
        if len(shape) < 2:
            return np.float32(0.05) * z
        embedding = "emb" in key or "pos" in key
        fan_in = shape[-1] if embedding or "ada_gss" in key else np.prod(shape[1:])
        return z * np.float32(fan_in**-0.5 * (1.5 if embedding else 1.0))


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Weights, and what the published implementation computes with them."""

    name: str
    spec: ModelSpec
    model: LoadedModel
    arrays: Mapping[str, NDArray[Any]]

    def scales(self, prefix: str) -> list[NDArray[Any]]:
        """Arrays `prefix.0` … of all scales."""
        return [self.arrays[f"{prefix}.{k}"] for k in range(self.spec.scales)]


@cache
def load_golden(name: str) -> Golden:
    from tools.golden import var_spec
    from var_deploy.export.checkpoint.assemble import assemble, empty_modules, open_checkpoint

    folder = (GOLDEN if name in SEEDS else SHARED_GOLDEN) / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not here: it holds 9 MB of weights and is not in the repository")
    config = json.loads((folder / "config.json").read_text())
    spec = var_spec(config)
    if name in SEEDS:
        tokenizer, transformer = (
            SeededWeights({k: tuple(p.shape) for k, p in m.named_parameters()}, SEEDS[name])
            for m in empty_modules(spec)
        )
        model = assemble(spec, tokenizer, transformer)
    else:
        model = assemble(
            spec,
            open_checkpoint(folder / "vae.safetensors", "tokenizer"),
            open_checkpoint(folder / "var.safetensors", "transformer"),
        )
    with np.load(folder / "golden.npz") as arrays:
        return Golden(name=name, spec=spec, model=model, arrays=dict(arrays))


@pytest.fixture(params=[*SEEDS, *TINY])
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each golden case; those that are not in the repository are skipped where they are absent."""
    return load_golden(request.param)


@pytest.fixture(params=list(SEEDS))
def seeded_golden(request: pytest.FixtureRequest) -> Golden:
    """Each golden case that needs no file of weights."""
    return load_golden(request.param)


@pytest.fixture(scope="session")
def family_member() -> Callable[..., ModelSpec]:
    """Sizes of a small model; keyword arguments override any field of either spec."""
    small = ModelSpec(
        tokenizer=TokenizerSpec(
            patch_nums=(1, 2, 4),
            vocab_size=48,
            code_width=8,
            base_width=32,
            width_multipliers=(1, 2),
            res_blocks=1,
        ),
        transformer=TransformerSpec(depth=2, width=64, heads=2, classes=5, ffn_width=128),
    )
    tokenizer_fields = {f.name for f in dataclasses.fields(TokenizerSpec)}

    def build(**changes: Any) -> ModelSpec:
        tokenizer = {k: v for k, v in changes.items() if k in tokenizer_fields}
        transformer = {k: v for k, v in changes.items() if k not in tokenizer_fields}
        return ModelSpec(
            tokenizer=dataclasses.replace(small.tokenizer, **tokenizer),
            transformer=dataclasses.replace(small.transformer, **transformer),
        )

    return build


@pytest.fixture(scope="session")
def load_case() -> Callable[[str], Golden]:
    """A golden case by name."""
    return load_golden


@pytest.fixture(scope="session")
def golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Bundle of a golden case by name: both precisions and layouts, B that of its arrays.

    Exported once a run; a test that changes it works on a copy.
    """
    from var_deploy.export.bundle import ExportOptions, export_bundle

    folder = tmp_path_factory.mktemp("golden")

    @cache
    def bundle(name: str) -> Path:
        golden = load_golden(name)
        options = ExportOptions(
            precisions=("fp32", "fp16"), batch=len(golden.arrays["labels"]), layout="both"
        )
        export_bundle(golden.model, folder / name, options)
        return folder / name

    return bundle


@pytest.fixture(scope="session")
def pocket_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pocket as the command line exports it, in fp32; not to be changed."""
    pytest.importorskip("onnx", reason="onnx is not installed, so nothing can be exported here")
    from var_deploy.export.bundle import ExportOptions, export_bundle
    from var_deploy.export.checkpoint.assemble import load_model

    out = tmp_path_factory.mktemp("pocket") / "bundle"
    export_bundle(load_model("pocket"), out, ExportOptions())
    return out


@pytest.fixture(scope="session")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle that takes prompts, with its text encoder beside it; see `text_case`."""
    pytest.importorskip("onnx", reason="onnx is not installed, so nothing can be exported here")
    from text_case import export_text_bundle

    return export_text_bundle(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def small_model(family_member: Callable[..., ModelSpec]) -> Callable[..., LoadedModel]:
    """A small member of the family with seeded weights, for what needs no golden arrays."""
    from var_deploy.export.checkpoint.assemble import assemble, empty_modules

    def build(seed: int = 1, **changes: Any) -> LoadedModel:
        spec = family_member(**changes)
        tokenizer, transformer = (
            SeededWeights({k: tuple(p.shape) for k, p in m.named_parameters()}, seed)
            for m in empty_modules(spec)
        )
        return assemble(spec, tokenizer, transformer)

    return build


@pytest.fixture
def states(family_member: Callable[..., ModelSpec]) -> tuple[dict[str, Any], dict[str, Any]]:
    """State dicts of a small tokenizer and transformer that belong together."""
    from var_deploy.export.models.tokenizer import Tokenizer
    from var_deploy.export.models.transformer import Transformer

    spec = family_member()
    return dict(Tokenizer(spec.tokenizer).state_dict()), dict(Transformer(spec).state_dict())
