"""The steps of `device_check` for one bundle.

Only one loop is open at a time, so that each variant has all memory.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from var_deploy.bench.roofline import reached, rooflines
from var_deploy.bundle.graph_refs import held_layouts
from var_deploy.config import CPU, CUDA, LAYOUTS, TENSORRT, Layout, Precision
from var_deploy.device_check.agreement import (
    Outcome,
    Reference,
    compare,
    evaluate,
    make_cases,
    observe,
)
from var_deploy.device_check.measure import Latency, time_images
from var_deploy.device_check.report import DeviceReport, Found, NotRunError
from var_deploy.device_check.variants import Variant, onnxruntime_lacks, opened
from var_deploy.host.installation import pip_install
from var_deploy.manifest import Manifest, check_files, read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.planning.devices import Device
from var_deploy.planning.memory import footprint
from var_deploy.planning.plan import make_plan
from var_deploy.planning.workload import workload_of
from var_deploy.runtime.backends.onnxruntime_cpu import OrtCpuBackend
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.runtime.measure import launch_names
from var_deploy.runtime.tensorrt.build import build_bundle
from var_deploy.runtime.tensorrt.library import Library

NO_GPU = "there is no GPU, see the step GPU"
NO_TENSORRT = "TensorRT is missing, see the step TensorRT"
EXPORT_BOTH = "export it with --precision fp32 --precision fp16"


@dataclass(kw_only=True)
class Here:
    """Facts about this machine, filled by the first steps.

    Attributes:
        gpu: whether there is a GPU that CUDA can use.
        library: TensorRT, None where it is not installed.
        low_memory: build each engine in a process of its own.
        published: the device with the published rates of `plan`; None where unknown.
        device: the device with the rates for rooflines; None where unknown.
        rates: source of the rates of `device`.
    """

    gpu: bool = False
    library: Library | None = None
    low_memory: bool = False
    published: Device | None = None
    device: Device | None = None
    rates: str = ""


class BundleCheck:
    """Runs the steps for one bundle and keeps their results."""

    manifest: Manifest

    def __init__(
        self, bundle: Path, name: str, report: DeviceReport, here: Here, images: int, budget: float
    ) -> None:
        self._bundle, self._name, self._report, self._here = bundle, name, report, here
        self._images, self._budget = images, budget
        self._reference: Reference | None = None
        self._built: set[str] = set()
        self._outcomes: dict[Variant, Outcome] = {}
        self._latencies: dict[Variant, Latency] = {}

    def open(self) -> bool:
        """Read and check the bundle; return whether it is intact."""
        return self._report.step("bundle", self._read) is not None

    def run(self) -> None:
        """Run all steps, each after the steps that it depends on."""
        report = self._report
        report.step("plan", self._plan)
        report.step("reference", self._refer)
        for layout in LAYOUTS:
            report.step(f"build {layout}", partial(self._build, layout))
        report.step("build encoder", partial(self._build, self._common_layout, encoder=True))
        engines = [
            Variant(backend=TENSORRT, precision=self.precision, layout=layout, cuda_graph=graphs)
            for layout in LAYOUTS
            for graphs in (True, False)
        ]
        others = [
            Variant(backend=CUDA, precision=precision, layout=layout, cuda_graph=graphs)
            for precision in self._precisions
            if precision != "int8"  # for CPUs
            for layout in LAYOUTS
            for graphs in (True, False)
        ]
        rehearsal = [
            Variant(backend=CPU, precision=self.precision, layout=layout) for layout in LAYOUTS
        ]
        for variant in (*engines, *others, *rehearsal):
            report.step(variant.title, partial(self._run, variant))
        separate, shared = engines[0], engines[2]
        layouts = rehearsal if set(rehearsal) <= set(self._outcomes) else [separate, shared]
        report.step("layouts agree", partial(self._compare, *layouts))
        for variant in (*engines, *others):
            if variant.cuda_graph:
                plain = dataclasses.replace(variant, cuda_graph=False)
                name = f"CUDA graph changes nothing, {variant.title}"
                report.step(name, partial(self._compare, variant, plain))
        report.step("generate", self._generate)

    @property
    def precision(self) -> Precision:
        """Precision of the engines."""
        return "fp16" if "fp16" in self._precisions else self._precisions[0]

    @property
    def _precisions(self) -> tuple[Precision, ...]:
        """Precisions that the bundle holds, in its order."""
        return cast("tuple[Precision, ...]", tuple(self.manifest.graphs))

    def best(self) -> float | None:
        """Seconds of one generation with the fastest variant on a GPU, None where none ran."""
        found = [
            latency.image.median
            for variant, latency in self._latencies.items()
            if variant.backend != CPU
        ]
        return min(found, default=None)

    # before anything runs

    def _read(self) -> Found:
        self.manifest = manifest = read_manifest(self._bundle)
        manifest.code_model("device_check")
        check_files(self._bundle, manifest)
        precisions = list(manifest.graphs)
        return Found(
            result={
                "digest": manifest.digest(),
                "preset": manifest.preset,
                "random_weights": manifest.checkpoint.get("transformer", {}).get("random_weights"),
                "batch": manifest.batch,
                "guidance": manifest.guidance,
                "precisions": precisions,
                "model": manifest.model.to_json(),
                "sampling": dataclasses.asdict(manifest.defaults),
            },
            headline=f"{' and '.join(precisions)}, batch {manifest.batch}, guidance "
            f"{'on' if manifest.guidance else 'off'}",
        )

    def _plan(self) -> Found:
        if self._here.published is None:
            raise NotRunError("the rates of this machine are not known")
        workload = workload_of(self.manifest, self.precision)
        plan = make_plan(
            workload, self._here.published, name=self._name, manifest=self.manifest
        )
        peak = plan.layouts[plan.layout].footprint.peak
        fits = f"fits, at least {plan.seconds * 1e3:.2f} ms" if plan.fits else "does not fit"
        return Found(
            result=plan.to_json(),
            headline=f"layout {plan.layout}, {peak / 1e9:.2f} GB, {fits}",
        )

    def _refer(self) -> Found:
        if importlib.util.find_spec("onnxruntime") is None:
            raise NotRunError(f"onnxruntime is not installed; run {pip_install('cpu')}")
        if "fp32" not in self.manifest.graphs:
            raise NotRunError(f"the bundle has no fp32 graphs to compare with; {EXPORT_BOTH}")
        cases = make_cases(self.manifest, self._images)
        self._reference = reference = Reference(self._open_reference, cases)
        images = len(cases) * self.manifest.batch
        tokens = sum(t.size for case in reference.tokens for t in case)
        return Found(
            result={"images": images, "tokens": tokens, "labels": [c.labels for c in cases]},
            headline=f"{images} images, {tokens} tokens, fp32 on the CPU",
        )

    def _open_reference(self) -> ScaleLoop:
        return ScaleLoop(
            self._bundle, self.manifest, OrtCpuBackend(), "fp32", self._common_layout
        )

    @property
    def _common_layout(self) -> Layout:
        """Layout "shared" where the bundle has it in all precisions, else "per-scale"."""
        held = map(held_layouts, self.manifest.graphs.values())
        everywhere = all("shared" in layouts for layouts in held)
        return "shared" if everywhere else "per-scale"

    def _build(self, layout: Layout, encoder: bool = False) -> Found:
        here = self._here
        if layout not in held_layouts(self.manifest.graphs[self.precision]):
            raise NotRunError(f"the bundle has no layout {layout}")
        if not here.gpu or here.library is None:
            raise NotRunError(NO_TENSORRT if here.gpu else NO_GPU)
        made = build_bundle(
            self._bundle,
            precision=self.precision,
            layout=layout,
            low_memory=here.low_memory,
            library=here.library,
            encoder=encoder,
            progress=self._report.progress,
        )
        self._built.add(layout)
        size = sum(engine.size for engine in made.engines)
        fresh = [engine for engine in made.engines if not engine.kept]
        return Found(
            result={
                "target": dataclasses.asdict(made.target),
                "low_memory": here.low_memory,
                "engines": [dataclasses.asdict(engine) for engine in made.engines],
                "notes": list(made.notes),
            },
            headline=f"{len(fresh)} built in {sum(e.seconds for e in fresh):.1f} s, "
            f"{len(made.engines) - len(fresh)} kept, {size / 1e6:.1f} MB",
        )

    # one variant

    def _run(self, variant: Variant) -> Found:
        self._refuse(variant)
        manifest, reference = self.manifest, self._reference
        started = time.perf_counter()
        with opened(self._bundle, manifest, variant, self._here.library) as running:
            loop = running.loop
            result: dict[str, Any] = {
                "load_seconds": round(time.perf_counter() - started, 3),
                "runs_on": running.runs_on,
                "clock": running.clock.source,
            }
            outcome = observe(loop, reference, variant.precision) if reference else None
            case = (reference.cases if reference else make_cases(manifest, 1))[0]
            latency = time_images(
                lambda: loop.run(case.labels, case.uniforms, case.sampling),
                running.clock,
                launch_names(manifest),
                self._budget,
            )
            if running.cuda is not None:
                left = running.cuda.free_memory()[0]
                result["memory"] = self._memory(variant, running.free, left)
        self._latencies[variant] = latency
        result["latency"] = latency.to_json()
        told, problems = [f"image {latency.image.median * 1e3:.2f} ms"], list[str]()
        if self._here.device is not None:
            workload = workload_of(manifest, variant.precision)
            least = rooflines(workload, self._here.device)
            part = reached(latency.launches, latency.image, least)
            result["floor"] = {"rates": self._here.rates, **part}
        if outcome is not None and reference is not None:
            self._outcomes[variant] = outcome
            result["agreement"], problems = evaluate(outcome, reference)
            found = result["agreement"]
            told = [
                f"{found['forced_equal']} of {found['tokens']} tokens, "
                f"{min(found['psnr_forced_db']):.1f} dB",
                *told,
            ]
        return Found(result=result, headline=", ".join(told), problems=problems)

    def _refuse(self, variant: Variant) -> None:
        """Raise NotRunError where a variant cannot run on this machine, or need not."""
        here = self._here
        if variant.backend == CPU and here.gpu:
            raise NotRunError("a rehearsal, for machines without a GPU")
        if variant.backend != CPU and not here.gpu:
            raise NotRunError(NO_GPU)
        if variant.backend == TENSORRT:
            if here.library is None:
                raise NotRunError(NO_TENSORRT)
            if variant.layout not in self._built:
                raise NotRunError("its engines were not built")
            return
        if lacking := onnxruntime_lacks(self.manifest, variant):
            raise NotRunError(lacking)

    def _memory(self, variant: Variant, before: int, after: int) -> dict[str, int]:
        """Bytes of device memory that a loop holds after it ran, and those that `plan` predicts.

        The prediction is without the CUDA context, which exists before.
        """
        workload = workload_of(self.manifest, variant.precision)
        held = footprint(workload, variant.layout, "tensorrt")
        return {
            "free_before": before,
            "free_after": after,
            "held": before - after,
            "predicted": held.peak - held.runtime,
        }

    # comparisons of variants

    def _compare(self, *pair: Variant) -> Found:
        for variant in pair:
            if variant not in self._outcomes:
                raise NotRunError(f"{variant.title} has nothing to compare")
        result, problems = compare(*(self._outcomes[variant] for variant in pair))
        told = "equal to the last bit"
        if not result["equal"]:
            told = (
                f"{result['forced_equal']} of {result['tokens']} tokens equal, "
                f"{min(result['psnr_forced_db']):.1f} dB"
            )
        result["between"] = [variant.title for variant in pair]
        return Found(result=result, headline=told, problems=problems)

    def _generate(self) -> Found:
        """Generate an image as `var-deploy generate` does, with the backend that "auto" selects."""
        conditional = self.manifest.model.transformer.conditional
        with Pipeline.load(self._bundle) as pipe:
            images = pipe.generate([0] if conditional else None)
            how = pipe.describe()
        problems = []
        ran = any(v.backend == TENSORRT for v in self._latencies)
        if ran and not how.backend.startswith(TENSORRT):
            problems.append(f"engines run here, but it took {how.backend}")
        if images.std() == 0:
            problems.append("the image has one colour")
        return Found(
            result={"runs_on": how.to_json()},
            headline=f"{how.backend} {how.precision} {how.layout}",
            problems=problems,
        )
