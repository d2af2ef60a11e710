"""Predicts memory, disk and least time of a model on a device, before a bundle exists."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from var_deploy.bundle.graph_refs import held_layouts
from var_deploy.config import LAYOUTS, Layout, Precision
from var_deploy.manifest import Manifest
from var_deploy.planning.costs import launches
from var_deploy.planning.devices import Device
from var_deploy.planning.memory import (
    BuildMemory,
    Footprint,
    Library,
    build_memory,
    bundle_bytes,
    engine_bytes,
    footprint,
    upload_bytes,
)
from var_deploy.planning.precisions import check_gpu_precision
from var_deploy.planning.selection import ASKED, layout_that_fits
from var_deploy.planning.text_costs import text_encoder_weights, text_encoder_work
from var_deploy.planning.text_memory import (
    TextEncoderMemory,
    keeps_text_encoder,
    text_encoder_memory,
)
from var_deploy.planning.workload import FULL, Work, Workload, itemsize_of
from var_deploy.spec import TextEncoderSpec

ASSUMPTION = (
    "A floor, not a promise: every launch takes the longer of its bytes over the published "
    "bandwidth and its operations over the published dense rates. Launches, activations that "
    "leave the caches and clocks below the maximum come on top; weights small enough to stay in a "
    "cache from one scale to the next may beat it."
)
ESTIMATES: Mapping[Library, str] = {
    "tensorrt": "Cache and buffers are exact; scratch memory, the runtime, the engines and what "
    "building takes are estimates that no board has confirmed yet.",
    "onnxruntime-cpu": "Cache and buffers are exact; the rest is an estimate, within a third of "
    "what processes were seen to hold.",
}


@dataclass(frozen=True, kw_only=True)
class LaunchTime:
    """The least time of one launch on a device.

    Attributes:
        tokens: tokens of its scale.
        past: tokens in the cache before the launch.
        moving: seconds for its bytes; computing: seconds for its operations.
    """

    work: Work
    tokens: int
    past: int
    moving: float
    computing: float

    @property
    def seconds(self) -> float:
        return max(self.moving, self.computing)

    @property
    def bound(self) -> str:
        """What limits the time: "memory" or "compute"."""
        return "memory" if self.moving >= self.computing else "compute"

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "seconds": self.seconds, "bound": self.bound}


@dataclass(frozen=True, kw_only=True)
class TextEncoderWorkload:
    """A text encoder to plan for.

    Attributes:
        name: of its bundle or preset.
        precision: that of its graph.
        bundle: bytes on disk; None where it is yet to be exported.
    """

    name: str
    spec: TextEncoderSpec
    precision: Precision
    bundle: int | None = None


@dataclass(frozen=True, kw_only=True)
class TextEncoderPlan:
    """The prediction of a text encoder beside the scales in the chosen layout.

    Attributes:
        bundle: its bytes on disk; `measured`: whether they were read from its manifest.
        kept: whether it stays in memory beside the scales; see `keeps_text_encoder`.
        reason: why.
        launch: the least time of a prompt.
    """

    workload: TextEncoderWorkload
    bundle: int
    measured: bool
    memory: TextEncoderMemory
    kept: bool
    reason: str
    launch: LaunchTime

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; bytes, operations and seconds."""
        return {
            "model": self.workload.name,
            "precision": self.workload.precision,
            "text_length": self.workload.spec.length,
            "bundle_bytes": self.bundle,
            "bundle_measured": self.measured,
            "memory": {**dataclasses.asdict(self.memory), "peak": self.memory.peak},
            "kept": self.kept,
            "reason": self.reason,
            "launch": self.launch.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class LayoutPlan:
    """Memory of one layout on the device, and with TensorRT disk and memory to build engines.

    `missing` and `build_missing` are the bytes that the device lacks, 0 where the layout fits. A
    text encoder counts where it needs more than a generation.
    """

    footprint: Footprint
    missing: int
    engines: int = 0
    build: BuildMemory | None = None
    build_missing: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The prediction of a workload on a device.

    Attributes:
        name: name of the preset or bundle.
        layout: the chosen layout; `reason`: why it was chosen.
        held: the layouts that can be chosen: those of the bundle, or both of a model that is yet to
            be exported.
        bundle: bytes of the bundle; `measured`: whether they were read from its manifest.
        launches: the least time of each launch of B images.
        text_encoder: the one that a text-to-image model takes its features from.
    """

    name: str
    workload: Workload
    device: Device
    library: Library
    layouts: Mapping[Layout, LayoutPlan]
    layout: Layout
    reason: str
    held: tuple[Layout, ...] = LAYOUTS
    bundle: int
    measured: bool
    launches: tuple[LaunchTime, ...]
    text_encoder: TextEncoderPlan | None = None

    @property
    def peak(self) -> int:
        """The most bytes at one time in the chosen layout, with the text encoder."""
        scales, text = self.layouts[self.layout].footprint.peak, self.text_encoder
        if text is None:
            return scales
        return scales + text.memory.peak if text.kept else max(scales, text.memory.peak)

    @property
    def stored(self) -> int:
        """Bytes on disk of the bundles, and of the engines of the chosen layout."""
        text = self.text_encoder.bundle if self.text_encoder else 0
        return self.bundle + text + self.layouts[self.layout].engines

    @property
    def seconds(self) -> float:
        """The least time of B images, of prompts whose features are known."""
        # the same digits on every Python: sum rounds otherwise from 3.12 on
        return math.fsum(launch.seconds for launch in self.launches)

    @property
    def fits(self) -> bool:
        """Whether the device has memory to generate in the chosen layout."""
        return self.layouts[self.layout].missing == 0

    @property
    def misfit(self) -> str:
        """Why it does not fit, and what to do, in one line; "" where it fits."""
        if self.fits:
            return ""
        lacks = {name: plan.missing for name, plan in self.layouts.items()}
        said = f"{self.name} does not fit {self.device.title} in layout {self.layout}"
        said += f": {lacks[self.layout] / 1e9:.2f} GB are missing; "
        for other, missing in lacks.items():
            if not missing:
                again = "" if other in self.held else ", once exported with --layout both"
                return f"{said}layout {other} fits: give --layout {other}{again}"
        batch = ", a smaller --batch" if self.workload.batch > 1 else ""
        return f"{said}take a larger device{batch} or a smaller model: no layout fits"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; bytes, operations and seconds, None for what does not fit."""
        w = self.workload
        layouts = {}
        for name, layout in self.layouts.items():
            data = dataclasses.asdict(layout)
            data["footprint"]["peak"] = layout.footprint.peak
            if layout.build:
                data["build"]["total"] = layout.build.total
            layouts[name] = data
        return {
            "model": self.name,
            "batch": w.batch,
            "guidance": w.guidance,
            "precision": w.precision,
            "more_smooth": w.more_smooth,
            "library": self.library,
            "device": {**dataclasses.asdict(self.device), "available": self.device.available},
            "bundle_bytes": self.bundle,
            "bundle_measured": self.measured,
            "layouts": layouts,
            "layout": self.layout,
            "reason": self.reason,
            "fits": self.fits,
            "upload_bytes": upload_bytes(w),
            **({"text_encoder": self.text_encoder.to_json()} if self.text_encoder else {}),
            "launches": [launch.to_json() for launch in self.launches],
            "seconds": self.seconds if self.fits else None,
            "assumptions": [ASSUMPTION, ESTIMATES[self.library]],
        }


def make_plan(
    workload: Workload,
    device: Device,
    *,
    name: str,
    layout: Layout | None = None,
    manifest: Manifest | None = None,
    text_encoder: TextEncoderWorkload | None = None,
) -> Plan:
    """Predict `workload` on `device`, with TensorRT where it has a GPU, else with ONNX Runtime.

    Args:
        layout: None chooses the layout.
        manifest: the manifest of the bundle, where one exists already.
        text_encoder: of a text-to-image model; None leaves it out.

    Raises UsageError for int8 on a GPU.
    """
    library: Library = "onnxruntime-cpu" if device.sm is None else "tensorrt"
    if device.sm is not None:
        check_gpu_precision(workload.precision, f"TensorRT on {device.title}")
    least = _text_memory(text_encoder, device).peak if text_encoder else 0
    plans = {each: _layout_plan(workload, device, each, library, least) for each in LAYOUTS}
    held = LAYOUTS if manifest is None else held_layouts(
        manifest.graphs.get(workload.precision, {})
    )
    chosen, reason = layout_that_fits(
        {each: plans[each].footprint for each in held or LAYOUTS}, device.available, library
    )
    if layout is not None:
        chosen, reason = layout, ASKED
    measured = manifest is not None and workload.precision in manifest.graphs
    if manifest is not None and measured:
        bundle = sum(file.size for file in manifest.files.values())
    else:
        bundle = bundle_bytes(workload, (workload.precision,))
    return Plan(
        name=name,
        workload=workload,
        device=device,
        library=library,
        layouts=plans,
        layout=chosen,
        reason=reason,
        held=tuple(held or LAYOUTS),
        bundle=bundle,
        measured=measured,
        launches=launch_times(workload, device),
        text_encoder=None
        if text_encoder is None
        else _text_plan(text_encoder, device, plans[chosen].footprint.peak),
    )


def launch_times(workload: Workload, device: Device) -> tuple[LaunchTime, ...]:
    """max(bytes / bandwidth, operations / rate) of every launch; see ASSUMPTION."""
    model, times = workload.model, []
    for work in launches(workload, _read_itemsize(workload.precision, device)):
        scale = None
        if work.name in workload.scale_graphs:
            scale = workload.scale_graphs.index(work.name)
        times.append(
            LaunchTime(
                work=work,
                tokens=0 if scale is None else model.scale_lengths[scale],
                past=0 if scale is None else model.prefix_lengths[scale],
                moving=work.traffic / device.bandwidth,
                computing=computing_seconds(work, workload.precision, device),
            )
        )
    return tuple(times)


def _read_itemsize(precision: Precision, device: Device) -> int | None:
    """Bytes per weight as the device reads them; None: those of the precision."""
    return FULL if device.sm is None and precision == "fp16" else None  # a CPU computes it in fp32


def computing_seconds(work: Work, precision: Precision, device: Device) -> float:
    """Seconds for the operations of a launch."""
    rate = device.rate(precision)
    return work.compute_operations / rate + work.full_operations / device.full_rate


def _text_memory(text: TextEncoderWorkload, device: Device) -> TextEncoderMemory:
    return text_encoder_memory(text.spec, text.precision, gpu=device.sm is not None)


def _text_plan(text: TextEncoderWorkload, device: Device, scales: int) -> TextEncoderPlan:
    """Predict a text encoder beside scales whose generation takes `scales` bytes."""
    memory = _text_memory(text, device)
    kept, reason = keeps_text_encoder(scales, memory.peak, device.available)
    weights = text_encoder_weights(text.spec, text.precision)
    work = text_encoder_work(
        text.spec, text.precision, _read_itemsize(text.precision, device)
    )
    return TextEncoderPlan(
        workload=text,
        bundle=weights.nbytes(itemsize_of(text.precision)) if text.bundle is None else text.bundle,
        measured=text.bundle is not None,
        memory=memory,
        kept=kept,
        reason=reason,
        launch=LaunchTime(
            work=work,
            tokens=text.spec.length,
            past=0,
            moving=work.traffic / device.bandwidth,
            computing=computing_seconds(work, text.precision, device),
        ),
    )


def _layout_plan(
    workload: Workload, device: Device, layout: Layout, library: Library, least: int
) -> LayoutPlan:
    """Predict one layout; `least` bytes are needed in any case."""
    held = footprint(workload, layout, library, one_memory=device.one_memory)
    missing = max(max(held.peak, least) - device.available, 0)
    if library != "tensorrt":
        return LayoutPlan(footprint=held, missing=missing)
    build = build_memory(workload, layout)
    needed = build.total if device.one_memory else build.device
    return LayoutPlan(
        footprint=held,
        missing=missing,
        engines=engine_bytes(workload, layout),
        build=build,
        build_missing=max(needed - device.available, 0),
    )
