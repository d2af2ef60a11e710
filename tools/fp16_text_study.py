"""Measures the effect of fp16 on a text encoder, without a GPU.

    python -m tools.fp16_text_study TEXT_ENCODER --prompts prompts.txt --json study.json

The bundle holds fp32 and fp16 graphs, which run through the interpreter on the same prompts. The
fp16 graph keeps the residual stream, norms, the gated product and `wo` in fp32, since T5 is known
to exceed fp16 there; the study shows how far these values reach as well, that is, which layers
would overflow in fp16.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from tools.fp16_study import SHOWN_LAYERS, LayerRange, layer_ranges
from var_deploy import names
from var_deploy.errors import VarDeployError
from var_deploy.export.debug.fp16_overflow import HALF_MAX, HalfOverflowError, Magnitudes
from var_deploy.export.debug.interpreter import TorchGraph
from var_deploy.files import whole_file
from var_deploy.manifest import check_files
from var_deploy.text.manifest import read_text_encoder, read_tokenizer_json
from var_deploy.text.prompt_tokenizer import PromptTokenizer

PROMPTS = (
    "",
    "a red fox in the snow",
    "An oil painting of a harbour at dusk, with fishing boats, gulls and a lighthouse; warm light",
    "</s> 3/4 \u2026 \u6771\u4eac \u0442\u0438\u0433\u0440",
)


@dataclass(frozen=True, kw_only=True)
class TextStudy:
    """Results of a study of a text encoder.

    Attributes:
        digest: of the text encoder.
        lengths: tokens of each prompt that was encoded in both precisions.
        errors: largest difference of each prompt's features over their largest magnitude.
        half: largest magnitudes of fp16 values by layer, the largest first.
        full: those of fp32 values in the fp16 graph.
        overflow: node that overflowed, which ended the study; "" if none did.
    """

    digest: str
    lengths: tuple[int, ...]
    errors: tuple[float, ...]
    half: tuple[LayerRange, ...]
    full: tuple[LayerRange, ...]
    overflow: str

    @property
    def beyond(self) -> tuple[LayerRange, ...]:
        """Layers whose fp32 values are beyond fp16."""
        return tuple(layer for layer in self.full if layer.largest > HALF_MAX)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; an infinite magnitude is null."""
        data = dataclasses.asdict(self)
        for layer in (*data["half"], *data["full"]):
            layer["largest"] = layer["largest"] if math.isfinite(layer["largest"]) else None
        return data

    def markdown(self) -> str:
        """Return a line on the features and a Markdown table of the layers."""
        count = len(self.errors)
        worst = f"{max(self.errors):.2e}" if count else "not known"
        lines = [
            f"Features of {count} prompts: largest difference over the largest magnitude {worst}.",
            "",
            "| layer | largest magnitude | part of 65504 | kept in |",
            "|---|---|---|---|",
        ]
        rows = [("fp16", layer) for layer in self.half] + [("fp32", layer) for layer in self.full]
        rows.sort(key=lambda row: -row[1].largest)
        lines += [
            f"| {layer.layer} | {layer.largest:.4g} | {layer.largest / HALF_MAX:.2%} | {kept} |"
            for kept, layer in rows[:SHOWN_LAYERS]
        ]
        if self.beyond:
            layers = ", ".join(layer.layer for layer in self.beyond)
            lines += ["", f"Would overflow in fp16, and are kept in fp32: {layers}."]
        if self.overflow:
            lines += ["", f"Ended by an overflow: {self.overflow}."]
        return "\n".join(lines)


def study_text_encoder(folder: Path, prompts: Sequence[str] = PROMPTS) -> TextStudy:
    """Compare the fp16 graph of a text encoder with its fp32 graph on these prompts.

    Raises BundleError where the folder is not a text encoder, lacks a precision or is damaged, and
    UsageError for prompts that are not text.
    """
    manifest = read_text_encoder(folder)
    graphs = {
        precision: folder / manifest.graph(precision, names.TEXT_ENCODER).file
        for precision in ("fp32", "fp16")
    }
    check_files(folder, manifest)
    spec, magnitudes = manifest.model, Magnitudes()
    tokenizer = PromptTokenizer(
        read_tokenizer_json(folder, manifest), spec.length, vocab_size=spec.vocab_size
    )
    lengths, errors = list[int](), list[float]()
    for prompt in prompts:
        tokens = tokenizer(prompt)
        given = {names.TEXT_IDS: tokens.ids[None], names.TEXT_MASK: tokens.mask[None]}
        expected = TorchGraph(graphs["fp32"]).run(given)[names.TEXT_FEATURES]
        watch = magnitudes.watch(names.TEXT_ENCODER, full=True)
        try:
            found = TorchGraph(graphs["fp16"]).run(given, on_value=watch)[names.TEXT_FEATURES]
        except HalfOverflowError:
            break
        lengths.append(tokens.length)
        errors.append(float(np.abs(found - expected).max() / np.abs(expected).max()))
    return TextStudy(
        digest=manifest.digest(),
        lengths=tuple(lengths),
        errors=tuple(errors),
        half=layer_ranges(magnitudes.largest),
        full=layer_ranges(magnitudes.full),
        overflow=magnitudes.overflow[1] if magnitudes.overflow else "",
    )


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="One prompt per line, in UTF-8.",
)
@click.option("--json", "out", type=click.Path(path_type=Path, dir_okay=False))
def main(folder: Path, prompts: Path | None, out: Path | None) -> None:
    """Compare the fp16 graph of the text encoder FOLDER with its fp32 graph; print Markdown."""
    try:
        lines = prompts.read_text(encoding="utf-8").splitlines() if prompts else PROMPTS
        result = study_text_encoder(folder, lines)
        if out:
            with whole_file(out) as stream:
                stream.write(f"{json.dumps(result.to_json(), indent=1)}\n".encode())
    except VarDeployError as error:
        raise click.ClickException(str(error)) from None
    except UnicodeDecodeError as error:
        raise click.ClickException(f"{prompts} is not UTF-8: {error.reason}") from None
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from None
    click.echo(result.markdown())


if __name__ == "__main__":
    main()
