"""`inspect` of the files of a text-to-image model: transformer, tokenizer, T5 folder."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_infinity import MODELS, OWN, Shapes, load_case, official, published_states, renamed
from safetensors.torch import save_file

import t5_case
from cli_steps import done, refused
from var_deploy.export.checkpoint.facts import _describe_text_model
from var_deploy.export.checkpoint.infinity_keys import tokenizer_names, transformer_names


class ShapesAlone:
    """A weight source without values."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes, self.description = shapes, dict[str, Any]()

    def keys(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def read(self, key: str) -> Any:
        raise AssertionError("only names and shapes are looked at")


@pytest.mark.parametrize("name", list(MODELS))
def test_released_files_are_told_by_their_shapes(name: str) -> None:
    shapes = [official(file) for file in MODELS[name]]
    transformer, tokenizer = (
        ShapesAlone(renamed(found, names(found.keys())))
        for found, names in zip(shapes, (transformer_names, tokenizer_names), strict=True)
    )
    both = _describe_text_model({"transformer": transformer, "tokenizer": tokenizer}, ())
    twins = {"infinity-8b", "infinity-8b-512"}
    expected = twins if name in twins else {name}
    assert set(both.presets) == expected
    assert set(_describe_text_model({"transformer": transformer}, ()).presets) == expected
    alone = _describe_text_model({"tokenizer": tokenizer}, ())
    assert name in alone.presets and alone.sizes["tokenizer"]["base_width"] == 128


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden case with published names: a .pth, the tokenizer nested, a folder of shards."""
    place = tmp_path_factory.mktemp("files")
    transformer, tokenizer = published_states(load_case(OWN / "seeded-small"))
    torch.save({"trainer": {"gpt_fsdp": transformer}}, place / "model.pth")
    torch.save({"vae": tokenizer}, place / "vae.pth")
    names = tokenizer_names(tokenizer)  # without the wrappers, as in older files
    older = {ours: tokenizer[stored].contiguous() for stored, ours in names.items()}
    save_file(older, place / "older.safetensors")
    shards = place / "shards"
    shards.mkdir()
    keys = sorted(transformer)
    halves = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for file, part in halves.items():
        save_file({key: transformer[key].contiguous() for key in part}, shards / file)
    index = {"weight_map": {key: file for file, part in halves.items() for key in part}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    return place


def shown(*words: object) -> Any:
    return json.loads(done("inspect", *words, "--json").stdout)


def test_each_file_alone_and_both(files: Path) -> None:
    spec = load_case(OWN / "seeded-small").spec
    one = shown(files / "model.pth")
    assert one["parts"]["transformer"]["key"] == "trainer.gpt_fsdp"
    assert one["sizes"]["transformer"]["width"] == spec.transformer.width
    assert one["presets"] == [] and one["model"] is None
    for name in ("vae.pth", "older.safetensors"):
        assert shown(files / name)["sizes"]["tokenizer"]["bits"] == spec.tokenizer.bits, name
    shards = shown(files / "shards")
    assert shards["sizes"] == one["sizes"]
    assert shards["parts"]["transformer"]["size"] > 1000
    both = shown("--checkpoint", files / "shards", "--tokenizer", files / "vae.pth")
    assert set(both["sizes"]) == {"transformer", "tokenizer"}
    text = done("inspect", files / "model.pth", "--tokenizer", files / "vae.pth").stdout
    for part in ("none has these sizes", "bits a token", "--resolution", "channels"):
        assert part in text, part


def test_a_text_encoder(files: Path) -> None:
    folder = t5_case.hub_folder(files / "t5")
    found = shown(folder)
    assert found["sizes"]["text encoder"]["ffn_width"] == t5_case.SPEC.ffn_width
    assert "length" not in found["sizes"]["text encoder"]
    assert found["parts"]["text encoder"]["size"] == (folder / "model.safetensors").stat().st_size
    assert "T5, 2 blocks, width 64, 4 heads of 24" in done("inspect", folder).stdout
    refused(
        *(2, "inspect", folder, "--tokenizer", files / "vae.pth"), parts=("is a text encoder",)
    )
    (files / "empty").mkdir()
    refused(1, "inspect", files / "empty", parts=("is not a bundle",))
