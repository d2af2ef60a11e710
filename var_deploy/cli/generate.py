"""`var-deploy generate`: images from a bundle, without PyTorch."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import click

from var_deploy import __version__
from var_deploy.cli.console import Progress, needs_extra
from var_deploy.errors import UsageError
from var_deploy.images import check_writable, grid, save_folder, save_png
from var_deploy.labels import resolve_labels
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.sampling import Sampling, parse_seeds, parse_setting

FEW_CLASSES = 16  # up to here, a call without labels takes every class once


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--labels",
    metavar="LIST",
    help='Names or numbers, as in "star,3"; repeated in order to fill --count.',
)
@click.option("--count", type=click.IntRange(1), help="Images (default: one a label).")
@click.option(
    "--seed",
    metavar="N[,N,…]",
    default="0",
    show_default=True,
    help="0 to 2⁶⁴-1; several: one an image, each as if it were asked for alone.",
)
@click.option(
    "--out",
    type=str,  # a trailing slash, which a Path would drop, asks for a folder
    required=True,
    help="x.png: one image, or a grid of several; a folder: single images.",
)
@click.option("--cfg", metavar="SETTING", help="Strength of guidance, 0 = off.")
@click.option("--top-k", metavar="SETTING", help="Keep the k most likely codes, 0 = all.")
@click.option("--top-p", metavar="SETTING", help="Keep the likeliest codes of this mass, 0 = all.")
@click.option("--temperature", metavar="SETTING", help="Divides the logits.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16", "int8"]),
    default="auto",
    show_default=True,
    help="auto: fp16 on a GPU; on a CPU int8 where the bundle has it, else fp32.",
)
@click.option(
    "--layout",
    type=click.Choice(["auto", "per-scale", "shared"]),
    default="auto",
    show_default=True,
    help="One graph a scale, or one for all of them.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "tensorrt_rtx", "onnxruntime-cuda", "onnxruntime-cpu"]),
    default="auto",
    show_default=True,
    help="What runs the graphs; auto takes the fastest that can.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads (default: all cores).")
@click.option(
    "--cuda-graph/--no-cuda-graph",
    default=True,
    show_default=True,
    help="TensorRT: record every launch and replay it.",
)
@click.option("--quiet", is_flag=True, help="No progress and no closing line.")
@click.option("--json", "as_json", is_flag=True, help="What was done, as JSON on stdout.")
def generate(
    bundle: Path,
    labels: str | None,
    count: int | None,
    seed: str,
    out: str,
    cfg: str | None,
    top_k: str | None,
    top_p: str | None,
    temperature: str | None,
    precision: str,
    layout: str,
    backend: str,
    threads: int | None,
    cuda_graph: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Generate images from BUNDLE. The same seed gives the same images.

    The PNGs carry settings, seed, labels and the bundle's digest as text.

    \b
    A SETTING is one number, or a value for each of the K scales, coarse to fine:
      --temperature 0.9  the same at every scale
      --cfg 4            the published ramp: 4·k/(K-1) at scale k = 0 … K-1
      --cfg 1:4          a ramp of your own: 1 + (4 - 1)·k/(K-1)
      --cfg 0,1,1,2,4    a list, which must have K values
    Settings that are not given are the bundle's defaults, as inspect shows them.

    \b
    Example:
      var-deploy generate build/pocket --labels star,3 --count 16 --seed 7 --out grid.png
      var-deploy generate build/pocket --labels boat --count 4 --out boats/
      var-deploy generate build/pocket --labels tree --seed 3,8 --cfg 1:4 --out trees.png
    """
    # everything that can be wrong is looked at before the weights are loaded
    target, as_folder = _target(out)
    seeds = parse_seeds(seed)
    manifest = read_manifest(bundle)
    given = {"cfg": cfg, "top_k": top_k, "top_p": top_p, "temperature": temperature}
    sampling = _sampling(given, manifest)
    chosen = _labels(labels, manifest)
    count = count or max(len(chosen), len(seeds))
    if len(seeds) not in (1, count):
        raise UsageError(f"{len(seeds)} seeds for {count} images: give one, or one an image")
    wanted = [chosen[n % len(chosen)] for n in range(count)]
    check_writable(target)

    started = time.monotonic()
    with needs_extra("cpu", "generate"):
        from var_deploy.pipeline import Pipeline

        with Progress(quiet=quiet) as progress:
            progress.update("loading", 0.0)
            with Pipeline.load(
                bundle,
                backend=backend,
                precision=precision,
                layout=layout,
                threads=threads,
                cuda_graph=cuda_graph,
            ) as pipe:
                images = pipe.generate(
                    wanted if manifest.model.transformer.conditional else [0] * count,
                    seed=seeds if len(seeds) > 1 else seeds[0],
                    cfg=sampling.cfg,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                    temperature=sampling.temperature,
                    on_progress=lambda done, steps: progress.update(
                        f"step {done} of {steps}", done / max(steps, 1)
                    ),
                )
                how = pipe.describe()
    seconds = time.monotonic() - started

    text = _settings(manifest, sampling, seeds, str(how.get("precision", precision)))
    written = {**text, "labels": ", ".join(_label(n, manifest) for n in wanted)}
    if as_folder:
        texts = [
            {**text, "labels": _label(n, manifest), **_place(i, count, seeds)}
            for i, n in enumerate(wanted)
        ]
        names = [_file_name(i, n, manifest) for i, n in enumerate(wanted)]
        save_folder(target, names, images, texts)
    elif count == 1:
        save_png(target, images[0], written)
    else:
        save_png(target, grid(images, _columns(len(chosen), count)), written)

    if as_json:
        done: dict[str, Any] = {"out": str(target), "count": count, "seconds": round(seconds, 3)}
        click.echo(json.dumps({**done, "settings": written, "runtime": how}, indent=1, default=str))
    elif not quiet:
        height, width = images.shape[1:3]
        what = f"{count} images" if count > 1 else "1 image"
        click.echo(f"wrote {target} ({what} of {width} × {height}, {seconds:.1f} s)")


