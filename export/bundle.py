"""Writes a bundle (graphs, weights and manifest), complete or not at all."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
from numpy.typing import NDArray

import var_deploy
from var_deploy import names
from var_deploy.bundle.graph_refs import GraphRef, generation_graphs, tokenizer_graphs
from var_deploy.bundle.interfaces import launch_batch
from var_deploy.bundle.place import BUNDLE, check_place
from var_deploy.config import LAYOUT_SETS, GraphForm, LayoutSet, Precision
from var_deploy.errors import ExportError, UsageError
from var_deploy.export.checkpoint.assemble import LoadedModel
from var_deploy.export.checkpoint.files import WeightSource
from var_deploy.export.checkpoint.text_model import LoadedTextModel
from var_deploy.export.families import export_family_of
from var_deploy.export.graphs.accumulate import build_accumulate
from var_deploy.export.graphs.bit_codec import (
    build_bit_accumulate,
    build_bit_decoder,
    build_bit_encoder,
)
from var_deploy.export.graphs.builder import OPSET, GraphBuilder, ReadKey
from var_deploy.export.graphs.codec import build_decoder, build_encoder
from var_deploy.export.graphs.scale import build_scale, build_step
from var_deploy.export.graphs.text_condition import build_text_condition, build_unconditional
from var_deploy.export.graphs.text_scale import build_text_scale, build_text_step
from var_deploy.export.graphs.weights_bin import (
    WeightLayout,
    check_weights,
    plan_layout,
    write_weights,
)
from var_deploy.export.int8.decoder_ranges import decoder_ranges
from var_deploy.export.int8.operators import Ranges
from var_deploy.families import family_of
from var_deploy.files.folders import whole_folder
from var_deploy.manifest import FileInfo, GraphInfo, Manifest, TextEncoderRef, file_sha256
from var_deploy.progress import Progress
from var_deploy.sampling import BitSampling, Sampling
from var_deploy.spec import ModelSpec, TextModelSpec

CALIBRATION = 0.5  # share of an int8 export's progress: generating images takes longer than writing


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export: which graphs a bundle holds, and in which form.

    Attributes:
        precisions: folders to write, of "fp32", "fp16" and "int8".
        batch: B, images per launch; int8 graphs of large models take one, see `launch_batch`.
        guidance: 2B rows for classifier-free guidance, or B at half the work; None: guidance where
            the model has classes.
        more_smooth: mix codes where the published `more_smooth` does, see `sampling.smoothing`.
        layout: per-scale static graphs, the one `step` graph ("shared"), or both over the same
            weights.
        calibration: images that an int8 decoder's ranges are taken from.
    """

    precisions: tuple[Precision, ...] = ("fp32",)
    batch: int = 1
    guidance: bool | None = True
    more_smooth: bool = False
    layout: LayoutSet = "both"
    calibration: int = 8

    def __post_init__(self) -> None:
        known = get_args(Precision)
        if not self.precisions or not set(self.precisions) <= set(known):
            raise UsageError(f"precision must be of {', '.join(known)}, found {self.precisions}")
        if self.calibration < 1:
            raise UsageError(f"calibration must be at least 1 image, found {self.calibration}")
        if self.batch < 1:
            raise UsageError(f"batch must be at least 1, found {self.batch}")
        if self.layout not in LAYOUT_SETS:
            raise UsageError(f"layout must be both, per-scale or shared, found {self.layout!r}")

    def form(self, precision: Precision, spec: ModelSpec | TextModelSpec) -> GraphForm:
        """Return the form of a model's graphs in one precision; `launch_batch` has its batch."""
        guidance = bool(self.guidance)
        batch = launch_batch(spec, precision, self.batch, guidance=guidance)
        return GraphForm(
            precision=precision, batch=batch, guidance=guidance, more_smooth=self.more_smooth
        )


def build_graphs(
    spec: ModelSpec | TextModelSpec,
    precision: Precision,
    options: ExportOptions,
    ranges: Ranges | None = None,
) -> list[GraphBuilder]:
    """Build every graph of one precision, in the order in which a generation runs them.

    `ranges` are the value ranges that the convolutions of an int8 decoder are quantised with;
    without `ranges` those convolutions stay in fp32.
    """
    form = options.form(precision, spec)
    wanted = (
        *generation_graphs(spec, options.layout, precision, guidance=form.guidance),
        *tokenizer_graphs(precision),
    )
    if isinstance(spec, TextModelSpec):
        return [_build_of_text(graph, spec, form, ranges) for graph in wanted]
    return [_build(graph, spec, form, ranges) for graph in wanted]


