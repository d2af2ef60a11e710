"""PyTorch as a baseline: the published path computes the model, in the published way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from var_deploy.errors import BackendError, BundleError, UsageError
from var_deploy.export import var
from var_deploy.export.baselines import torch_bench
from var_deploy.export.baselines.published_path import Generation, generate_as_published
from var_deploy.export.baselines.torch_bench import TorchBaseline
from var_deploy.export.checkpoint.assemble import assemble, build_modules, empty_modules
from var_deploy.export.checkpoint.random_weights import RandomWeights
from var_deploy.export.verify.reference import Trace, trace_generation
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.runtime.measure import launch_names
from var_deploy.sampling import Sampling, uniforms
from var_deploy.spec import ModelSpec

SAMPLING = Sampling(cfg=2.0, top_k=20, top_p=0.9, temperature=0.8)
LABELS = [0, 2]  # of images 0 and 1 of a baseline, for five classes
Family = Callable[..., ModelSpec]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def modules(spec: ModelSpec) -> tuple[Any, Any]:
    """The weights that a baseline draws, encoder included."""
    sources = []
    for module in empty_modules(spec):
        shapes = {key: tuple(p.shape) for key, p in module.named_parameters()}
        sources.append(RandomWeights(shapes, 0))
    return build_modules(assemble(spec, *sources))


def draws(spec: ModelSpec) -> Any:
    return np.stack([uniforms(n, 0, spec.total_tokens) for n in range(2)])


def reference(spec: ModelSpec, guidance: bool) -> Trace:
    labels = LABELS if spec.transformer.conditional else [0, 0]
    return trace_generation(*modules(spec), labels, draws(spec), SAMPLING, guidance)


def published(spec: ModelSpec, guidance: bool = True, **options: Any) -> Generation:
    given = torch.tensor(LABELS), torch.from_numpy(draws(spec)), SAMPLING
    return generate_as_published(*modules(spec), *given, guidance=guidance, **options)


def bundle(folder: Path, spec: ModelSpec, *, guidance: bool = True) -> Path:
    """A manifest is all that these baselines read."""
    Manifest(
        model=spec,
        preset="",
        batch=1,
        guidance=guidance,
        graphs={"fp32": {}},
        files={},
        checkpoint={"tokenizer": {}, "transformer": {}},
        tools={},
        defaults=SAMPLING,
    ).save(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "guidance"),
    [
        ({}, True),
        ({}, False),
        ({"shared_adaln": True, "phi_ratio": 0.0}, True),
        ({"qk_l2_norm": False, "width_multipliers": (1, 2, 2)}, True),
    ],
)
def test_the_published_path_computes_the_model(
    family_member: Family, changes: dict[str, Any], guidance: bool
) -> None:
    spec = family_member(**changes)
    expected = reference(spec, guidance)
    found = published(spec, guidance)
    for scale, tokens in zip(expected.scales, found.tokens, strict=True):
        np.testing.assert_array_equal(tokens.numpy(), scale.outputs["tokens"])
    assert expected.image.std() > 0.05, "or the comparison would be hollow"
    np.testing.assert_allclose(found.image.permute(0, 2, 3, 1).numpy(), expected.image, atol=1e-5)


class Operators(TorchDispatchMode):
    """Counts what reaches PyTorch's kernels, and notes the types that products are made in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.products: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        made = func(*args, **(kwargs or {}))
        if name in ("addmm", "mm", "convolution"):
            self.products.add(made.dtype)
        return made


def test_it_does_the_published_work(family_member: Family) -> None:
    """Each of these is something that our own modules spare."""
    spec = family_member()
    scales, depth = spec.scales, spec.transformer.depth
    tokenizer, transformer = modules(spec)
    projected: list[int] = []
    for block in transformer.blocks:
        block.ada_lin.register_forward_hook(lambda *call: projected.append(len(call[2])))
    given = torch.tensor(LABELS), torch.from_numpy(draws(spec)), SAMPLING
    with Operators() as operators:
        generate_as_published(tokenizer, transformer, *given, guidance=True)
    assert projected == [4] * depth * scales, "the labels' rows, in every block, at every scale"
    assert operators.calls["topk"] == operators.calls["sort"] == scales
    labels, biases, caches = 1, scales * depth, 2 * depth * (scales - 1)
    assert operators.calls["cat"] == labels + biases + caches
    assert operators.calls["silu"] == scales * (depth + 1), "of the condition"
    assert operators.calls["silu_"] > 0, "of the decoder: in place, as published"


def test_marks_lie_between_the_launches(family_member: Family) -> None:
    spec = family_member(depth=1)
    moments: list[None] = []
    published(spec, mark=lambda: moments.append(None))
    assert len(moments) == 1 + 1 + spec.scales + 1