def _target(out: str) -> tuple[Path, bool]:
    """The output path, and whether it is a folder for single images."""
    path = Path(out)
    if path.is_dir() or out.endswith(("/", "\\")) or not path.suffix:
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; name a .png file or a folder")
        return path, True
    if path.suffix.lower() != ".png":
        raise UsageError(f"images are written as .png, found {path.name}")
    return path, False


def _sampling(given: dict[str, str | None], manifest: Manifest) -> Sampling:
    """The bundle's defaults with what was given in their place."""
    scales = manifest.model.scales
    parsed = {k: parse_setting(k, v, scales) for k, v in given.items() if v is not None}
    return manifest.defaults.replace(**parsed)


def _place(image: int, count: int, seeds: list[int]) -> dict[str, str]:
    """Which image of which request an image is: one with a seed of its own is the first of its."""
    if len(seeds) == 1:
        return {"image": f"{image} of {count}"}
    return {"seed": str(seeds[image]), "image": "0 of 1"}


def _labels(text: str | None, manifest: Manifest) -> list[int]:
    """Labels to cycle through. An unconditional model takes none: one placeholder stands in."""
    transformer = manifest.model.transformer
    if not transformer.conditional:
        if text is not None:
            raise UsageError("this model has no classes: leave --labels out")
        return [0]
    if text is not None:
        return resolve_labels(text, manifest.labels, transformer.classes)
    if transformer.classes > FEW_CLASSES:
        raise UsageError(f"the model has {transformer.classes} classes: choose with --labels")
    return list(range(transformer.classes))


def _label(label: int, manifest: Manifest) -> str:
    if not manifest.model.transformer.conditional:
        return "none"
    return f"{label} {manifest.labels[label]}" if manifest.labels else str(label)


def _file_name(index: int, label: int, manifest: Manifest) -> str:
    """000_star.png; without names 000_17.png, without classes 000.png."""
    if not manifest.model.transformer.conditional:
        return f"{index:03d}.png"
    name = manifest.labels[label] if manifest.labels else str(label)
    plain = re.sub(r"\W+", "-", name.split(",")[0]).strip("-")[:40] or str(label)
    return f"{index:03d}_{plain}.png"


def _columns(labels: int, count: int) -> int | None:
    """One column a label where that makes a grid at least as wide as high; else None."""
    return labels if count % labels == 0 and labels * labels >= count else None


def _settings(
    manifest: Manifest, sampling: Sampling, seeds: list[int], precision: str
) -> dict[str, str]:
    return {
        "Software": f"var-deploy {__version__}",
        "model": manifest.preset or "no preset",
        "bundle": manifest.digest(),
        "precision": precision,
        "seed": ",".join(map(str, seeds)),
        **sampling.texts(),
    }