def _build_of_text(
    graph: GraphRef, spec: TextModelSpec, form: GraphForm, ranges: Ranges | None
) -> GraphBuilder:
    if graph.kind == "condition":
        return build_text_condition(spec, form)
    if graph.kind == "unconditional":
        return build_unconditional(spec, form)
    if graph.kind == "step":
        return build_text_step(spec, form)
    if graph.kind == "decoder":
        return build_bit_decoder(spec.tokenizer, form, ranges)
    if graph.kind == "encoder":
        return build_bit_encoder(spec.tokenizer, form)
    if graph.kind == "accumulate":
        return build_bit_accumulate(spec.tokenizer, form)
    assert graph.scale is not None
    return build_text_scale(spec, graph.scale, form)


def _build(
    graph: GraphRef, spec: ModelSpec, form: GraphForm, ranges: Ranges | None
) -> GraphBuilder:
    if graph.kind == "condition":
        condition = export_family_of(spec.transformer).condition(spec, form)
        assert condition is not None  # a conditional family has one
        return condition
    if graph.kind == "step":
        return build_step(spec, form)
    if graph.kind == "decoder":
        return build_decoder(spec.tokenizer, form, ranges)
    if graph.kind == "encoder":
        return build_encoder(spec.tokenizer, form)
    if graph.kind == "accumulate":
        return build_accumulate(spec.tokenizer, form)
    assert graph.scale is not None
    return build_scale(spec, graph.scale, form)


def export_bundle(
    model: LoadedModel | LoadedTextModel,
    out: Path,
    options: ExportOptions,
    progress: Progress | None = None,
    *,
    replace: bool = True,
    text_encoder: TextEncoderRef | None = None,
) -> Manifest:
    """Write the bundle of `model` to `out` and return its manifest.

    The bundle is written into a folder beside `out` and renamed at the end: where the export fails,
    an older bundle stays as it was. With `replace` an older bundle at `out` is replaced; its
    engines stay in any case. The same input gives the same bytes. See `var_deploy.files.folders`
    for an `out` that cannot be renamed. `text_encoder` is the one whose features a text-to-image
    model was trained with.

    Raises UsageError for options that do not fit the model and for an `out` that holds other files,
    and ExportError where a weight cannot be stored or the disk is full.
    """
    if options.guidance is None:
        options = dataclasses.replace(options, guidance=model.spec.transformer.guidable)
    if options.guidance and not model.spec.transformer.guidable:
        raise UsageError("an unconditional model has no guidance: export it with --no-guidance")
    spec = model.spec
    if isinstance(spec, TextModelSpec):
        if options.more_smooth:
            raise UsageError("bits are not mixed: a text-to-image model has no more-smooth form")
    elif options.more_smooth and not family_of(spec.transformer).mixes_codes:
        raise UsageError(
            "the GPT-2 form feeds tokens to the next scale, not f_hat: it has no more-smooth "
            "sampling; export it without"
        )
    report = progress or (lambda message, fraction: None)

    def check() -> None:
        check_place(out, replace=replace)

    with whole_folder(out, check=check, index=BUNDLE, error=ExportError) as folder:
        manifest = _write(model, folder, options, report, text_encoder)
    report("done", 1.0)
    return manifest


def _write(
    model: LoadedModel | LoadedTextModel,
    folder: Path,
    options: ExportOptions,
    report: Progress,
    text_encoder: TextEncoderRef | None,
) -> Manifest:
    read = cached_reader(model)
    plans: dict[Precision, _Plan] = {}
    for precision in options.precisions:
        ranges = None
        if precision == "int8":
            ranges = _calibrate(model, folder, options, read, report)
        plans[precision] = _Plan.of(build_graphs(model.spec, precision, options, ranges))
    total = sum(plan.layout.size for plan in plans.values())
    check_space(folder, total)
    start = CALIBRATION if "int8" in plans else 0.0
    done = 0
    manifest = dataclasses.replace(_manifest(model, options), text_encoder=text_encoder)
    for precision, plan in plans.items():

        def advance(count: int, precision: str = precision) -> None:
            nonlocal done
            done += count
            part = start + (0.95 - start) * done / max(total, 1)
            report(f"writing {precision} weights", part)

        manifest = plan.write(folder, precision, manifest, read, advance)
    manifest.save(folder)
    return manifest


def _calibrate(
    model: LoadedModel | LoadedTextModel,
    folder: Path,
    options: ExportOptions,
    read: ReadKey,
    report: Progress,
) -> Ranges:
    """Measure the ranges of the decoder on images that the model's own int8 scale graphs generate.

    These scale graphs are written to a temporary folder first, and deleted with it.
    """
    # Without more_smooth: single codes reach further than mixes, and edits decode them too.
    # One image at a time: the same images, and so the same ranges, whatever the batch size
    changes: dict[str, Any] = {"precisions": ("int8",), "more_smooth": False, "batch": 1}
    shared = dataclasses.replace(options, layout="shared", **changes)
    built = {graph.name: graph for graph in build_graphs(model.spec, "int8", shared)}
    decoder = built.pop(names.DECODER)
    del built[names.ENCODER], built[names.ACCUMULATE]
    plan = _Plan.of(list(built.values()))
    check_space(folder, plan.layout.size)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        report("rounding to int8", 0.0)
        check_weights(decoder, read)  # a decoder with bad weights is refused before calibration
        found = plan.write(scratch, "int8", _manifest(model, shared), read, lambda count: None)
        return decoder_ranges(
            model,
            scratch,
            found,
            options.calibration,
            lambda done, batches: report("calibrating int8", CALIBRATION * done / batches),
        )


