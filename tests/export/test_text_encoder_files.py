"""Folders of the Hub as a source of text encoders: their forms, and what is wrong with others."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import t5_case
from var_deploy.errors import CheckpointError, ExportError, UsageError
from var_deploy.export.checkpoint.text_encoder import open_text_encoder, random_text_encoder
from var_deploy.export.text_encoder_bundle import export_text_encoder
from var_deploy.text.manifest import read_text_encoder

LENGTH = 16
EMBEDDING, ALIAS = "shared.weight", "encoder.embed_tokens.weight"
State = dict[str, torch.Tensor]


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return t5_case.hub_folder(tmp_path / "hub")


@pytest.fixture(scope="module")
def state() -> State:
    return load_file(t5_case.FOLDER / "t5.safetensors")


def sharded(hub: Path, state: State, save: Callable[[State, Path], None], suffix: str) -> None:
    (hub / "model.safetensors").unlink()
    keys, stem = sorted(state), "model" if suffix == "safetensors" else "pytorch_model"
    index = {}
    for number in range(3):
        name = f"{stem}-0000{number + 1}-of-00003.{suffix}"
        part = {key: state[key] for key in keys[number::3]}
        save(part, hub / name)
        index |= dict.fromkeys(part, name)
    data = {"metadata": {"total_size": 1}, "weight_map": index}
    (hub / f"{stem}.{suffix}.index.json").write_text(json.dumps(data))


def whole_bin(hub: Path, state: State) -> None:
    (hub / "model.safetensors").unlink()
    torch.save(state, hub / "pytorch_model.bin")


def with_decoder(hub: Path, state: State) -> None:
    """A whole T5: the decoder is left out by name, and the embedding is there three times."""
    more = {
        "decoder.embed_tokens.weight": state[EMBEDDING].clone(),
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(3, 3),
        "decoder.final_layer_norm.weight": torch.ones(64),
        "lm_head.weight": torch.ones(288, 64),
        ALIAS: state[EMBEDDING].clone(),
    }
    save_file({**state, **more}, hub / "model.safetensors")


def alias_alone(hub: Path, state: State) -> None:
    changed = {(ALIAS if key == EMBEDDING else key): tensor for key, tensor in state.items()}
    save_file(changed, hub / "model.safetensors")


def older_config(hub: Path, state: State) -> None:
    config = json.loads((hub / "config.json").read_text())
    for name in ("relative_attention_max_distance", "relative_attention_num_buckets"):
        del config[name]
    (hub / "config.json").write_text(json.dumps({**config, "n_positions": 512, "x": [1, None]}))


FORMS: dict[str, Callable[[Path, State], None]] = {
    "sharded safetensors": lambda h, s: sharded(h, s, save_file, "safetensors"),
    "sharded bin": lambda h, s: sharded(h, s, torch.save, "bin"),
    "bin": whole_bin,
    "whole T5": with_decoder,
    "other name": alias_alone,
    "older config": older_config,
    "fp32": lambda h, s: save_file({k: t.float() for k, t in s.items()}, h / "model.safetensors"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_folder(form: str, hub: Path, state: State) -> None:
    expected = open_text_encoder(hub, LENGTH)
    FORMS[form](hub, state)
    found = open_text_encoder(hub, LENGTH)
    assert found.spec == expected.spec and found.spec.length == LENGTH
    assert set(found.weights.keys()) == set(expected.weights.keys())
    for key in sorted(expected.weights.keys()):
        np.testing.assert_array_equal(found.weights.read(key), expected.weights.read(key))
        assert found.weights.read(key).dtype == np.float32


def test_the_manifest_says_where_the_weights_came_from(
    hub: Path, state: State, tmp_path: Path
) -> None:
    FORMS["sharded bin"](hub, state)
    manifest = export_text_encoder(open_text_encoder(hub, LENGTH), tmp_path / "out")
    assert sorted(manifest.checkpoint["files"]) == [
        f"pytorch_model-0000{n}-of-00003.bin" for n in (1, 2, 3)
    ]
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    assert read_text_encoder(tmp_path / "out") == manifest


# what is wrong


def edit(name: str, **changes: Any) -> Callable[[Path, State], object]:
    def change(hub: Path, state: State) -> None:
        data = json.loads((hub / name).read_text())
        for key, value in changes.items():
            data[key] = value
            if value is None:
                del data[key]
        (hub / name).write_text(json.dumps(data))

    return change


def index(content: Any) -> Callable[[Path, State], object]:
    def change(hub: Path, state: State) -> None:
        (hub / "model.safetensors").unlink()
        text = content if isinstance(content, str) else json.dumps(content)
        (hub / "model.safetensors.index.json").write_text(text)

    return change


def weights(change: Callable[[State], object]) -> Callable[[Path, State], object]:
    def save(hub: Path, state: State) -> None:
        changed = dict(state)
        change(changed)
        save_file(changed, hub / "model.safetensors")

    return save


def lying_index(hub: Path, state: State) -> None:
    sharded(hub, state, save_file, "safetensors")
    path = hub / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    data["weight_map"]["encoder.more"] = "model-00002-of-00003.safetensors"
    path.write_text(json.dumps(data))


def twice(hub: Path, state: State) -> None:
    sharded(hub, state, save_file, "safetensors")
    for number in (1, 2):
        name = f"model-0000{number}-of-00003.safetensors"
        save_file({**load_file(hub / name), "twice": torch.ones(2)}, hub / name)


OUT = {"weight_map": {EMBEDDING: "../other.safetensors"}}
GONE = {"weight_map": {EMBEDDING: "gone.safetensors"}}
WRONG: dict[str, tuple[Callable[[Path, State], object], str]] = {
    "no config": (lambda h, s: (h / "config.json").unlink(), "has no config.json"),
    "no weights": (
        lambda h, s: (h / "model.safetensors").unlink(),
        "is a folder, expected a checkpoint",
    ),
    "no tokenizer": (lambda h, s: (h / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "config": (lambda h, s: (h / "config.json").write_text("{"), "config.json cannot be read"),
    "a list": (lambda h, s: (h / "config.json").write_text("[]"), "is not a JSON object"),
    "first T5": (
        edit("config.json", feed_forward_proj="relu"),
        r"config.json is not of a T5 encoder that is supported \(feed_forward_proj is 'relu', expe",
    ),
    "not T5": (edit("config.json", d_model=None), "d_model is missing"),
    "deep": (edit("config.json", num_layers=10**6), "num_layers is 1000000, expected a whole"),
    "buckets": (edit("config.json", relative_attention_num_buckets=6), "expected a multiple of 4"),
    "near": (edit("config.json", relative_attention_max_distance=8), "expected a multiple of 4"),
    "eps": (edit("config.json", layer_norm_epsilon="1"), "layer_norm_epsilon is '1'"),
    "other sizes": (
        edit("config.json", d_ff=161, num_layers=3),
        r"wi_0.weight is \[160, 64\], expected \[161, 64\].*block.2.* is missing",
    ),
    "fewer layers": (edit("config.json", num_layers=1), r"block.1.* is unexpected"),
    "out": (index(OUT), "weight_map.* is '../other.safetensors', expected the name of a file"),
    "gone": (index(GONE), "lacks 1 of the 1 shards that .* lists, gone.safetensors first"),
    "empty index": (index({"weight_map": {}}), "weight_map is empty"),
    "no map": (index({}), "weight_map is missing"),
    "large index": (index(" " * (17 << 20)), "not an index of shards .more than 16 MiB."),
    "lying index": (lying_index, "lacks encoder.more, which .* lists in model-00002"),
    "twice": (twice, "holds twice, which .* does not list there"),
    "integers": (
        weights(lambda s: s.update({EMBEDDING: s[EMBEDDING].to(torch.int32)})),
        "shared.weight is int32, expected a float type",
    ),
    "more": (weights(lambda s: s.update(other=torch.ones(3))), r"other is unexpected \(\[3\]\)"),
    "cut": (
        lambda h, s: os.truncate(h / "model.safetensors", 100_000),
        "truncated|not a safetensors file",
    ),
    "vocabulary": (
        lambda h, s: [
            edit("config.json", vocab_size=270)(h, s),
            weights(lambda s: s.update({EMBEDDING: s[EMBEDDING][:270].contiguous()}))(h, s),
        ],
        r"tokenizer.json gives .* only 270 tokens",
    ),
    "tokenizer": (
        edit("tokenizer.json", model={"type": "BPE"}),
        "tokenizer.json is not a T5 tokenizer: model.type is 'BPE'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_folder_that_is_wrong(name: str, hub: Path, state: State) -> None:
    change, said = WRONG[name]
    change(hub, state)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_text_encoder(hub, LENGTH)
    message = str(caught.value)
    assert message.isprintable() and "hub" in message and len(message) < 1500


def test_paths_that_are_no_folder(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_text_encoder(tmp_path / "nothing", LENGTH)
    with pytest.raises(CheckpointError, match="is a file, expected the folder"):
        open_text_encoder(hub / "model.safetensors", LENGTH)
    for length in (0, 4097, 2.0, True):
        with pytest.raises(UsageError, match="text length must be from 1 to 4096"):
            open_text_encoder(hub, length)  # type: ignore[arg-type]


def test_a_pickle_that_runs_code(hub: Path, tmp_path: Path) -> None:
    class Run:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    (hub / "model.safetensors").unlink()
    torch.save({"a": Run()}, hub / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="loading it would run"):
        open_text_encoder(hub, LENGTH)
    assert not (tmp_path / "ran").exists()


# the folder that is written


def test_random_weights_give_healthy_features(tmp_path: Path) -> None:
    """Neither one token's features for all, nor a spread that grows without bound."""
    from var_deploy.export.checkpoint.text_encoder import build_t5

    module = build_t5(t5_case.random_model())
    ids = torch.arange(3, 35)[None]
    features = module(ids, torch.ones_like(ids, dtype=torch.bool))[0]
    assert 0.5 < features.std() < 2
    assert torch.cosine_similarity(features[0], features[1], 0) < 0.9
    same = random_text_encoder(module.spec, t5_case.TOKENIZER_JSON, 3)
    np.testing.assert_array_equal(
        same.weights.read(EMBEDDING), module.shared.weight.detach().numpy()
    )


