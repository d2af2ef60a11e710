"""The drawings and sentences of pocket-text, and a few steps of its training up to a bundle."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from tools.pocket.shapes import ROOT
from tools.pocket_text import (
    bundle,
    classifier,
    evaluate,
    fit_text_encoder,
    fit_tokenizer,
    fit_transformer,
    train,
)
from tools.pocket_text import scenes as drawn
from tools.pocket_text.captions import caption, vocabulary
from tools.pocket_text.recipe import Recipe
from tools.pocket_text.scenes import Item, Scene, scenes, unseen_colour, unseen_pair
from tools.pocket_text.things import COLOUR_NAMES, THINGS, paint, shade
from tools.pocket_text.words import SPECIAL, tokenizer_json, vocab_size
from var_deploy import demo, names
from var_deploy.export.checkpoint.presets import POCKET_TEXT_FOLDER
from var_deploy.export.models.bit_tokenizer import BitTokenizer
from var_deploy.export.models.t5 import BIAS_TABLE, T5Encoder, relative_buckets
from var_deploy.export.pocket_text.model import POCKET_TEXT, TEXT_ENCODER, TEXT_LENGTH
from var_deploy.pipeline import Pipeline
from var_deploy.text.examples import examples
from var_deploy.text.prompt_tokenizer import PromptTokenizer

SEED = 31
UNKNOWN = SPECIAL.index("<unk>")
SPEC = dataclasses.replace(
    POCKET_TEXT,
    transformer=dataclasses.replace(
        POCKET_TEXT.transformer, depth=1, width=32, heads=2, ffn_width=64, text_width=32
    ),
)
ENCODER = dataclasses.replace(TEXT_ENCODER, width=32, depth=1, heads=2, head_width=16, ffn_width=32)
RECIPE = Recipe(
    seed=3,
    tokenizer_batch=2,
    tokenizer_steps=3,
    decoder_steps=2,
    text_encoder_batch=16,
    text_encoder_steps=40,
    transformer_images=60,
    transformer_batch=16,
    transformer_steps=24,
    classifier_images=40,
    classifier_steps=3,
    threads=1,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def words() -> PromptTokenizer:
    size = vocab_size(vocabulary())
    return PromptTokenizer(tokenizer_json(vocabulary()), TEXT_LENGTH, vocab_size=size)


@pytest.fixture(scope="module")
def blind_tokenizer() -> BitTokenizer:
    """A tokenizer with random weights: enough where only its use is tested."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BitTokenizer(SPEC.tokenizer).requires_grad_(False).eval()


# scenes and drawings


def test_there_are_enough_things_and_colours() -> None:
    assert len(THINGS) >= 20 and len(COLOUR_NAMES) >= 10


def test_a_training_set_holds_no_held_out_combination() -> None:
    for scene, _ in scenes(2000, SEED):
        assert not drawn.held_out(scene)
        assert not any(unseen_colour(item.thing, item.colour) for item in scene.items)
        assert len(scene.items) == 1 or not unseen_pair(*(item.thing for item in scene.items))
    assert all(drawn.held_out(scene) for scene, _ in scenes(200, SEED, training=False))


def test_held_out_combinations_are_few_and_no_thing_or_colour_is_among_them_alone() -> None:
    colours = np.array([[unseen_colour(t, c) for c in COLOUR_NAMES] for t in THINGS])
    pairs = np.array([[unseen_pair(a, b) for b in THINGS] for a in THINGS])
    assert 0.08 < colours.mean() < 0.2 and 0.08 < pairs.mean() < 0.2
    assert colours.sum(axis=0).min() > 0  # every colour is held out with some thing
    assert colours.mean(axis=0).max() < 0.5 and colours.mean(axis=1).max() < 0.5
    assert pairs.mean(axis=1).max() < 0.5
    np.testing.assert_array_equal(pairs, pairs.T)


def test_a_training_set_covers_what_the_grammar_knows() -> None:
    shown = [scene for scene, _ in scenes(3000, SEED)]
    items = [item for scene in shown for item in scene.items]
    assert {item.thing for item in items} == set(THINGS)
    assert {item.colour for item in items} == set(COLOUR_NAMES)
    assert {scene.relation for scene in shown} == {"", *drawn.RELATIONS}
    assert {scene.place for scene in shown} == set(drawn.PLACES)
    seen = {(item.thing, item.colour) for item in items}
    assert len(seen) == sum(
        not unseen_colour(t, c) for t, c in itertools.product(THINGS, COLOUR_NAMES)
    )


def test_the_same_seed_draws_the_same_pictures_and_another_does_not() -> None:
    images, shown = drawn.draw_training(6, SEED)
    again, same = drawn.draw_training(4, SEED)
    np.testing.assert_array_equal(again, images[:4])
    assert same == shown[:4]
    assert (drawn.draw_training(4, SEED + 1)[0] != again).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("thing", THINGS)
