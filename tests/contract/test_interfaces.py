"""The contract's inputs, outputs and operators are those that the exporter writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest

from var_deploy.bundle.interfaces import Interfaces, interfaces_of
from var_deploy.bundle.operators import FLOAT_OPERATORS, INT8_OPERATORS, OPERATORS
from var_deploy.spec import BitTokenizerSpec, ModelSpec, TextModelSpec, TextTransformerSpec

pytest.importorskip("onnx", reason="onnx is not installed, so no graph can be built here")

FORMS: dict[str, dict[str, Any]] = {
    "adaln": {},
    "shared adaln, odd sizes": {"shared_adaln": True, "patch_nums": (1, 2, 3, 5)},
    "no phi": {"phi_ratio": 0.0, "qk_l2_norm": False},
    "gpt2": {"family": "gpt2", "classes": 0, "codebook_per_scale": True},
}
TEXT_FORMS = {"square": 1, "patches, not square": 2}


def text_model(patch: int) -> TextModelSpec:
    grids = ((1, 1), (2, 2), (3, 2)) if patch == 2 else ((1, 1), (2, 2), (3, 3))
    return TextModelSpec(
        tokenizer=BitTokenizerSpec(
            grids=grids, bits=4, patch=patch, base_width=24, width_multipliers=(1, 2)
        ),
        transformer=TextTransformerSpec(
            depth=2,
            width=24,
            heads=3,
            ffn_width=32,
            text_width=16,
            text_length=5,
            pool_heads=2,
            rope_grid=(5, 4),
        ),
    )


def built(
    spec: ModelSpec | TextModelSpec, precision: str
) -> Iterator[tuple[Interfaces, Any]]:
    """Every graph of every form that this model has in a precision."""
    from var_deploy.config import Precision
    from var_deploy.export.bundle import ExportOptions, build_graphs
    from var_deploy.export.int8.operators import ConvRanges, Range

    assert precision in get_args(Precision)
    guidable, mixes = spec.transformer.guidable, spec.transformer.conditional
    edge = Range(low=-1.0, high=1.0)
    ranges = None
    if precision == "int8":

        class Everywhere(dict[str, ConvRanges]):
            """Any convolution may be rounded, in these ranges."""

            def __missing__(self, key: str) -> ConvRanges:
                return ConvRanges(input=edge, output=edge)

            def __contains__(self, key: object) -> bool:
                return True

            def get(self, key: str, default: Any = None) -> Any:
                return self[key]

        ranges = Everywhere({"any": ConvRanges(input=edge, output=edge)})
    for batch, guidance, more_smooth in [(1, True, False), (3, False, True)]:
        how = {
            "batch": batch,
            "guidance": guidance and guidable,
            "more_smooth": more_smooth and mixes,
        }
        options = ExportOptions(precisions=(precision,), **how)  # type: ignore[arg-type]
        sizes = interfaces_of(spec, precision=precision, **how)  # type: ignore[arg-type]
        graphs = build_graphs(spec, precision, options, ranges)  # type: ignore[arg-type]
        unneeded = set() if how["guidance"] else {"unconditional"}
        assert [graph.name for graph in graphs] == [
            name for name in sizes.graphs() if name not in unneeded
        ]
        yield from ((sizes, graph) for graph in graphs)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("form", FORMS)
def test_every_graph_is_as_the_contract_says(
    family_member: Callable[..., ModelSpec], form: str, precision: str
) -> None:
    for sizes, graph in built(family_member(**FORMS[form]), precision):
        for listed, expected in (
            (graph.inputs, sizes.inputs(graph.name)),
            (graph.outputs, sizes.outputs(graph.name)),
        ):
            assert [(t.name, t.dtype, t.shape) for t in listed] == expected, graph.name


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("form", TEXT_FORMS)
def test_every_graph_of_a_text_model_is_as_the_contract_says(form: str, precision: str) -> None:
    for sizes, graph in built(text_model(TEXT_FORMS[form]), precision):
        for listed, expected in (
            (graph.inputs, sizes.inputs(graph.name)),
            (graph.outputs, sizes.outputs(graph.name)),
        ):
            assert [(t.name, t.dtype, t.shape) for t in listed] == expected, graph.name


def test_the_operators_are_exactly_those_that_are_written(
    family_member: Callable[..., ModelSpec],
) -> None:
    found: dict[str, set[str]] = {"fp32": set(), "fp16": set(), "int8": set()}
    for precision, operators in found.items():
        specs: list[ModelSpec | TextModelSpec] = [family_member(**f) for f in FORMS.values()]
        for spec in (*specs, *map(text_model, TEXT_FORMS.values())):
            for _, graph in built(spec, precision):
                proto = graph.model(lambda name: ("weights.bin", 0, 0)).graph
                operators.update(node.op_type for node in proto.node)
    assert found["fp32"] | found["fp16"] == FLOAT_OPERATORS
    assert found["int8"] - FLOAT_OPERATORS == INT8_OPERATORS
    assert set().union(*found.values()) == OPERATORS


def test_what_a_name_is_not() -> None:
    sizes = interfaces_of(
        ModelSpec.from_json(
            {
                "tokenizer": {
                    "patch_nums": [1, 2],
                    "vocab_size": 8,
                    "code_width": 4,
                    "base_width": 32,
                    "width_multipliers": [1, 2],
                },
                "transformer": {"depth": 1, "width": 8, "heads": 2, "classes": 3, "ffn_width": 8},
            }
        ),
        precision="fp32",
        batch=1,
        guidance=True,
        more_smooth=False,
    )
    with pytest.raises(KeyError):
        sizes.inputs("scale_02")
