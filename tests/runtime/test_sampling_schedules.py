"""Settings with one value a scale: the graphs, the loop and every PyTorch path mean the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from var_deploy.config import Layout
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.sampling import Sampling, uniforms
from var_deploy.spec import ModelSpec

torch = pytest.importorskip("torch")

SCHEDULE = Sampling(
    cfg=(1.5, 0.0, 3.0), top_k=(9, 0, 20), top_p=(0.0, 0.9, 0.5), temperature=(2.0, 0.7, 1.0)
)
LABELS = [3, 0]
Family = Callable[..., ModelSpec]


@pytest.fixture(scope="module")
def model(family_member: Family, random_model: Callable[[ModelSpec], Any]) -> Any:
    """A small model whose defaults are the schedule."""
    return dataclasses.replace(random_model(family_member()), defaults=SCHEDULE)


@pytest.fixture(scope="module")
def bundle(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from var_deploy.export.bundle import ExportOptions, export_bundle

    out = tmp_path_factory.mktemp("schedule") / "bundle"
    export_bundle(model, out, ExportOptions(batch=2))
    return out


@pytest.fixture(params=["shared", "per-scale"])
def loop(bundle: Path, request: pytest.FixtureRequest) -> Iterator[ScaleLoop]:
    layout: Layout = request.param
    made = ScaleLoop(bundle, read_manifest(bundle), OrtCpuBackend(1), "fp32", layout)
    yield made
    made.close()


def draws(model: Any, seed: int = 3) -> Any:
    return np.stack([uniforms(seed, n, model.spec.total_tokens) for n in range(len(LABELS))])


def test_the_graphs_agree_with_pytorch(bundle: Path, model: Any) -> None:
    from var_deploy.export.verify.bundle import verify_model

    assert read_manifest(bundle).defaults == SCHEDULE
    report = verify_model(bundle, model)
    assert report.failure is None
    assert any(check.graph.startswith("loop") for check in report.checks)


def test_the_loop_draws_what_pytorch_draws(loop: ScaleLoop, model: Any) -> None:
    from var_deploy.export.checkpoint.assemble import build_modules
    from var_deploy.export.verify.reference import trace_generation

    image = loop.run(LABELS, draws(model), SCHEDULE)
    trace = trace_generation(*build_modules(model), LABELS, draws(model), SCHEDULE, True)
    for found, scale in zip(loop.tokens(), trace.scales, strict=True):
        clear = scale.margins > 2e-5
        np.testing.assert_array_equal(found[clear], scale.outputs["tokens"][clear])
    np.testing.assert_allclose(image, trace.image, atol=1e-3)


def test_the_other_pytorch_paths_agree(model: Any) -> None:
    from var_deploy.export.baselines.published_path import generate_as_published
    from var_deploy.export.baselines.torch_peers import Peer
    from var_deploy.export.checkpoint.assemble import build_modules
    from var_deploy.export.verify.reference import trace_generation

    tokenizer, transformer = build_modules(model)
    expected = trace_generation(tokenizer, transformer, LABELS, draws(model), SCHEDULE, True)
    given = torch.tensor(LABELS), torch.from_numpy(draws(model))
    published = generate_as_published(tokenizer, transformer, *given, SCHEDULE, guidance=True)
    found = published.image.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found, expected.image, atol=1e-4)
    peer = Peer(
        model.spec,
        batch=2,
        guidance=True,
        sampling=SCHEDULE,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    peer.tokenizer.load_state_dict(tokenizer.state_dict(), strict=False)
    peer.transformer.load_state_dict(transformer.state_dict(), strict=False)
    found = (peer(*given).permute(0, 2, 3, 1).numpy() + 1) / 2
    np.testing.assert_allclose(found, expected.image, atol=1e-4)


@pytest.mark.parametrize("name", ["cfg", "top_k", "top_p", "temperature"])
def test_each_scale_follows_its_own_value(loop: ScaleLoop, model: Any, name: str) -> None:
    """A change at one scale leaves the tokens before it alone, and moves its own."""
    wide = Sampling(cfg=(0, 0, 0), top_k=0, top_p=0.0, temperature=2.0)
    flat, sharp = {
        "cfg": (0.0, 50.0),
        "top_k": (0, 1),
        "top_p": (0.0, 1e-6),
        "temperature": (2.0, 0.001),
    }[name]
    loop.run(LABELS, draws(model), wide)
    plain = loop.tokens()
    for scale in range(model.spec.scales):
        values = [sharp if k == scale else flat for k in range(model.spec.scales)]
        loop.run(LABELS, draws(model), wide.replace(**{name: values}))
        changed = loop.tokens()
        for k in range(scale):
            np.testing.assert_array_equal(changed[k], plain[k])
        assert (changed[scale] != plain[scale]).any()


def test_a_number_is_its_published_schedule_written_out(bundle: Path) -> None:
    with Pipeline.load(bundle, threads=1) as pipe:
        number = pipe.generate(LABELS, seed=7, cfg=4.0, top_k=20, top_p=0.9, temperature=1.5)
        ramp: Any = (0.0, 2.0, 4.0)
        same: Any = {"top_k": [20] * 3, "top_p": (0.9,) * 3, "temperature": np.full(3, 1.5)}
        np.testing.assert_array_equal(pipe.generate(LABELS, seed=7, cfg=ramp, **same), number)
        assert (pipe.generate(LABELS, seed=7) != number).any()
