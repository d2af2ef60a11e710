"""`var-deploy sample`: a set of images of classes or of prompts, in shards."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from var_deploy.cli.console import ProgressBar, Terminated, echo, needs_extra, say
from var_deploy.cli.options import (
    SamplingOptions,
    load_pipeline,
    out_option,
    report_options,
    runtime_options,
    sampling_options,
)
from var_deploy.cli.outputs import OUTPUT, runtime_json
from var_deploy.cli.prompts import PromptOptions, prompt_options
from var_deploy.config import Loaded, RuntimeConfig
from var_deploy.datasets.folder import NPZ_FILE, SetFolder, damage
from var_deploy.datasets.spec import (
    FID_PER_CLASS,
    FID_SAMPLING,
    FORMATS,
    PARQUET,
    SHARD_SIZE,
    TAR,
    PromptSpec,
    SetSpec,
)
from var_deploy.errors import UsageError, VarDeployError
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.sampling import Sampling
from var_deploy.spec import Grid

if TYPE_CHECKING:
    from var_deploy.cluster.sets import ClusterRun
    from var_deploy.progress import Progress as OnProgress


MOST_SHARD_PIXELS = 400_000_000  # up to 1.2 GB of PNGs


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--per-class",
    type=click.IntRange(1),
    metavar="N",
    show_default="50 with --recipe fid",
    help="Images of each class; a model without classes counts as one.",
)
@prompt_options()
@click.option(
    "--per-prompt",
    type=click.IntRange(1),
    metavar="N",
    show_default="1",
    help="Images of each prompt, for a bundle that takes prompts.",
)
@click.option(
    "--recipe",
    type=click.Choice(["fid"]),
    show_default="none",
    help="fid: the published one, 50 a class, cfg 1.5, top-k 900, top-p 0.96, and --npz.",
)
@out_option(
    type=OUTPUT,
    required=True,
    metavar="FOLDER",
    help="A new folder, or a set with the same settings, which is completed.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="0 to 2⁶⁴-1.")
@click.option(
    "--shard-size",
    type=click.IntRange(1),
    default=SHARD_SIZE,
    show_default=True,
    metavar="N",
    help="Images of a shard.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default=TAR,
    show_default=True,
    help="tar: PNG, .cls (or .txt, the prompt) and .json an image, for WebDataset. parquet: for "
    "Hugging Face datasets.",
)
@click.option(
    "--shards",
    "share",
    metavar="I/N",
    default="1/1",
    show_default=True,
    help="Make every N-th shard from the I-th on: the share of one of N processes.",
)
@click.option(
    "--npz/--no-npz",
    default=None,
    show_default="only with --recipe fid",
    help=f"Write all images into {NPZ_FILE} once the set is complete.",
)
@click.option(
    "--ray",
    "cluster",
    metavar="ADDRESS",
    show_default="generate in this process",
    help="Generate on a Ray cluster: local, auto, HOST:PORT or ray://HOST:PORT.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    show_default="one a device",
    help="With --ray: at most so many, each on a GPU or on --threads CPUs (1 unless given).",
)
@click.option(
    "--check", is_flag=True, help="Only compare the shards that exist with their hashes."
)
@sampling_options
@runtime_options
@report_options
def sample(
    bundle: Path,
    per_class: int | None,
    prompts: PromptOptions,
    per_prompt: int | None,
    recipe: str | None,
    out: Path,
    seed: int,
    shard_size: int,
    form: str,
    share: str,
    npz: bool | None,
    cluster: str | None,
    workers: int | None,
    check: bool,
    sampling: SamplingOptions,
    config: RuntimeConfig,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make a set of images in shards, such as the 50 000 that FID needs, or those of many prompts.

    A shard is a file of PNGs, with label or prompt, and seed, beside each. Image n has label n mod
    classes, or prompt n mod prompts, and depends on --seed, n and the settings alone: the set is
    the same whichever process makes a shard. After Ctrl-C or a failure the same command makes what
    is missing. Several processes, on machines that share the folder, take a part each with
    --shards; --ray has a cluster generate all of them.

    \b
    Example:
      var-deploy sample build/d16 --recipe fid --out fid
      var-deploy sample build/pocket --per-class 50 --out set
      var-deploy sample build/pocket --per-class 50 --out set --shards 2/4
      var-deploy sample build/pocket --per-class 50 --out set --ray local
      var-deploy sample build/pocket --per-class 50 --out set --check
      var-deploy sample build/inf2b --prompts prompts.txt --per-prompt 4 --out pictures
    """
    # everything that can be wrong is looked at before the weights are loaded
    folder = SetFolder(path=out)
    folder.check_free()
    first, step = _share(share)
    if cluster is not None and step > 1:
        raise UsageError("--ray makes the shards that are missing: leave --shards out")
    if cluster is None and workers is not None:
        raise UsageError("--workers are those of a cluster: say which with --ray")
    manifest, there = read_manifest(bundle), folder.read()
    config = prompts.over(config)
    if there is not None:  # what is left open is as in the set
        config = there.complete(config)
    transformer = manifest.model.transformer
    texts = prompts.read(manifest)
    each = _images_of_each(manifest, recipe, per_class, per_prompt)
    spec = SetSpec(
        bundle=manifest.digest(),
        precision=config.precision,
        backend=config.backend,
        layout=config.layout,
        sampling=_sampling(manifest, recipe, sampling),
        seed=seed,
        classes=transformer.classes if transformer.conditional else 0,
        per_class=each,
        shard_size=shard_size,
        format=form,
        prompts=_prompts(bundle, manifest, texts, prompts, there),
    )
    if there is not None:
        folder.check_same(spec)
    else:
        _check_shard_size(spec, manifest.model.tokenizer.image_size)
    if check:
        if there is None:
            raise UsageError(f"{out} holds no set: there is nothing to check")
        _check(folder, spec, quiet=quiet, as_json=as_json)
        return

    if form == PARQUET:
        with needs_extra("parquet", "sample --format parquet"):
            import pyarrow.parquet  # noqa: F401
    from var_deploy.datasets.npz import write_npz
    from var_deploy.datasets.shards import described
    from var_deploy.datasets.work import make_missing

    mine = range(first, spec.shards, step)
    wants_npz = npz if npz is not None else recipe == "fid"
    made: list[int] = []
    how: Loaded | None = None
    ray: dict[str, Any] | None = None
    remarks: list[str] = []
    started = time.monotonic()
    with _telling_what_is_kept(folder, spec, as_json), ProgressBar(quiet=quiet) as progress:
        if there is None or folder.missing(spec, mine):
            progress.update("loading", 0.0)
            if cluster is not None:
                remarks = _remarks(bundle, manifest, config, prompts.text_encoder, spec)
                spread = _on_ray(
                    cluster,
                    bundle,
                    folder,
                    spec,
                    config,
                    workers,
                    progress.update,
                    prompts.text_encoder,
                )
                spec, how, made = spread.spec, spread.how, spread.shards
                ray = spread.to_json()
            else:
                own = spec.text_config(config)
                with load_pipeline(bundle, manifest, config, prompts.text_encoder, own) as pipe:
                    remarks = _remarks_of(spec, pipe.remarks)
                    how = described(pipe, spec)
                    spec = spec.decided_by(how)
                    folder.begin(spec)
                    made = make_missing(pipe, folder, spec, mine, progress.update)
        done = folder.list_shards(spec)
        complete = len(done) == spec.shards
        if wants_npz and complete and not (out / NPZ_FILE).exists():
            write_npz(
                folder,
                spec,
                lambda n: progress.update(f"{NPZ_FILE}: {_shards(n)}", n / spec.shards),
            )
    seconds = time.monotonic() - started

    if as_json:
        report = {
            "out": str(out),
            "images": spec.images,
            "shards": spec.shards,
            "shards_there": len(done),
            "complete": complete,
            "made": made,
            "npz": str(out / NPZ_FILE) if wants_npz and complete else None,
            "seconds": round(seconds, 3),
            "settings": spec.to_json(),
            "runtime": runtime_json(how) if how else {},
            "ray": ray,
            **({"remarks": remarks} if spec.prompts else {}),
        }
        echo(json.dumps(report, indent=1))
    elif not quiet:
        for line in remarks:
            say(line, err=True)
        images = sum(len(spec.numbers(shard)) for shard in made)
        say(f"made {_shards(len(made))} with {images} images in {seconds:.1f} s")
        say(_state(spec, out, len(done), wants_npz))


