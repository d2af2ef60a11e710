"""`var-deploy export`: from a checkpoint to a bundle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from var_deploy import names
from var_deploy.bundle.place import check_before_work
from var_deploy.cli.console import ProgressBar, echo, human_bytes, needs_extra, say
from var_deploy.cli.options import (
    MOST_BATCH,
    MOST_ROUNDS,
    CheckpointOptions,
    ChoiceList,
    checkpoint_options,
    out_option,
    report_options,
)
from var_deploy.cli.outputs import OUTPUT
from var_deploy.cli.prompts import check_text_width
from var_deploy.config import LAYOUT_SETS, LayoutSet, Precision
from var_deploy.errors import UsageError
from var_deploy.files.paths import utf8_path
from var_deploy.labels.class_names import read_class_names
from var_deploy.manifest import TextEncoderRef
from var_deploy.sampling import MAX_SEED
from var_deploy.spec import TextEncoderSpec

INT8_IMAGES, FP16_IMAGES = 8, 1  # of --calibration, where it is not given


@click.command(no_args_is_help=True)
@click.argument("model", required=False)
@out_option(
    type=OUTPUT,
    required=True,
    metavar="FOLDER",
    help="Folder of the bundle.",
)
@checkpoint_options
@click.option(
    "--random-weights",
    type=click.IntRange(0, MAX_SEED),
    metavar="SEED",
    help="Generate random weights for a preset instead of loading them, for benchmarks.",
)
@click.option(
    "--precision",
    type=ChoiceList(["fp32", "fp16", "int8"]),
    multiple=True,
    callback=ChoiceList.flattened,
    default=("fp32",),
    show_default="fp32",
    metavar="LIST",
    help="fp32, fp16 and int8, as in fp16,int8, or the option several times; int8 is for ONNX "
    "Runtime on CPUs.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, MOST_BATCH),
    default=1,
    show_default=True,
    help="Images per launch; fixed in the graphs.",
)
@click.option(
    "--guidance/--no-guidance",
    default=None,
    show_default="on, where the model has classes",
    help="Classifier-free guidance; doubles the rows.",
)
@click.option(
    "--more-smooth",
    is_flag=True,
    help="Mix codes as the published more_smooth does: smoother images; worsens FID.",
)
@click.option(
    "--layout",
    type=click.Choice(LAYOUT_SETS),
    default="both",
    show_default=True,
    help="One graph per scale, one for all scales, or both over the same weights.",
)
@click.option(
    "--calibration",
    type=click.IntRange(0, MOST_ROUNDS),
    metavar="N",
    help=f"Images drawn to take int8's ranges from (default: {INT8_IMAGES}), and to warn of fp16 "
    f"values near overflow (default: {FP16_IMAGES}, of a text-to-image model 0; 0 skips it).",
)
@click.option(
    "--class-names",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Names of the classes for --labels: one per line, or a JSON list.",
)
@click.option(
    "--resolution",
    metavar="NAME|WxH",
    show_default="the preset's",
    help="Of a text-to-image model: 0.06M, 0.25M, 0.60M or 1M, or the list nearest to a size.",
)
@click.option("--aspect", metavar="W:H", show_default="1:1", help="Width to height of its images.")
@click.option(
    "--text-length",
    type=click.IntRange(1, 512),
    show_default="128, or the model's longest",
    help="Tokens of a prompt that its graphs take.",
)
@click.option(
    "--text-encoder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    show_default="the preset's, where it has one",
    help="Its T5: a Hugging Face folder, which is exported to OUT-text, or a text encoder that was "
    "exported before.",
)
@click.option("--force", is_flag=True, help="Replace the bundle in --out; its engines stay.")
@report_options
def export(
    model: str | None,
    out: Path,
    weights: CheckpointOptions,
    random_weights: int | None,
    precision: tuple[Precision, ...],
    batch: int,
    guidance: bool | None,
    more_smooth: bool,
    layout: LayoutSet,
    calibration: int | None,
    class_names: Path | None,
    resolution: str | None,
    aspect: str | None,
    text_length: int | None,
    text_encoder: Path | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the bundle of MODEL: ONNX graphs, one weights file and a manifest.

    MODEL is a preset such as pocket, var-d16 or infinity-2b. Without it, --checkpoint and
    --tokenizer are needed and the architecture is recognised from them.

    \b
    Example:
      var-deploy export pocket --out build/pocket
      var-deploy export var-d16 --checkpoint var_d16.pth \\
          --tokenizer vae_ch160v4096z32.pth --precision fp16 --out build/d16
      var-deploy export infinity-2b --checkpoint infinity_2b_reg.pth \\
          --tokenizer infinity_vae_d32reg.pth --text-encoder flan-t5-xl/ \\
          --resolution 0.25M --precision fp16 --out build/inf2b
    """
    if calibration == 0 and "int8" in precision:
        raise UsageError("--calibration must be at least 1 with int8, whose ranges it gives")
    labels = read_class_names(class_names) if class_names is not None else ()
    check_before_work(out, replace=force)
    utf8_path(out.absolute(), "the library of ONNX")

    with needs_extra("export", "export"):
        from var_deploy.export.checkpoint.presets import (
            TEXT_PRESETS,
            find_preset,
            find_text_preset,
            own_file,
            own_text_encoder,
        )

        words = model in TEXT_PRESETS or (model is None and _holds_text_model(weights.checkpoint))
        if not words and (resolution or aspect or text_encoder):
            raise UsageError(
                "--resolution, --aspect and --text-encoder are for text-to-image models: leave "
                "them out"
            )
        # a wrong name, or no network, is told before torch is imported
        if model is not None and not words:
            preset = find_preset(model)
            if random_weights is None:
                with ProgressBar(quiet=quiet) as progress:
                    for part, given in weights.files().items():
                        if given is None:
                            own_file(preset, part, lambda message: progress.update(message, 0.0))
        from var_deploy.export.bundle import ExportOptions, export_bundle
        from var_deploy.export.checkpoint.assemble import load_model

        options = ExportOptions(
            precisions=precision,
            batch=batch,
            guidance=guidance,
            more_smooth=more_smooth,
            layout=layout,
            calibration=calibration or INT8_IMAGES,
        )
        with ProgressBar(quiet=quiet) as progress:
            files: dict[str, Any] = {
                "checkpoint": weights.checkpoint,
                "tokenizer": weights.tokenizer,
                "random_weights": random_weights,
                "hints": weights.hints(),
                "progress": lambda message: progress.update(message, 0.0),
            }
            loaded: Any
            ref = None
            if words:
                if labels:
                    raise UsageError("a text-to-image model has no classes: no --class-names")
                from var_deploy.export.checkpoint.text_model import load_text_model

                loaded = load_text_model(
                    model, resolution=resolution, aspect=aspect, text_length=text_length, **files
                )
                progress.update(f"scales of {loaded.scales}", 0.0)
                if model is not None and weights.checkpoint is None and random_weights is None:
                    text_encoder = text_encoder or own_text_encoder(find_text_preset(model))
                if text_encoder is not None:
                    ref = _text_encoder(
                        text_encoder, loaded, out, precision, force, progress.update
                    )
            else:
                loaded = load_model(model, **files)
            if labels:
                from var_deploy.export.checkpoint.assemble import with_labels

                loaded = with_labels(loaded, labels)
            text: dict[str, Any] = {} if ref is None else {"text_encoder": ref}
            manifest = export_bundle(loaded, out, options, progress.update, replace=force, **text)
            warning = ""
            # a text-to-image model takes minutes in PyTorch, so it is looked at where that is asked
            wanted = calibration if words else calibration != 0
            if "fp16" in precision and wanted:
                from var_deploy.export.debug.fp16_overflow import calibrate

                warning = calibrate(out, calibration or FP16_IMAGES, progress.update)
    if warning and not as_json:  # where it is told as well
        say(f"warning: {warning}", err=True)
    size = sum(file.size for file in manifest.files.values())
    if as_json:
        done = {"out": str(out), "digest": manifest.digest(), "bytes": size, "warning": warning}
        echo(json.dumps(done, indent=1))
    elif not quiet:
        say(f"wrote {out} ({len(manifest.files)} files, {human_bytes(size)})")


