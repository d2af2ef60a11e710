"""`var-deploy reconstruct`: an image rebuilt from the first of its scales."""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np

from var_deploy import names
from var_deploy.cli.console import ProgressBar
from var_deploy.cli.options import (
    check_graphs,
    load_options,
    load_pipeline,
    out_option,
    report_options,
)
from var_deploy.cli.outputs import check_at_once, file_target, runtime_json
from var_deploy.cli.token_files import SUFFIX, read_tokens
from var_deploy.config import RuntimeConfig
from var_deploy.errors import UsageError
from var_deploy.image.images import grid, origin_text
from var_deploy.image.pictures import frame_of, read_pictures
from var_deploy.manifest import read_manifest


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--scales",
    metavar="LIST",
    default="1..K",
    show_default=True,
    help="From how many scales: as in 3, 1,4,K or 2..5; K is all of them.",
)
@out_option(
    required=True,
    metavar="FILE",
    help="The images in a row; a row for each where a file of tokens holds several. -: standard "
    "output.",
)
@load_options
@report_options
def reconstruct(
    bundle: Path,
    image: Path,
    scales: str,
    out: str,
    config: RuntimeConfig,
    quiet: bool,
    as_json: bool,
) -> None:
    """Rebuild IMAGE from the first k of its scales, for every k that --scales names.

    The last of K is how the model's tokenizer sees the image. IMAGE is a picture of any size, see
    encode, or an .npz file that encode wrote.

    \b
    Example:
      var-deploy reconstruct build/pocket photo.jpg --out strip.png
      var-deploy reconstruct build/pocket tokens.npz --scales 1,3,K --out three.png
    """
    # everything that can be wrong is looked at before the weights are loaded
    target = file_target(out)
    manifest = read_manifest(bundle)
    tokenizer, most = manifest.model.tokenizer, manifest.model.scales
    counts = _counts(scales, most)
    pixels = tokens = None
    if image.suffix.lower() == SUFFIX:
        from var_deploy.runtime.tokenizer import check_tokens

        tokens = check_tokens(manifest.model, read_tokens(image, most), max(counts))
    else:
        pixels = read_pictures(image, frame_of(tokenizer), tokenizer.image_channels)
        check_graphs(manifest, config, names.ENCODER)
    shown = len(counts) * (1 if tokens is None else len(tokens[0]))
    check_at_once(shown, tokenizer.image_size)
    target.check_sheet(manifest, shown, len(counts))
    check_graphs(manifest, config, names.ACCUMULATE)

    started = time.monotonic()
    with ProgressBar(quiet=quiet) as progress:
        progress.update("loading", 0.0)
        with load_pipeline(bundle, manifest, config) as pipe:
            if pixels is not None:
                progress.update("encoding", 0.0)
                tokens = pipe.encode(pixels)
            rebuilt = []
            for n, count in enumerate(counts):
                progress.update(f"{count} of {most} scales", n / len(counts))
                rebuilt.append(pipe.decode(tokens or [], scales=count))
            how = pipe.describe()
    seconds = time.monotonic() - started

    rows = np.stack(rebuilt, axis=1)  # [N, scales, H, W, C]
    images = rows.reshape(-1, *rows.shape[2:])
    sheet = images[0] if len(images) == 1 else grid(images, columns=len(counts))
    settings = {
        **origin_text(manifest, how.precision),
        "picture": image.name,
        "scales": f"{','.join(map(str, counts))} of {most}",
    }
    target.save(sheet, settings)

    if as_json:
        done = {"out": str(target.path), "scales": counts, "seconds": round(seconds, 3)}
        target.tell_json({**done, "settings": settings, "runtime": runtime_json(how)})
    elif not quiet:
        target.tell(f"wrote {target} (from {settings['scales']} scales, {seconds:.1f} s)")


def _counts(text: str, scales: int) -> list[int]:
    """Numbers of scales, from "1..K", "3" or "1,4,K"."""
    counts: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        low = _count(first, text, scales)
        high = _count(last, text, scales) if dots else low
        if low > high:
            raise UsageError(f"--scales {text!r}: {part.strip()} runs backwards")
        counts += range(low, high + 1)
    return counts


def _count(part: str, text: str, scales: int) -> int:
    word = part.strip()
    if word.upper() == "K":
        return scales
    if not (word.isascii() and word.isdigit() and len(word) < 10):
        raise UsageError(
            f"--scales {text!r} is no number of scales, nor a list such as 1,4,K or 1..K"
        )
    if not 1 <= int(word) <= scales:
        raise UsageError(f"--scales {text!r}: the model has 1 to {scales}, found {word}")
    return int(word)
