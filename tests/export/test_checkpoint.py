"""Checkpoints against models: what fits, what is reported by key, and at what cost it loads."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from var_deploy.errors import CheckpointError, UsageError
from var_deploy.export.checkpoint import assemble as checkpoints
from var_deploy.export.checkpoint import hub, presets
from var_deploy.export.checkpoint.assemble import (
    build_modules,
    check_state,
    empty_modules,
    load_into,
    load_model,
    open_checkpoint,
)
from var_deploy.export.checkpoint.presets import PRESETS
from var_deploy.spec import ModelSpec

Member = Callable[..., ModelSpec]
State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def saved(states: tuple[State, State]) -> dict[str, Path]:
    torch.save(states[0], "vae.pth")
    torch.save(states[1], "var.pth")
    return {"tokenizer": Path("vae.pth"), "checkpoint": Path("var.pth")}


def misfit(preset: str | None, files: dict[str, Path]) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(preset, **files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_and_unexpected_keys_are_named(states: tuple[State, State]) -> None:
    del states[1]["blocks.1.attn.proj.bias"]
    states[1]["blocks.1.attn.rotary"] = torch.zeros(4)
    message = misfit(None, saved(states))
    assert message.startswith("var.pth does not fit")
    assert "blocks.1.attn.proj.bias is missing, expected [64]" in message
    assert "blocks.1.attn.rotary is unexpected ([4])" in message
    del states[0]["decoder.conv_out.bias"]
    assert "vae.pth does not fit" in misfit(None, saved(states))


def test_a_wrong_shape_is_named_with_both_shapes(states: tuple[State, State]) -> None:
    states[1]["blocks.1.ffn.fc2.weight"] = torch.zeros(64, 7)
    message = misfit(None, saved(states))
    assert "blocks.1.ffn.fc2.weight is [64, 7], expected [64, 128]" in message


def released(depth: int, width: int, patch_nums: tuple[int, ...]) -> ModelSpec:
    """The published tokenizer with a transformer of other sizes."""
    spec = PRESETS["var-d16"].spec
    return ModelSpec(
        tokenizer=dataclasses.replace(spec.tokenizer, patch_nums=patch_nums),
        transformer=dataclasses.replace(
            spec.transformer, depth=depth, width=width, heads=width // 64, ffn_width=4 * width
        ),
    )


class Shapes:
    """A source of shapes alone."""

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        self.name, self.description = name, {"file": name}
        self.state = module.state_dict()

    def __str__(self) -> str:
        return self.name

    def keys(self) -> Any:
        return self.state.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.state[key].shape)

    def read(self, key: str) -> Any:
        sides = self.sides
        return np.repeat(np.arange(len(sides)), [n * n for n in sides])[None]

    sides: tuple[int, ...] = ()


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModelSpec], dict[str, Path]]:
    """Make files of a model that is too large to write."""

    def prepare(spec: ModelSpec) -> dict[str, Path]:
        sources = [Shapes(n, m) for n, m in zip(("vae", "var"), empty_modules(spec), strict=True)]
        for source in sources:
            source.sides = spec.patch_nums
        by_name = {s.name: s for s in sources}
        monkeypatch.setattr(checkpoints, "open_checkpoint", lambda path, *_: by_name[path.name])
        return {"tokenizer": Path("vae"), "checkpoint": Path("var")}

    return prepare


def test_a_preset_of_another_depth(opens: Callable[[ModelSpec], dict[str, Path]]) -> None:
    files = opens(PRESETS["var-d20"].spec)
    assert load_model("var-d20", **files).spec == PRESETS["var-d20"].spec
    message = misfit("var-d16", files)
    assert message.startswith("var does not fit preset var-d16")
    assert "pos_1LC is [1, 680, 1280], expected [1, 680, 1024]" in message
    assert "blocks.16.attn.scale_mul_1H11 is unexpected ([1, 20, 1, 1])" in message
    assert message.count("expected [") <= 8
    assert "more" in message


def test_a_preset_of_the_same_width_with_blocks_missing(
    opens: Callable[[ModelSpec], dict[str, Path]],
) -> None:
    shallow = released(15, 1024, PRESETS["var-d16"].spec.patch_nums)
    message = misfit("var-d16", opens(shallow))
    assert "blocks.15.attn.scale_mul_1H11 is missing, expected [1, 16, 1, 1]" in message


def test_a_tokenizer_that_is_not_the_presets(states: tuple[State, State]) -> None:
    message = misfit("var-d16", saved(states))
    assert message.startswith("vae.pth does not fit preset var-d16")
    assert "encoder.conv_in.weight is [32, 3, 3, 3], expected [160, 3, 3, 3]" in message


def test_a_preset_with_other_scales_of_as_many_tokens(
    opens: Callable[[ModelSpec], dict[str, Path]],
) -> None:
    """The shapes agree, the meaning of the tokens does not."""
    reference = PRESETS["var-d16"].spec.patch_nums
    candidates = ((1, *rest) for rest in combinations(range(2, 17), len(reference) - 1))
    twin = next(c for c in candidates if c != reference and sum(n * n for n in c) == 680)
    message = misfit("var-d16", opens(released(16, 1024, twin)))
    assert f"lvl_1L has patch_nums {twin}, expected {reference}" in message


def test_check_state_lists_a_few_and_counts_the_rest(states: tuple[State, State]) -> None:
    torch.save(states[1], "var.pth")
    source = open_checkpoint(Path("var.pth"), "transformer")
    shapes = {k: tuple(v.shape) for k, v in states[1].items()}
    check_state(source, shapes, ())
    with pytest.raises(CheckpointError, match=r"^var.pth does not fit the model: .*; and 12 more$"):
        check_state(source, {**shapes, **{f"new.{i}": (i,) for i in range(20)}}, ())
    check_state(source, {**shapes, "lvl_1L": (1, 99), "absent": (3,)}, ("lvl_1L", "absent"))


def test_statistic_of_another_number_of_scales_is_ignored(states: tuple[State, State]) -> None:
    states[0]["quantize.ema_vocab_hit_SV"] = torch.ones(7, 48)
    model = load_model(None, **saved(states))
    assert model.tokenizer.shape("quantize.ema_vocab_hit_SV") == (3, 48)
    tokenizer, _ = build_modules(model)
    assert tokenizer.quantize.ema_vocab_hit_SV.shape == (3, 48)


def test_modules_come_without_gradients_in_evaluation_mode(states: tuple[State, State]) -> None:
    for module in build_modules(load_model(None, **saved(states))):
        assert not module.training
        assert not any(p.requires_grad or p.is_meta for p in module.parameters())
        assert not any(b.is_meta for b in module.buffers())


def test_load_into_refuses_another_model(
    states: tuple[State, State], family_member: Member
) -> None:
    source = open_checkpoint(saved(states)["checkpoint"], "transformer")
    _, transformer = empty_modules(family_member(depth=1))
    with pytest.raises(CheckpointError, match=r"blocks.1.* is unexpected"):
        load_into(transformer, source)


def test_each_key_has_one_source() -> None:
    model = load_model("pocket", random_weights=0)
    assert model.source("quantize.embedding.weight") is model.tokenizer
    assert model.source("head.weight") is model.transformer
    assert not set(model.tokenizer.keys()) & set(model.transformer.keys())
    with pytest.raises(KeyError):
        model.source("nowhere")


# ------------------------------------------------------------------ arguments and the hub


def test_arguments_that_do_not_go_together(states: tuple[State, State]) -> None:
    files = saved(states)
    with pytest.raises(UsageError, match="--tokenizer is missing"):
        load_model(None, checkpoint=files["checkpoint"])
    with pytest.raises(UsageError, match="--checkpoint is missing"):
        load_model(None, tokenizer=files["tokenizer"])
    with pytest.raises(UsageError, match="needs a preset"):
        load_model(None, random_weights=1)
    with pytest.raises(UsageError, match="exclude each other"):
        load_model("pocket", checkpoint=files["checkpoint"], random_weights=1)
    with pytest.raises(UsageError, match="seed must lie between"):
        load_model("pocket", random_weights=-1)
    with pytest.raises(UsageError, match=r"unknown preset 'var-d17'; did you mean var-d1"):
        load_model("var-d17")


def test_pocket_without_its_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(presets, "POCKET_FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer.safetensors.* is not in this install"):
        load_model("pocket")


def test_pocket_files_are_those_that_training_writes() -> None:
    from tools.pocket import train

    pocket = PRESETS["pocket"]
    assert pocket.tokenizer_file == train.TOKENIZER_FILE
    assert pocket.transformer_file == train.TRANSFORMER_FILE
    assert len(pocket.labels) == pocket.spec.transformer.classes


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> str:
        try:
            raise ConnectionError("[Errno -2] Name or service not known\nmore lines")
        except ConnectionError as error:
            raise FileNotFoundError("An error happened while trying to locate it") from error

    monkeypatch.setattr(hub, "_out_of_reach", lambda endpoint: "")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)


@pytest.mark.usefixtures("offline")
def test_offline_says_what_to_download_and_which_option_takes_it() -> None:
    said: list[str] = []
    with pytest.raises(CheckpointError) as caught:
        load_model("var-d16", progress=said.append)
    message = str(caught.value)
    assert "\n" not in message
    assert "vae_ch160v4096z32.pth could not be fetched from FoundationVision/var" in message
    assert "Name or service not known" in message
    assert message.endswith("give it with --tokenizer")
    assert said == ["fetching vae_ch160v4096z32.pth from FoundationVision/var"]
    with pytest.raises(CheckpointError, match=r"var_d30\.pth.* give it with --checkpoint$"):
        hub.fetch("FoundationVision/var", "var_d30.pth", option="--checkpoint")


@pytest.mark.parametrize("proxied", [False, True])
def test_a_hub_out_of_reach_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, proxied: bool
) -> None:
    import huggingface_hub

    def never(*_: object, **__: object) -> str:
        raise AssertionError("its retries take half a minute")

    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"127.0.0.1:{server.getsockname()[1]}"
    endpoint = "https://hub.invalid" if proxied else f"http://{closed}"
    if proxied:
        monkeypatch.setenv("https_proxy", closed)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", never)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(CheckpointError) as caught:
        hub.fetch("a/b", "x.pth", option="--checkpoint")
    assert "(127.0.0.1 cannot be reached: " in str(caught.value)
    assert str(caught.value).endswith("give it with --checkpoint")


def test_export_looks_for_the_hub_before_it_imports_torch(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from var_deploy.cli import main; main(sys.argv[1:])"
    )
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{closed}", "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-c", code, "export", "var-d16", "--out", str(tmp_path / "b")]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1), ended.stderr
    assert "127.0.0.1 cannot be reached" in ended.stderr and "--tokenizer" in ended.stderr
    assert not (tmp_path / "b").exists()


def test_a_name_that_is_looked_up_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = threading.Event()
    monkeypatch.setattr(hub, "PATIENCE", 0.05)

    def never(*_: object, **__: object) -> None:
        waiting.wait(60)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", never)
    assert hub._out_of_reach("http://hub.invalid") == "hub.invalid does not answer within 0 s"
    waiting.set()


def test_a_hub_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert hub._out_of_reach(f"http://127.0.0.1:{server.getsockname()[1]}") == ""


def test_a_cached_file_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(tmp_path / "x.pth")
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    said: list[str] = []
    assert hub.fetch("a/b", "x.pth", said.append) == tmp_path / "x.pth"
    assert said == []


# ------------------------------------------------------------------ memory

LOAD = """
import re, sys
from pathlib import Path
import torch
from var_deploy.export.checkpoint import assemble as c

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def load(path):
    source = c.open_checkpoint(Path(path), "transformer")
    _, module = c.empty_modules(c.recognise(small.tokenizer, source))
    c.load_into(module, source)
    assert all(p.amax() > 0 for p in module.parameters())  # touches every page

