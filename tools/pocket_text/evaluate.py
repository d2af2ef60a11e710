"""Evaluates what a bundle of pocket-text makes of sentences that it has never seen.

`python -m tools.pocket_text.evaluate BUNDLE` prints the report: half of the sentences are of one
thing, half of two; all scenes are held out, see `scenes.held_out`. The classifiers, as trained by
`tools.pocket_text.train`, know drawings of other seeds alone; those of the weights that ship lie
beside this file.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from safetensors.torch import load_file

from tools.pocket.evaluate import (
    Distances,
    diversity,
    nearest_distance,
    psnr,
    reconstruct,
    spacing,
)
from tools.pocket_text.bundle import load
from tools.pocket_text.captions import caption
from tools.pocket_text.classifier import (
    ALONE,
    CHECK_SEED,
    PAIR,
    Images,
    SceneClassifier,
    accuracies,
    answers,
    draw_any,
)
from tools.pocket_text.fit_transformer import TRAINING_CHUNK, TRAINING_SEED
from tools.pocket_text.recipe import Recipe
from tools.pocket_text.scenes import (
    Scene,
    draw_held_out,
    draw_scene,
    draw_training,
    scenes,
    unseen_colour,
    unseen_pair,
)
from var_deploy.errors import VarDeployError
from var_deploy.export.checkpoint.presets import POCKET_TEXT_FOLDER
from var_deploy.export.checkpoint.text_model import build_text_modules
from var_deploy.export.models.bit_tokenizer import BitTokenizer
from var_deploy.pipeline import Pipeline

HERE = Path(__file__).parent
CLASSIFIER_FILES = {
    "alone": "classifier-alone.safetensors",
    "pair": "classifier-pair.safetensors",
}
SENTENCES, SEEDS = 8, 16  # for variety: sentences, and pictures of each
# what must be reached, as a share; see `Evaluation.shares`
BARS = {
    "thing": 0.95,
    "colour": 0.90,
    "place or relation": 0.75,
    "both things of a pair": 0.80,
    "unseen thing and colour": 0.80,
}
MIN_PSNR = 25.0  # dB


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The evaluation of pocket-text.

    Attributes:
        shares: right answers by what was asked, as a share, and out of how many.
        classifiers: accuracy of the classifiers on drawings, by question.
        psnr: of the tokenizer on held-out drawings, dB.
        diversity, drawn_diversity: mean root mean square difference (0..255) of pictures of one
            sentence, and of drawings of its scene; spacing likewise, to the nearest other picture.
        nearest, fresh_nearest: distance of each picture, and of as many held-out drawings, to the
            nearest training picture, all as the tokenizer gives them back.
    """

    shares: dict[str, tuple[float, int]]
    classifiers: dict[str, float]
    psnr: float
    diversity: float
    drawn_diversity: float
    spacing: float
    drawn_spacing: float
    nearest: Distances
    fresh_nearest: Distances

    def table(self) -> str:
        """Return the evaluation as lines to print."""
        lines = []
        for name, (share, count) in self.shares.items():
            bar = f"at least {BARS[name]:.0%}" if name in BARS else ""
            lines.append(f"{name:40s}{share:8.1%} of {count:4d}   {bar}".rstrip())
        lines.append("")
        for name, share in self.classifiers.items():
            lines.append(f"classifier on drawings, {name:16s}{share:8.1%}")
        lines += [
            "",
            f"{'pictures of one sentence':40s}diversity {self.diversity:5.1f} (drawn "
            f"{self.drawn_diversity:.1f})  spacing {self.spacing:5.1f} (drawn "
            f"{self.drawn_spacing:.1f})",
        ]
        for name, found in (("pictures", self.nearest), ("fresh drawings", self.fresh_nearest)):
            values = "  ".join(f"{v:5.1f}" for v in np.percentile(found, (0, 1, 5, 50)))
            lines.append(f"{name + ' to the nearest training picture':48s}{values}")
        lines += ["", f"tokenizer PSNR on held-out drawings: {self.psnr:.2f} dB"]
        return "\n".join(lines)


