"""Writes a bundle: graphs, weights and manifest, complete or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

import var_deploy
from var_deploy import names
from var_deploy.errors import ExportError, UsageError
from var_deploy.export.checkpoint import LoadedModel
from var_deploy.export.graphs.builder import OPSET, GraphBuilder, Precision, ReadKey
from var_deploy.export.graphs.codec import build_decoder, build_encoder
from var_deploy.export.graphs.condition import build_condition
from var_deploy.export.graphs.scale import build_scale, build_step
from var_deploy.export.weights_bin import plan_layout, write_weights
from var_deploy.manifest import FileInfo, GraphInfo, Manifest, file_sha256
from var_deploy.spec import ModelSpec

Layout = Literal["both", "per-scale", "shared"]
Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What a bundle holds.

    Attributes:
        precisions: folders to write, of "fp32" and "fp16".
        batch: images a launch, B.
        guidance: 2B rows for classifier-free guidance, or B at half the work.
        layout: per-scale static graphs, the one `step` graph ("shared"), or both over the same
            weights.
    """

    precisions: tuple[Precision, ...] = ("fp32",)
    batch: int = 1
    guidance: bool = True
    layout: Layout = "both"

    def __post_init__(self) -> None:
        if not self.precisions or not set(self.precisions) <= {"fp32", "fp16"}:
            raise UsageError(f"precision must be fp32 or fp16, found {self.precisions}")
        if self.batch < 1:
            raise UsageError(f"batch must be at least 1, found {self.batch}")
        if self.layout not in ("both", "per-scale", "shared"):
            raise UsageError(f"layout must be both, per-scale or shared, found {self.layout!r}")


def build_graphs(
    spec: ModelSpec, precision: Precision, options: ExportOptions
) -> list[GraphBuilder]:
    """Every graph of one precision, in the order in which a generation needs them."""
    batch, guidance = options.batch, options.guidance
    graphs = []
    if spec.transformer.conditional:
        graphs.append(build_condition(spec, precision, 2 * batch if guidance else batch))
    if options.layout != "per-scale":
        graphs.append(build_step(spec, precision, batch, guidance))
    if options.layout != "shared":
        graphs += [build_scale(spec, k, precision, batch, guidance) for k in range(spec.scales)]
    graphs.append(build_decoder(spec.tokenizer, precision, batch))
    graphs.append(build_encoder(spec.tokenizer, precision, batch))
    return graphs


def export_bundle(
    model: LoadedModel, out: Path, options: ExportOptions, progress: Progress | None = None
) -> Manifest:
    """Write the bundle of `model` to `out`, replacing a bundle that is there.

    Everything is written into a folder beside `out` and renamed at the end: whatever happens
    before, an older bundle stays as it was. The same input gives the same bytes.

    Raises UsageError for options that do not fit the model and ExportError where a weight cannot
    be stored or the disk is full.
    """
    if options.guidance and not model.spec.transformer.conditional:
        raise UsageError("an unconditional model has no guidance: export it with --no-guidance")
    report = progress or (lambda message, fraction: None)
    out = out.resolve()  # a link is followed, not replaced
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise ExportError(f"cannot write beside {out}: {error.strerror}") from None
    try:
        folder.chmod(0o755)  # mkdtemp makes it private
        manifest = _write(model, folder, options, report)
        _put_in_place(folder, out)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ExportError(f"cannot write {out}: {error.strerror or error}") from None
    except BaseException:  # Ctrl-C as well: nothing half-written stays
        shutil.rmtree(folder, ignore_errors=True)
        raise
    report("done", 1.0)
    return manifest


def _write(model: LoadedModel, folder: Path, options: ExportOptions, report: Progress) -> Manifest:
    graphs: dict[str, dict[str, GraphInfo]] = {}
    files: dict[str, FileInfo] = {}
    read = cached_reader(model)
    plans = []
    for precision in options.precisions:
        built = build_graphs(model.spec, precision, options)
        plans.append((precision, built, plan_layout(built)))
    total = sum(layout.size for _, _, layout in plans)
    free = shutil.disk_usage(folder).free
    if free < 1.01 * total:
        raise ExportError(
            f"the disk has {free / 1e6:.0f} MB free, the bundle needs {1.01 * total / 1e6:.0f} MB"
        )
    done = 0
    for precision, built, layout in plans:
        (folder / precision).mkdir()

        def advance(count: int, precision: str = precision) -> None:
            nonlocal done
            done += count
            report(f"writing {precision} weights", 0.95 * done / max(total, 1))

        weights = f"{precision}/{names.WEIGHTS}"
        files[weights] = write_weights(folder / weights, layout, read, advance)
        graphs[precision] = {}
        for graph in built:
            file = f"{precision}/{names.graph_file(graph.name)}"
            files[file] = _save_graph(graph, folder / file, layout.locate)
            graphs[precision][graph.name] = GraphInfo(
                file=file,
                inputs=tuple(graph.inputs),
                outputs=tuple(graph.outputs),
                weight_bytes=sum(w.nbytes for w in graph.weights.values()),
            )
    manifest = Manifest(
        model=model.spec,
        preset=model.preset,
        batch=options.batch,
        guidance=options.guidance,
        graphs=graphs,
        files=files,
        checkpoint={
            "tokenizer": dict(model.tokenizer.description),
            "transformer": dict(model.transformer.description),
        },
        tools={
            "var-deploy": var_deploy.__version__,
            "onnx": onnx.__version__,
            "opset": str(OPSET),
        },
        # a default must be something that the graphs can do
        defaults=model.defaults if options.guidance else model.defaults.replace(cfg=0.0),
        labels=model.labels,
    )
    manifest.save(folder)
    return manifest


def cached_reader(model: LoadedModel) -> ReadKey:
    """Reads a tensor by key; small ones, which several weights may be made of, stay in memory."""

    @lru_cache(maxsize=64)
    def small(key: str) -> NDArray[Any]:
        return model.source(key).read(key)

    def read(key: str) -> NDArray[Any]:
        source = model.source(key)
        if np.prod(source.shape(key), dtype=np.int64) > 1 << 16:
            return source.read(key)
        return small(key)

    return read


def _save_graph(
    graph: GraphBuilder, path: Path, locate: Callable[[str], tuple[str, int, int]]
) -> FileInfo:
    data = graph.model(locate).SerializeToString(deterministic=True)
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ExportError(f"cannot write {path.name}: {error.strerror}") from None
    onnx.checker.check_model(str(path), full_check=True)
    return FileInfo(size=path.stat().st_size, sha256=file_sha256(path))


def _put_in_place(folder: Path, out: Path) -> None:
    """Rename; an older bundle is moved aside first and deleted last."""
    old = folder.with_name(folder.name.replace(".partial-", ".old-"))
    try:
        try:
            if out.exists():
                out.rename(old)
            folder.rename(out)
        except BaseException:
            if old.exists() and not out.exists():
                old.rename(out)
            raise
        finally:
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ExportError(f"cannot put the bundle at {out}: {error.strerror}") from None