@contextlib.contextmanager
def _telling_what_is_kept(folder: SetFolder, spec: SetSpec, as_json: bool) -> Iterator[None]:
    """Says what an interrupted run leaves, and how it goes on; not beside an error that is JSON."""
    try:
        yield
    except (KeyboardInterrupt, Terminated):
        if as_json:
            raise
        there = spec.shards - len(folder.missing(spec, range(spec.shards)))
        say(
            f"{folder.path} keeps {there} of {_shards(spec.shards)}; the same command goes on from "
            "there",
            err=True,
        )
        raise


def _on_ray(
    address: str,
    bundle: Path,
    folder: SetFolder,
    spec: SetSpec,
    config: RuntimeConfig,
    workers: int | None,
    tell: OnProgress,
    text_encoder: Path | None,
) -> ClusterRun:
    with needs_extra("ray", "sample --ray"):
        from var_deploy.cluster.connect import connected
        from var_deploy.cluster.sets import make_missing
    with connected(address):
        return make_missing(
            bundle,
            folder,
            spec,
            range(spec.shards),
            tell,
            config=config,
            workers=workers,
            text_encoder=text_encoder,
        )


def _share(text: str) -> tuple[int, int]:
    """The first shard of a share, and how many there are to the next: "2/4" → (1, 4)."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--shards {text!r} is no share; write 2/4 for the second of four")
    return int(found[1]) - 1, int(found[2])


def _check_shard_size(spec: SetSpec, size: Grid) -> None:
    """Raise UsageError where a shard, which is packed in memory, would be too large."""
    images, most = min(spec.shard_size, spec.images), max(1, MOST_SHARD_PIXELS // math.prod(size))
    if images > most:
        raise UsageError(
            f"a shard is packed in memory and has at most {MOST_SHARD_PIXELS // 10**6} million "
            f"pixels, {most:,} images of {size[1]} × {size[0]}, found {images:,}: give a smaller "
            "--shard-size"
        )


def _images_of_each(
    manifest: Manifest, recipe: str | None, per_class: int | None, per_prompt: int | None
) -> int:
    """How many images each class or each prompt gets. Raises UsageError for an option of the other
    kind of bundle."""
    if manifest.takes_text:
        if recipe is not None:
            raise UsageError(
                f"--recipe {recipe} is one of classes, and this bundle takes prompts: give "
                "--prompts FILE and --per-prompt N"
            )
        if per_class is not None:
            raise UsageError("this bundle takes prompts, not classes: give --per-prompt N")
        return per_prompt or 1
    if per_prompt is not None:
        takes = "labels" if manifest.model.transformer.conditional else "no labels"
        raise UsageError(f"this bundle takes {takes} and no prompts: give --per-class N")
    if per_class is None and recipe is None:
        raise UsageError("how many images? give --per-class N, or --recipe fid")
    return per_class or FID_PER_CLASS


def _prompts(
    bundle: Path,
    manifest: Manifest,
    texts: list[str],
    given: PromptOptions,
    there: SetSpec | None,
) -> PromptSpec | None:
    """The prompts of a set, None for a bundle of classes; what is left open is as in the set that
    is there."""
    if not manifest.takes_text:
        return None
    if not texts:
        raise UsageError('this bundle takes prompts: give --prompts FILE, or --prompt "…"')
    from var_deploy.runtime.text_features import checked_text_encoder

    _, encoder = checked_text_encoder(bundle, manifest, given.text_encoder)
    prompts = PromptSpec.of(texts, given.negative or "", encoder.digest())
    if there is None or there.prompts is None:
        return prompts
    return dataclasses.replace(
        prompts, precision=there.prompts.precision, backend=there.prompts.backend
    )


def _remarks(
    bundle: Path,
    manifest: Manifest,
    config: RuntimeConfig,
    text_encoder: Path | None,
    spec: SetSpec,
) -> list[str]:
    """Return the remarks on a set's prompts where no pipeline is loaded here; loads no weights."""
    from var_deploy.runtime.text_features import TextFeatures, find_text_encoder

    text = TextFeatures(manifest, find_text_encoder(bundle, manifest, config, text_encoder))
    try:
        return _remarks_of(spec, text.remarks)
    finally:
        text.close()