def held_out_sentences(count: int, seed: int) -> tuple[list[Scene], list[str]]:
    """Return `count` held-out scenes, of one thing and of two in turn, each with a sentence."""
    found: dict[int, list[tuple[Scene, str]]] = {1: [], 2: []}
    stream = scenes(20 * count + 100, seed, training=False)
    while min(map(len, found.values())) < (count + 1) // 2:
        scene, rng = next(stream)
        found[len(scene.items)].append((scene, caption(scene, rng)))
    pairs = [found[1 + i % 2][i // 2] for i in range(count)]
    return [scene for scene, _ in pairs], [text for _, text in pairs]


def load_classifiers(folder: Path = HERE) -> tuple[SceneClassifier, SceneClassifier]:
    """Load the classifiers for one thing and for two."""
    models = []
    for name, questions in (("alone", ALONE), ("pair", PAIR)):
        model = SceneClassifier(questions)
        state = load_file(folder / CLASSIFIER_FILES[name])
        model.load_state_dict({key: value.float() for key, value in state.items()})
        models.append(model.eval().requires_grad_(False))
    return models[0], models[1]


def shares(
    shown: list[Scene], images: Images, alone: SceneClassifier, pair: SceneClassifier
) -> dict[str, tuple[float, int]]:
    """Return the share of right answers by what was asked, and out of how many scenes."""
    asked = [answers(scene) for scene in shown]
    found: list[dict[str, str]] = [{} for _ in shown]
    for count, model in ((1, alone), (2, pair)):
        places = [i for i, scene in enumerate(shown) if len(scene.items) == count]
        for i, answer in zip(places, model.predict(images[places]), strict=True):
            found[i] = answer
    right: dict[str, list[bool]] = {}

    def note(name: str, good: bool) -> None:
        right.setdefault(name, []).append(good)

    for scene, a, b in zip(shown, asked, found, strict=True):
        same = {question: a[question] == b[question] for question in a}
        items = scene.items
        if len(items) == 1:
            note("thing", same["thing"])
            note("colour", same["colour"])
            note("place or relation", same["place"])
            note("place", same["place"])
            if unseen_colour(items[0].thing, items[0].colour):
                note("unseen thing and colour", same["thing"] and same["colour"])
        else:
            both = {b["first"], b["second"]} == {a["first"], a["second"]}
            note("both things of a pair", both)
            relation = same["across"] and same["first"] and same["second"]
            note("place or relation", relation)
            note("relation", relation)
            note("colours of a pair", same["first colour"] and same["second colour"])
            if unseen_pair(items[0].thing, items[1].thing):
                note("unseen pair of things", both)
        note("background", same["background"])
        note("time", same["time"])
    return {name: (float(np.mean(good)), len(good)) for name, good in right.items()}


def variety(pipe: Pipeline) -> tuple[float, float, float, float]:
    """Return diversity and spacing of pictures of one sentence, and of drawings of its scene."""
    found = []
    shown, texts = held_out_sentences(SENTENCES, Recipe().held_out_seed + 3)
    for scene, text in zip(shown, texts, strict=True):
        made = pipe.generate(prompts=[text] * SEEDS, seed=0)
        drawn = np.stack([draw_scene(scene, np.random.default_rng([7, i])) for i in range(SEEDS)])
        found.append([f(images) for images in (made, drawn) for f in (diversity, spacing)])
    means = np.mean(found, axis=0).tolist()
    return means[0], means[2], means[1], means[3]


def training_pictures(count: int) -> Images:
    """Return the first `count` pictures that the transformer learned from."""
    sets = [(min(TRAINING_CHUNK, count - n), n) for n in range(0, count, TRAINING_CHUNK)]
    return np.concatenate([draw_training(size, TRAINING_SEED + n)[0] for size, n in sets])


def evaluate(
    pipe: Pipeline,
    tokenizer: BitTokenizer,
    classifiers: tuple[SceneClassifier, SceneClassifier],
    *,
    count: int = 500,
    seed: int = 0,
    references: int = 4000,
    checks: int = 500,
) -> Evaluation:
    """Generate pictures of `count` held-out sentences at the bundle's defaults and measure them.

    `references` training pictures are looked through for copies; `checks` drawings of one thing,
    and of two, measure the classifiers.
    """
    shown, texts = held_out_sentences(count, Recipe().held_out_seed)
    images = pipe.generate(prompts=texts, seed=seed)
    checked: dict[str, float] = {}
    for things, model in zip((1, 2), classifiers, strict=True):
        found = accuracies(model, *draw_any(checks, CHECK_SEED, things))
        checked |= {f"{name} of {things}": share for name, share in found.items()}
    drawn, _ = draw_held_out(count, Recipe().held_out_seed)
    coded = reconstruct(tokenizer, drawn)
    learned = reconstruct(tokenizer, training_pictures(references))
    varied = variety(pipe)
    return Evaluation(
        shares=shares(shown, images, *classifiers),
        classifiers=checked,
        psnr=psnr(drawn, coded),
        diversity=varied[0],
        drawn_diversity=varied[1],
        spacing=varied[2],
        drawn_spacing=varied[3],
        nearest=nearest_distance(images, learned),
        fresh_nearest=nearest_distance(coded, learned),
    )


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--weights",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    show_default="those that ship",
    help="Folder that `tools.pocket_text.train` wrote: the tokenizer and the classifiers.",
)
@click.option("--count", type=click.IntRange(min=20), default=500, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def main(bundle: Path, weights: Path | None, count: int, seed: int) -> None:
    """Evaluate pictures generated through BUNDLE, exported from the folder of weights."""
    start = time.monotonic()
    try:
        tokenizer = build_text_modules(load(weights or POCKET_TEXT_FOLDER))[0]
        classifiers = load_classifiers(weights or HERE)
        with Pipeline.load(bundle) as pipe:
            report = evaluate(pipe, tokenizer, classifiers, count=count, seed=seed)
    except VarDeployError as error:
        raise click.ClickException(str(error)) from None
    click.echo(report.table())
    click.echo(f"{time.monotonic() - start:.0f} s", err=True)


if __name__ == "__main__":
    main()
