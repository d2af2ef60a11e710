"""`var-deploy encode`: the tokens of an image."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from var_deploy import names
from var_deploy.cli.console import ProgressBar, echo, say
from var_deploy.cli.options import (
    check_graphs,
    load_options,
    load_pipeline,
    out_option,
    report_options,
)
from var_deploy.cli.outputs import OUTPUT, output_file, runtime_json
from var_deploy.cli.token_files import SUFFIX, save_tokens
from var_deploy.config import RuntimeConfig
from var_deploy.image.pictures import frame_of, read_pictures
from var_deploy.manifest import read_manifest


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.argument("image", type=click.Path(path_type=Path))
@out_option(
    type=OUTPUT,
    required=True,
    metavar="FILE.npz",
    help="An array [1, L_k] a scale: tokens_00, tokens_01, …",
)
@load_options
@report_options
def encode(
    bundle: Path,
    image: Path,
    out: Path,
    config: RuntimeConfig,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the tokens of IMAGE, one array per scale.

    The image may have any size and mode: it is turned as its EXIF tag says, put on white where it
    is transparent, resized and cropped to the middle as in the model's training. Of an animation
    the first frame is taken. Grey pictures may have 16 bits, or floats from 0 to 1.

    \b
    Example:
      var-deploy encode build/pocket photo.jpg --out tokens.npz
      var-deploy reconstruct build/pocket tokens.npz --out strip.png
    """
    # everything that can be wrong is looked at before the weights are loaded
    output_file(out, SUFFIX)
    manifest = read_manifest(bundle)
    tokenizer = manifest.model.tokenizer
    pixels = read_pictures(image, frame_of(tokenizer), tokenizer.image_channels)
    check_graphs(manifest, config, names.ENCODER)

    started = time.monotonic()
    with ProgressBar(quiet=quiet) as progress:
        progress.update("loading", 0.0)
        with load_pipeline(bundle, manifest, config) as pipe:
            progress.update("encoding", 0.5)
            tokens = pipe.encode(pixels)
            how = pipe.describe()
    seconds = time.monotonic() - started
    save_tokens(out, tokens)

    lengths = [found.shape[1] for found in tokens]
    if as_json:
        done = {"out": str(out), "tokens": lengths, "seconds": round(seconds, 3)}
        echo(json.dumps({**done, "runtime": runtime_json(how)}, indent=1))
    elif not quiet:
        what = f"{sum(lengths)} tokens of {len(lengths)} scales"
        say(f"wrote {out} ({what}, {seconds:.1f} s)")
