"""Checkpoint files of Infinity: every released form is read, every fault is told by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_infinity import (
    MODELS,
    OWN,
    Shapes,
    load_case,
    official,
    published_states,
    renamed,
)
from numpy.typing import NDArray
from safetensors.torch import save_file

from var_deploy.errors import CheckpointError, UsageError
from var_deploy.export.checkpoint import hub, presets
from var_deploy.export.checkpoint.assemble import load_model
from var_deploy.export.checkpoint.files import holds_text_model, parts_of
from var_deploy.export.checkpoint.hints import Hints
from var_deploy.export.checkpoint.infinity_keys import tokenizer_names, transformer_names
from var_deploy.export.checkpoint.presets import TEXT_PRESETS
from var_deploy.export.checkpoint.recognise_text import recognise_text
from var_deploy.export.checkpoint.shard_index import stored_sha256, stored_size
from var_deploy.export.checkpoint.text_model import LoadedTextModel, load_text_model
from var_deploy.scale_lists import scale_list, with_scales

CASE = load_case(OWN / "seeded-small")
SCALES = scale_list("0.06M", "3:2")
SPEC = with_scales(CASE.spec, SCALES, 8)
State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def states() -> tuple[State, State]:
    """Transformer and tokenizer as published."""
    return published_states(CASE)


def shards(state: State, folder: Path, suffix: str = ".safetensors", count: int = 3) -> Path:
    """Write the folder of a large model: shards, and an index that tells where each tensor is."""
    folder.mkdir()
    keys = list(state)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    weight_map = {}
    for number in range(count):
        name = f"{stem}-{number + 1:05}-of-{count:05}{suffix}"
        part = {key: state[key] for key in keys[number::count]}
        weight_map |= dict.fromkeys(part, name)
        if suffix == ".safetensors":
            save_file(part, folder / name)
        else:
            torch.save(part, folder / name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return folder


def load(checkpoint: Path, tokenizer: Path, **options: Any) -> LoadedTextModel:
    options = {"resolution": "0.06M", "aspect": "3:2", "text_length": 8, **options}
    return load_text_model(checkpoint=checkpoint, tokenizer=tokenizer, **options)


def save(state: object, name: str) -> Path:
    torch.save(state, name)
    return Path(name)


def save_both(states: tuple[State, State]) -> tuple[Path, Path]:
    return save(states[0], "infinity.pth"), save({"vae": states[1]}, "vae.pth")


def assert_loaded(model: LoadedTextModel, tolerance: float = 0.0) -> None:
    """The model is the golden case at other scales, to the last bit of its weights."""
    assert model.spec == SPEC
    assert model.scales == SCALES
    for found, expected in zip(
        (model.transformer, model.tokenizer), (CASE.transformer, CASE.tokenizer), strict=True
    ):
        assert set(found.keys()) == set(expected.keys())
        for key in expected.keys():  # noqa: SIM118
            array = found.read(key)
            assert array.dtype == np.float32
            np.testing.assert_allclose(array, expected.read(key), rtol=tolerance, err_msg=key)
    assert model.source("pos_start") is model.transformer
    assert model.source("decoder.conv_in.weight") is model.tokenizer


def misfit(states: tuple[State, State], **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(*save_both(states), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# forms


def test_bare_state_dict_and_vae_entry(states: tuple[State, State]) -> None:
    files = save_both(states)
    model = load(*files)
    assert_loaded(model)
    assert (model.preset, model.defaults.cfg, model.defaults.temperature) == ("", 4.0, 0.5)
    assert model.tokenizer.description["key"] == "vae"
    assert holds_text_model(files[0])
    assert not holds_text_model(files[1])


def test_safetensors(states: tuple[State, State]) -> None:
    states[1].pop("quantize.lfq.mask")  # the format has no tensor twice
    save_file(states[0], "infinity.safetensors")
    save_file(states[1], "vae.safetensors")
    assert_loaded(load(Path("infinity.safetensors"), Path("vae.safetensors")))


def test_training_checkpoint(states: tuple[State, State]) -> None:
    training = {
        "args": "--pn 0.06M",
        "trainer": {"gpt_fsdp": states[0], "gpt_fsdp_opt": {"state": {}, "param_groups": [{}]}},
        "g_it": 4,
    }
    # the rest of a tokenizer's training lies beside it, an averaged copy among it
    averaged = {key: value + 1 for key, value in states[1].items()}
    file = save({"epoch": 3, "ema": averaged, "vae": states[1]}, "vae.pth")
    model = load(save(training, "ar.pth"), file)
    assert_loaded(model)
    assert model.transformer.description["key"] == "trainer.gpt_fsdp"
    averaged_model = load(Path("ar.pth"), file, hints=Hints(tokenizer_key="ema"))
    assert averaged_model.tokenizer.description["key"] == "ema"
    recorded = load(Path("ar.pth"), file, fallback=Hints(tokenizer_key="ema"))
    assert recorded.tokenizer.description == averaged_model.tokenizer.description
    bias = averaged_model.tokenizer.read("decoder.conv_in.bias")
    np.testing.assert_allclose(bias, CASE.tokenizer.read("decoder.conv_in.bias") + 1, rtol=1e-6)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_folder_of_shards(suffix: str, states: tuple[State, State]) -> None:
    folder = shards(states[0], Path("weights"), suffix)
    assert holds_text_model(folder)
    model = load(folder, save_both(states)[1])
    assert_loaded(model)
    found = model.transformer.description
    assert found == {"file": "weights", "sha256": stored_sha256(folder)}
    assert len(found["sha256"]) == 64
    sizes = [file.stat().st_size for file in folder.iterdir() if file.suffix == suffix]
    assert stored_size(folder) == sum(sizes)
    largest = max(folder.glob(f"*{suffix}"))
    largest.write_bytes(largest.read_bytes()[:-1] + b"\x01")
    assert stored_sha256(folder) != found["sha256"]


def test_folder_of_one_shard_has_no_index(states: tuple[State, State]) -> None:
    Path("weights").mkdir()
    save_file(states[0], "weights/model.safetensors")
    assert_loaded(load(Path("weights"), save_both(states)[1]))
    assert stored_size(Path("weights")) == Path("weights/model.safetensors").stat().st_size


def test_one_file_with_both(states: tuple[State, State]) -> None:
    file = save({"vae": states[1], "trainer": {"gpt_fsdp": states[0]}}, "both.pth")
    assert_loaded(load(file, file))


def test_names_of_older_tokenizers_and_of_parallel_wrappers(states: tuple[State, State]) -> None:
    plain = {theirs: states[1][key] for key, theirs in tokenizer_names(states[1]).items()}
    assert "encoder.conv_in.weight" in plain
    wrapped = {f"module.{key}": value for key, value in states[0].items()}
    assert_loaded(load(save(wrapped, "w.pth"), save({"vae": plain}, "vae.pth")))


def test_blocks_without_chunks(states: tuple[State, State]) -> None:
    flat = {ours: states[0][key] for key, ours in transformer_names(states[0]).items()}
    assert "blocks.1.sa.q_bias" in flat
    assert_loaded(load(save(flat, "flat.pth"), save_both(states)[1]))


def test_buffers_of_zeros_may_be_missing_or_of_another_shape(states: tuple[State, State]) -> None:
    for number, key in enumerate([key for key in states[0] if key.endswith("zero_k_bias")]):
        if number % 2:
            states[0][key] = torch.zeros(3)
        else:
            del states[0][key]
    assert_loaded(load(*save_both(states)))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 0.0), (torch.bfloat16, 2**-8), (torch.float64, 0.0)]
)
def test_types_of_weights(
    dtype: torch.dtype, tolerance: float, states: tuple[State, State]
) -> None:
    for state in states:
        for key, value in state.items():
            if value.is_floating_point():
                state[key] = value.to(dtype)
    assert_loaded(load(*save_both(states)), tolerance)


# faults


def test_missing_unexpected_and_misshapen_keys_are_named(states: tuple[State, State]) -> None:
    del states[0]["block_chunks.1.module.0.sa.v_bias"]
    states[0]["block_chunks.0.module.0.ca_gamma"] = torch.zeros(64)
    states[0]["head.bias"] = torch.zeros(39)
    message = misfit(states)
    assert "blocks.1.sa.v_bias is missing, expected [64]" in message
    assert "blocks.0.ca_gamma is unexpected ([64])" in message
    assert "head.bias is [39], expected [40]" in message


def test_faults_of_a_tokenizer_are_named(states: tuple[State, State]) -> None:
    del states[1]["decoder.mid.block_1.conv1.conv.weight"]
    states[1]["encoder.mid.attn_1.q.weight"] = torch.zeros(2)
    message = misfit(states)
    assert "decoder.mid.block_1.conv1.weight is missing" in message
    assert "encoder.mid.attn_1.q.weight is unexpected" in message


@pytest.mark.parametrize("key", ["pos_start", "blocks.0.sa.scale_mul_1H11", "cfg_uncond"])
def test_a_key_that_tells_a_size_is_missing(key: str, states: tuple[State, State]) -> None:
    del states[0][key.replace("blocks.0", "block_chunks.0.module.0")]
    assert f"lacks {key}: it is incomplete" in misfit(states)


def test_a_layer_with_and_without_its_wrapper(states: tuple[State, State]) -> None:
    states[1]["decoder.conv_in.weight"] = states[1]["decoder.conv_in.conv.weight"]
    assert "holds decoder.conv_in.weight twice" in misfit(states)


def test_chunks_of_different_sizes(states: tuple[State, State]) -> None:
    for key in [key for key in states[0] if key.startswith("block_chunks.1.")]:
        states[0][key.replace("module.0", "module.1")] = states[0][key].clone()
    message = misfit(states)
    assert "block_chunks hold [1, 2] blocks, expected the same number in each" in message
    assert message.startswith("infinity.pth: ")


def test_files_of_the_other_part_and_of_the_other_kind(states: tuple[State, State]) -> None:
    transformer, tokenizer = save_both(states)
    for files in ((tokenizer, tokenizer), (transformer, transformer), (tokenizer, transformer)):
        with pytest.raises(CheckpointError, match=r"were --checkpoint and --tokenizer swapped\?"):
            load(*files)
    pocket = presets.POCKET_FOLDER
    with pytest.raises(CheckpointError, match="holds no Infinity transformer: no keys like cfg_un"):
        load(pocket / "transformer.safetensors", tokenizer)
    with pytest.raises(CheckpointError, match="is a tokenizer of codes, as VAR has"):
        load(transformer, pocket / "tokenizer.safetensors")
    assert not holds_text_model(pocket / "transformer.safetensors")
    assert parts_of(pocket / "transformer.safetensors") == ["transformer"]


def test_tokenizer_of_another_width(states: tuple[State, State]) -> None:
    states[0]["word_embed.weight"] = torch.zeros(64, 7)
    message = misfit(states)
    assert "infinity.pth does not belong to vae.pth: its tokens have 7 bits" in message
    assert "expected 5, or 20 with patches" in message


def test_tokenizer_of_other_pixels(states: tuple[State, State]) -> None:
    states[0]["word_embed.weight"] = torch.zeros(64, 5)
    assert "makes 8 × 8 pixels of a token of infinity.pth, expected 16 × 16" in misfit(states)


@pytest.mark.parametrize(("rows", "fits"), [(8, True), (11, True), (7, False)])
def test_unconditional_text_of_another_length(
    rows: int, fits: bool, states: tuple[State, State]
) -> None:
    """A file that knows longer texts is used as far as the graphs reach."""
    states[0]["cfg_uncond"] = torch.zeros(rows, 128)
    if fits:
        transformer = load(*save_both(states)).spec.transformer
        assert (transformer.text_length, transformer.unconditional_length) == (8, rows)
        return
    with pytest.raises(UsageError, match=r"must be 1 to 7, the longest text that infinity\.pth"):
        load(*save_both(states))


# shards


def broken(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        holds_text_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    edit(data["weight_map"])
    index.write_text(json.dumps(data))


def test_faults_of_shards(states: tuple[State, State]) -> None:
    folder = shards(states[0], Path("a"))
    edit_index(folder, lambda names: names.pop("pos_start"))
    assert "holds pos_start, which model.safetensors.index.json does not list" in broken(folder)
    edit_index(folder, lambda names: names.update({"pos_start": "model-00002-of-00003.safetens"}))
    edit_index(folder, lambda names: names.update({"pos_start": "m" * 900}))
    assert "a lacks 1 of the 4 shards" in broken(folder)
    edit_index(folder, lambda names: names.update({"pos_start": "model-00002-of-00003.safetens"}))
    message = broken(folder)
    assert "a lacks 1 of the 4 shards that model.safetensors.index.json lists" in message
    assert "model-00002-of-00003.safetens first; download it again" in message

    folder = shards(states[0], Path("b"))
    first = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    edit_index(folder, lambda names: names.update({"x": first["pos_start"]}))
    assert "b lacks x, which model.safetensors.index.json lists in model-" in broken(folder)
    (folder / first["pos_start"]).unlink()
    assert f"{first['pos_start']} first; download it again" in broken(folder)


@pytest.mark.parametrize("name", ["../infinity.pth", "/etc/passwd", "..", ".", "a\\b", 3])
def test_an_index_that_leaves_its_folder(name: object, states: tuple[State, State]) -> None:
    save_both(states)
    folder = shards(states[0], Path("a"))
    edit_index(folder, lambda names: names.update({"pos_start": name}))
    assert "is not an index of shards" in broken(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', "{" * 5000, "\udcff"])
def test_an_index_that_is_none(text: str, states: tuple[State, State]) -> None:
    folder = shards(states[0], Path("a"))
    index = folder / "model.safetensors.index.json"
    index.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert f"{index} is not an index of shards" in broken(folder)


def test_folders_without_a_checkpoint(states: tuple[State, State]) -> None:
    Path("empty").mkdir()
    assert "is a folder, expected a checkpoint file, or a folder of shards" in broken(Path("empty"))
    for name in ("a.index.json", "b.index.json"):
        (Path("empty") / name).write_text("{}")
    message = broken(Path("empty"))
    assert "empty has 2 indices ('a.index.json', 'b.index.json'), expected one" in message


def test_safetensors_come_first_in_a_folder_of_several_formats(states: tuple[State, State]) -> None:
    folder = shards(states[0], Path("a"))
    for name in ("pytorch_model.bin.index.json", "tf_model.h5.index.json"):
        (folder / name).write_text("{}")
    tokenizer = save_both(states)[1]
    assert_loaded(load(folder, tokenizer))
    (folder / "pytorch_model.bin").touch()
    save_file(states[0], folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert_loaded(load(folder, tokenizer))


def test_a_shard_that_holds_more_than_tensors(states: tuple[State, State]) -> None:
    folder = shards(states[0], Path("a"), ".bin", count=1)
    file = next(folder.glob("*.bin"))
    torch.save({**states[0], "more": {"x": torch.zeros(1)}}, file)
    assert "is not a shard: more is not a tensor" in broken(folder)
    torch.save([1], file)
    assert "is not a shard: expected names and tensors" in broken(folder)


# arguments


def test_arguments_that_do_not_go_together(states: tuple[State, State]) -> None:
    files = dict(zip(("checkpoint", "tokenizer"), save_both(states), strict=True))
    refused: list[tuple[dict[str, Any], str]] = [
        (files, "needs --resolution, such as 0.25M"),
        ({**files, "resolution": "3M"}, "resolution must be one of"),
        ({**files, "resolution": "0.06M", "aspect": "9:1"}, "no scale list has aspect 9:1"),
        ({**files, "resolution": "0.06M", "text_length": 0}, "must be 1 to 8"),
        ({**files, "resolution": "0.06M", "hints": Hints(heads=2)}, "--heads tell of a VAR"),
        ({"tokenizer": Path("vae.pth"), "resolution": "1M"}, "--checkpoint is missing"),
        ({"checkpoint": Path("infinity.pth"), "resolution": "1M"}, "--tokenizer is missing"),
        ({"random_weights": 1, "resolution": "1M"}, "needs a preset"),
        ({"preset": "infinity-2b", "random_weights": 1, **files}, "exclude each other"),
        ({"preset": "infinity-2b", "random_weights": 1, "text_length": 513}, "at most 512"),
        ({"preset": "var-d16", "random_weights": 1}, "has no text condition"),
    ]
    for arguments, message in refused:
        with pytest.raises(UsageError, match=message):
            load_text_model(**arguments)


def test_files_must_fit_their_preset(states: tuple[State, State]) -> None:
    with pytest.raises(CheckpointError, match=r"vae\.pth does not fit preset infinity-125m: enco"):
        load(*save_both(states), preset="infinity-125m")


def test_a_preset_takes_other_lengths_of_text(
    states: tuple[State, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = dataclasses.replace(TEXT_PRESETS["infinity-2b"], spec=CASE.spec)
    monkeypatch.setattr(presets, "TEXT_PRESETS", {"small": known})
    states[0]["cfg_uncond"] = torch.zeros(30, 128)
    model = load(*save_both(states), preset="small", text_length=20)
    assert (model.preset, model.defaults) == ("small", known.defaults)
    assert model.spec.transformer.text_length == 20
    assert model.transformer.read("cfg_uncond").shape == (30, 128)


# presets


class OfShapes:
    """A weight source that only has shapes."""

    description: Mapping[str, Any] = {}

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes

    def keys(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def read(self, key: str) -> NDArray[Any]:
        raise AssertionError("sizes are told by shapes alone")


@pytest.mark.parametrize("preset", MODELS)
def test_released_models_are_recognised(preset: str) -> None:
    transformer, tokenizer = map(official, MODELS[preset])
    known = TEXT_PRESETS[preset]
    for resolution, aspect in ((known.scales.resolution, "1:1"), ("0.25M", "4:3")):
        scales = scale_list(resolution, aspect)
        found = recognise_text(
            OfShapes(renamed(tokenizer, tokenizer_names(tokenizer))),
            OfShapes(renamed(transformer, transformer_names(transformer))),
            scales,
            512,
        )
        assert found == with_scales(known.spec, scales, 512)


def test_a_model_without_a_preset_is_recognised() -> None:
    transformer, tokenizer = official("infinity_layer16"), official("infinity_vae_d32")
    found = recognise_text(
        OfShapes(renamed(tokenizer, tokenizer_names(tokenizer))),
        OfShapes(renamed(transformer, transformer_names(transformer))),
        SCALES,
        64,
    )
    t = found.transformer
    assert (t.depth, t.width, t.heads, t.head_width, t.ffn_width) == (16, 1152, 12, 96, 4608)
    assert (t.pool_heads, t.levels, found.tokenizer.bits) == (16, 15, 32)
    with pytest.raises(CheckpointError, match=r"tokens have 32 bits .* expected 64, or 256"):
        recognise_text(
            OfShapes(renamed(official("infinity_vae_d64"), tokenizer_names(tokenizer))),
            OfShapes(renamed(transformer, transformer_names(transformer))),
            SCALES,
            64,
        )


def test_files_of_presets_are_fetched(
    monkeypatch: pytest.MonkeyPatch, states: tuple[State, State], tmp_path: Path
) -> None:
    shards(states[0], tmp_path / "infinity_8b_weights")
    save({"vae": states[1]}, "infinity_vae_d56_f8_14_patchify.pth")
    asked: list[tuple[str, str]] = []

    def fetch(repo: str, name: str, *_: object, **__: object) -> Path:
        asked.append((repo, name))
        return tmp_path / name

    monkeypatch.setattr(hub, "fetch", fetch)
    with pytest.raises(CheckpointError, match="does not fit preset infinity-8b"):
        load_text_model("infinity-8b", text_length=8)  # the files are those of a smaller model
    assert asked == [
        (presets.INFINITY_REPO, name)
        for name in (
            "infinity_vae_d56_f8_14_patchify.pth",
            "infinity_8b_weights/model.safetensors.index.json",
            *(f"infinity_8b_weights/model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
        )
    ]
    with pytest.raises(CheckpointError, match="this preset was not released; give a file with"):
        load_text_model("infinity-1b", tokenizer=Path("infinity_vae_d56_f8_14_patchify.pth"))


@pytest.mark.parametrize("preset", [name for name in TEXT_PRESETS if name != "pocket-text"])
def test_every_preset_can_be_drawn(preset: str) -> None:
    model = load_text_model(preset, random_weights=1, resolution="512x512")
    assert (model.preset, model.defaults) == (preset, TEXT_PRESETS[preset].defaults)
    assert str(model.scales) == "0.25M at 1:1 (512x512)"
    assert model.spec.transformer.text_length == 128
    assert model.transformer.read("blocks.0.sa.q_bias").std() > 0
    assert not model.transformer.read("blocks.0.sa.zero_k_bias").any()
    assert model.transformer.description == {"random_weights": 1}


def test_a_model_of_one_list_takes_no_other() -> None:
    model = load_text_model("pocket-text", random_weights=1)
    assert (model.scales, model.spec) == (
        TEXT_PRESETS["pocket-text"].scales,
        TEXT_PRESETS["pocket-text"].spec,
    )
    for asked in ({"resolution": "0.06M"}, {"aspect": "4:3"}, {"resolution": "64x64"}):
        with pytest.raises(UsageError, match="images of 64x64 alone: leave out --resolution"):
            load_text_model("pocket-text", random_weights=1, **asked)


def test_a_var_preset_does_not_take_these_files(states: tuple[State, State]) -> None:
    transformer, tokenizer = save_both(states)
    with pytest.raises(CheckpointError, match="holds no VAR tokenizer"):
        load_model(None, checkpoint=transformer, tokenizer=tokenizer)
