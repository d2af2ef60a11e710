"""What "auto" means, as a function of what was asked for, the bundle and the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from var_deploy import names
from var_deploy.bundle.graph_refs import (
    bundle_graphs,
    generation_graphs,
    graph_ref,
    held_layouts,
    scale_graphs,
    tokenizer_graphs,
)
from var_deploy.bundle.interfaces import interfaces_of
from var_deploy.config import LAYOUTS, Loaded, RuntimeConfig
from var_deploy.errors import BackendError, BundleError, UsageError
from var_deploy.manifest import GraphInfo, Manifest
from var_deploy.planning.selection import Engines, Facts, select
from var_deploy.sampling import Sampling
from var_deploy.spec import ModelSpec

Family = Callable[..., ModelSpec]
HoldsType = Callable[..., Manifest]
STEP, STATIC = names.STEP, names.scale_graph(0)
GPU = Facts(cuda=True, cores=8)
WRONG = "onnxruntime computes int8 wrongly here"


@pytest.fixture
def holds(family_member: Family) -> HoldsType:
    """The manifest of a bundle that has some graphs in some precisions."""

    def make(*precisions: str, graphs: tuple[str, ...] = (STEP, STATIC)) -> Manifest:
        info = GraphInfo(file="x.onnx", inputs=(), outputs=(), weight_bytes=1)
        named = {name: info for name in (*graphs, names.DECODER)}
        return Manifest(
            model=family_member(),
            preset="",
            batch=1,
            guidance=True,
            graphs={precision: named for precision in precisions or ("fp32",)},
            files={},
            checkpoint={},
            tools={},
            defaults=Sampling(),
        )

    return make


def chosen(config: RuntimeConfig, manifest: Manifest, facts: Facts) -> tuple[Any, ...]:
    found = select(config, manifest, facts).config
    return found.backend, found.precision, found.layout, found.threads


ALL = ("fp32", "fp16", "int8")
CPU, CUDA = "onnxruntime-cpu", "onnxruntime-cuda"
BUILT = Engines(built={"fp16": ("per-scale",)}, free=1)


@pytest.mark.parametrize(
    ("asked", "facts", "expected"),
    [
        ({}, Facts(cores=8), (CPU, "int8", "shared", 8)),
        ({}, Facts(), (CPU, "int8", "shared", None)),
        ({}, Facts(int8_problem=WRONG), (CPU, "fp32", "shared", None)),
        ({}, GPU, (CUDA, "fp16", "shared", None)),
        ({}, Facts(engines=BUILT, cuda=True), ("tensorrt", "fp16", "per-scale", None)),
        ({}, Facts(engines=Engines()), ("tensorrt", "fp16", "shared", None)),
        ({}, Facts(engines=Engines(free=1 << 50)), ("tensorrt", "fp16", "per-scale", None)),
        ({}, Facts(engines=Engines(free=1)), ("tensorrt", "fp16", "shared", None)),
        ({"precision": "int8"}, GPU, (CPU, "int8", "shared", 8)),
        ({"threads": 3}, GPU, (CPU, "int8", "shared", 3)),
        ({"precision": "fp32"}, GPU, (CUDA, "fp32", "shared", None)),
        ({"layout": "per-scale"}, GPU, (CUDA, "fp16", "per-scale", None)),
        ({"backend": CPU}, GPU, (CPU, "int8", "shared", 8)),
        ({"backend": CUDA}, Facts(), (CUDA, "fp16", "shared", None)),
        ({"backend": "tensorrt_rtx"}, Facts(), ("tensorrt_rtx", "fp16", "shared", None)),
        ({}, Facts(cuda=True, failed={CUDA: "no memory"}), (CPU, "int8", "shared", None)),
    ],
)
def test_what_is_taken(
    holds: HoldsType, asked: dict[str, Any], facts: Facts, expected: tuple[Any, ...]
) -> None:
    assert chosen(RuntimeConfig(**asked), holds(*ALL), facts) == expected


def test_nothing_is_left_open_and_the_rest_is_kept(holds: HoldsType) -> None:
    config = RuntimeConfig(cuda_graph=False, check="sizes")
    for facts in (Facts(), GPU, Facts(engines=BUILT)):
        found = select(config, holds(*ALL), facts)
        assert "auto" not in vars(found.config).values()
        assert (found.config.cuda_graph, found.config.check) == (False, "sizes")
        assert found.on_gpu is (facts != Facts())
        assert select(found.config, holds(*ALL), facts).config == found.config, "settled"


def test_a_layout_that_is_not_held_is_not_taken(holds: HoldsType) -> None:
    for graphs, layout in (((STEP,), "shared"), ((STATIC,), "per-scale")):
        manifest = holds("fp32", graphs=graphs)
        for facts in (Facts(), GPU, Facts(engines=Engines(free=1)), Facts(engines=Engines())):
            assert chosen(RuntimeConfig(), manifest, facts)[2] == layout


def test_reasons(holds: HoldsType) -> None:
    facts = Facts(cuda=True, failed={CUDA: "no memory"})
    assert select(RuntimeConfig(), holds(), facts).reason == "onnxruntime-cuda: no memory"
    assert select(RuntimeConfig(), holds(), Facts()).reason == ""
    exported = "the bundle was exported with int8"
    assert select(RuntimeConfig(), holds(*ALL), facts).reason == (
        f"onnxruntime-cuda: no memory; {exported}"
    )
    assert select(RuntimeConfig(), holds(*ALL), Facts(int8_problem=WRONG)).reason == WRONG
    built = select(RuntimeConfig(), holds(*ALL), Facts(engines=BUILT))
    assert built.reason == "its engines were built"


@pytest.mark.parametrize(
    ("kind", "asked", "held", "facts", "words"),
    [
        (UsageError, {"backend": CUDA, "threads": 2}, ALL, GPU, f"threads are for {CPU}"),
        (UsageError, {"backend": "tensorrt", "precision": "int8"}, ALL, GPU, "int8 is for"),
        (BackendError, {"backend": CUDA}, ("int8",), GPU, "has only int8 graphs"),
        (BackendError, {"backend": "tensorrt"}, ("int8",), GPU, "not for tensorrt; export"),
        (BackendError, {"precision": "int8"}, ALL, Facts(int8_problem=WRONG), WRONG),
        (BackendError, {"backend": CUDA}, ALL, Facts(failed={CUDA: "no memory"}), "no memory"),
        (BundleError, {"precision": "fp16"}, ("fp32",), Facts(engines=Engines()), "no fp16"),
    ],
)
def test_what_is_refused(
    holds: HoldsType,
    kind: type[Exception],
    asked: dict[str, Any],
    held: tuple[str, ...],
    facts: Facts,
    words: str,
) -> None:
    with pytest.raises(kind, match=words):
        select(RuntimeConfig(**asked), holds(*held), facts)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"backend": "best"}, "backend must be one of auto, tensorrt,"),
        ({"precision": "bf16"}, "precision must be one of auto, fp32,"),
        ({"layout": "both"}, "layout must be one of auto, per-scale, shared, found 'both'"),
        ({"check": "nothing"}, "check must be one of changed, hashes, sizes, found 'nothing'"),
        ({"threads": 0}, "threads must be at least 1, found 0"),
    ],
)
def test_a_config_is_checked_when_it_is_made(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        RuntimeConfig(**wrong)


def test_what_was_loaded_as_reports_hold_it() -> None:
    settings = {"onnxruntime": "1.0", "threads": "2"}
    loaded = Loaded(precision="fp32", backend=CPU, layout="shared", settings=settings)
    told = {"precision": "fp32", "layout": "shared", "backend": CPU, **settings}
    assert list(loaded.to_json().items()) == list(told.items())
    why = Loaded(precision="fp32", backend=CPU, layout="shared", reason="no GPU").to_json()
    assert list(why)[-1] == "chosen because" and why["chosen because"] == "no GPU"


# graphs


def test_graphs_know_what_they_are(family_member: Family) -> None:
    model = family_member()
    last = model.scales - 1
    for graph in bundle_graphs(model, "fp16"):
        assert graph_ref(model, "fp16", graph.name) == graph
        assert (graph.scale is None) == (graph.kind != "scale")
    assert graph_ref(model, "fp16", names.scale_graph(last)).scale == last
    with pytest.raises(KeyError):
        graph_ref(model, "fp16", names.scale_graph(model.scales))


def test_layouts_list_their_graphs_in_order(family_member: Family) -> None:
    model = family_member()
    scales = [names.scale_graph(k) for k in range(model.scales)]
    expected = {
        "shared": [names.CONDITION, names.STEP, names.DECODER],
        "per-scale": [names.CONDITION, *scales, names.DECODER],
        "both": [names.CONDITION, names.STEP, *scales, names.DECODER],
    }
    for layout, listed in expected.items():
        found = generation_graphs(model, layout)  # type: ignore[arg-type]
        assert [graph.name for graph in found] == listed
    assert [g.name for g in scale_graphs(model, "per-scale")] == scales
    assert {g.name for g in scale_graphs(model, "shared")} == {names.STEP}
    assert len(scale_graphs(model, "shared")) == model.scales
    for layout in LAYOUTS:
        assert held_layouts([g.name for g in generation_graphs(model, layout)]) == (layout,)
    assert held_layouts(expected["both"]) == LAYOUTS
    assert held_layouts([g.name for g in tokenizer_graphs()]) == ()
    form = {"batch": 1, "guidance": True, "more_smooth": False}
    interfaces = interfaces_of(model, precision="fp32", **form)  # type: ignore[arg-type]
    assert interfaces.graphs() == [graph.name for graph in bundle_graphs(model)]
