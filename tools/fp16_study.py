"""Measures the effect of fp16 on a model's tokens and images, without a GPU or on one.

    python -m tools.fp16_study BUNDLE --json study.json
    python -m tools.fp16_study BUNDLE --provider CUDAExecutionProvider

The bundle holds fp32 and fp16 graphs. Both run through the interpreter, or through one provider of
ONNX Runtime, so that nothing but the rounding differs: the fp32 graphs first, then the fp16 graphs
with the fp32 tokens in place of their own (what rounding does to each scale), then left to
themselves (what becomes of the image).
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from var_deploy.errors import VarDeployError
from var_deploy.export.debug.fp16_overflow import (
    HALF_MAX,
    HalfOverflowError,
    Magnitudes,
    encode_watched,
    layer_of,
)
from var_deploy.export.debug.interpreter_backend import generate, study_conditions
from var_deploy.export.debug.provider_backend import ProviderBackend
from var_deploy.files import whole_file
from var_deploy.host.terminal import is_terminal
from var_deploy.image.images import psnr
from var_deploy.manifest import check_files, read_manifest
from var_deploy.progress import Progress

SHOWN_LAYERS = 12


@dataclass(frozen=True, kw_only=True)
class ScaleAgreement:
    """Tokens of one scale on which fp16 and fp32 agree.

    Attributes:
        tokens: all that were drawn; bits, where a token has several.
        forced: equal ones, where the scales before had the fp32 tokens.
        free: equal ones, where fp16 was left to itself.
    """

    tokens: int
    forced: int
    free: int


@dataclass(frozen=True, kw_only=True)
class LayerRange:
    """The largest magnitude among a layer's fp16 values, and where it was."""

    layer: str
    graph: str
    node: str
    largest: float