def test_a_baseline_makes_the_bundles_images(family_member: Family, tmp_path: Path) -> None:
    spec = family_member()
    folder = bundle(tmp_path, spec)
    baseline = TorchBaseline(folder, "torch", 2, threads=1)
    sample = baseline.generate()
    assert list(sample.launches) == launch_names(read_manifest(folder))
    assert 0 < sum(sample.launches.values()) < sample.seconds
    expected = np.rint(reference(spec, guidance=True).image * 255)
    assert baseline.images.dtype == np.uint8
    assert np.abs(baseline.images - expected).max() <= 1
    assert baseline.describe().settings == {
        "torch": torch.__version__,
        "threads": "1",
        "precision": "fp32",
        "weights": "random, of the bundle's sizes",
        "path": "as published: AdaLN in every block at every scale, concatenated cache",
        "images a launch": "2",
    }
    first = baseline.images.copy()
    assert list(baseline.generate().launches) == list(sample.launches)
    np.testing.assert_array_equal(baseline.images, first)
    baseline.close()


def test_bf16_is_autocast_of_the_same_path(family_member: Family, tmp_path: Path) -> None:
    folder = bundle(tmp_path, family_member(depth=1))
    types = {}
    for name in ("torch", "torch-bf16"):
        baseline = TorchBaseline(folder, name, 1)
        with Operators() as operators:
            baseline.generate()
        types[name] = operators.products
        assert baseline.images.std() > 10
    assert types == {"torch": {torch.float32}, "torch-bf16": {torch.bfloat16}}
    assert baseline.describe().settings["precision"].startswith("bf16 by autocast")


def test_compiled_it_makes_the_same_images(family_member: Family, tmp_path: Path) -> None:
    folder = bundle(tmp_path, family_member(depth=1))
    plain = TorchBaseline(folder, "torch", 1)
    plain.generate()
    counter = CompileCounter()
    compiled = TorchBaseline(folder, "torch-compile", 1, compiler=counter)
    sample = compiled.generate()
    assert counter.frame_count == 4, "a graph a scale and one for the decoder"
    assert list(sample.launches) == list(plain.generate().launches)
    assert np.abs(compiled.images.astype(int) - plain.images).max() <= 1
    assert "compiled by inductor" in compiled.describe().settings["path"]


def test_a_compiler_that_fails_is_one_line(family_member: Family, tmp_path: Path) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such header\n" + "and so on " * 1000)

    folder = bundle(tmp_path, family_member(depth=1))
    baseline = TorchBaseline(folder, "torch-compile", 1, compiler=broken)
    with pytest.raises(BackendError, match=r"^torch-compile failed: .*no such header") as caught:
        baseline.generate()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_without_a_cpp_compiler_it_says_so_at_once(
    family_member: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_bench.shutil, "which", lambda name: None)
    with pytest.raises(BackendError, match="needs a C\\+\\+ compiler and finds none"):
        TorchBaseline(bundle(tmp_path, family_member()), "torch-compile", 1)


def test_the_gpt2_form_runs_on_our_modules(tmp_path: Path) -> None:
    spec = var.build(
        hidden_size=48, num_layers=2, num_heads=3, mlp_ratio=2.0, scales=(1, 2, 4), codebook_size=48
    ).spec
    baseline = TorchBaseline(bundle(tmp_path, spec, guidance=False), "torch", 2)
    sample = baseline.generate()
    assert list(sample.launches) == ["scale_00", "scale_01", "scale_02", "decoder"]
    expected = np.rint(reference(spec, guidance=False).image * 255)
    assert np.abs(baseline.images - expected).max() <= 1
    assert "no published" in baseline.describe().settings["path"]


def test_what_it_refuses(family_member: Family, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        TorchBaseline(tmp_path, "torch", 1)
    folder = bundle(tmp_path, family_member())
    with pytest.raises(UsageError, match="baseline must be one of torch, torch-bf16"):
        TorchBaseline(folder, "jax", 1)
    with pytest.raises(UsageError, match="threads must be 0"):
        TorchBaseline(folder, "torch", 1, threads=-1)


def test_the_program_answers_and_loads_no_compiler(family_member: Family, tmp_path: Path) -> None:
    """Importing torch._dynamo costs 50 MB and a second, which are not the published path's."""
    code = (
        "import sys\nfrom var_deploy.export.baselines.torch_bench import main\nmain(sys.argv[1:])\n"
        "print('torch._dynamo' in sys.modules, file=sys.stderr)"
    )
    folder = bundle(tmp_path, family_member(depth=1))
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), "--batch", "2", "--threads", "1"],
        input="generate\n",
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    ready, sample = map(json.loads, done.stdout.splitlines())
    assert ready["ready"]["settings"]["images a launch"] == "2"
    assert set(sample["launches"]) >= {"scale_00", "decoder"}
    assert done.stderr.split() == ["False"]