def test_the_window_of_a_thing_cuts_nothing_off(thing: str) -> None:
    scene = Scene((Item(thing, "red", "large"),), "", "", "sky", "day")
    rng, whole = np.random.default_rng(SEED), np.random.default_rng(SEED)
    image = drawn.draw_scene(scene, rng)
    canvas = drawn._backdrop(scene, whole)
    radius = drawn._ALONE["large"] * drawn.uniform(whole, 0.93, 1.07)
    reach = 0.97 - radius
    x, y = (min(max(drawn.uniform(whole, -0.07, 0.07), -reach), reach) for _ in "xy")
    frame = ROOT.place(x, y, radius, drawn.turn_of(thing, whole))
    paint(canvas, frame, thing, shade("red", whole), whole)
    np.testing.assert_array_equal(image, canvas.image())


def test_things_differ_by_their_shapes() -> None:
    """In the same colour at the same place, a tenth of the picture tells any two apart."""
    shown = [Scene((Item(thing, "blue", "large"),), "", "", "snow", "day") for thing in THINGS]
    images = [drawn.draw_scene(scene, np.random.default_rng(1)).astype(int) for scene in shown]
    for (i, a), (j, b) in itertools.combinations(enumerate(images), 2):
        share = (np.abs(a - b).max(axis=2) > 40).mean()
        assert share > 0.1, (THINGS[i], THINGS[j], share)


# sentences and tokens


def test_every_sentence_is_known_and_fits(words: PromptTokenizer) -> None:
    seen: set[str] = set()
    for scene, rng in scenes(1500, SEED):
        text = caption(scene, rng)
        found = words(text)
        assert UNKNOWN not in found.ids[: found.length], text
        assert not found.truncation
        seen.update(text.split())
    assert seen == set(vocabulary())


def test_a_sentence_tells_thing_and_colour_of_a_scene() -> None:
    rng = np.random.default_rng(SEED)
    scene = Scene(
        (Item("boat", "red", "small"), Item("sun", "blue", "large")), "", "left of", "sea", "night"
    )
    texts = {caption(scene, rng) for _ in range(400)}
    assert len(texts) > 200  # several ways to say it
    for text in texts:
        told = text.split()
        boat = next(told.index(noun) for noun in ("boat", "ship") if noun in told)
        assert boat < told.index("sun"), text
        assert {"red", "scarlet"} & set(told) and "blue" in told, text
        assert {"small", "little", "tiny"} & set(told) and {"large", "big", "huge"} & set(told)


def test_letters_are_made_small_and_unknown_words_stand_at_their_places(
    words: PromptTokenizer,
) -> None:
    plain = words("a red star, left of a blue moon")
    shouted = words("A RED Star, Left of a blue MOON")
    np.testing.assert_array_equal(plain.ids, shouted.ids)
    found = words("a zeppelin in the sky")
    assert (found.ids[: found.length] == UNKNOWN).tolist() == [False, True] + 4 * [False]
    assert words("").length == 1


def test_the_weights_fit_into_14_megabytes_of_fp16() -> None:
    model = fit_transformer.TextToBits(TEXT_ENCODER, POCKET_TEXT)
    modules = (model, BitTokenizer(POCKET_TEXT.tokenizer))
    assert sum(p.numel() * 2 for module in modules for p in module.parameters()) <= 14_000_000


# training


def test_quantising_without_flips_is_that_of_the_tokenizer(blind_tokenizer: BitTokenizer) -> None:
    f = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    found = fit_tokenizer.quantize(blind_tokenizer, f)
    expected = list(blind_tokenizer.quantize(f))
    for k, (bits, f_hat) in enumerate(expected):
        assert torch.equal(found.bits[k], bits.float())
        if k < len(found.inputs):
            torch.testing.assert_close(found.inputs[k], blind_tokenizer.next_input(k, f_hat))
    torch.testing.assert_close(found.f_hat, expected[-1][1])


