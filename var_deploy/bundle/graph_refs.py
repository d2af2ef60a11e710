"""The graphs that a bundle may hold, with kind and scale.

Files, manifests and messages name a graph by its name. Its kind, and the scale that it computes,
are read from its `GraphRef`, never from the name.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from var_deploy import names
from var_deploy.config import LAYOUTS, Layout, LayoutSet
from var_deploy.spec import ModelSpec, NextScaleSpec, TextModelSpec

Kind = Literal[
    "condition",
    "unconditional",
    "scale",
    "step",
    "decoder",
    "encoder",
    "accumulate",
    "text_encoder",
    "other",
]


@dataclass(frozen=True, kw_only=True)
class GraphRef:
    """A graph of a bundle: name, kind, scale and precision.

    Attributes:
        name: in the bundle, as `var_deploy.names` spells it.
        kind: what it computes; "other" for a graph that is not one of a bundle.
        scale: the one that a static graph of kind "scale" computes, None for any other graph.
        precision: the folder that it lies in; "" where no file is meant.
    """

    name: str
    kind: Kind
    scale: int | None = None
    precision: str = ""


def generation_graphs(
    model: NextScaleSpec,
    layout: LayoutSet,
    precision: str = "",
    *,
    guidance: bool = True,
) -> tuple[GraphRef, ...]:
    """Return the graphs that generate images, each once, in the order of their first launch.

    A text-to-image model has a graph for the rows without a prompt, which needs `guidance`.
    """
    scales: list[GraphRef] = []
    if layout != "per-scale":
        scales.append(_step(precision))
    if layout != "shared":
        scales += [_scale(k, precision) for k in range(model.scales)]
    conditions: list[GraphRef] = []
    if not isinstance(model, ModelSpec) or model.transformer.conditional:
        conditions.append(GraphRef(name=names.CONDITION, kind="condition", precision=precision))
    if isinstance(model, TextModelSpec) and guidance:
        unconditional = GraphRef(
            name=names.UNCONDITIONAL, kind="unconditional", precision=precision
        )
        conditions.append(unconditional)
    decoder = GraphRef(name=names.DECODER, kind="decoder", precision=precision)
    return (*conditions, *scales, decoder)


def scale_graphs(model: NextScaleSpec, layout: Layout, precision: str = "") -> tuple[GraphRef, ...]:
    """Return the graph that computes each scale: K of them; in layout "shared" one graph K
    times."""
    shared = layout == "shared"
    return tuple(
        _step(precision) if shared else _scale(k, precision) for k in range(model.scales)
    )


def tokenizer_graphs(precision: str = "") -> tuple[GraphRef, ...]:
    """Return the graphs that encode images and add up tokens; generation does not need them."""
    return (
        GraphRef(name=names.ENCODER, kind="encoder", precision=precision),
        GraphRef(name=names.ACCUMULATE, kind="accumulate", precision=precision),
    )


def bundle_graphs(model: NextScaleSpec, precision: str = "") -> tuple[GraphRef, ...]:
    """Return every graph that a bundle may hold."""
    return (*generation_graphs(model, "both", precision), *tokenizer_graphs(precision))


def graph_ref(model: NextScaleSpec, precision: str, name: str) -> GraphRef:
    """Return the graph of this name. Raises KeyError for a name that no bundle of the model has."""
    return {ref.name: ref for ref in bundle_graphs(model, precision)}[name]


def held_layouts(graphs: Container[str]) -> tuple[Layout, ...]:
    """Return the layouts whose scale graphs (or engines of them) are among these names."""
    first = {"per-scale": names.scale_graph(0), "shared": names.STEP}
    return tuple(layout for layout in LAYOUTS if first[layout] in graphs)


def _step(precision: str) -> GraphRef:
    return GraphRef(name=names.STEP, kind="step", precision=precision)


def _scale(scale: int, precision: str) -> GraphRef:
    return GraphRef(name=names.scale_graph(scale), kind="scale", scale=scale, precision=precision)
