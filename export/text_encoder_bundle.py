"""Writes a text encoder as a bundle of its own, complete or not at all.

Several image bundles can share it, whatever their resolution; see `var_deploy.text.manifest`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import onnx

import var_deploy
from var_deploy import names
from var_deploy.bundle.place import BUNDLE, check_place
from var_deploy.config import GraphForm, Precision
from var_deploy.errors import ExportError, UsageError
from var_deploy.export.bundle import cached, check_space, save_graph
from var_deploy.export.checkpoint.text_encoder import LoadedTextEncoder
from var_deploy.export.graphs.builder import OPSET, GraphBuilder
from var_deploy.export.graphs.text_encoder import build_text_encoder
from var_deploy.export.graphs.weights_bin import WeightLayout, plan_layout, write_weights
from var_deploy.files.folders import whole_folder
from var_deploy.manifest import FileInfo, GraphInfo
from var_deploy.progress import Progress
from var_deploy.text.manifest import TextEncoderManifest


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The graph of one precision and the layout of its weights.bin."""

    graph: GraphBuilder
    layout: WeightLayout


def export_text_encoder(
    model: LoadedTextEncoder,
    out: Path,
    precisions: tuple[Precision, ...] = ("fp32",),
    progress: Progress | None = None,
    *,
    replace: bool = True,
) -> TextEncoderManifest:
    """Write the text encoder to the folder `out` and return its manifest.

    As with `export_bundle` the folder takes its place once it is complete (with `replace`, that of
    an older bundle), and the same input gives the same bytes.

    Raises UsageError for unknown precisions and for an `out` that holds other files, ExportError
    where a weight cannot be stored or the disk is full.
    """
    known = get_args(Precision)
    if not precisions or not set(precisions) <= set(known):
        raise UsageError(f"precision must be of {', '.join(known)}, found {precisions}")
    report = progress or (lambda message, fraction: None)

    def check() -> None:
        check_place(out, replace=replace)

    with whole_folder(out, check=check, index=BUNDLE, error=ExportError) as folder:
        manifest = _write(model, folder, precisions, report)
    report("done", 1.0)
    return manifest


def _write(
    model: LoadedTextEncoder, folder: Path, precisions: tuple[Precision, ...], report: Progress
) -> TextEncoderManifest:
    plans: dict[Precision, _Plan] = {}
    for precision in precisions:
        graph = build_text_encoder(model.spec, GraphForm(precision=precision))
        plans[precision] = _Plan(graph=graph, layout=plan_layout([graph]))
    total = sum(plan.layout.size for plan in plans.values())
    check_space(folder, total + len(model.tokenizer_json))
    files = {names.TOKENIZER_JSON: _write_tokenizer(model, folder / names.TOKENIZER_JSON)}
    graphs: dict[str, dict[str, GraphInfo]] = {}
    read, done = cached(lambda key: model.weights), 0
    for precision, plan in plans.items():

        def advance(count: int, precision: str = precision) -> None:
            nonlocal done
            done += count
            report(f"writing {precision} weights", 0.95 * done / max(total, 1))

        (folder / precision).mkdir()
        weights = f"{precision}/{names.WEIGHTS}"
        files[weights] = write_weights(folder / weights, plan.layout, read, advance)
        info = GraphInfo(
            file=f"{precision}/{names.graph_file(names.TEXT_ENCODER)}",
            inputs=tuple(plan.graph.inputs),
            outputs=tuple(plan.graph.outputs),
            weight_bytes=sum(w.nbytes for w in plan.graph.weights.values()),
        )
        graphs[precision] = {names.TEXT_ENCODER: info}
        files[info.file] = save_graph(plan.graph, folder / info.file, plan.layout.locate)
    manifest = TextEncoderManifest(
        model=model.spec,
        graphs=graphs,
        files=files,
        checkpoint=dict(model.weights.description),
        tools={
            "var-deploy": var_deploy.__version__,
            "onnx": onnx.__version__,
            "opset": str(OPSET),
        },
    )
    manifest.save(folder)
    return manifest


def _write_tokenizer(model: LoadedTextEncoder, path: Path) -> FileInfo:
    data = model.tokenizer_json
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ExportError(f"cannot write {path.name}: {error.strerror}") from None
    return FileInfo(size=len(data), sha256=hashlib.sha256(data).hexdigest())
