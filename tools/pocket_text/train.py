"""Trains pocket-text from nothing; `make train-text` does all of it.

pocket-text makes pictures of 64 × 64 pixels of a sentence. It has the form of Infinity's family: a
tokenizer of bits at four scales, a transformer with a text condition, and a text encoder of T5's
form, all trained here on drawings with sentences that a grammar writes.

- "tokenizer" fits encoder and decoder of the bits, on new drawings in each step.
- "text-encoder" fits the text encoder to answer questions about sentences.
- "transformer" encodes drawings once, and fits transformer and text encoder together; sentences
  are written anew each time that a drawing is used. Bits are flipped at random, so that the model
  learns to mend its own errors. One sentence in ten is dropped, for guidance.
- "decoder" fits the decoder to the finished bits. No bit changes, so it could run beside
  "transformer".
- "classifier" fits the two classifiers that evaluate the pictures, on drawings of other seeds.

Each of the first four keeps a checkpoint in OUT/checkpoints: the same command goes on where it was
stopped, and a stage that is done is not repeated. After a change of the recipe, give another OUT.

`python -m tools.pocket_text.bundle OUT --out BUNDLE` exports the weights, and
`python -m tools.pocket_text.evaluate BUNDLE --weights OUT` measures them. To ship them, copy them
to export/pocket_text/ and the classifiers to tools/pocket_text/, and run `make bundle`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import torch
from safetensors.torch import load_file

from tools.pocket.train import save_half
from tools.pocket_text.bundle import (
    TEXT_FOLDER,
    TOKENIZER_FILE,
    TRANSFORMER_FILE,
    save_text_encoder,
)
from tools.pocket_text.classifier import ALONE, PAIR, train_classifier
from tools.pocket_text.evaluate import CLASSIFIER_FILES
from tools.pocket_text.fit_text_encoder import train_text_encoder
from tools.pocket_text.fit_tokenizer import refine_decoder, train_tokenizer
from tools.pocket_text.fit_transformer import train_transformer
from tools.pocket_text.recipe import Recipe
from var_deploy.export.checkpoint.text_encoder import build_t5, open_text_encoder
from var_deploy.export.models.bit_tokenizer import BitTokenizer
from var_deploy.export.models.t5 import T5Encoder
from var_deploy.export.pocket_text.model import POCKET_TEXT, TEXT_ENCODER

JOINT_FILE = "tokenizer-joint.safetensors"
TEXT_ALONE_FOLDER = "text-alone"  # the text encoder before the transformer is trained with it
CHECKPOINTS = "checkpoints"
STAGES = ("tokenizer", "decoder", "text-encoder", "transformer", "classifier")


def load_tokenizer(path: Path) -> BitTokenizer:
    """Load the tokenizer as a stage saved it: rounded to fp16, computed in fp32."""
    tokenizer = BitTokenizer(POCKET_TEXT.tokenizer).eval()
    tokenizer.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return tokenizer.requires_grad_(False)


def load_text_encoder(folder: Path) -> T5Encoder:
    """Load the text encoder as its own stage saved it."""
    return build_t5(open_text_encoder(folder, TEXT_ENCODER.length))


def run_stage(stage: str, out: Path, recipe: Recipe, log: Callable[[str], None]) -> None:
    """Run one stage: read the files of the stage before, write its own."""
    torch.set_num_threads(recipe.threads)
    checkpoint = out / CHECKPOINTS / f"{stage}.pt"
    if stage == "tokenizer":
        model = train_tokenizer(recipe, POCKET_TEXT.tokenizer, log, checkpoint)
        save_half(model, out / JOINT_FILE)
    elif stage == "decoder":
        model = refine_decoder(load_tokenizer(out / JOINT_FILE), recipe, log, checkpoint)
        save_half(model, out / TOKENIZER_FILE)
    elif stage == "text-encoder":
        text_encoder = train_text_encoder(recipe, TEXT_ENCODER, log, checkpoint)
        save_text_encoder(text_encoder, out / TEXT_ALONE_FOLDER)
    elif stage == "transformer":
        trained = train_transformer(
            recipe,
            POCKET_TEXT,
            load_tokenizer(out / JOINT_FILE),
            load_text_encoder(out / TEXT_ALONE_FOLDER),
            log,
            checkpoint,
            out / CHECKPOINTS / "latents.npy",
        )
        save_half(trained.transformer, out / TRANSFORMER_FILE)
        save_text_encoder(trained.text_encoder, out / TEXT_FOLDER)
    else:
        for name, questions in (("alone", ALONE), ("pair", PAIR)):
            if not (out / CLASSIFIER_FILES[name]).is_file():
                save_half(train_classifier(questions, recipe, log), out / CLASSIFIER_FILES[name])


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--stage", type=click.Choice(["all", *STAGES]), default="all", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, stage: str, seed: int) -> None:
    """Train pocket-text and its classifiers and write their weight files into OUT."""
    recipe = Recipe(seed=seed)
    (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        click.echo(line, err=True)

    for each in STAGES if stage == "all" else (stage,):
        run_stage(each, out, recipe, log)


if __name__ == "__main__":
    main()
