"""A few steps of pocket's training: it learns, repeats itself, and writes what export reads."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors import safe_open
from torch import Tensor, nn

from tools.pocket import evaluate, fit_classifier, fit_tokenizer, fit_transformer, train
from tools.pocket.drawings import draw_set
from tools.pocket.recipe import Recipe
from var_deploy.export.checkpoint.assemble import build_modules, load_model
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.models.transformer import Transformer
from var_deploy.export.pocket.classifier import CLASSIFIER_FILE, load_classifier
from var_deploy.export.pocket.model import POCKET
from var_deploy.spec import ModelSpec

SPEC = ModelSpec(
    tokenizer=dataclasses.replace(
        POCKET.tokenizer,
        patch_nums=(1, 2, 4, 8),
        vocab_size=24,
        code_width=8,
        width_multipliers=(1, 1, 1, 1),
    ),
    transformer=dataclasses.replace(POCKET.transformer, depth=2, width=48, heads=2, ffn_width=96),
)
RECIPE = Recipe(
    seed=3,
    tokenizer_images=16,
    tokenizer_batch=4,
    tokenizer_steps=12,
    plain_steps=8,
    refine_images=40,
    code_steps=30,
    decoder_steps=10,
    transformer_images=24,
    transformer_batch=8,
    transformer_steps=80,
    classifier_images=64,
    classifier_steps=2,
    threads=1,
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Both models before and after their few steps."""

    untrained_tokenizer: Tokenizer
    tokenizer: Tokenizer
    untrained_transformer: Transformer
    transformer: Transformer
    log: list[str]


def run(recipe: Recipe) -> Run:
    none = dataclasses.replace(recipe, tokenizer_steps=0, transformer_steps=0)
    log: list[str] = []
    tokenizer = fit_tokenizer.train_tokenizer(recipe, SPEC, log.append)
    return Run(
        untrained_tokenizer=fit_tokenizer.train_tokenizer(none, SPEC, str),
        tokenizer=tokenizer,
        untrained_transformer=fit_transformer.train_transformer(none, SPEC, tokenizer, str),
        transformer=fit_transformer.train_transformer(recipe, SPEC, tokenizer, log.append),
        log=log,
    )


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained() -> Run:
    return run(RECIPE)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def unchanged(before: nn.Module, after: nn.Module) -> list[str]:
    old, new = parameters(before), parameters(after)
    assert all(bool(p.isfinite().all()) for p in new.values())
    return [name for name in old if torch.equal(old[name], new[name])]


@torch.no_grad()
def token_loss(tokenizer: Tokenizer, transformer: Transformer) -> float:
    """Cross-entropy over the pictures that the transformer learned from."""
    images = evaluate.training_images(RECIPE.transformer_images)
    labels = torch.arange(len(images)) % 10
    tokens = tokenizer.encode(fit_tokenizer.to_tensor(images))
    logits = transformer(labels, tokenizer.teacher_input(tokens))
    return F.cross_entropy(logits.flatten(0, 1), torch.cat(tokens, dim=1).flatten()).item()


def test_every_weight_of_the_tokenizer_moves_and_pictures_get_clearer(trained: Run) -> None:
    assert not unchanged(trained.untrained_tokenizer, trained.tokenizer)
    images, _ = draw_set(RECIPE.tokenizer_images, RECIPE.seed)
    before = evaluate.tokenizer_psnr(trained.untrained_tokenizer, images)
    assert evaluate.tokenizer_psnr(trained.tokenizer, images) > before + 1


def test_the_codebook_is_used(trained: Run) -> None:
    images, _ = draw_set(RECIPE.tokenizer_images, RECIPE.seed)
    with torch.no_grad():
        tokens = torch.cat(trained.tokenizer.encode(fit_tokenizer.to_tensor(images)), dim=1)
    assert len(tokens.unique()) > SPEC.tokenizer.vocab_size / 2


def test_every_weight_of_the_transformer_moves_and_its_loss_falls(trained: Run) -> None:
    assert not unchanged(trained.untrained_transformer, trained.transformer)
    before = token_loss(trained.tokenizer, trained.untrained_transformer)
    assert before == pytest.approx(np.log(SPEC.tokenizer.vocab_size), rel=0.05)  # knows nothing
    assert token_loss(trained.tokenizer, trained.transformer) < before - 0.1


def test_the_same_seed_trains_the_same_weights_and_another_does_not(trained: Run) -> None:
    torch.rand(5)  # whatever happened before must not matter
    again = run(RECIPE)
    for name in ("tokenizer", "transformer"):
        first, second = getattr(trained, name), getattr(again, name)
        assert unchanged(first, second) == list(parameters(first)), name
    short = dataclasses.replace(RECIPE, seed=4, tokenizer_steps=1, plain_steps=1)
    other = fit_tokenizer.train_tokenizer(short, SPEC, str)
    assert not torch.equal(other.encoder.conv_in.weight, trained.tokenizer.encoder.conv_in.weight)


def test_refining_the_codes_brings_them_nearer_and_moves_nothing_else(trained: Run) -> None:
    before = trained.tokenizer
    after = fit_tokenizer.refine_codes(copy.deepcopy(before), RECIPE, str)
    moved = set(parameters(before)) - set(unchanged(before, after))
    assert moved and all(name.startswith("quantize.") for name in moved)
    images = fit_tokenizer.to_tensor(draw_set(40, RECIPE.seed)[0])

    @torch.no_grad()
    def error(model: Tokenizer) -> float:
        f = model.features(images)
        return F.mse_loss(model.accumulate(model.encode(images)), f).item()

    assert error(after) < 0.9 * error(before)


