"""`var-deploy edit`: inpaints a part of an image, or continues it outside of a box."""

from __future__ import annotations

import time
from pathlib import Path

import click
from PIL import Image

from var_deploy import names
from var_deploy.cli.console import ProgressBar, say
from var_deploy.cli.options import (
    SamplingOptions,
    check_graphs,
    count_option,
    label_option,
    load_options,
    load_pipeline,
    out_option,
    report_options,
    sampling_options,
)
from var_deploy.cli.outputs import (
    GeneratedImages,
    check_at_once,
    image_target,
    known_labels,
    runtime_json,
)
from var_deploy.cli.prompts import PromptOptions, prompt_options
from var_deploy.config import RuntimeConfig
from var_deploy.errors import UsageError
from var_deploy.image.editing import box_mask
from var_deploy.image.images import settings_text
from var_deploy.image.pictures import Mask, read_edit, upright
from var_deploy.manifest import read_manifest
from var_deploy.sampling import image_seeds, parse_seeds


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--mask",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="An image as large as IMAGE: new where it is white (of 0 and one other number, where it "
    "is not 0), or where it is transparent.",
)
@click.option("--box", metavar="X0,Y0,X1,Y1", help="New from (X0, Y0) up to (X1, Y1), in pixels.")
@click.option("--outside", is_flag=True, help="Generate the part outside of the mask or box.")
@label_option(
    "--label",
    "--labels",
    how="give it once, with one class",
    metavar="NAME",
    show_default="none: what is around decides",
    help="What to generate there: a name, a number, or none.",
)
@prompt_options(one=True)
@click.option(
    "--seed",
    metavar="N[,N,…]",
    default="0",
    show_default=True,
    help="0 to 2⁶⁴-1; image i has seed + i, or one of several seeds.",
)
@count_option(
    type=click.IntRange(1),
    show_default="one per seed",
    help="Images.",
)
@click.option(
    "--keep-pixels",
    is_flag=True,
    help="Outside keep the pixels of IMAGE, not what the model sees in them.",
)
@out_option(
    type=str,  # a trailing slash, which a Path would drop, asks for a folder
    required=True,
    help="x.png, x.jpg or x.webp: one image, or a grid; a folder: single PNGs; -: standard output.",
)
@sampling_options
@load_options
@report_options
def edit(
    bundle: Path,
    image: Path,
    mask: Path | None,
    box: str | None,
    outside: bool,
    label: str | None,
    prompts: PromptOptions,
    seed: str,
    count: int | None,
    keep_pixels: bool,
    out: str,
    sampling: SamplingOptions,
    config: RuntimeConfig,
    quiet: bool,
    as_json: bool,
) -> None:
    """Inpaint a part of IMAGE: fill a hole, change a thing, or continue it outside of a box.

    Tokens stay where the mask leaves at least half of their area, so the rest is kept as the
    tokenizer reconstructs it, and near the edge it changes a little; --keep-pixels puts it back as
    it was, with a soft seam. IMAGE may have any size, see encode; mask and box are resized and
    cropped with it. A mask or box that is too small to change a token ends with 1, and nothing is
    written. For a SETTING see generate.

    \b
    Example:
      var-deploy edit build/pocket photo.png --box 16,16,48,48 --seed 3 --out filled.png
      var-deploy edit build/pocket photo.png --mask mask.png --label star --count 8 --out stars/
      var-deploy edit build/pocket photo.png --box 8,8,56,56 --outside --keep-pixels --out more.png
    """
    # everything that can be wrong is looked at before the weights are loaded
    target = image_target(out)
    manifest = read_manifest(bundle)
    check_at_once(count or 1, manifest.model.tokenizer.image_size)
    given = parse_seeds(seed)
    seeds = image_seeds(given if len(given) > 1 else given[0], count)
    settings = sampling.over(manifest)
    texts = prompts.read(manifest)
    if manifest.takes_text and label is not None:
        raise UsageError('this bundle takes prompts, not labels: --prompt "…"')
    chosen = None if label is None else known_labels([label], manifest, "--label")[0]
    tokenizer = manifest.model.tokenizer
    picture = upright(image, tokenizer.image_channels)
    prepared = read_edit(picture, _mask(picture, mask, box), tokenizer, outside=outside)
    check_graphs(manifest, config, names.ENCODER)
    target.check_sheet(manifest, len(seeds), labels=[chosen] * len(seeds))

    started = time.monotonic()
    with ProgressBar(quiet=quiet) as progress:
        progress.update("loading", 0.0)
        with load_pipeline(
            bundle, manifest, prompts.over(config), prompts.text_encoder
        ) as pipe:
            remarks = pipe.remarks([*texts, prompts.negative or ""]) if texts else []
            images = pipe.edit(
                prepared.pixels[0],
                prepared.new,
                label=chosen,
                prompt=texts[0] if texts else None,
                negative=prompts.negative,
                seed=seeds,
                sampling=settings,
                keep_pixels=keep_pixels,
                on_progress=progress.images(len(seeds)),
            )
            how = pipe.describe()
    seconds = time.monotonic() - started

    text = settings_text(manifest, how.precision, settings, seeds)
    text["picture"] = image.name
    text |= {"box": box.strip()} if box is not None else {"mask": mask.name if mask else ""}
    text |= {"outside": "yes"} if outside else {}
    text |= {"keep_pixels": "yes"} if keep_pixels else {}
    drawn = GeneratedImages(
        manifest=manifest,
        images=images,
        labels=[chosen] * len(seeds),
        seeds=seeds,
        text=prompts.told(text),
        prompts=(texts or [""]) * len(seeds) if manifest.takes_text else (),
    )
    written = drawn.save(target)

    if as_json:
        done = {"out": str(target.path), "count": len(seeds), "seconds": round(seconds, 3)}
        told = {"remarks": remarks} if texts else {}
        settled = drawn.settings(written)
        target.tell_json({**done, **told, "settings": settled, "runtime": runtime_json(how)})
    elif not quiet:
        for line in remarks:
            say(line, err=True)
        target.tell(f"wrote {target} ({drawn}, {seconds:.1f} s)")


def _mask(picture: Image.Image, mask: Path | None, box: str | None) -> Mask:
    """The mask as it was given, a box as a mask of the picture's size."""
    if (mask is None) == (box is None):
        raise UsageError("say with --mask or with --box, one of them, what is to be drawn anew")
    return mask if mask is not None else box_mask(_corners(box or ""), *picture.size[::-1])


def _corners(text: str) -> list[int]:
    try:
        corners = [int(part) for part in text.split(",")]
    except ValueError:
        corners = []
    if len(corners) != 4:
        raise UsageError(f"--box takes four whole numbers x0,y0,x1,y1, found {text!r}")
    return corners