def test_flipped_bits_change_the_inputs_and_later_bits_mend_them(
    blind_tokenizer: BitTokenizer,
) -> None:
    f = 0.3 * torch.randn(8, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = fit_tokenizer.quantize(blind_tokenizer, f)
    wrong = fit_tokenizer.quantize(blind_tokenizer, f, 0.5, torch.Generator().manual_seed(2))
    assert torch.equal(plain.bits[0], wrong.bits[0])  # what is right at the first scale stays so
    assert not torch.equal(plain.inputs[0], wrong.inputs[0])
    assert not torch.equal(plain.bits[1], wrong.bits[1])
    again = fit_tokenizer.quantize(blind_tokenizer, f, 0.5, torch.Generator().manual_seed(2))
    assert torch.equal(again.f_hat, wrong.f_hat)


def test_training_learns_and_goes_on_where_it_was_stopped(
    blind_tokenizer: BitTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    def train(steps: int, name: str) -> fit_transformer.TextToBits:
        recipe = dataclasses.replace(RECIPE, transformer_steps=steps)
        return fit_transformer.train_transformer(
            *(recipe, SPEC, blind_tokenizer, encoder, log.append),
            tmp_path / f"{name}.pt",
            tmp_path / "latents.npy",
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = T5Encoder(ENCODER)
        fit_text_encoder.init_text_encoder(encoder)
    # the schedule must be that of the whole training also where it is cut short
    monkeypatch.setattr("tools.pocket.optimizers.cosine_rate", lambda step, steps: 1.0)
    whole = train(24, "whole")
    first, last = (float(line.split("loss")[1].split()[0]) for line in (log[1], log[-1]))
    assert first == pytest.approx(np.log(2), rel=0.02) and last < first - 0.005
    train(10, "part")
    resumed = train(24, "part")
    assert any("goes on from step 10" in line for line in log)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_text_encoder_learns_to_read_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    def train(steps: int, name: str) -> T5Encoder:
        recipe = dataclasses.replace(RECIPE, text_encoder_steps=steps)
        place = tmp_path / f"{name}.pt"
        return fit_text_encoder.train_text_encoder(recipe, ENCODER, log.append, place)

    monkeypatch.setattr("tools.pocket.optimizers.cosine_rate", lambda step, steps: 1.0)
    whole = train(40, "whole")
    first, last = (float(line.split("right")[1].split()[0]) for line in (log[0], log[-1]))
    assert last > first + 0.05
    train(15, "part")
    resumed = train(40, "part")
    assert any("goes on from step 15" in line for line in log)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_first_position_biases_look_one_way() -> None:
    """An even head sees what stands before a word, an odd one what comes after it."""
    encoder = T5Encoder(TEXT_ENCODER)
    fit_text_encoder.init_text_encoder(encoder)
    buckets = torch.from_numpy(relative_buckets(TEXT_ENCODER, 12)).long()
    biases = (
        encoder.get_parameter(BIAS_TABLE).detach()[buckets].unbind(-1)
    )  # [S, S], of query and key
    assert len(biases) == TEXT_ENCODER.heads
    query, key = torch.arange(12)[:, None], torch.arange(12)
    before, after = ((key < query) & (key >= query - 3), (key > query) & (key <= query + 3))
    for head, bias in enumerate(biases):
        seen, unseen = (before, after) if head % 2 == 0 else (after, before)
        assert bias[seen].min() > bias[unseen].max() + 2


def test_questions_about_a_scene_have_the_right_answers() -> None:
    boat, sun = Item("boat", "red", "small"), Item("sun", "blue", "large")
    for relation in drawn.RELATIONS:
        scene = Scene((boat, sun), "", relation, "sea", "night")
        found = fit_text_encoder.right_answers(scene)
        boat_first = relation in ("left of", "above")
        assert (found["first"] == "boat") is boat_first
        assert (found["second colour"] == "blue") is boat_first
        assert found["where"] == ("beside" if "of" in relation else "stacked")
    alone = fit_text_encoder.right_answers(Scene((boat,), "top", "", "sea", "night"))
    assert alone["second"] == fit_text_encoder.NOTHING and alone["where"] == "top"
    numbers = fit_text_encoder.targets([Scene((boat,), "top", "", "sea", "night")])
    questions = fit_text_encoder.QUESTIONS.items()
    for (question, answers), number in zip(questions, numbers, strict=True):
        assert answers[int(number)] == alone[question]


def test_tokenizer_and_decoder_learn_and_bits_stay(tmp_path: Path) -> None:
    log: list[str] = []
    model = fit_tokenizer.train_tokenizer(RECIPE, SPEC.tokenizer, log.append)
    features = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    decoder = {k: v.clone() for k, v in model.decoder.state_dict().items()}
    fit_tokenizer.refine_decoder(model, RECIPE, log.append)
    assert all(torch.equal(v, features[k]) for k, v in model.encoder.state_dict().items())
    assert not any(
        torch.equal(v, decoder[k]) for k, v in model.decoder.state_dict().items() if v.ndim == 4
    )
    assert "psnr" in log[-1]
    other = fit_tokenizer.train_tokenizer(RECIPE, SPEC.tokenizer, log.append)
    assert all(torch.equal(v, features[k]) for k, v in other.encoder.state_dict().items())


def test_answers_put_the_left_or_upper_thing_first() -> None:
    pair = (Item("boat", "red"), Item("sun", "blue"))
    for relation, first in zip(drawn.RELATIONS, ("boat", "sun", "boat", "sun"), strict=True):
        found = classifier.answers(Scene(pair, "", relation, "sea", "day"))
        assert found["first"] == first
        assert found["across"] == ("beside" if "of" in relation else "stacked")


def test_the_command_trains_a_folder_that_becomes_a_bundle_and_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(RECIPE, transformer_steps=2, text_encoder_steps=2)
    drawings: list[tuple[int, int]] = []

    def recorded(count: int, seed: int) -> object:
        drawings.append((count, seed))
        return drawn.draw_training(count, seed)

    monkeypatch.setattr(train, "Recipe", lambda seed: dataclasses.replace(recipe, seed=seed))
    monkeypatch.setattr(train, "POCKET_TEXT", SPEC)
    monkeypatch.setattr(train, "TEXT_ENCODER", ENCODER)
    for module in (fit_tokenizer, fit_transformer):
        monkeypatch.setattr(module, "draw_training", recorded)
    weights = tmp_path / "weights"
    for _ in range(2):  # the second time there is nothing left to do
        result = CliRunner().invoke(train.main, ["--out", str(weights)])
        assert result.exit_code == 0, result.output
    told = result.output
    assert "tokenizer goes on from step 3" in told and "transformer goes on from step 2" in told
    assert "text-encoder goes on from step 2" in told
    assert "classifier" not in told
    first = fit_tokenizer.FIRST_SEED
    stages = [first, first + 1, first + 2, *(first + fit_tokenizer.STAGE_SEEDS + i for i in (0, 1))]
    assert drawings == [*((2, seed) for seed in stages), (60, fit_transformer.TRAINING_SEED)]
    # ... and no seed of a training drawing is one that anything is evaluated with
    evaluated = {recipe.held_out_seed + i for i in range(4)}
    most = Recipe().transformer_images
    assert not evaluated & {fit_transformer.TRAINING_SEED + i for i in range(0, most, 1000)}
    assert max(evaluated) < fit_tokenizer.FIRST_SEED

    for path in weights.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as saved:
            assert {saved.get_slice(key).get_dtype() for key in saved.keys()} == {"F16"}  # noqa: SIM118
    bundle.export(weights, tmp_path / "bundle", SPEC)
    monkeypatch.setattr(evaluate, "SENTENCES", 2)
    monkeypatch.setattr(evaluate, "SEEDS", 2)
    tokenizer = train.load_tokenizer(weights / bundle.TOKENIZER_FILE)
    with Pipeline.load(tmp_path / "bundle") as pipe:
        report = evaluate.evaluate(
            *(pipe, tokenizer, evaluate.load_classifiers(weights)),
            count=20,
            references=20,
            checks=20,
        )
    table = report.table()
    assert all(name in table for name in evaluate.BARS)
    assert report.shares["thing"][1] == report.shares["both things of a pair"][1] == 10
    assert len(report.nearest) == 20


# what ships

# of 500, where the weights miss the bar: docs/BENCHMARKS.md says why
FALLS_SHORT = {"thing": 0.948}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    folder = tmp_path_factory.mktemp("shipped")
    for packed in (demo.POCKET_TEXT_ENCODER, demo.POCKET_TEXT):
        demo.write_demo_bundle(packed, folder / packed.name)
    with Pipeline.load(folder / demo.POCKET_TEXT.name, threads=1) as pipe:
        yield pipe


def test_what_ships_has_the_words_of_the_grammar() -> None:
    assert TEXT_ENCODER.vocab_size == vocab_size(vocabulary())
    kept = POCKET_TEXT_FOLDER / bundle.TEXT_FOLDER / names.TOKENIZER_JSON
    assert kept.read_bytes() == tokenizer_json(vocabulary())


def test_what_ships_draws_what_is_asked_for(shipped: Pipeline) -> None:
    """Sentences of scenes that were never drawn; docs/BENCHMARKS.md has the result for 500."""
    shown, texts = evaluate.held_out_sentences(120, Recipe().held_out_seed)
    images = shipped.generate(prompts=texts, seed=0)
    found = evaluate.shares(shown, images, *evaluate.load_classifiers())
    for name, bar in {**evaluate.BARS, **FALLS_SHORT}.items():
        share, count = found[name]
        assert share >= bar - 2 * (bar * (1 - bar) / count) ** 0.5, (name, share, count)
    assert shipped.unknown_words([*texts, *examples("pocket-text")]) == []
    assert shipped.remarks(["a zeppelin"]) == ["pocket-text does not know: zeppelin"]


def test_pictures_of_one_sentence_vary(shipped: Pipeline) -> None:
    images = shipped.generate(prompts=["a red boat on the sea"] * 8, seed=0)
    assert evaluate.diversity(images) > 10 and evaluate.spacing(images) > 5
