"""`var-deploy plan`: what a model needs on a device, before anything is built."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import click

from var_deploy.cli.console import echo, facts, human_bytes, needs_extra, table, wrapped
from var_deploy.cli.options import MOST_BATCH, CheckpointOptions, checkpoint_options, verbose_option
from var_deploy.cli.prompts import check_text_width, text_encoder_option
from var_deploy.errors import BackendError, BundleError, UsageError

if TYPE_CHECKING:
    from var_deploy.config import Precision
    from var_deploy.manifest import Manifest
    from var_deploy.planning.devices import Device
    from var_deploy.planning.plan import Plan, TextEncoderWorkload
    from var_deploy.planning.workload import Workload
    from var_deploy.spec import ModelSpec, TextModelSpec


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options of a text-to-image model that is yet to be exported, and its text encoder."""

    resolution: str | None
    aspect: str | None
    text_length: int | None
    text_encoder: Path | None

    def refuse(self, what: str, *names: str) -> None:
        """Raise UsageError where one of the options `names` was given, which `what` excludes."""
        for name in names:
            if getattr(self, name) is not None:
                raise UsageError(f"{what}: leave --{name.replace('_', '-')} out")


def _devices(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """What the shell may complete --device to."""
    from var_deploy.planning.devices import DEVICES

    return [name for name in (*DEVICES, "this", "cpu") if name.startswith(incomplete)]


@click.command()
@click.argument("model", required=False)
@checkpoint_options
@click.option(
    "--device",
    default="this",
    show_default=True,
    metavar="NAME",
    shell_complete=_devices,
    help="orin-nano-8gb, orin-nx-16gb, agx-orin-64gb, thor, h200, rtx-4090, … or this, or cpu "
    "(its processor); a wrong name lists all.",
)
@click.option(
    "--batch", type=click.IntRange(1, MOST_BATCH), show_default="1", help="Images per launch."
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16", "int8"]),
    default="auto",
    show_default=True,
    help="auto: of a bundle, what generate takes; of a preset, fp16 on a GPU and fp32 on a CPU. "
    "int8 is for CPUs.",
)
@click.option(
    "--guidance/--no-guidance",
    default=None,
    show_default="two",
    help="Two rows per image for classifier-free guidance, or one.",
)
@click.option(
    "--layout",
    type=click.Choice(["auto", "per-scale", "shared"]),
    default="auto",
    show_default=True,
    help="One engine per scale, or one for all of them.",
)
@click.option(
    "--resolution",
    metavar="NAME|WxH",
    show_default="the preset's",
    help="Of a text-to-image preset or checkpoint: 0.06M, 0.25M, 0.60M or 1M, or the list nearest "
    "to a size.",
)
@click.option("--aspect", metavar="W:H", show_default="1:1", help="Width to height of its images.")
@click.option(
    "--text-length",
    type=click.IntRange(1, 512),
    show_default="128",
    help="Tokens of a prompt that its graphs take.",
)
@text_encoder_option("Its exported text encoder.", "the bundle's, else flan-t5-xl by its sizes")
@verbose_option()
@click.option("--json", "as_json", is_flag=True, help="The same as JSON on stdout.")
@click.option(
    "--kubernetes",
    is_flag=True,
    help="A manifest on stdout instead: a Deployment of serve with limits from this plan, its "
    "Service and its claim.",
)
@click.option(
    "--image",
    metavar="NAME",
    show_default="var-deploy:cpu, :gpu or :jetson",
    help="Container image in that manifest.",
)
def plan(
    model: str | None,
    weights: CheckpointOptions,
    device: str,
    batch: int | None,
    precision: Literal["auto", "fp32", "fp16", "int8"],
    guidance: bool | None,
    layout: Literal["auto", "per-scale", "shared"],
    resolution: str | None,
    aspect: str | None,
    text_length: int | None,
    text_encoder: Path | None,
    as_json: bool,
    kubernetes: bool,
    image: str | None,
) -> None:
    """Predict disk, memory and the least time of MODEL on a device.

    Nothing is built or run. MODEL is a preset such as var-d16 or infinity-2b, or the folder of a
    bundle, which settles batch and guidance; without it, --checkpoint and --tokenizer are needed,
    whose sizes are recognised. Ends with 1, without times, where the model does not fit the device.

    \b
    Example:
      var-deploy plan var-d16 --device orin-nano-8gb
      var-deploy plan infinity-2b --resolution 0.25M --device agx-orin-64gb
      var-deploy plan build/pocket --device this --json
      var-deploy plan var-d16 --device l4 --kubernetes --image registry/var-deploy:gpu
    """
    if kubernetes and as_json:
        raise UsageError("--json and --kubernetes are two forms of a plan; choose one")
    if image is not None and not kubernetes:
        raise UsageError("--image is for the manifest; add --kubernetes")
    if model is None and not weights.given:
        raise UsageError("give a preset, the folder of a bundle, or --checkpoint and --tokenizer")
    if model is not None and weights.given:
        raise UsageError(f"checkpoint files tell the sizes themselves: leave {model} out")
    from var_deploy.planning.devices import find_device
    from var_deploy.planning.plan import make_plan

    target = find_device(device)
    chosen: Precision | None = None if precision == "auto" else precision
    options = TextOptions(
        resolution=resolution, aspect=aspect, text_length=text_length, text_encoder=text_encoder
    )
    manifest, workload = _workload(model, weights, target, batch, chosen, guidance, options)
    bundle = None if manifest is None else Path(model or "")
    found = make_plan(
        workload,
        target,
        name=model or Path(weights.checkpoint or "").stem,
        layout=None if layout == "auto" else layout,
        manifest=manifest,
        text_encoder=_text_encoder(bundle, manifest, workload, target, options),
    )
    if kubernetes:
        echo(_as_manifest(found, image))
    else:
        echo(json.dumps(found.to_json(), indent=1) if as_json else _as_text(found))
        if not found.fits:
            raise BackendError(found.misfit)


def _workload(
    model: str | None,
    weights: CheckpointOptions,
    device: Device,
    batch: int | None,
    precision: Precision | None,
    guidance: bool | None,
    text: TextOptions,
) -> tuple[Manifest | None, Workload]:
    """Sizes of a bundle, a preset or checkpoint files; what the options say must agree with a
    bundle."""
    from var_deploy.bundle.interfaces import launch_batch
    from var_deploy.planning.workload import Workload

    path = Path(model or "")
    if model is None or not path.exists():
        spec = _preset(model, text) if model is not None else _recognised(weights, text)
        _check_guidance(guidance, spec.transformer.guidable)
        guides = spec.transformer.guidable if guidance is None else guidance
        form: Precision = precision or ("fp32" if device.sm is None else "fp16")
        launched = launch_batch(spec, form, batch or 1, guidance=guides)
        return None, Workload(model=spec, batch=launched, guidance=guides, precision=form)

    from var_deploy.manifest import read_manifest
    from var_deploy.planning.workload import workload_of

    if path.is_file():
        raise BundleError(
            f"{path} is not a bundle but a file: give checkpoints with --checkpoint and --tokenizer"
        )
    manifest = read_manifest(path)
    _check_guidance(guidance, manifest.model.transformer.guidable)
    text.refuse(f"{path} settles its scales", "resolution", "aspect", "text_length")
    if not manifest.takes_text:
        text.refuse(f"{path} takes no prompts", "text_encoder")
    if batch not in (None, manifest.batch):
        raise UsageError(
            f"{path} was exported for {manifest.batch} images a launch; export it again with "
            f"--batch {batch}, or give the name of the preset"
        )
    if guidance not in (None, manifest.guidance):
        asked, held = ("--guidance", "without") if guidance else ("--no-guidance", "with")
        raise UsageError(f"{path} was exported {held} guidance; export it again with {asked}")
    if precision is None:
        precision = _best(manifest, device)
    elif precision not in manifest.graphs:
        raise UsageError(
            f"{path} has no {precision} graphs (it has {', '.join(manifest.graphs)}); export it "
            f"again with --precision {precision}"
        )
    return manifest, workload_of(manifest, precision)


def _text_encoder(
    bundle: Path | None,
    manifest: Manifest | None,
    workload: Workload,
    device: Device,
    options: TextOptions,
) -> TextEncoderWorkload | None:
    """The text encoder of a text-to-image model: the one that was given, or that a bundle finds, or
    else flan-t5-xl, where the model takes features of its width."""
    from var_deploy.planning.plan import TextEncoderWorkload
    from var_deploy.planning.text_memory import text_encoder_precision
    from var_deploy.spec import TextModelSpec

    if not isinstance(workload.model, TextModelSpec):
        return None
    t = workload.model.transformer
    place = options.text_encoder
    if place is None and bundle is not None and manifest is not None:
        from var_deploy.runtime.text_features import text_encoder_folder

        place = text_encoder_folder(bundle, manifest)
    if place is not None:
        from var_deploy.text.manifest import read_text_encoder

        found = read_text_encoder(place)
        check_text_width(place, found.model.width, t.text_width)
        precision = text_encoder_precision(
            found.graphs, workload.precision, gpu=device.sm is not None
        )
        size = sum(file.size for file in found.files.values())
        return TextEncoderWorkload(
            name=place.name, spec=found.model, precision=precision, bundle=size
        )
    with needs_extra("export", "plan"):
        from var_deploy.export.checkpoint.presets import TEXT_ENCODERS
    for name, spec in TEXT_ENCODERS.items():
        if spec.width == t.text_width:
            spec = replace(spec, length=t.text_length)
            return TextEncoderWorkload(name=name, spec=spec, precision=workload.precision)
    return None


def _best(manifest: Manifest, device: Device) -> Precision:
    """What the runtime would take of a bundle by itself."""
    from var_deploy.config import CPU, TENSORRT, RuntimeConfig
    from var_deploy.planning.selection import Engines, Facts, select

    config = RuntimeConfig(backend=CPU if device.sm is None else TENSORRT)
    facts = Facts(engines=Engines(runner=f"TensorRT on {device.title}"))
    return cast("Precision", select(config, manifest, facts).config.precision)


def _preset(name: str, text: TextOptions) -> ModelSpec | TextModelSpec:
    with needs_extra("export", "plan"):
        from var_deploy.export.checkpoint.presets import PRESETS, TEXT_PRESETS
    if name in TEXT_PRESETS:
        from var_deploy.scale_lists import with_scales

        known = TEXT_PRESETS[name]
        scales = known.scales_for(text.resolution, text.aspect)
        return with_scales(known.spec, scales, text.text_length or known.text_length)
    if name in PRESETS:
        _refuse_text(text, name)
        return PRESETS[name].spec
    presets = (*PRESETS, *TEXT_PRESETS)
    close = difflib.get_close_matches(name, presets, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UsageError(
        f"{name} is neither the folder of a bundle nor a preset ({', '.join(presets)}){hint}"
    )


def _recognised(weights: CheckpointOptions, text: TextOptions) -> ModelSpec | TextModelSpec:
    with needs_extra("export", "plan"):
        from var_deploy.export.checkpoint.assemble import load_model
        from var_deploy.export.checkpoint.files import holds_text_model
    if weights.checkpoint is not None and holds_text_model(weights.checkpoint):
        from var_deploy.export.checkpoint.text_model import load_text_model

        return load_text_model(
            None,
            checkpoint=weights.checkpoint,
            tokenizer=weights.tokenizer,
            resolution=text.resolution,
            aspect=text.aspect,
            text_length=text.text_length,
            hints=weights.hints(),
        ).spec
    _refuse_text(text, "the checkpoint")
    return load_model(
        None, checkpoint=weights.checkpoint, tokenizer=weights.tokenizer, hints=weights.hints()
    ).spec


def _refuse_text(text: TextOptions, model: str) -> None:
    names = ("resolution", "aspect", "text_length", "text_encoder")
    text.refuse(f"{model} is not a text-to-image model", *names)


def _check_guidance(guidance: bool | None, conditional: bool) -> None:
    if guidance and not conditional:
        raise UsageError("an unconditional model has no guidance: leave --guidance out")


def _as_manifest(found: Plan, image: str | None) -> str:
    from var_deploy.host.machine import Machine
    from var_deploy.planning.kubernetes import manifest

    # a plan without a GPU is one of this machine's processor; one thread is left to the node
    return manifest(found, cpus=max(Machine().threads() - 1, 1), image=image)


def _as_text(found: Plan) -> str:
    from var_deploy.planning.plan import ASSUMPTION, ESTIMATES

    notes = [f"numbers of the device: {found.device.source}"]
    if found.device.derived:
        notes.append(f"derived: {found.device.derived}")
    notes += [ESTIMATES[found.library], *([ASSUMPTION] if found.fits else [])]
    times = ["", _times(found)] if found.fits else []  # of what cannot run there are none
    parts = [_facts(found), "", _memory(found), "", _verdict(found), *times, ""]
    return "\n".join([*parts, *map(wrapped, notes)])


def _facts(found: Plan) -> str:
    w, device = found.workload, found.device
    spec = w.model
    height, width = spec.tokenizer.image_size
    rows = [
        (
            "model",
            f"{found.name}: {spec.transformer.depth} blocks, width {spec.transformer.width}, "
            f"{width} × {height} pixels, {spec.scales} "
            f"scales, {spec.total_tokens} tokens",
        ),
        (
            "device",
            f"{device.title}: {human_bytes(device.memory)}"
            f"{', one memory for CPU and GPU' if device.one_memory and device.sm else ''}, "
            f"{human_bytes(device.reserved)} of it the system's",
        ),
        (
            "rates",
            f"{device.bandwidth / 1e9:.0f} GB/s, {device.compute_rate / 1e12:.3g} "
            f"{'TOPS int8' if device.sm is None else 'TFLOPS dense fp16'}, "
            f"{device.full_rate / 1e12:.3g} TFLOPS fp32",
        ),
        (
            "run",
            f"batch {w.batch}, guidance {'on' if w.guidance else 'off'}, {w.precision}, "
            f"{'TensorRT' if found.library == 'tensorrt' else 'ONNX Runtime'}",
        ),
        ("bundle", f"{'' if found.measured else 'about '}{human_bytes(found.bundle)} on disk"),
        *_text_facts(found),
    ]
    return facts(rows)


def _text_facts(found: Plan) -> list[tuple[str, str]]:
    """The row of a text-to-image model's text encoder; none for other models."""
    from var_deploy.spec import TextModelSpec

    text = found.text_encoder
    if text is None:
        missing = isinstance(found.workload.model, TextModelSpec)
        return [("text encoder", "not counted: none was found or given")] if missing else []
    about = "" if text.measured else "about "
    size, w = human_bytes(text.bundle), text.workload
    return [
        (
            "text encoder",
            f"{w.name}, {w.spec.length} tokens, {w.precision}, ONNX Runtime, {about}{size} on disk",
        )
    ]


def _memory(found: Plan) -> str:
    plans = found.layouts.values()
    rows: list[tuple[str, ...]] = [("memory", *found.layouts)]
    for part in ("weights", "cache", "buffers", "scratch", "runtime", "loading", "peak"):
        sizes = [getattr(layout.footprint, part) for layout in plans]
        if any(sizes):
            label = {"scratch": "scratch (or loading)", "loading": "while loading"}.get(part, part)
            rows.append((label, *map(human_bytes, sizes)))
    if found.text_encoder is not None:
        encoder = human_bytes(found.text_encoder.memory.peak)
        rows.append(("text encoder", *(encoder for _ in plans)))
    rows.append(("generates", *(_lacking(layout.missing) for layout in plans)))
    if found.library == "tensorrt":
        rows.append(("engines on disk", *(human_bytes(layout.engines) for layout in plans)))
        builds = [layout.build for layout in plans if layout.build]
        for side in ("host", "device"):
            rows.append((f"to build, {side}", *(human_bytes(getattr(b, side)) for b in builds)))
        rows.append(("builds", *(_lacking(layout.build_missing) for layout in plans)))
    return table(rows, right=(1, 2))


def _lacking(missing: int) -> str:
    return f"no, lacks {human_bytes(missing)}" if missing else "yes"


def _verdict(found: Plan) -> str:
    said = wrapped(f"layout {found.layout}: {found.reason}")
    text = found.text_encoder
    if text is None:
        return said
    stays = "stays in memory" if text.kept else "is released before the scales are loaded"
    peak = f"; the peak of both is {human_bytes(found.peak)}"
    return f"{said}\n{wrapped(f'text encoder: {stays}: {text.reason}{peak}')}"


def _times(found: Plan) -> str:
    rows: list[tuple[str, ...]] = [
        ("launch", "tokens", "past", "operations", "bytes", "at least", "bound by")
    ]
    text = found.text_encoder
    for launch in (*((text.launch,) if text else ()), *found.launches):
        work = launch.work
        rows.append(
            (
                work.name,
                str(launch.tokens or ""),
                str(launch.past if launch.tokens else ""),
                f"{(work.compute_operations + work.full_operations) / 1e9:.1f} G",
                human_bytes(work.traffic),
                f"{launch.seconds * 1e3:.2f} ms",
                launch.bound,
            )
        )
    images = "one image" if found.workload.batch == 1 else f"{found.workload.batch} images"
    total = f"{images}: at least {found.seconds * 1e3:.1f} ms"
    if text:
        total += f", and {text.launch.seconds * 1e3:.1f} ms more for a new prompt"
    return table(rows, right=(1, 2, 3, 4, 5), optional=(2, 3, 4)) + f"\n\n{total}"