def _remarks_of(spec: SetSpec, remarks: Callable[[Sequence[str]], list[str]]) -> list[str]:
    """Return what `remarks` says of a set's prompts, see `Pipeline.remarks`; nothing without."""
    return remarks([*spec.prompts.texts, spec.negative]) if spec.prompts else []


def _sampling(manifest: Manifest, recipe: str | None, given: SamplingOptions) -> Sampling:
    """The settings that were typed over those of the recipe, or over the bundle's."""
    if recipe == "fid":
        if manifest.more_smooth:
            raise UsageError(
                "the published recipe draws without more_smooth, with which this bundle was "
                "exported: export it again without --more-smooth"
            )
        return given.over(manifest, Sampling(**FID_SAMPLING))
    return given.over(manifest)


def _check(folder: SetFolder, spec: SetSpec, *, quiet: bool, as_json: bool) -> None:
    """Tell of every shard whether it is whole. Raises VarDeployError where one is not."""
    read, damaged = 0, []
    with ProgressBar(quiet=quiet) as progress:
        for shard, bad in folder.damaged(spec):
            read += 1
            damaged += [shard] * bad
            progress.update(f"{_shards(read)} read", (shard + 1) / spec.shards)
    missing = folder.missing(spec, range(spec.shards))
    if as_json:
        report = {"shards": spec.shards, "damaged": damaged, "missing": missing}
        echo(json.dumps({"out": str(folder.path), **report}, indent=1))
    if damaged:
        others = f" (and {_shards(len(damaged) - 1)} more)" if len(damaged) > 1 else ""
        raise VarDeployError(damage(folder.path / spec.shard_file(damaged[0])) + others)
    if missing:
        raise VarDeployError(
            f"{_state(spec, folder.path, spec.shards - len(missing), False)}, none of them "
            "damaged; run the command that began it again"
        )
    if not quiet and not as_json:
        say(_state(spec, folder.path, spec.shards, False))


def _state(spec: SetSpec, out: Path, there: int, wants_npz: bool) -> str:
    if there < spec.shards:
        later = f"; the run that completes it writes {NPZ_FILE}" if wants_npz else ""
        return f"{out} has {there} of {_shards(spec.shards)}{later}"
    array = f" and {NPZ_FILE}" if wants_npz else ""
    return f"{out} is complete: {spec.images} images in {_shards(spec.shards)}{array}"


def _shards(number: int) -> str:
    return f"{number} shard{'' if number == 1 else 's'}"
