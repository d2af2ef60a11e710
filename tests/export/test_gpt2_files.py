"""State dicts of the GPT-2 form as files: recognised by shape, exported, verified, planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cli_steps import assert_one_line, done, run
from var_deploy.errors import UsageError
from var_deploy.export import export_modules, verify_bundle
from var_deploy.export import var as library_call
from var_deploy.export.checkpoint.assemble import load_model
from var_deploy.export.checkpoint.hints import Hints
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.spec import ModelSpec

SCALES, CODES = (1, 2), 16


def make(
    scales: tuple[int, ...] = SCALES, heads: int = 8, channels: int = 3, width: int = 32
) -> tuple[Any, Any, Any]:
    """(model, encoder, decoder), whose weights say something."""
    torch.manual_seed(0)
    model = library_call.build(
        hidden_size=width, num_layers=1, num_heads=heads, scales=scales, codebook_size=CODES
    )
    encoder, decoder = library_call.build_tokenizer(
        image_size=2 * scales[-1], scales=scales, codebook_size=CODES, embed_dim=8,
        in_channels=channels,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, encoder, decoder


def saved(folder: Path, model: Any, tokenizer: Any, suffix: str = ".pth") -> tuple[Path, Path]:
    """(transformer, tokenizer) as files."""
    paths = folder / f"gpt2{suffix}", folder / f"tok{suffix}"
    for path, module in zip(paths, (model, tokenizer), strict=True):
        save: Any = torch.save if suffix == ".pth" else save_file
        save(module.state_dict(), path)
    return paths


def options(files: tuple[Path, Path]) -> list[object]:
    return ["--checkpoint", files[0], "--tokenizer", files[1]]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("scales", "heads", "channels"),
    [((1, 2), 8, 3), ((1, 3, 4), 4, 1), ((1, 5), 2, 4), ((1, 2, 4, 8), 1, 2)],
)
def test_sizes_are_recognised(
    scales: tuple[int, ...], heads: int, channels: int, suffix: str, tmp_path: Path
) -> None:
    """Any scales from 1 on, any heads and channels, and a tokenizer with one codebook a scale."""
    model, encoder, decoder = make(scales, heads, channels)
    for tokenizer in (encoder, decoder, encoder.tokenizer):
        files = saved(tmp_path, model, tokenizer, suffix)
        loaded = load_model(None, checkpoint=files[0], tokenizer=files[1])
        assert loaded.spec.transformer == model.spec.transformer
        assert loaded.spec.tokenizer == encoder.tokenizer.spec
        assert (loaded.defaults.cfg, loaded.defaults.top_k, loaded.defaults.top_p) == (0, 0, 0)


def test_one_file_may_hold_both(tmp_path: Path) -> None:
    model, encoder, _ = make()
    both = {"model": model.state_dict(), "vae": encoder.tokenizer.state_dict()}
    torch.save(both, tmp_path / "both.pth")
    text = done("inspect", tmp_path / "both.pth").stdout
    assert "both.pth at model" in text and "both.pth at vae" in text
    assert "gpt2, 1 blocks, width 32, 8 heads" in text


def test_heads_that_nothing_tells_must_be_told(tmp_path: Path) -> None:
    """A guess would make another model of the same weights, without a word."""
    model, encoder, _ = make(width=64)
    state = {k: v for k, v in model.state_dict().items() if k not in ("heads_1H", "lvl_1L")}
    torch.save(state, tmp_path / "old.pth")
    files = tmp_path / "old.pth", saved(tmp_path, model, encoder)[1]
    given = {"checkpoint": files[0], "tokenizer": files[1]}
    with pytest.raises(UsageError, match=r"number of heads \(no heads_1H\); give it with --heads"):
        load_model(None, **given, hints=Hints(patch_nums=SCALES))
    loaded = load_model(None, **given, hints=Hints(patch_nums=SCALES, heads=8))
    assert loaded.spec.transformer == model.spec.transformer
    plan = run("plan", *options(files), "--patch-nums", "1,2", "--heads", 8, "--device", "cpu")
    assert plan.exit_code == 0, plan.output
    with pytest.raises(UsageError, match="--heads 4 contradicts"):
        load_model(
            None, checkpoint=saved(tmp_path, model, encoder)[0], tokenizer=files[1],
            hints=Hints(heads=4),
        )  # fmt: skip


def test_state_dicts_without_heads_are_loaded_strictly() -> None:
    """They were saved before the buffer was there; another number of heads is noticed with it."""
    model, *_ = make()
    state = model.state_dict()
    assert state.pop("heads_1H").shape == (1, 8)
    model.load_state_dict(state, strict=True)
    assert "heads_1H" not in state
    other, *_ = make(heads=4)
    with pytest.raises(RuntimeError, match="heads_1H"):
        other.load_state_dict(model.state_dict())


def test_swapped_files_are_told(tmp_path: Path) -> None:
    files = saved(tmp_path, *make()[:2])
    result = run("export", *options(files[::-1]), "--out", tmp_path / "b")  # type: ignore[arg-type]
    assert_one_line(result, 1, "swapped?")


# --- the command line


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return saved(tmp_path_factory.mktemp("files"), *make()[:2])


@pytest.fixture(scope="module")
def bundle(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    done("export", *options(files), "--precision", "fp32", "--precision", "int8", "--out", out)
    return out


def test_export_leaves_guidance_out_by_itself(
    bundle: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    assert not read_manifest(bundle).guidance
    out = tmp_path / "b"
    result = run("export", *options(files), "--guidance", "--out", out)
    assert_one_line(result, 2, "no guidance", "--no-guidance")
    assert not out.exists()
    with Pipeline.load(bundle, precision="fp32", threads=1) as pipe:
        assert pipe.generate([None] * 2, seed=1).shape == (2, 4, 4, 3)


def test_verify_takes_what_it_asks_for(bundle: Path, files: tuple[Path, Path]) -> None:
    result = run("verify", bundle)
    assert_one_line(result, 2, "--checkpoint and --tokenizer")
    text = done("verify", bundle, "--precision", "fp32", *options(files)).stdout
    assert "20 of 20 tokens of 4 images equal the PyTorch model's" in text
    label = run("verify", bundle, "--labels", "1", *options(files))
    assert_one_line(label, 2, "has no classes")


def test_int8_is_verified_or_refused_with_the_reason(
    bundle: Path, files: tuple[Path, Path]
) -> None:
    """An untrained autoencoder may lose more than 35 dB; the scales are held to their bounds."""
    result = run("verify", bundle, "--precision", "int8", "--json", *options(files))
    report = json.loads(result.stdout)
    wrong = {c["graph"]: c["detail"] for c in report["checks"] if not c["passed"]}
    assert set(wrong) <= {"decoder", "decoder drawn"}, wrong
    assert all("dB, bound 35 dB" in detail for detail in wrong.values())
    assert result.exit_code == (1 if wrong else 0)
    assert {c["graph"] for c in report["checks"]} >= {"step @ 1", "scale_01", "loop shared"}


def test_a_bundle_of_modules_takes_the_files_that_they_were_saved_to(tmp_path: Path) -> None:
    """`verify` advises files, so the files of the very modules must do; others are refused."""
    model, encoder, _ = make()
    out = tmp_path / "bundle"
    export_modules(model, encoder, out, layout="shared")
    assert_one_line(run("verify", out), 2, "Gpt2Transformer, Tokenizer", "--checkpoint and")
    files = saved(tmp_path, model, encoder)
    assert run("verify", out, *options(files)).exit_code == 0
    for suffix in (".pth", ".safetensors"):
        transformer, tokenizer = saved(tmp_path, model, encoder.tokenizer, suffix)
        assert verify_bundle(out, checkpoint=transformer, tokenizer=tokenizer, images=1).passed
    with torch.no_grad():
        model.head.bias.add_(1)
    torch.save(model.state_dict(), files[0])
    result = run("verify", out, *options(files))
    assert_one_line(result, 2, "gpt2.pth is not the file", "a Gpt2Transformer in memory")


def test_inspect_and_plan(bundle: Path, files: tuple[Path, Path]) -> None:
    transformer, tokenizer = files
    lines = done("inspect", transformer).stdout.splitlines()
    assert lines[0].startswith("checkpoint  gpt2.pth, ")
    assert "sizes" in lines[-1] and "--tokenizer" in lines[-1]
    text = done("inspect", transformer, "--tokenizer", tokenizer).stdout
    assert text == done("inspect", *options(files)).stdout
    data = json.loads(done("inspect", *options(files), "--json").stdout)
    recorded = read_manifest(bundle).checkpoint
    for part in ("transformer", "tokenizer"):
        assert data["parts"][part]["sha256"] == recorded[part]["sha256"]
        assert data["parts"][part]["sha256"] in text
        assert recorded[part]["sha256"][:16] in done("inspect", bundle).stdout
    assert ModelSpec.from_json(data["model"]) == read_manifest(bundle).model
    assert "checkpoint  " in done("inspect", bundle).stdout
    assert "gpt2: 1 blocks, width 32" in done("plan", *options(files), "--device", "cpu").stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["inspect"], "give a bundle, a checkpoint file"),
        (["inspect", "{bundle}", "--checkpoint", "{file}"], "is not a file"),
        (["inspect", "{file}", "--graph", "step"], "a checkpoint has no graphs"),
        (["plan"], "give a preset, the folder of a bundle, or --checkpoint"),
        (["plan", "pocket", "--checkpoint", "{file}"], "leave pocket out"),
        (["plan", "--checkpoint", "{file}"], "--tokenizer is missing"),
    ],
)
def test_what_does_not_go_together(
    arguments: list[str], told: str, bundle: Path, files: tuple[Path, Path]
) -> None:
    filled = [a.format(bundle=bundle, file=files[0]) for a in arguments]
    assert_one_line(run(*filled), 2, told)


def test_a_file_is_no_bundle_to_plan(files: tuple[Path, Path]) -> None:
    assert_one_line(run("plan", files[0]), 1, "is not a bundle", "--checkpoint and --tokenizer")


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pth")
    assert_one_line(run("inspect", tmp_path / "a.pth"), 1, "neither a VAR transformer nor")
    (tmp_path / "b.pth").write_bytes(b"text")
    assert_one_line(run("inspect", tmp_path / "b.pth"), 1, "b.pth")
