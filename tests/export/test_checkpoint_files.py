"""Checkpoint files: what is read, and what is refused in which words."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from var_deploy.errors import CheckpointError
from var_deploy.export.checkpoint import load_model, open_checkpoint

State = dict[str, torch.Tensor]


class RunsCode:
    """What an attacker puts into a pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch EXECUTED",)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(path: Path, part: Any = "transformer") -> str:
    """The message with which a file is refused: one line that begins with its path."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, part)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    assert "weights_only" not in message  # torch advises to switch the protection off
    return message


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_wants_to_run_code(legacy: bool, states: tuple[State, State]) -> None:
    file = Path("evil.pth")
    torch.save({**states[1], "x": RunsCode()}, file, _use_new_zipfile_serialization=not legacy)
    assert f"is refused: loading it would run {os.name}.system" in refusal(file)
    assert not Path("EXECUTED").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_plain_pickle_that_wants_to_run_code(protocol: int) -> None:
    file = Path("evil.pth")
    file.write_bytes(pickle.dumps(RunsCode(), protocol))
    message = refusal(file)
    assert "refused" in message or "no checkpoint" in message
    assert not Path("EXECUTED").exists()


def test_a_whole_module_is_refused_by_its_class() -> None:
    torch.save(torch.nn.Linear(2, 2), "module.pth")
    message = refusal(Path("module.pth"))
    assert "torch.nn.modules.linear.Linear" in message
    assert "state_dict() alone" in message


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_truncated_pth(legacy: bool, kept: float, states: tuple[State, State]) -> None:
    file = Path("cut.pth")
    torch.save(states[1], file, _use_new_zipfile_serialization=not legacy)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept)])
    assert "truncated or damaged" in refusal(file)


def test_truncated_safetensors(states: tuple[State, State]) -> None:
    file = Path("cut.safetensors")
    save_file(states[1], file)
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated" in refusal(file)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_checkpoint(suffix: str) -> None:
    file = Path("x" + suffix)
    assert refusal(file) == f"{file} does not exist"
    file.mkdir()
    assert refusal(file) == f"{file} is a folder, expected a checkpoint file"
    file.rmdir()
    file.touch()
    assert "is empty" in refusal(file)
    for text in (b"once upon a time " * 9, b"<!DOCTYPE html><html></html>", b"\x00\xff" * 99, b"."):
        file.write_bytes(text)
        assert "is no " in refusal(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "Git LFS pointer" in refusal(file)


def test_an_archive_that_is_no_checkpoint() -> None:
    with zipfile.ZipFile("a.pth", "w") as archive:
        archive.writestr("letter.txt", "dear reader")
    assert "no PyTorch checkpoint" in refusal(Path("a.pth"))


@pytest.mark.parametrize("content", [{}, [1, 2], torch.zeros(3), {"a": torch.zeros(3)}])
def test_a_checkpoint_of_something_else(content: object) -> None:
    torch.save(content, "other.pth")
    assert "holds no VAR transformer" in refusal(Path("other.pth"))


def test_swapped_files(states: tuple[State, State]) -> None:
    torch.save(states[0], "vae.pth")
    torch.save(states[1], "var.pth")
    message = "expected a transformer: were --checkpoint and --tokenizer swapped?"
    assert message in refusal(Path("vae.pth"), "transformer")
    assert "holds a transformer, expected a tokenizer" in refusal(Path("var.pth"), "tokenizer")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_training_checkpoint(legacy: bool, states: tuple[State, State]) -> None:
    """The layout of the published trainer, with DDP's and torch.compile's prefixes."""
    tokenizer, transformer = states
    wrapped = {f"_orig_mod.module.{k}": v for k, v in transformer.items()}
    inner = {k.replace("encoder.mid.", "encoder.mid._orig_mod."): v for k, v in tokenizer.items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save(
        {"epoch": 7, "trainer": {"var_wo_ddp": wrapped, "vae_local": inner, "var_opt": optimizer}},
        "ckpt.pth",
        _use_new_zipfile_serialization=not legacy,
    )
    file = Path("ckpt.pth")
    model = load_model(None, checkpoint=file, tokenizer=file)
    assert model.transformer.description["key"] == "trainer.var_wo_ddp._orig_mod.module"
    for source, state in ((model.tokenizer, tokenizer), (model.transformer, transformer)):
        assert list(source.keys()) == list(state)
        for key in source.keys():  # noqa: SIM118 (no mapping)
            np.testing.assert_array_equal(source.read(key), state[key].numpy())


def test_one_flat_safetensors_file_with_both(states: tuple[State, State]) -> None:
    tokenizer, transformer = states
    both = {f"vae_proxy.0.{k}": v for k, v in tokenizer.items()} | transformer
    save_file(both, "both.safetensors")
    file = Path("both.safetensors")
    model = load_model(None, checkpoint=file, tokenizer=file)
    assert list(model.tokenizer.keys()) == list(tokenizer)


def test_two_candidates_are_not_guessed_between(states: tuple[State, State]) -> None:
    torch.save({"model": states[1], "ema": states[1]}, "two.pth")
    assert "holds 2 transformers (ema, model)" in refusal(Path("two.pth"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_float_types_become_fp32(
    dtype: torch.dtype, suffix: str, states: tuple[State, State]
) -> None:
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in states[1].items()}
    file = Path("half" + suffix)
    save_file(stored, file) if suffix == ".safetensors" else torch.save(stored, file)
    source = open_checkpoint(file, "transformer")
    for key, tensor in stored.items():
        array = source.read(key)
        assert array.dtype == (np.int64 if key == "lvl_1L" else np.float32)
        assert source.shape(key) == array.shape == tuple(tensor.shape)
        np.testing.assert_array_equal(array, tensor.to(torch.float64).numpy())


def test_description_has_the_name_and_hash_but_no_path(
    states: tuple[State, State], tmp_path: Path
) -> None:
    file = tmp_path / "var.pth"
    torch.save(states[1], file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    description = open_checkpoint(file, "transformer").description
    assert description == {"file": "var.pth", "sha256": digest}