def test_refining_the_decoder_clears_the_picture_and_changes_no_token(trained: Run) -> None:
    before = trained.tokenizer
    after = fit_tokenizer.refine_decoder(copy.deepcopy(before), RECIPE, str)
    moved = set(parameters(before)) - set(unchanged(before, after))
    assert moved and all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
    images, _ = draw_set(RECIPE.tokenizer_images, RECIPE.seed)
    assert evaluate.tokenizer_psnr(after, images) > evaluate.tokenizer_psnr(before, images)


def test_progress_is_logged(trained: Run) -> None:
    for stage, steps in (("tokenizer", 12), ("transformer", 80)):
        lines = [" ".join(line.split()) for line in trained.log if line.startswith(stage)]
        shown = [line.split(" ")[1] for line in lines]
        assert [shown[0], shown[-1]] == [f"0/{steps}", f"{steps - 1}/{steps}"]


def test_what_is_saved_is_half_precision_and_loads_as_it_was(trained: Run, tmp_path: Path) -> None:
    files = {"tokenizer": tmp_path / "t.safetensors", "checkpoint": tmp_path / "v.safetensors"}
    train.save_half(trained.tokenizer, files["tokenizer"])
    train.save_half(trained.transformer, files["checkpoint"])
    for path in files.values():
        with safe_open(path, framework="pt") as saved:
            kinds = {key: saved.get_slice(key).get_dtype() for key in saved.keys()}  # noqa: SIM118
        assert {kind for key, kind in kinds.items() if key != "lvl_1L"} == {"F16"}
    model = load_model(None, **files)
    assert model.spec == SPEC
    for loaded, module in zip(
        build_modules(model), (trained.tokenizer, trained.transformer), strict=True
    ):
        found = loaded.state_dict()
        assert found.keys() == module.state_dict().keys()
        for name, p in parameters(module).items():
            assert torch.equal(found[name], p.half().float()), name


def test_the_command_trains_every_stage_on_pictures_that_nothing_is_evaluated_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"tokenizer_steps": 1, "plain_steps": 0, "code_steps": 1, "decoder_steps": 1}
    drawn: list[tuple[int, int]] = []

    def recipe(seed: int) -> Recipe:
        return dataclasses.replace(RECIPE, seed=seed, transformer_steps=1, **few)

    def recorded(count: int, seed: int) -> object:
        drawn.append((count, seed))
        return draw_set(count, seed)

    monkeypatch.setattr(train, "Recipe", recipe)
    monkeypatch.setattr(train, "POCKET", SPEC)
    for module in (fit_tokenizer, fit_transformer):
        monkeypatch.setattr(module, "draw_set", recorded)
    folder = tmp_path / "out"
    told = ""
    for stage in train.STAGES:
        arguments = ["--out", str(folder), "--stage", stage]
        result = CliRunner().invoke(train.main, arguments)
        assert result.exit_code == 0, result.output
        told += result.output
    assert "transformer     0/1" in told and "classifier    0/2" in told
    files = {train.JOINT_FILE, train.CODES_FILE, train.TOKENIZER_FILE, train.TRANSFORMER_FILE}
    assert {p.name for p in folder.iterdir()} == {*files, CLASSIFIER_FILE.name}
    load_classifier(folder / CLASSIFIER_FILE.name)
    model = load_model(
        None,
        tokenizer=folder / train.TOKENIZER_FILE,
        checkpoint=folder / train.TRANSFORMER_FILE,
    )
    assert model.spec == SPEC

    assert drawn == [(16, 0), (40, 0), (16, 0), (24, fit_transformer.TRAINING_SEED)]
    full = range(0, Recipe().transformer_images, fit_transformer.TRAINING_CHUNK)
    learned = {Recipe().seed, *(fit_transformer.TRAINING_SEED + start for start in full)}
    evaluated = {fit_classifier.CLASSIFIER_SEED, fit_classifier.CHECK_SEED}
    assert not learned & {Recipe().held_out_seed, *evaluated}


def test_training_pictures_are_those_that_were_encoded(
    trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`evaluate.training_images` looks for copies in the right place, beyond the first thousand."""
    drawn: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = []

    def recorded(count: int, seed: int) -> object:
        images, labels = draw_set(min(count, 2), seed)
        drawn.append(images)
        return images, labels

    monkeypatch.setattr(fit_transformer, "draw_set", recorded)
    fit_transformer.encode_set(trained.tokenizer, 2002, fit_transformer.TRAINING_SEED)
    picked = evaluate.training_images(2002)[[0, 1, 1000, 1001, 2000, 2001]]
    np.testing.assert_array_equal(np.concatenate(drawn), picked)


def test_help_says_what_the_command_does() -> None:
    command = [sys.executable, "-m", "tools.pocket.train", "--help"]
    result = subprocess.run(command, cwd=train.ROOT, capture_output=True, text=True, check=True)
    assert "Train pocket and its classifier and write their three weight files" in result.stdout
    for option in ("--out", "--stage", "--seed"):
        assert option in result.stdout
