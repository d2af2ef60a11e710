"""`var-deploy generate`: images from a bundle, without PyTorch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from var_deploy.cli.console import ProgressBar, say
from var_deploy.cli.filmstrip import MOST_IMAGES, Filmstrip
from var_deploy.cli.options import (
    SamplingOptions,
    count_option,
    label_option,
    load_options,
    load_pipeline,
    out_option,
    report_options,
    sampling_options,
)
from var_deploy.cli.outputs import (
    OUTPUT,
    GeneratedImages,
    check_at_once,
    check_files,
    image_file,
    image_target,
    known_labels,
    most_at_once,
    output_file,
    runtime_json,
)
from var_deploy.cli.prompts import PromptOptions, prompt_options
from var_deploy.config import RuntimeConfig
from var_deploy.errors import UsageError
from var_deploy.image.images import grid_columns, settings_text
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.sampling import Sampling, call_keys, parse_seeds, series

if TYPE_CHECKING:
    from var_deploy.pipeline import Pipeline

AHEAD = 16  # images whose prompts are encoded at once
FEW_CLASSES = 16  # up to here, a call without labels takes every class once


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@label_option(
    "--labels",
    "--label",
    how="give it once, with commas",
    metavar="LIST",
    help='Names or numbers, as in "star,3", or none for an image without a class; repeated in '
    "order to fill --count, which must leave none out.",
)
@prompt_options()
@count_option(
    type=click.IntRange(1), show_default="one per label, prompt or seed", help="Images."
)
@click.option(
    "--seed",
    metavar="N[,N,…]",
    default="0",
    show_default=True,
    help="0 to 2⁶⁴-1; image i has seed + i, or one of several seeds.",
)
@out_option(
    type=str,  # a trailing slash, which a Path would drop, asks for a folder
    required=True,
    help="x.png, x.jpg or x.webp: one image, or a grid; a folder: single PNGs; -: standard output.",
)
@click.option(
    "--preview",
    type=OUTPUT,
    metavar="FILE",
    help="Strip of previews: a row per image, a column per scale.",
)
@click.option(
    "--gif", type=OUTPUT, metavar="FILE.gif", help="The previews as a moving image."
)
@click.option(
    "--deadline",
    type=float,
    metavar="SECONDS",
    show_default="none",
    help="For all images, once the bundle is loaded.",
)
@sampling_options
@load_options
@report_options
def generate(
    bundle: Path,
    labels: str | None,
    prompts: PromptOptions,
    count: int | None,
    seed: str,
    out: str,
    preview: Path | None,
    gif: Path | None,
    deadline: float | None,
    sampling: SamplingOptions,
    config: RuntimeConfig,
    quiet: bool,
    as_json: bool,
) -> None:
    """Generate images from BUNDLE. The same seed gives the same images.

    A bundle takes either labels or prompts, as inspect tells. Image i has seed + i: that seed with
    --count 1 makes it again. The files carry settings, seed,
    labels and the bundle's digest: PNG as text, JPEG and WebP in EXIF's UserComment. WebP keeps
    every pixel, as PNG does. With --deadline an image is made of the scales that were done in
    time, one at least, and it is said how many.

    \b
    A SETTING is one number, or a value for each of the K scales, coarse to fine:
      --temperature 0.9  the same at every scale
      --cfg 4            the published ramp: 4·k/(K-1) at scale k = 0 … K-1;
                         with prompts 4 at every scale
      --cfg 1:4          a ramp of your own: 1 + (4 - 1)·k/(K-1)
      --cfg 0,1,1,2,4    a list, which must have K values
    Settings that are not given are the bundle's defaults, as inspect shows them.

    \b
    Example:
      var-deploy generate build/pocket --labels star,3 --count 16 --seed 7 --out grid.png
      var-deploy generate build/pocket --labels boat --count 4 --out boats/
      var-deploy generate build/pocket --labels tree --seed 3,8 --cfg 1:4 --out trees.png
      var-deploy generate build/pocket --labels sun --preview strip.png --gif sun.gif --out sun.png
      var-deploy generate build/inf2b --prompt "a lighthouse at night" --count 4 --out night.png
    """
    # everything that can be wrong is looked at before the weights are loaded
    target = image_target(out)
    seeds = parse_seeds(seed)
    manifest = read_manifest(bundle)
    settings = sampling.over(manifest)
    texts = prompts.read(manifest)
    chosen: list[int | None] = [None] * len(texts) if texts else _labels(labels, manifest)
    count = count or max(len(chosen), len(seeds))
    size = manifest.model.tokenizer.image_size
    if target.folder:
        check_files(count)
    else:
        check_at_once(count, size, ", or name a folder")
    at_once = most_at_once(size)
    if deadline is not None and count > at_once:
        raise UsageError(f"--deadline is for at most {at_once:,} images, found {count:,}")
    given = chosen if labels is not None else chosen[:count]
    several = seeds if len(seeds) > 1 else seeds[0]
    if texts:
        wanted_texts, seeds = series(texts, several, count, what="prompt")
        wanted: list[int | None] = [None] * count
    else:
        wanted_texts = []
        wanted, seeds = series(given, several, count)
    columns = grid_columns(len(chosen), count)
    target.check_sheet(manifest, count, columns, wanted, wanted_texts)
    story = _story(manifest, count, target.path, preview, gif)
    watched: dict[str, Any] = {} if story is None else {"on_scale": story.see}
    if deadline is not None:
        watched["deadline"] = _deadline(deadline)

    started = time.monotonic()
    with ProgressBar(quiet=quiet) as progress:
        progress.update("loading", 0.0)
        with load_pipeline(
            bundle, manifest, prompts.over(config), prompts.text_encoder
        ) as pipe:
            remarks = pipe.remarks([*wanted_texts, prompts.negative or ""]) if texts else []
            how = pipe.describe()
            images: Any
            what: dict[str, Any] = {}
            if texts:
                what = {"prompts": wanted_texts, "negative": prompts.negative}
            elif manifest.model.transformer.conditional:
                what = {"labels": wanted}
            if count > at_once:
                images = _OneByOne(pipe, what, wanted, seeds, settings, progress)
            else:
                images = pipe.generate(
                    **(what or {"labels": [0] * count}),
                    seed=seeds,
                    sampling=settings,
                    on_progress=progress.images(count),
                    **watched,
                )
            drawn = GeneratedImages(
                manifest=manifest,
                images=images,
                labels=wanted,
                seeds=seeds,
                prompts=wanted_texts,
                text=prompts.told(settings_text(manifest, how.precision, settings, seeds)),
                scales_done=None if deadline is None else images.scales_done.tolist(),
            )
            seconds = time.monotonic() - started
            written = drawn.save(target, columns)
            if count > at_once:  # they were drawn while they were written
                seconds = time.monotonic() - started
    files = {"out": str(target.path)}
    if story is not None:
        story.finish(images)
        if preview is not None:
            story.save_strip(preview, written)
            files["preview"] = str(preview)
        if gif is not None:
            story.save_gif(gif, columns)
            files["gif"] = str(gif)

    if as_json:
        done: dict[str, Any] = {**files, "count": count, "seconds": round(seconds, 3)}
        if drawn.scales_done is not None:
            done["scales_done"] = drawn.scales_done
        if texts:
            done["remarks"] = remarks
        settled = drawn.settings(written)
        target.tell_json({**done, "settings": settled, "runtime": runtime_json(how)})
    elif not quiet:
        for line in remarks:
            say(line, err=True)
        target.tell(f"wrote {target} ({drawn}, {seconds:.1f} s)")
        for path in list(files.values())[1:]:
            target.tell(f"wrote {path} (after each of {manifest.model.scales} scales)")
        if drawn.scales_done is not None:
            target.tell(drawn.stopped())


class _OneByOne:
    """Images [N, H, W, C] that are generated batch by batch during iteration, for more of them
    than memory should hold. They equal those of one call."""

    def __init__(
        self,
        pipe: Pipeline,
        what: Mapping[str, Any],
        labels: Sequence[int | None],
        seeds: Sequence[int],
        settings: Sampling,
        progress: ProgressBar,
    ) -> None:
        tokenizer = pipe.manifest.model.tokenizer
        self.shape = (len(seeds), *tokenizer.image_size, tokenizer.image_channels)
        self._pipe, self._what, self._labels, self._seeds = pipe, what, labels, seeds
        self._settings, self._progress = settings, progress

    def __len__(self) -> int:
        return len(self._seeds)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        from var_deploy.runtime.request import Request, label_numbers

        count, batch = len(self), self._pipe.manifest.batch
        texts, negative = self._what.get("prompts", ()), self._what.get("negative")
        labels = [0] * count if texts else label_numbers(self._pipe.manifest, self._labels)
        drawn = call_keys(self._seeds)
        told = self._progress.images(count)
        for first in range(0, count, batch):
            told(first, count)
            rows = slice(first, first + batch)
            prompts = None
            if part := texts[rows]:
                if first % AHEAD < batch:
                    # together: the text encoder may have to be loaded anew for them
                    ahead = [*texts[first : first + AHEAD + batch], *filter(None, [negative])]
                    self._pipe.features(list(dict.fromkeys(ahead)))
                prompts = self._pipe.features(part, [negative] * len(part) if negative else None)
            request = Request(
                labels=labels[rows],
                rng_keys=drawn[rows],
                sampling=self._settings,
                prompts=prompts,
            )
            yield from self._pipe.draw(request)


def _story(
    manifest: Manifest, count: int, out: Path, preview: Path | None, gif: Path | None
) -> Filmstrip | None:
    """What is remembered for --preview and --gif, where they are given and can be written."""
    paths = [out]
    if preview is not None:
        paths.append(image_file(preview))
    if gif is not None:
        paths.append(output_file(gif, ".gif"))
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("--out, --preview and --gif must be different files")
    if len(paths) == 1:
        return None
    if count > MOST_IMAGES:
        raise UsageError(
            f"--preview and --gif show at most {MOST_IMAGES} images, found {count}: ask for fewer"
        )
    return Filmstrip(manifest, count)


def _deadline(seconds: float) -> float:
    """Return `seconds` after validating that it is a positive number."""
    from var_deploy.runtime.request import end_of

    end_of(seconds)
    return seconds


def _labels(text: str | None, manifest: Manifest) -> list[int | None]:
    """Labels to cycle through. A model without classes takes none: one None stands in."""
    transformer = manifest.model.transformer
    if manifest.takes_text:
        raise UsageError(
            'this bundle takes prompts, not labels: --prompt "…"'
            if text is not None
            else 'this bundle takes prompts: --prompt "…"'
        )
    if text is not None:
        return known_labels(text, manifest, "--labels")
    if not transformer.conditional:
        return [None]
    if transformer.classes > FEW_CLASSES:
        raise UsageError(f"the model has {transformer.classes} classes: choose with --labels")
    return [*range(transformer.classes)]