@dataclass(frozen=True, kw_only=True)
class HalfStudy:
    """Results of a study of fp16 against fp32.

    Attributes:
        digest: of the bundle.
        images: how many were generated each way.
        psnr_forced, psnr_free: of each image against the fp32 one, in dB.
        layers: by magnitude, the largest first.
        overflow: "graph: node" that overflowed, which ended the study; "" if none did.
    """

    digest: str
    images: int
    scales: tuple[ScaleAgreement, ...]
    psnr_forced: tuple[float, ...]
    psnr_free: tuple[float, ...]
    layers: tuple[LayerRange, ...]
    overflow: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; an infinite magnitude is null."""
        data = dataclasses.asdict(self)
        for layer in data["layers"]:
            layer["largest"] = layer["largest"] if math.isfinite(layer["largest"]) else None
        return data

    def markdown(self) -> str:
        """Return three Markdown tables."""
        total = [sum(getattr(s, k) for s in self.scales) for k in ("tokens", "forced", "free")]
        rows = [(str(k), s.tokens, s.forced, s.free) for k, s in enumerate(self.scales)]
        lines = [
            "| scale | tokens | equal, from the fp32 tokens | equal, left to itself |",
            "|---|---|---|---|",
            *(
                f"| {name} | {n} | {_share(forced, n)} | {_share(free, n)} |"
                for name, n, forced, free in (*rows, ("all", *total))
            ),
            "",
            f"| images ({self.images}) | mean PSNR | lowest |",
            "|---|---|---|",
            f"| from the fp32 tokens | {_decibels(self.psnr_forced)} |",
            f"| left to itself | {_decibels(self.psnr_free)} |",
            "",
            "| layer | largest magnitude | part of 65504 | in |",
            "|---|---|---|---|",
            *(
                f"| {r.layer} | {r.largest:.4g} | {r.largest / HALF_MAX:.2%} | {r.graph} |"
                for r in self.layers[:SHOWN_LAYERS]
            ),
        ]
        if len(self.layers) > SHOWN_LAYERS:
            rest = self.layers[SHOWN_LAYERS:]
            lines += ["", f"{len(rest)} more layers stay at or below {rest[0].largest:.4g}."]
        if self.overflow:
            lines += ["", f"Ended by an overflow: {self.overflow}."]
        return "\n".join(lines)


def study(
    bundle: Path,
    *,
    images: int = 1,
    seed: int = 0,
    provider: str = "",
    progress: Progress | None = None,
) -> HalfStudy:
    """Compare fp16 with fp32 over `images` images (whole batches).

    `provider` is one of ONNX Runtime's; "" takes the interpreter, and watches the encoder as well.

    Raises BackendError where ONNX Runtime lacks the provider, BundleError where the bundle lacks a
    precision or is damaged.
    """
    manifest = read_manifest(bundle)
    for precision in ("fp32", "fp16"):
        manifest.graph(precision, "decoder")
    check_files(bundle, manifest)
    magnitudes, scales = Magnitudes(), manifest.model.scales
    drawn, forced, free = (np.zeros(scales, np.int64) for _ in range(3))
    near: dict[str, list[float]] = {"forced": [], "free": []}
    batches = range(0, images, manifest.batch)
    steps = 3 * len(batches)
    for number, first in enumerate(batches):

        def run(precision: str, step: int, first: int = first, **how: Any) -> Any:
            def report(message: str, fraction: float) -> None:
                if progress:
                    progress(message, (step + fraction) / steps)

            return generate(
                *(bundle, manifest, precision, study_conditions(manifest, first)),
                first=first,
                seed=seed,
                progress=report,
                open_backend=partial(ProviderBackend, provider) if provider else None,
                **how,
            )

        expected = run("fp32", 3 * number)
        try:
            guided = run("fp16", 3 * number + 1, forced=expected.tokens, watch=magnitudes.watch)
            alone = run("fp16", 3 * number + 2, watch=magnitudes.watch)
            if not provider:
                encode_watched(bundle, manifest, expected, magnitudes)
        except HalfOverflowError:
            break
        for k, tokens in enumerate(expected.tokens):
            drawn[k] += tokens.size
            forced[k] += (guided.tokens[k] == tokens).sum()
            free[k] += (alone.tokens[k] == tokens).sum()
        for name, generation in (("forced", guided), ("free", alone)):
            pairs = zip(generation.image, expected.image, strict=True)
            near[name] += [psnr(found, wanted) for found, wanted in pairs]
    return HalfStudy(
        digest=manifest.digest(),
        images=len(near["free"]),
        scales=tuple(
            ScaleAgreement(tokens=int(n), forced=int(a), free=int(b))
            for n, a, b in zip(drawn, forced, free, strict=True)
        ),
        psnr_forced=tuple(near["forced"]),
        psnr_free=tuple(near["free"]),
        layers=layer_ranges(magnitudes.largest),
        overflow=": ".join(magnitudes.overflow or ()),
    )


def layer_ranges(magnitudes: Mapping[tuple[str, str], float]) -> tuple[LayerRange, ...]:
    """Return the largest value of each layer over all graphs that hold it, the largest first."""
    found: dict[str, LayerRange] = {}
    for (graph, node), largest in magnitudes.items():
        layer = layer_of(node)
        if layer not in found or not largest <= found[layer].largest:
            found[layer] = LayerRange(layer=layer, graph=graph, node=node, largest=largest)
    return tuple(sorted(found.values(), key=lambda r: (math.isfinite(r.largest), -r.largest)))


def _share(equal: int, tokens: int) -> str:
    return f"{equal} ({equal / tokens:.1%})" if tokens else "–"


def _decibels(values: tuple[float, ...]) -> str:
    return f"{np.mean(values):.1f} dB | {min(values):.1f} dB" if values else "– | –"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.option("--images", type=click.IntRange(1), default=1, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--provider",
    default="",
    help="Run the graphs with this execution provider of ONNX Runtime, such as "
    "CUDAExecutionProvider; without it, with the interpreter.",
)
@click.option("--json", "out", type=click.Path(path_type=Path, dir_okay=False))
def main(bundle: Path, images: int, seed: int, provider: str, out: Path | None) -> None:
    """Compare the fp16 graphs of BUNDLE with its fp32 graphs; print tables in Markdown."""
    shown = is_terminal(sys.stderr)

    def progress(message: str, fraction: float) -> None:
        if shown:
            click.echo(f"\r\x1b[K{fraction:4.0%} {message}", nl=False, err=True)

    try:
        result = study(bundle, images=images, seed=seed, provider=provider, progress=progress)
        if out:
            with whole_file(out) as stream:
                stream.write(f"{json.dumps(result.to_json(), indent=1)}\n".encode())
    except VarDeployError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from None
    if shown:
        click.echo("\r\x1b[K", nl=False, err=True)
    click.echo(result.markdown())


if __name__ == "__main__":
    main()