def test_an_old_encoder_is_replaced_and_other_files_are_not(hub: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = open_text_encoder(hub, LENGTH)
    first = export_text_encoder(model, out, ("fp32", "fp16"))
    second = export_text_encoder(model, out, ("fp16",))
    assert second.digest() != first.digest() and not (out / "fp32").exists()
    with pytest.raises(UsageError, match="already holds a bundle; --force replaces it"):
        export_text_encoder(model, out, replace=False)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds notes\.txt, which is not part of the bundle"):
        export_text_encoder(model, out)
    with pytest.raises(UsageError, match="holds no bundle"):
        export_text_encoder(model, hub)


def test_a_failed_export_leaves_the_old_one(hub: Path, state: State, tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = export_text_encoder(open_text_encoder(hub, LENGTH), out)
    huge = {**{k: t.float() for k, t in state.items()}}
    huge["encoder.block.1.layer.0.SelfAttention.o.weight"][0, 0] = 1e6
    save_file(huge, hub / "model.safetensors")
    with pytest.raises(ExportError, match=r"o\.weight holds values that fp16 cannot"):
        export_text_encoder(open_text_encoder(hub, LENGTH), out, ("fp16",))
    assert read_text_encoder(out) == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "out"]
    huge["shared.weight"][5, 5] = float("nan")
    save_file(huge, hub / "model.safetensors")
    with pytest.raises(ExportError, match=r"shared\.weight holds"):
        export_text_encoder(open_text_encoder(hub, LENGTH), out)
    with pytest.raises(UsageError, match="precision must be of fp32, fp16, int8"):
        export_text_encoder(open_text_encoder(hub, LENGTH), out, ("bf16",))  # type: ignore[arg-type]
    shutil.rmtree(out)
