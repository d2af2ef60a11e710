"""Models known by name: the released VAR and Infinity checkpoints, pocket and pocket-text."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from var_deploy.errors import CheckpointError, UsageError
from var_deploy.export.checkpoint import hub
from var_deploy.export.checkpoint.shard_index import read_index
from var_deploy.export.pocket import model as pocket
from var_deploy.export.pocket_text import model as pocket_text
from var_deploy.labels import imagenet
from var_deploy.sampling import BitSampling, Sampling
from var_deploy.scale_lists import RESOLUTIONS, ScaleList, parse_scales, scale_list
from var_deploy.spec import (
    BitTokenizerSpec,
    ModelSpec,
    TextEncoderSpec,
    TextModelSpec,
    TextTransformerSpec,
    TokenizerSpec,
    TransformerSpec,
)

RELEASED_REPO = "FoundationVision/var"
INFINITY_REPO = "FoundationVision/Infinity"
SHARD_INDEX = "model.safetensors.index.json"
# the weights that ship with the package
POCKET_FOLDER = Path(__file__).parents[1] / "pocket"
POCKET_TEXT_FOLDER = Path(__file__).parents[1] / "pocket_text"


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
        spec=pocket.POCKET,
        transformer_file="transformer.safetensors",
        tokenizer_file="tokenizer.safetensors",
        repo="",
        labels=pocket.CLASS_NAMES,
        defaults=Sampling(cfg=2.0, top_k=0, top_p=0.95),
    ),
    "var-d16": _released(16, shared_adaln=False, patch_nums=PATCH_NUMS_256),
    "var-d20": _released(20, shared_adaln=False, patch_nums=PATCH_NUMS_256),
    "var-d24": _released(24, shared_adaln=False, patch_nums=PATCH_NUMS_256),
    "var-d30": _released(30, shared_adaln=False, patch_nums=PATCH_NUMS_256),
    "var-d36": _released(36, shared_adaln=True, patch_nums=PATCH_NUMS_512),
}


@dataclass(frozen=True, kw_only=True)
class TextPreset:
    """A text-to-image model with a name.

    Attributes:
        spec: its sizes with the scales that it was made for, at 1:1, and the longest text; see
            `scale_lists.with_scales` for others.
        scales: these scales. A model whose list is not one of `scale_lists` has no others.
        transformer_file: name of its checkpoint file, or of the folder of its shards; "" for a
            model that was not released.
        tokenizer_file, repo: name of the tokenizer's file, and the Hub repository of both; "" where
            they ship with the package.
        text_encoder: folder of its T5 beside them; "" where the T5 is a model of its own.
        defaults: sampling settings to use where none are given; `cfg` 1 is no guidance.
    """

    spec: TextModelSpec
    scales: ScaleList
    transformer_file: str
    tokenizer_file: str
    repo: str = INFINITY_REPO
    text_encoder: str = ""
    defaults: BitSampling

    @property
    def text_length(self) -> int:
        """S, the tokens that its graphs take where nothing else is asked for."""
        return min(PROMPT_LENGTH, self.spec.transformer.unconditional_length)

    def scales_for(self, resolution: str | None, aspect: str | None) -> ScaleList:
        """Return the list of scales that is asked for, see `scale_lists.parse_scales`; its own
        where nothing is. Raises UsageError as that, and for a model that has no others."""
        if resolution is None and aspect is None:
            return self.scales
        if self.scales.resolution not in RESOLUTIONS:
            height, width = self.scales.image_size
            raise UsageError(
                f"this model makes images of {width}x{height} alone: leave out --resolution and "
                "--aspect"
            )
        return parse_scales(resolution or self.scales.resolution, aspect)


TEXT_WIDTH, TEXT_LENGTH = 2048, 512  # of flan-t5-xl, and the longest text in training
PROMPT_LENGTH = 128  # tokens that graphs take by default, some hundred words
# sizes of the text encoders of released models, by name
TEXT_ENCODERS: Mapping[str, TextEncoderSpec] = {
    "flan-t5-xl": TextEncoderSpec(
        width=TEXT_WIDTH,
        depth=24,
        heads=32,
        head_width=64,
        ffn_width=5120,
        vocab_size=32128,
        length=PROMPT_LENGTH,
    ),
    "pocket-text": pocket_text.TEXT_ENCODER,
}


def _infinity(
    depth: int,
    width: int,
    heads: int,
    *,
    bits: int,
    patch: int = 1,
    resolution: str,
    files: tuple[str, str],
    cfg: float,
    temperature: float,
) -> TextPreset:
    """Return the preset of an Infinity model (arXiv 2412.04431), with its published sizes.

    The tokenizer of a model with patches halves the image three times, the others four times.
    """
    scales = scale_list(resolution)
    return TextPreset(
        spec=TextModelSpec(
            tokenizer=BitTokenizerSpec(
                grids=scales.grids,
                bits=bits,
                patch=patch,
                base_width=128,
                width_multipliers=(1, 2, 4, 4) if patch == 2 else (1, 2, 4, 4, 4),
            ),
            transformer=TextTransformerSpec(
                depth=depth,
                width=width,
                heads=heads,
                ffn_width=4 * width,
                text_width=TEXT_WIDTH,
                text_length=TEXT_LENGTH,
                pool_heads=TEXT_WIDTH // 128,
                rope_grid=scales.rope_grid,
                unconditional_length=TEXT_LENGTH,
            ),
        ),
        scales=scales,
        transformer_file=files[0],
        tokenizer_file=files[1],
        # the published top-k of 900 does nothing to the two values of a bit
        defaults=BitSampling(cfg=cfg, temperature=temperature, top_p=0.97),
    )


def _infinity_8b(resolution: str, folder: str) -> TextPreset:
    return _infinity(
        *(40, 3584, 28),
        bits=14,
        patch=2,
        resolution=resolution,
        files=(folder, "infinity_vae_d56_f8_14_patchify.pth"),
        cfg=3.0,
        temperature=1.0,
    )


D32_TOKENIZER = "infinity_vae_d32reg.pth"

# settings: of the published notebooks for 2b and 8b; of the inference script for the others
TEXT_PRESETS: Mapping[str, TextPreset] = {
    "pocket-text": TextPreset(
        spec=pocket_text.POCKET_TEXT,
        scales=pocket_text.SCALES,
        transformer_file="transformer.safetensors",
        tokenizer_file="tokenizer.safetensors",
        repo="",
        text_encoder="text",
        defaults=pocket_text.DEFAULTS,
    ),
    "infinity-125m": _infinity(
        *(12, 768, 8),
        bits=16,
        resolution="0.06M",
        files=("infinity_125M_256x256.pth", "infinity_vae_d16.pth"),
        cfg=4.0,
        temperature=0.5,
    ),
    "infinity-1b": _infinity(
        *(24, 1536, 16),
        bits=32,
        resolution="0.06M",
        files=("", D32_TOKENIZER),
        cfg=4.0,
        temperature=0.5,
    ),
    "infinity-2b": _infinity(
        *(32, 2048, 16),
        bits=32,
        resolution="1M",
        files=("infinity_2b_reg.pth", D32_TOKENIZER),
        cfg=3.0,
        temperature=0.5,
    ),
    "infinity-8b": _infinity_8b("1M", "infinity_8b_weights"),
    "infinity-8b-512": _infinity_8b("0.25M", "infinity_8b_512x512_weights"),
}


def find_preset(name: str) -> Preset:
    """Return the class-conditional preset of this name. Raises UsageError that suggests the
    nearest names."""
    if name in PRESETS:
        return PRESETS[name]
    raise _unknown(name)


def find_text_preset(name: str) -> TextPreset:
    """Return the text-to-image preset of this name. Raises UsageError that suggests the nearest
    names."""
    if name in TEXT_PRESETS:
        return TEXT_PRESETS[name]
    raise _unknown(name)


def _unknown(name: str) -> UsageError:
    if name in TEXT_PRESETS:
        return UsageError(f"preset {name} makes images of text, expected one with classes")
    if name in PRESETS:
        return UsageError(f"preset {name} has no text condition, expected a text-to-image model")
    known = (*PRESETS, *TEXT_PRESETS)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return UsageError(
        f"unknown preset {name!r}; {hint}known are {', '.join(known)} (a model without "
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
    return _packaged("pocket", POCKET_FOLDER / name, part, option, "make train")


def own_text_file(
    preset: TextPreset,
    part: Literal["transformer", "tokenizer"],
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Return the path of a text-to-image preset's file, or of its folder of shards, fetched unless
    it is on this machine. Raises CheckpointError."""
    option = "--tokenizer" if part == "tokenizer" else "--checkpoint"
    name = preset.tokenizer_file if part == "tokenizer" else preset.transformer_file
    if not name:
        raise CheckpointError(
            f"the {part} of this preset was not released; give a file with {option}, or "
            "--random-weights SEED"
        )
    if not preset.repo:
        return _packaged("pocket-text", POCKET_TEXT_FOLDER / name, part, option, "make train-text")
    if Path(name).suffix:
        return hub.fetch(preset.repo, name, progress, option=option)
    index = hub.fetch(preset.repo, f"{name}/{SHARD_INDEX}", progress, option=option)
    for shard in dict.fromkeys(read_index(index).values()):
        hub.fetch(preset.repo, f"{name}/{shard}", progress, option=option)
    return index.parent


def own_text_encoder(preset: TextPreset) -> Path | None:
    """Return the folder of the T5 that ships with a preset's weights, None where none does.
    Raises CheckpointError where this installation lacks it."""
    if not preset.text_encoder:
        return None
    folder = POCKET_TEXT_FOLDER / preset.text_encoder
    _packaged(
        *("pocket-text", folder / "model.safetensors", "text encoder"),
        *("--text-encoder", "make train-text"),
    )
    return folder


def _packaged(model: str, path: Path, part: str, option: str, target: str) -> Path:
    """Return the path of a file that ships with the package. Raises CheckpointError where this
    installation lacks it."""
    if not path.is_file():
        raise CheckpointError(
            f"{model}'s {part} ({path.name}) is not in this installation; reinstall var-deploy, "
            f"train it with `{target}`, or give a file with {option}"
        )
    return path
