"""The trained files of pocket-text, and the bundles that the product's own export makes of them.

A folder of weights holds `tokenizer.safetensors` and `transformer.safetensors` under our names, and
the text encoder in the form of the Hugging Face Hub: `text/config.json`, `text/tokenizer.json` and
`text/model.safetensors`. All weights are fp16.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from tools.pocket.train import save_half
from tools.pocket_text.captions import vocabulary
from tools.pocket_text.words import tokenizer_json
from var_deploy.errors import VarDeployError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.files import INFINITY_STATE, open_checkpoint
from var_deploy.export.checkpoint.text_encoder import CONFIG_NAMES, open_text_encoder
from var_deploy.export.checkpoint.text_model import LoadedTextModel, assemble_text
from var_deploy.export.models.t5 import T5Encoder
from var_deploy.export.pocket_text.model import DEFAULTS, POCKET_TEXT, SCALES, TEXT_LENGTH
from var_deploy.export.text_encoder_bundle import export_text_encoder
from var_deploy.manifest import TextEncoderRef
from var_deploy.spec import TextModelSpec

TOKENIZER_FILE = "tokenizer.safetensors"
TRANSFORMER_FILE = "transformer.safetensors"
TEXT_FOLDER = "text"


def save_text_encoder(model: T5Encoder, folder: Path) -> None:
    """Write a text encoder and its tokenizer.json as a folder of the Hub's form."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = model.spec
    config = {name: getattr(spec, ours) for name, ours in CONFIG_NAMES.items()}
    config |= {
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": spec.norm_eps,
        "model_type": "t5",
        "relative_attention_max_distance": spec.max_distance,
        "relative_attention_num_buckets": spec.buckets,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (folder / "tokenizer.json").write_bytes(tokenizer_json(vocabulary()))
    save_half(model, folder / "model.safetensors")


def load(weights: Path, spec: TextModelSpec = POCKET_TEXT) -> LoadedTextModel:
    """Open tokenizer and transformer of a folder of weights. Raises CheckpointError."""
    tokenizer = open_checkpoint(weights / TOKENIZER_FILE, "tokenizer", form=INFINITY_STATE)
    transformer = open_checkpoint(weights / TRANSFORMER_FILE, "transformer", form=INFINITY_STATE)
    return assemble_text(spec, tokenizer, transformer, scales=SCALES, defaults=DEFAULTS)


def export(weights: Path, out: Path, spec: TextModelSpec = POCKET_TEXT) -> None:
    """Write the fp32 bundle to `out` and its text encoder beside it, to `OUT-text`.

    Raises CheckpointError and ExportError as the product's export does.
    """
    folder = out.parent / f"{out.name}-text"
    encoder = open_text_encoder(weights / TEXT_FOLDER, TEXT_LENGTH)
    found = export_text_encoder(encoder, folder)
    export_bundle(
        load(weights, spec),
        out,
        ExportOptions(batch=4, guidance=True),
        text_encoder=TextEncoderRef(digest=found.digest(), folder=folder.name),
    )


@click.command()
@click.argument("weights", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True)
def main(weights: Path, out: Path) -> None:
    """Export the folder WEIGHTS, as `tools.pocket_text.train` writes it, to the bundle OUT."""
    try:
        export(weights, out)
    except VarDeployError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
