"""PyTorch as the rival: it computes the model, is compiled whole, and tells its times in lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch._dynamo.testing import CompileCounter

from var_deploy.export import var
from var_deploy.export.baselines import torch_peers
from var_deploy.export.baselines.torch_peers import (
    Peer,
    main,
    measure_rates,
    random_modules,
    time_peers,
)
from var_deploy.export.checkpoint.assemble import assemble, build_modules, empty_modules
from var_deploy.export.checkpoint.random_weights import RandomWeights
from var_deploy.export.verify.reference import trace_generation
from var_deploy.sampling import Sampling, uniforms
from var_deploy.spec import ModelSpec

CPU = torch.device("cpu")
SAMPLING = Sampling(cfg=2.0, top_k=20, top_p=0.9)
Family = Callable[..., ModelSpec]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def draws(spec: ModelSpec, batch: int) -> Any:
    return np.stack([uniforms(3, n, spec.total_tokens) for n in range(batch)])


def peer(spec: ModelSpec, guidance: bool = True, **options: Any) -> Peer:
    return Peer(
        spec,
        batch=2,
        guidance=guidance,
        sampling=SAMPLING if guidance else SAMPLING.replace(cfg=0.0),
        device=CPU,
        dtype=torch.float32,
        **options,
    )


def reference_image(spec: ModelSpec, guidance: bool) -> Any:
    """[B, S, S, 3] in [0, 1] by the code that `verify` trusts, from the same weights."""
    sources = []
    for module in empty_modules(spec):
        shapes = {key: tuple(p.shape) for key, p in module.named_parameters()}
        sources.append(RandomWeights(shapes, 0))
    tokenizer, transformer = build_modules(assemble(spec, *sources))
    sampling = SAMPLING if guidance else SAMPLING.replace(cfg=0.0)
    labels = [1, 2] if spec.transformer.conditional else [0, 0]
    trace = trace_generation(tokenizer, transformer, labels, draws(spec, 2), sampling, guidance)
    return trace.image


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("changes", [{}, {"shared_adaln": True, "phi_ratio": 0.0}])
def test_it_generates_what_the_reference_does(
    family_member: Family, guidance: bool, changes: dict[str, Any]
) -> None:
    spec = family_member(**changes)
    image = peer(spec, guidance)(torch.tensor([1, 2]), torch.from_numpy(draws(spec, 2)))
    found = (image.permute(0, 2, 3, 1).numpy() + 1) / 2
    expected = reference_image(spec, guidance)
    assert expected.std() > 0.05, "or the comparison would be hollow"
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_gpt2_form() -> None:
    spec = var.build(
        hidden_size=48, num_layers=2, num_heads=3, mlp_ratio=2.0, scales=(1, 2, 4), codebook_size=48
    ).spec
    image = peer(spec, guidance=False)(torch.tensor([0, 0]), torch.from_numpy(draws(spec, 2)))
    found = (image.permute(0, 2, 3, 1).numpy() + 1) / 2
    np.testing.assert_allclose(found, reference_image(spec, False), atol=1e-4)


def test_what_no_generation_needs_takes_no_memory(family_member: Family) -> None:
    tokenizer, _ = random_modules(family_member())
    parts = {name.partition(".")[0] for name, _ in tokenizer.named_parameters()}
    assert parts == {"decoder", "quantize", "post_quant_conv"}


def test_a_scale_is_compiled_as_one_graph(family_member: Family) -> None:
    spec = family_member(depth=1)
    counter = CompileCounter()
    given = torch.tensor([1, 2]), torch.from_numpy(draws(spec, 2))
    compiled = peer(spec, compiler=counter)
    image = compiled(*given)
    assert counter.frame_count == spec.scales + 1, "a graph a scale and one for the decoder"
    compiled(*given)
    assert counter.frame_count == spec.scales + 1, "the second image compiles nothing"
    torch.testing.assert_close(image, peer(spec)(*given))
    assert torch._dynamo.config.recompile_limit >= 2 * 10 + 2, "as many as released models need"


def test_each_way_is_a_row_and_a_failure_spoils_no_other(family_member: Family) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler\nis here")

    rows = list(
        time_peers(
            family_member(depth=1),
            guidance=True,
            sampling=SAMPLING,
            batches=(1, 2),
            device=CPU,
            dtype=torch.float32,
            modes=(("broken", broken), ("eager", None)),
            budget=0.0,
        )
    )
    assert [(row["mode"], row["batch"]) for row in rows] == [
        ("broken", 1),
        ("broken", 2),
        ("eager", 1),
        ("eager", 2),
    ]
    for row in rows[:2]:
        assert "no C++ compiler is here" in row["problem"]
        assert "median_ms" not in row
    for row in rows[2:]:
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p95_ms"]
        assert row["count"] == torch_peers.FEWEST
        assert row["first_seconds"] >= 0


def test_rates_are_positive_and_bytes_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure_rates(CPU, copy_bytes=1 << 16, sides=(8, 16))
    assert sorted(found) == ["bandwidth", "full_rate", "half_rate"]
    assert min(found.values()) > 0
    monkeypatch.setattr(torch_peers, "timer_of", lambda device: lambda run, most, budget: [0.001])
    timed = measure_rates(CPU, copy_bytes=1 << 16, sides=(8, 16))
    assert timed["bandwidth"] == pytest.approx(2 * (1 << 16) / 0.001)
    assert timed["half_rate"] == pytest.approx(2 * 16**3 / 0.001), "the larger one counts"


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for arguments in (["--rates"], [str(tmp_path)]):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0
        assert json.loads(done.output)["problem"].endswith("finds no GPU")
    for wrong in ([], ["--rates", str(tmp_path)]):
        assert CliRunner().invoke(main, wrong).exit_code == 2
