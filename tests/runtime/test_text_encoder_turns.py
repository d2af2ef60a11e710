"""The text encoder beside the scales, or in turns with them where memory is short."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_case import export_text_bundle

from cli_steps import done, refused
from fake_machine import FakeMachine, meminfo, workstation
from var_deploy.config import CPU, TENSORRT, RuntimeConfig
from var_deploy.errors import BackendError, UsageError
from var_deploy.manifest import read_manifest
from var_deploy.pipeline import Pipeline
from var_deploy.runtime import text_encoder, text_features
from var_deploy.runtime.backends import choice
from var_deploy.text.manifest import read_text_encoder

DEER, BOAT = "a red deer in the snow", "a boat"
SETTLED = RuntimeConfig(backend=CPU, precision="fp32", layout="shared", threads=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    return export_text_bundle(tmp_path_factory.mktemp("turns"))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without room for both."""
    monkeypatch.setattr("var_deploy.pipeline.stays_in_memory", lambda *_: (False, "no room"))


@pytest.fixture
def turns(short: None, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pipeline that takes turns, and the scales that were in memory at each load of the text
    encoder."""
    held: list[Any] = []
    load = text_encoder.TextEncoder._load

    def watched(self: Any) -> Any:
        held.append(pipe._loop._held)
        return load(self)

    monkeypatch.setattr(text_encoder.TextEncoder, "_load", watched)
    with Pipeline.load(bundle, threads=1) as pipe:
        yield pipe, held


def encoder_of(pipe: Pipeline) -> Any:
    return pipe._text.found()


def test_images_are_the_same_and_never_both_in_memory(turns: Any, bundle: Path) -> None:
    pipe, held = turns
    assert pipe._loop._held is None, "nothing is loaded before the first prompt"
    prompts = [DEER, BOAT, DEER]
    images = pipe.generate(prompts=prompts, negative="fog", seed=5)
    assert held == [None] * 3 and encoder_of(pipe)._graph is None
    loop = pipe._loop._held
    again = pipe.generate(prompts=prompts, negative="fog", seed=5)
    assert pipe._loop._held is loop and len(held) == 3, "features of known prompts are kept"
    other = pipe.generate(prompts=["a house"], seed=5)
    assert held == [None] * 4 and pipe._loop._held is not loop
    with Pipeline.load(bundle, threads=1, keep_text_encoder=True) as both:
        np.testing.assert_array_equal(
            both.generate(prompts=prompts, negative="fog", seed=5), images
        )
        np.testing.assert_array_equal(both.generate(prompts=["a house"], seed=5), other)
    np.testing.assert_array_equal(again, images)


def test_what_else_a_pipeline_does_works_in_turns(turns: Any) -> None:
    pipe, held = turns
    picture = np.full((16, 24, 3), 90, np.uint8)
    mask = np.zeros((16, 24), bool)
    mask[:8, :12] = True
    tokens = pipe.encode(picture)
    pipe.edit(picture, mask, prompt=DEER, seed=1)
    pipe.vary(picture, 1, prompt=BOAT, seed=1)
    assert held == [None, None] and pipe._graphs._opened
    assert len(pipe.decode(tokens)) == 1

    def ask(event: Any) -> None:
        pipe.features(["a new one"])

    with pytest.raises(UsageError, match="callback"):
        pipe.generate(prompts=[DEER], on_scale=ask)
    pipe.start_clock()
    loop = pipe._loop._held
    pipe.generate(prompts=["a house"])
    assert pipe._loop._held is loop, "a loop with a clock stays"
    pipe.close()
    for call in (lambda: pipe.generate(prompts=[DEER]), lambda: pipe.features(["more"])):
        with pytest.raises(BackendError, match="closed"):
            call()


def test_a_text_encoder_that_fails_is_released(
    turns: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, _ = turns

    def refuse(features: Any) -> None:
        raise BackendError("not plausible")

    with monkeypatch.context() as patched:
        patched.setattr(text_encoder, "check_features", refuse)
        with pytest.raises(BackendError, match="plausible"):
            pipe.generate(prompts=[DEER])
    assert encoder_of(pipe)._graph is None
    assert len(pipe.generate(prompts=[DEER])) == 1


@pytest.mark.parametrize(
    ("config", "free", "stays", "why"),
    [
        ({}, 4000, True, "fit in the 4.2 GB"),
        ({}, 60, False, "would not leave a tenth"),
        ({"keep_text_encoder": True}, 60, True, "as asked for"),
        ({}, None, True, "not known"),
    ],
)
def test_free_memory_decides(
    bundle: Path, config: dict[str, Any], free: int | None, stays: bool, why: str
) -> None:
    files = {} if free is None else {"/proc/meminfo": meminfo(8000, free)}
    machine = FakeMachine(files=files)
    found, reason = text_features.stays_in_memory(
        read_manifest(bundle),
        dataclasses.replace(SETTLED, **config),
        read_text_encoder(bundle.parent / "t5"),
        machine,
    )
    assert found is stays and why in reason


def test_on_a_card_the_memory_of_both_is_compared_only_where_both_are_there(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, encoder = read_manifest(bundle), read_text_encoder(bundle.parent / "t5")
    config = dataclasses.replace(SETTLED, backend=TENSORRT, threads=None)
    machine = workstation()
    assert "of the host" in text_features.stays_in_memory(manifest, config, encoder, machine)[1]
    monkeypatch.setattr(choice, "has_cuda_provider", lambda: True)
    stays, reason = text_features.stays_in_memory(manifest, config, encoder, machine)
    assert stays and "scales 0.6 GB and text encoder" in reason
    only_int8 = dataclasses.replace(encoder, graphs={"int8": encoder.graphs["fp32"]})
    assert "of the host" in text_features.stays_in_memory(manifest, config, only_int8, machine)[1]


def test_commands_can_keep_it(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def note(manifest: Any, config: RuntimeConfig, encoder: Any) -> tuple[bool, str]:
        asked.append(config.keep_text_encoder)
        return True, ""

    monkeypatch.setattr("var_deploy.pipeline.stays_in_memory", note)
    out = ("--threads", 1, "--out", tmp_path / "deer.png")
    done("generate", bundle, "--prompt", DEER, *out)
    done("generate", bundle, "--prompt", DEER, "--keep-text-encoder", *out)
    box = ("--box", "0,0,12,8", "--prompt", DEER, "--keep-text-encoder")
    done("edit", bundle, tmp_path / "deer.png", *box, "--threads", 1, "--out", tmp_path / "b.png")
    words = ("--prompt", DEER, "--keep-text-encoder", "--threads", 1)
    done("sample", bundle, *words, "--out", tmp_path / "set")
    assert asked == [False, True, True, True]


def test_many_prompts_are_encoded_together(
    turns: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that are drawn one batch after the other do not reload the scales for each."""
    from var_deploy.cli.console import ProgressBar
    from var_deploy.cli.generate import _OneByOne

    pipe, held = turns
    texts = [f"boat {n}" for n in range(6)]
    with ProgressBar(quiet=True) as progress:
        what = {"prompts": texts, "negative": "fog"}
        images = _OneByOne(
            pipe, what, [None] * 6, list(range(6)), pipe.manifest.defaults, progress
        )
        first, loops = next(rows := iter(images)), set()
        for _ in rows:
            loops.add(id(pipe._loop._held))
    assert first.shape == (16, 24, 3)
    assert len(held) == 7 and len(loops) == 1


def test_a_bundle_of_labels_has_nothing_to_keep(pocket_bundle: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "x.png")
    refused(2, "generate", pocket_bundle, "--keep-text-encoder", *out, parts=("no prompts",))
    refused(2, "serve", pocket_bundle, "--keep-text-encoder", parts=("takes prompts",))
