"""A small model as files and as bundles, for the command line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli_steps import done, export, tree
from var_deploy.spec import ModelSpec


@pytest.fixture(scope="session")
def files(
    tmp_path_factory: pytest.TempPathFactory, family_member: Callable[..., ModelSpec]
) -> Path:
    """Checkpoint files of a small model: vae and var, each .pth and .safetensors; other.pth is a
    transformer of the same sizes with other weights."""
    import torch
    from safetensors.torch import save_file

    from var_deploy.export.checkpoint.assemble import empty_modules
    from var_deploy.export.checkpoint.random_weights import RandomWeights

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("files")
    for name, seed, part in (("vae", 0, 0), ("var", 0, 1), ("other", 1, 1)):
        module = empty_modules(family_member())[part]
        shapes = {key: tuple(p.shape) for key, p in module.named_parameters()}
        drawn = RandomWeights(shapes, seed)
        state = {key: torch.from_numpy(drawn.read(key)) for key in shapes}
        sides = torch.tensor(family_member().patch_nums)
        if part:
            state["lvl_1L"] = torch.repeat_interleave(torch.arange(len(sides)), sides**2)[None]
        torch.save(state, folder / f"{name}.pth")
        save_file(state, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="session")
def made(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the small model, two images a launch. Not to be changed."""
    out = tmp_path_factory.mktemp("made") / "bundle"
    result = export(files, out, "--batch", 2)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy of the same bundle, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose classes have names: pocket with random weights."""
    out = tmp_path_factory.mktemp("named") / "pocket"
    options = ("--random-weights", 0, "--layout", "shared")
    result = done("export", "pocket", "--out", out, *options)
    assert re.fullmatch(rf"wrote {out} \(\d+ files, [\d.]+ MB\)\n", result.stdout)
    return out


@pytest.fixture
def unchanged(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Call it once the stage is set: after the test, nothing below tmp_path may have changed."""
    before: dict[str, bytes | None] = {}

    def note() -> None:
        before.update(tree(tmp_path))
        before["noted"] = None

    yield note
    assert before.pop("noted", 0) is None, "the test never called it"
    assert tree(tmp_path) == before
