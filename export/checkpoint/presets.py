"""Models known by name: the released VAR checkpoints and pocket."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from var_deploy.errors import CheckpointError, UsageError
from var_deploy.export.checkpoint import hub
from var_deploy.export.pocket.model import CLASS_NAMES, POCKET
from var_deploy.labels import imagenet
from var_deploy.sampling import Sampling
from var_deploy.spec import ModelSpec, TokenizerSpec, TransformerSpec

RELEASED_REPO = "FoundationVision/var"
POCKET_FOLDER = Path(__file__).parents[1] / "pocket"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model with a name.

    Attributes:
        spec: its sizes.
        transformer_file, tokenizer_file: names of its checkpoint files.
        repo: Hub repository that holds them; "" where they ship with the package.
        labels: class names, index = label; empty where they are not known.
        defaults: sampling settings to use where none are given.
    """

    spec: ModelSpec
    transformer_file: str
    tokenizer_file: str
    repo: str
    labels: tuple[str, ...] = ()
    defaults: Sampling


def _released(depth: int, *, shared_adaln: bool, patch_nums: tuple[int, ...]) -> Preset:
    """Return the preset of a released VAR (table 1 of arXiv 2404.02905): width 64·depth, as many
    heads as blocks."""
    width = 64 * depth
    return Preset(
        spec=ModelSpec(
            tokenizer=TokenizerSpec(
                patch_nums=patch_nums, vocab_size=4096, code_width=32, base_width=160
            ),
            transformer=TransformerSpec(
                depth=depth,
                width=width,
                heads=depth,
                classes=1000,
                ffn_width=4 * width,
                shared_adaln=shared_adaln,
            ),
        ),
        transformer_file=f"var_d{depth}.pth",
        tokenizer_file="vae_ch160v4096z32.pth",
        repo=RELEASED_REPO,
        labels=imagenet.CLASS_NAMES,
        defaults=Sampling(cfg=4.0, top_k=900, top_p=0.95),
    )


PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

PRESETS: Mapping[str, Preset] = {
    "pocket": Preset(
        spec=POCKET,
        transformer_file="transformer.safetensors",
        tokenizer_file="tokenizer.safetensors",
        repo="",
        labels=CLASS_NAMES,
        defaults=Sampling(cfg=2.0, top_k=0, top_p=0.95),
    ),
    "var-d16": _released(16, shared_adaln=False, patch_nums=PATCH_NUMS_256),
    "var-d20": _released(20, shared_adaln=False, patch_nums=PATCH_NUMS_256),
    "var-d24": _released(24, shared_adaln=False, patch_nums=PATCH_NUMS_256),
    "var-d30": _released(30, shared_adaln=False, patch_nums=PATCH_NUMS_256),
    "var-d36": _released(36, shared_adaln=True, patch_nums=PATCH_NUMS_512),
}


def find_preset(name: str) -> Preset:
    """Return the preset of this name. Raises UsageError that suggests the nearest names."""
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UsageError(
        f"unknown preset {name!r}; {hint}known are {', '.join(PRESETS)} (a model without "
        "a preset is given by --checkpoint and --tokenizer alone)"
    )


def own_file(
    preset: Preset | None,
    part: Literal["transformer", "tokenizer"],
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Return the path of a preset's file, fetched unless it is on this machine. Raises
    CheckpointError."""
    assert preset is not None  # both files are asked for otherwise
    option = "--tokenizer" if part == "tokenizer" else "--checkpoint"
    name = preset.tokenizer_file if part == "tokenizer" else preset.transformer_file
    if preset.repo:
        return hub.fetch(preset.repo, name, progress, option=option)
    path = POCKET_FOLDER / name
    if not path.is_file():
        raise CheckpointError(
            f"pocket's {part} ({name}) is not in this installation; reinstall var-deploy, "
            f"train it with `make train`, or give a file with {option}"
        )
    return path