torch.set_num_threads(1)
small = c.load_model("pocket", random_weights=0)
c.build_modules(small)  # what torch loads on first use is no copy of the weights
before = peak()
load("big.pth")
print(peak() - before)
load("big.safetensors")
print(peak() - before)
state = torch.load("big.pth", weights_only=True)
copies = [tensor.clone() for tensor in state.values()]
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_loading_holds_the_weights_once(family_member: Member) -> None:
    pocket = PRESETS["pocket"].spec.tokenizer
    spec = family_member(
        vocab_size=pocket.vocab_size, code_width=pocket.code_width,
        patch_nums=pocket.patch_nums, width=1024, heads=16, ffn_width=4096, depth=2,
    )  # fmt: skip
    _, module = empty_modules(spec)
    state = {k: torch.ones(v.shape, dtype=v.dtype) for k, v in module.state_dict().items()}
    lengths = torch.tensor(spec.scale_lengths)
    state["lvl_1L"] = torch.repeat_interleave(torch.arange(spec.scales), lengths)[None]
    torch.save(state, "big.pth")
    save_file(state, "big.safetensors")
    megabytes = Path("big.pth").stat().st_size / 2**20
    assert megabytes > 150
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pth, both, copied = (float(line) / megabytes for line in done.stdout.split())
    assert 0.9 < pth < 1.4
    assert both < 1.4
    assert copied > 1.8  # the measure does see a second copy
