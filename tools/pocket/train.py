"""Trains pocket from nothing; `make train` repeats the shipped weights from their seed.

Stages hand on files: "joint" fits the whole tokenizer to drawn images, "codes" fits codebook and
φ to the finished encoder, and then "decoder" and "transformer", which see the codes alone and not
each other, run side by side on a core each. "classifier" needs none of them: it fits the classifier
that evaluates what a deployed pocket generates.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tools.pocket.fit_classifier import train_classifier
from tools.pocket.fit_tokenizer import refine_codes, refine_decoder, train_tokenizer
from tools.pocket.fit_transformer import train_transformer
from tools.pocket.recipe import Recipe
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.pocket.classifier import CLASSIFIER_FILE
from var_deploy.export.pocket.model import POCKET

ROOT = Path(__file__).parents[2]  # where `python -m tools…` finds this program
JOINT_FILE = "tokenizer-joint.safetensors"
CODES_FILE = "tokenizer-codes.safetensors"
TOKENIZER_FILE = "tokenizer.safetensors"
TRANSFORMER_FILE = "transformer.safetensors"
STAGES = ("joint", "codes", "decoder", "transformer", "classifier")
ONE_CORE = ("decoder", "transformer", "classifier")


def save_half(model: nn.Module, path: Path) -> None:
    """Write the weights as fp16 safetensors; integer buffers as they are.

    Buffers that follow from the sizes alone (masks, level numbers, statistics) are left out,
    except `lvl_1L`, from which the patch numbers are recognised.
    """
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith(("attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")):
            continue
        value = value.detach().contiguous()
        state[name] = value.half() if value.is_floating_point() else value
    save_file(state, path)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer as a stage saved it: rounded to fp16, computed in fp32."""
    tokenizer = Tokenizer(POCKET.tokenizer).eval()
    weights = {key: value.float() for key, value in load_file(path).items()}
    tokenizer.load_state_dict(weights, strict=False)
    return tokenizer


def run_stage(stage: str, out: Path, recipe: Recipe, log: Callable[[str], None]) -> None:
    """Run one stage: read the files of the stage before, write its own."""
    torch.set_num_threads(1 if stage in ONE_CORE else recipe.threads)
    if stage == "joint":
        save_half(train_tokenizer(recipe, POCKET, log), out / JOINT_FILE)
    elif stage == "codes":
        save_half(refine_codes(load_tokenizer(out / JOINT_FILE), recipe, log), out / CODES_FILE)
    elif stage == "decoder":
        tokenizer = refine_decoder(load_tokenizer(out / CODES_FILE), recipe, log)
        save_half(tokenizer, out / TOKENIZER_FILE)
    elif stage == "classifier":
        images, steps = recipe.classifier_images, recipe.classifier_steps
        save_half(train_classifier(images, steps=steps, log=log), out / CLASSIFIER_FILE.name)
    else:
        tokenizer = load_tokenizer(out / CODES_FILE)
        save_half(train_transformer(recipe, POCKET, tokenizer, log), out / TRANSFORMER_FILE)


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--stage", type=click.Choice(["all", *STAGES]), default="all", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, stage: str, seed: int) -> None:
    """Train pocket and its classifier and write their three weight files into OUT."""
    recipe = Recipe(seed=seed)
    out.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        click.echo(line, err=True)

    if stage != "all":
        run_stage(stage, out, recipe, log)
        return
    run_stage("joint", out, recipe, log)
    run_stage("codes", out, recipe, log)
    # a process of its own: the number of threads belongs to a process
    command = [sys.executable, "-m", "tools.pocket.train", "--stage", "decoder"]
    command += ["--out", str(out.resolve()), "--seed", str(seed)]
    with subprocess.Popen(command, cwd=ROOT) as beside:
        try:
            run_stage("transformer", out, recipe, log)
        except BaseException:
            beside.terminate()
            raise
    if beside.returncode:
        raise click.ClickException("the decoder stage failed")
    run_stage("classifier", out, recipe, log)


if __name__ == "__main__":
    main()