def _holds_text_model(checkpoint: Path | None) -> bool:
    if checkpoint is None:
        return False
    from var_deploy.export.checkpoint.files import holds_text_model

    return holds_text_model(checkpoint)


def _text_encoder(
    given: Path,
    model: Any,
    out: Path,
    precisions: tuple[Precision, ...],
    force: bool,
    progress: Any,
) -> TextEncoderRef:
    """The text encoder of a bundle at `out`: the one that was given, or one that is written beside
    the bundle."""
    from var_deploy.text.manifest import read_text_encoder

    spec = model.spec.transformer
    if (given / names.MANIFEST).is_file():
        found, folder = read_text_encoder(given), given
    else:
        from var_deploy.export.checkpoint.text_encoder import open_text_encoder
        from var_deploy.export.text_encoder_bundle import export_text_encoder

        folder = out.parent / f"{out.name}-text"
        encoder = open_text_encoder(given, spec.text_length)
        _check_text(spec, encoder.spec, given)
        found = export_text_encoder(encoder, folder, precisions, progress, replace=force)
    _check_text(spec, found.model, given)
    return TextEncoderRef(digest=found.digest(), folder=Path(os.path.abspath(folder)).name)


def _check_text(transformer: Any, encoder: TextEncoderSpec, given: Path) -> None:
    check_text_width(given, encoder.width, transformer.text_width)
    if encoder.length < transformer.text_length:
        raise UsageError(
            f"{given} takes {encoder.length} tokens, --text-length asks for "
            f"{transformer.text_length}: export it again, or ask for fewer"
        )