def check_space(folder: Path, needed: int) -> None:
    """Raise ExportError where the disk has less than `needed` bytes free, and a hundredth more."""
    free = shutil.disk_usage(folder).free
    if free < 1.01 * needed:
        raise ExportError(
            f"the disk has {free / 1e6:.0f} MB free, the bundle needs {1.01 * needed / 1e6:.0f} MB"
        )


def _manifest(model: LoadedModel | LoadedTextModel, options: ExportOptions) -> Manifest:
    """Return the manifest without graphs and files, which are added as they are written."""
    batches = {name: options.form(name, model.spec).batch for name in options.precisions}
    return Manifest(
        model=model.spec,
        preset=model.preset,
        batch=options.batch,
        batches={name: batch for name, batch in batches.items() if batch != options.batch},
        guidance=bool(options.guidance),
        more_smooth=options.more_smooth,
        graphs={},
        files={},
        checkpoint={
            "tokenizer": dict(model.tokenizer.description),
            "transformer": dict(model.transformer.description),
        },
        tools={
            "var-deploy": var_deploy.__version__,
            "onnx": onnx.__version__,
            "opset": str(OPSET),
        },
        # the default settings must be possible with these graphs
        defaults=model.defaults if options.guidance else _unguided(model.defaults),
        labels=model.labels,
    )


def _unguided(sampling: Sampling) -> Sampling:
    return sampling.replace(cfg=1.0 if isinstance(sampling, BitSampling) else 0.0)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The graphs of one precision and the layout of their weights.bin, before they are written."""

    graphs: list[GraphBuilder]
    layout: WeightLayout

    @classmethod
    def of(cls, graphs: list[GraphBuilder]) -> _Plan:
        return cls(graphs=graphs, layout=plan_layout(graphs))

    def write(
        self,
        folder: Path,
        precision: Precision,
        manifest: Manifest,
        read: ReadKey,
        advance: Callable[[int], None],
    ) -> Manifest:
        """Write weights and graphs to `folder`; return `manifest` with these files added."""
        (folder / precision).mkdir()
        weights = f"{precision}/{names.WEIGHTS}"
        files = {weights: write_weights(folder / weights, self.layout, read, advance)}
        infos = {}
        for graph in self.graphs:
            infos[graph.name] = info = GraphInfo(
                file=f"{precision}/{names.graph_file(graph.name)}",
                inputs=tuple(graph.inputs),
                outputs=tuple(graph.outputs),
                weight_bytes=sum(w.nbytes for w in graph.weights.values()),
            )
            files[info.file] = save_graph(graph, folder / info.file, self.layout.locate)
        return dataclasses.replace(
            manifest,
            graphs={**manifest.graphs, precision: infos},
            files={**manifest.files, **files},
        )


def cached_reader(model: LoadedModel | LoadedTextModel) -> ReadKey:
    """Return `cached` of a model's two weight sources."""
    return cached(model.source)


def cached(source_of: Callable[[str], WeightSource]) -> ReadKey:
    """Return a function that reads a checkpoint tensor by key, with a small cache.

    Small tensors, of which several weights may be made, stay in memory. Of the large ones the last
    stays, since an int8 matrix and its scales are made of the same tensor.
    """

    @lru_cache(maxsize=64)
    def small(key: str) -> NDArray[Any]:
        return source_of(key).read(key)

    @lru_cache(maxsize=1)
    def large(key: str) -> NDArray[Any]:
        return source_of(key).read(key)

    def read(key: str) -> NDArray[Any]:
        size = np.prod(source_of(key).shape(key), dtype=np.int64)
        return large(key) if size > 1 << 16 else small(key)

    return read


def save_graph(
    graph: GraphBuilder, path: Path, locate: Callable[[str], tuple[str, int, int]]
) -> FileInfo:
    """Write a graph and check the file. Raises ExportError where the disk refuses."""
    data = graph.model(locate).SerializeToString(deterministic=True)
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ExportError(f"cannot write {path.name}: {error.strerror}") from None
    onnx.checker.check_model(str(path), full_check=True)
    return FileInfo(size=path.stat().st_size, sha256=file_sha256(path))
