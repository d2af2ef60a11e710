"""Checkpoint files: what is read, and what is refused in which words."""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from var_deploy.errors import CheckpointError
from var_deploy.export.checkpoint.assemble import load_model, open_checkpoint

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
    assert "refused" in message or "not a checkpoint" in message
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
    assert refusal(file).startswith(f"{file} is a folder, expected a checkpoint file, or a folder")
    file.rmdir()
    file.touch()
    assert "is empty" in refusal(file)
    for text in (b"once upon a time " * 9, b"<!DOCTYPE html><html></html>", b"\x00\xff" * 99, b"."):
        file.write_bytes(text)
        assert "is not a " in refusal(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "Git LFS pointer" in refusal(file)


def test_an_archive_that_is_no_checkpoint() -> None:
    with zipfile.ZipFile("a.pth", "w") as archive:
        archive.writestr("letter.txt", "dear reader")
    assert "not a PyTorch checkpoint" in refusal(Path("a.pth"))


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


# ------------------------------------------------------------------ formats


def save_as(state: Any, file: Path, kind: str) -> Path:
    if kind == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "zip")
    return file


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize(
    "name", ["x", "x.ckpt", "x.PTH", "x.SAFETENSORS", "x.pth", "x.safetensors"]
)
def test_the_content_tells_the_format(name: str, kind: str, states: tuple[State, State]) -> None:
    source = open_checkpoint(save_as(states[1], Path(name), kind), "transformer")
    assert list(source.keys()) == (sorted if kind == "safetensors" else list)(states[1])
    for key, tensor in states[1].items():
        np.testing.assert_array_equal(source.read(key), tensor.numpy())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_training_run_reads_as_torch_reads_it(
    kind: str, protocol: int, states: tuple[State, State]
) -> None:
    """Modules, optimizer, schedule and odds and ends: the weights are torch's, bit by bit."""
    from var_deploy.export.checkpoint.files import _Entries
    from var_deploy.export.checkpoint.formats import open_contents

    module = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 5), "b": torch.nn.BatchNorm1d(5)})
    module["a"].weight.extra = "an attribute"  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(module.parameters(), amsgrad=True)
    module["b"](module["a"](torch.ones(4, 3))).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10)
    content = {
        "model": module.state_dict(),
        "parameters": dict(module.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "schedule": {k: v for k, v in schedule.state_dict().items() if not callable(v)},
        "rng": torch.get_rng_state(),
        "half": torch.arange(12).view(3, 4).half().t(),
        "tied": module["a"].weight.detach(),
        "row": module["a"].weight.detach()[1],
        "types": {"d": torch.float16, "e": torch.device("cpu"), "size": torch.Size([1, 2])},
        "odds": [None, True, -1, 2**40, 1.5, "é", b"bytes", (1, (2,)), {3: {4}}, bytearray(2), 1j],
    }
    torch.save(
        content, "x.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=kind == "zip"
    )
    contents = open_contents(Path("x.pth"))
    expected = torch.load("x.pth", weights_only=protocol == 2)  # it knows one protocol safely
    compared = 0

    def compare(found: Any, wanted: Any) -> None:
        nonlocal compared
        if isinstance(wanted, torch.Tensor):
            tensor = contents.tensor("x", found)
            torch.testing.assert_close(tensor.read(), wanted.detach(), rtol=0, atol=0)
            assert tensor.read().dtype == wanted.dtype
            compared += 1
        elif isinstance(wanted, dict):
            assert list(found) == [str(key) for key in wanted]
            for a, b in zip(found.values(), wanted.values(), strict=True):
                compare(a, b)

    compare(contents.tree, expected)
    assert compared > 20
    assert not dict(_Entries(Path("x.pth"), contents).find("transformer"))


def test_checkpoints_without_checksums(states: tuple[State, State]) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(states[1], "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert open_checkpoint(Path("x.pth"), "transformer").read("pos_1LC").shape == (1, 21, 64)


def test_tied_and_flattened_tensors(states: tuple[State, State]) -> None:
    """Views of one storage, overlapping and transposed ones too, are what they are in torch."""
    state = dict(states[1])
    flat = torch.randn(2 * 64 * 64 + 64)
    state["blocks.0.attn.proj.weight"] = flat[1 : 1 + 64 * 64].view(64, 64)
    state["blocks.1.attn.proj.weight"] = flat[1 + 64 * 64 : 1 + 2 * 64 * 64].view(64, 64).t()
    state["blocks.0.attn.q_bias"] = state["blocks.1.attn.q_bias"] = flat[:64]
    state["blocks.0.attn.v_bias"] = torch.ones(1).expand(64)  # few repeated values do no harm
    for kind in ("zip", "legacy"):
        source = open_checkpoint(save_as(state, Path(kind), kind), "transformer")
        for key, tensor in state.items():
            np.testing.assert_array_equal(source.read(key), tensor.numpy())


def test_writing_to_what_was_read_never_reaches_the_file(states: tuple[State, State]) -> None:
    for kind in ("zip", "legacy"):
        file = save_as(states[1], Path(kind), kind)
        before = file.read_bytes()
        open_checkpoint(file, "transformer").read("pos_1LC")[:] = 7
        assert file.read_bytes() == before


def test_storages_of_other_parts_are_not_looked_at(states: tuple[State, State]) -> None:
    torch.save({"model": states[1], "optimizer": torch.zeros(99)}, "x.pth")
    with zipfile.ZipFile("x.pth") as whole, zipfile.ZipFile("y.pth", "w") as cut:
        for entry in whole.infolist():
            if len(content := whole.read(entry)) != 99 * 4:
                cut.writestr(entry.filename, content)
    open_checkpoint(Path("y.pth"), "transformer")


def test_packed_again_with_compression(states: tuple[State, State]) -> None:
    torch.save(states[1], "x.pth")
    for name, deflated in (("small", ("data.pkl", "version")), ("all", ("",))):
        with zipfile.ZipFile("x.pth") as whole, zipfile.ZipFile(name, "w") as other:
            for entry in whole.infolist():
                packed = entry.filename.endswith(deflated)
                other.writestr(entry.filename, whole.read(entry), zipfile.ZIP_DEFLATED * packed)
    open_checkpoint(Path("small"), "transformer")
    assert "is compressed, which torch.save never does" in refusal(Path("all"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".SAFETENSORS"])
def test_headers_that_lie(suffix: str, states: tuple[State, State]) -> None:
    file = save_as(states[1], Path("good.safetensors"), "safetensors")
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    bad = Path("bad" + suffix)
    bad.write_bytes((len(content) - 8 - 99).to_bytes(8, "little") + content[8:])
    assert "not a safetensors file" in refusal(bad)
    for old, new in ((b'"F32"', b'"F64"'), (b"[0,", b"[4,"), (b"[1,21,64]", b"[1,21,46]")):
        assert old in content
        bad.write_bytes(content[:8] + content[8 : 8 + size].replace(old, new) + content[8 + size :])
        assert "not a safetensors file or is truncated" in refusal(bad)
    bad.write_bytes((2**62).to_bytes(8, "little") + content[8:])
    assert ("4611686018427387904 bytes" in refusal(bad)) == (suffix != ".pth")


# ------------------------------------------------------------------ kinds of tensors


def _quantized(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about to leave torch
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def _nested(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its interface may change
        return torch.nested.nested_tensor([tensor[0], tensor[1]])


WEIGHT = "blocks.1.attn.proj.weight"
ODD: dict[str, tuple[str, Callable[[torch.Tensor], Any], str]] = {
    "complex": (WEIGHT, lambda t: t.to(torch.complex64), "is complex64, expected a float type"),
    "quantized": (WEIGHT, _quantized, "is a quantized tensor, expected a dense one"),
    "sparse": (WEIGHT, lambda t: t.to_sparse(), "is a sparse tensor, expected a dense one"),
    "sparse rows": (WEIGHT, lambda t: t.to_sparse_csc(), "is a sparse tensor"),
    "meta": (WEIGHT, lambda t: t.to("meta"), "is a meta tensor, expected a dense one"),
    "nested": (WEIGHT, _nested, "is a nested tensor, expected a dense one"),
    "negated": (WEIGHT, lambda t: torch.complex(t, t).conj().imag, "lazily conjugated or negated"),
    "bool": (WEIGHT, lambda t: t > 0, "is bool, expected a float type"),
    "integer": (WEIGHT, lambda t: t.to(torch.int8), "is int8, expected a float type"),
    "levels": ("lvl_1L", lambda t: t.float(), "is float32, expected int64"),
    "levels, bool": ("lvl_1L", lambda t: t > 0, "is bool, expected int64"),
    "levels, sparse": ("lvl_1L", lambda t: t.to_sparse(), "is a sparse tensor"),
    "dimensions": (WEIGHT, lambda t: t.view(*t.shape, *[1] * 7), "truncated or damaged"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_tensors_that_are_no_weights(name: str, legacy: bool, states: tuple[State, State]) -> None:
    key, change, message = ODD[name]
    states[1][key] = change(states[1][key])
    torch.save(states[1], "x.pth", _use_new_zipfile_serialization=not legacy)
    found = refusal(Path("x.pth"))
    assert message in found
    assert key in found or name == "dimensions"


@pytest.mark.parametrize("name", ["complex", "bool", "integer", "levels", "levels, bool"])
def test_types_of_safetensors_that_are_no_weights(name: str, states: tuple[State, State]) -> None:
    key, change, message = ODD[name]
    states[1][key] = change(states[1][key])
    save_file(states[1], "x.safetensors")
    assert f"x.safetensors: {key} {message}" in refusal(Path("x.safetensors"))


def test_buffers_that_are_not_read_may_be_anything(states: tuple[State, State]) -> None:
    states[1]["attn_bias_for_masking"] = torch.zeros(1).expand(4 * 10**8) > 0
    torch.save(states[1], "x.pth")
    open_checkpoint(Path("x.pth"), "transformer")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", ["zip", "safetensors"])
def test_eight_bit_floats_become_fp32_exactly(
    dtype: torch.dtype, kind: str, states: tuple[State, State]
) -> None:
    states[1][WEIGHT] = states[1][WEIGHT].to(dtype)
    source = open_checkpoint(save_as(states[1], Path("x"), kind), "transformer")
    np.testing.assert_array_equal(source.read(WEIGHT), states[1][WEIGHT].float().numpy())


def test_a_tensor_class_of_another_package(states: tuple[State, State]) -> None:
    from fuzz.tensor_class import Scaled

    states[1][WEIGHT] = states[1][WEIGHT].as_subclass(Scaled)
    torch.save(states[1], "x.pth")
    assert "loading it would run fuzz.tensor_class.Scaled" in refusal(Path("x.pth"))


def test_repeated_values_beyond_the_file(states: tuple[State, State]) -> None:
    states[1][WEIGHT] = torch.zeros(1).expand(4 * 10**8)
    torch.save(states[1], "x.pth")
    message = refusal(Path("x.pth"))
    assert f"{WEIGHT} [400000000] repeats the values of 4 bytes" in message
    assert ".contiguous()" in message


def test_one_tensor_under_two_names(states: tuple[State, State]) -> None:
    """Without its wrapper's prefix one would replace the other."""
    states[1]["blocks.0.module.attn.q_bias"] = torch.zeros(64)
    torch.save(states[1], "x.pth")
    message = "holds blocks.0.attn.q_bias twice, once as blocks.0.module.attn.q_bias"
    assert message in refusal(Path("x.pth"))


def test_names_are_never_written_raw(states: tuple[State, State]) -> None:
    states[1]["blocks.0.\x1b[31m\n"] = torch.zeros(1)
    torch.save(states[1], "x.pth")
    torch.save(states[0], "vae.pth")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.\\x1b\[31m\\n is unexpected"):
        load_model(None, checkpoint=Path("x.pth"), tokenizer=Path("vae.pth"))


# ------------------------------------------------------------------ several candidates


def test_a_key_chooses_between_candidates(states: tuple[State, State]) -> None:
    other = {key: tensor + 1 for key, tensor in states[1].items()}
    two = {"model": states[1], "trainer": {"ema": {f"module.{k}": v for k, v in other.items()}}}
    torch.save(two, "two.pth")
    file = Path("two.pth")
    assert refusal(file).endswith(
        "holds 2 transformers (model, trainer.ema.module); choose one with --key NAME"
    )
    for key in ("trainer.ema.module", "trainer.ema", "trainer"):
        source = open_checkpoint(file, "transformer", key)
        assert source.description["key"] == "trainer.ema.module"
        np.testing.assert_array_equal(source.read("pos_1LC"), other["pos_1LC"].numpy())
    assert open_checkpoint(file, "transformer", "model", "trainer.ema.module").description[
        "key"
    ] == "model"  # fmt: skip
    default = open_checkpoint(file, "transformer", None, "trainer.ema.module")
    assert default.description["key"] == "trainer.ema.module"
    for key in ("ema", "train", "", ".", "model.x"):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(file, "transformer", key)
        assert str(caught.value) == (
            f"two.pth holds no transformer under --key {key}, expected one of model, "
            "trainer.ema.module"
        )


def test_a_key_of_one_candidate_and_of_the_top_level(states: tuple[State, State]) -> None:
    tokenizer, transformer = states
    ema = {f"ema.{key}": tensor + 1 for key, tensor in tokenizer.items()}
    save_file(tokenizer | ema | transformer, "x.safetensors")
    file = Path("x.safetensors")
    assert "holds 2 tokenizers (., ema); choose one with --tokenizer-key" in refusal(
        file, "tokenizer"
    )
    key = "decoder.conv_out.bias"
    for place, plus in ((".", 0), ("ema", 1)):
        source = open_checkpoint(file, "tokenizer", place)
        np.testing.assert_array_equal(source.read(key), (tokenizer[key] + plus).numpy())
        default = open_checkpoint(file, "tokenizer", None, place)
        assert default.description == source.description
    assert open_checkpoint(file, "transformer", ".").description.get("key") is None
    # one place is taken even where the default is another: the file was saved in another way
    assert open_checkpoint(file, "transformer", None, "ema").description.get("key") is None
    with pytest.raises(
        CheckpointError, match=r"no transformer under --key ema, expected one of \."
    ):
        open_checkpoint(file, "transformer", "ema")
