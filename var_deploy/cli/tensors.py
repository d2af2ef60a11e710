"""The tensors of a graph for people: `var-deploy inspect BUNDLE --graph NAME`.

All of it comes from the manifest, so no ONNX library is needed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from var_deploy import names
from var_deploy.cli.console import facts, human_bytes, table
from var_deploy.errors import UsageError
from var_deploy.manifest import GraphInfo, Manifest, TensorInfo

ROLES = {
    names.LABELS: "class of each row, with guidance the second half without one",
    names.FIRST_INPUT: "input of the first scale",
    names.MODULATION: "the label's scales and shifts for all blocks",
    names.INPUT: "what the scales before say of this one",
    names.F_HAT: "sum of the codes so far, which the decoder reads",
    names.UNIFORMS: "random numbers that choose the tokens",
    names.NOISE: "random numbers that mix the codes",
    names.CFG: "setting: strength of guidance",
    names.TEMPERATURE: "setting: divides the logits",
    names.TOP_K: "setting: codes that stay, 0 = all",
    names.TOP_P: "setting: mass that stays, 0 = all",
    names.KEEP_MASK: "where a token is kept, not sampled",
    names.KEEP_TOKENS: "the tokens that stand there",
    names.TOKENS: "the codes of this scale",
    names.NEW_F_HAT: "the sum with this scale's codes",
    names.NEXT_INPUT: "input of the next scale",
    names.SCALE: "which scale this is",
    names.UP_MATRIX: "resizes this scale's map to that of f_hat",
    names.NEXT_MATRIX: "resizes f_hat to the next scale's map",
    names.IMAGE: "pixels between 0 and 1",
    names.F_HATS: "f_hat after each scale",
}
FAMILIES = (  # of tensors that a graph has many of
    (names.past_key(0), "cache: keys of the scales before"),
    (names.past_value(0), "cache: values of the scales before"),
    (names.new_key(0), "cache: keys of this scale"),
    (names.new_value(0), "cache: values of this scale"),
    (names.encoder_tokens(0), "the codes of a scale"),
)


def role(name: str) -> str:
    """Return the purpose of a tensor in words; "" for a name that this version does not know."""
    if name in ROLES:
        return ROLES[name]
    same = [what for first, what in FAMILIES if _family(first) == _family(name)]
    return same[0] if same else ""


def _family(name: str) -> str:
    """The name with `*` for its number."""
    return re.sub(r"\d+", "*", name)


def find_graph(manifest: Manifest, name: str, precision: str | None) -> str:
    """Return the precision whose graph to show: the requested one, else the first that has it.

    Raises UsageError with the known names for an unknown graph.
    """
    if precision is not None and precision not in manifest.graphs:
        manifest.graph(precision, name)
    asked = list(manifest.graphs) if precision is None else [precision]
    for candidate in asked:
        if name in manifest.graphs[candidate]:
            return candidate
    there = list(dict.fromkeys(graph for p in asked for graph in manifest.graphs[p]))
    close = difflib.get_close_matches(name, there, n=1)
    hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(there)}"
    raise UsageError(f"the bundle has no graph {name!r}; {hint}")


def as_json(manifest: Manifest, precision: str, name: str) -> dict[str, Any]:
    graph = manifest.graphs[precision][name]
    file = manifest.files[graph.file]
    return {
        "graph": name,
        "precision": precision,
        "file": graph.file,
        "size": file.size,
        "sha256": file.sha256,
        "weight_bytes": graph.weight_bytes,
        "inputs": [_plain(tensor) for tensor in graph.inputs],
        "outputs": [_plain(tensor) for tensor in graph.outputs],
    }


def _plain(tensor: TensorInfo) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "role": role(tensor.name),
    }


def as_text(manifest: Manifest, precision: str, name: str) -> str:
    graph = manifest.graphs[precision][name]
    others = [p for p, graphs in manifest.graphs.items() if name in graphs and p != precision]
    head = [
        ("graph", f"{name}, {precision}" + (f" (also in {', '.join(others)})" if others else "")),
        ("file", f"{graph.file}, {human_bytes(manifest.files[graph.file].size)}"),
        ("weights used", human_bytes(graph.weight_bytes)),
    ]
    return f"{facts(head)}\n\n{_tensors(graph)}"


def _tensors(graph: GraphInfo) -> str:
    rows: list[tuple[str, ...]] = [("", "tensor", "dtype", "shape", "role")]
    for side, tensors in (("in", graph.inputs), ("out", graph.outputs)):
        for alike in _gathered(tensors):
            first = alike[0]
            shape = f"[{', '.join(map(str, first.shape))}]"
            label = first.name
            if len(alike) > 1:
                label = f"{_family(first.name)} × {len(alike)}"
            rows.append((side, label, first.dtype, shape, role(first.name)))
    return table(rows, optional=(0,))


def _gathered(tensors: Sequence[TensorInfo]) -> list[list[TensorInfo]]:
    """Tensors in order; those that differ in their number alone share the place of the first."""
    groups: dict[tuple[object, ...], list[TensorInfo]] = {}
    for tensor in tensors:
        groups.setdefault((_family(tensor.name), tensor.dtype, tensor.shape), []).append(tensor)
    return list(groups.values())
