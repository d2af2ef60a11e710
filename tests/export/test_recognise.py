"""Sizes are recognised from the state dicts alone, for any member of the family."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from var_deploy.errors import CheckpointError, UsageError
from var_deploy.export.checkpoint.assemble import build_modules, load_model, open_checkpoint
from var_deploy.export.checkpoint.hints import Hints
from var_deploy.export.checkpoint.presets import PRESETS
from var_deploy.export.checkpoint.random_weights import RandomWeights
from var_deploy.export.checkpoint.recognise import recognise
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.models.transformer import Transformer
from var_deploy.spec import ModelSpec

Member = Callable[..., ModelSpec]

MEMBERS: dict[str, dict[str, Any]] = {
    "smallest": {},
    "one scale more": {"patch_nums": (1, 2, 3, 6)},
    "one block": {"depth": 1},
    "twelve blocks": {"depth": 12, "width": 32, "heads": 4, "ffn_width": 32},
    "wide, many heads": {"width": 192, "heads": 12, "ffn_width": 100},
    "codes": {"vocab_size": 97, "code_width": 12},
    "one class": {"classes": 1},
    "shared AdaLN": {"shared_adaln": True},
    "no L2 norm, width/64 heads": {"qk_l2_norm": False, "width": 128, "heads": 2},
    "shared AdaLN, no L2 norm": {
        "shared_adaln": True, "qk_l2_norm": False, "width": 64, "heads": 1
    },
    "a φ for every scale": {"shared_phi": 0},
    "one φ": {"shared_phi": 1},
    "two φ": {"shared_phi": 2},
    "no φ": {"shared_phi": 0, "phi_ratio": 0.0},
    "tokenizer of another width": {"base_width": 64, "width_multipliers": (1, 1, 2)},
    "tokenizer, more blocks": {"res_blocks": 3, "width_multipliers": (1, 2, 2)},
    "tokenizer without down-sampling": {"width_multipliers": (2,)},
    "grey images": {"image_channels": 1},
    "a codebook for every scale": {"codebook_per_scale": True},
}  # fmt: skip


def save_both(spec: ModelSpec, folder: Path, suffix: str) -> tuple[Path, Path]:
    """Fresh weights in the files of a released model."""
    paths = folder / f"vae{suffix}", folder / f"var{suffix}"
    for path, module in zip(paths, (Tokenizer(spec.tokenizer), Transformer(spec)), strict=True):
        save = save_file if suffix == ".safetensors" else torch.save
        save(module.state_dict(), path)  # type: ignore[operator]
    return paths


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", MEMBERS)
def test_round_trip(name: str, suffix: str, tmp_path: Path, family_member: Member) -> None:
    spec = family_member(**MEMBERS[name])
    tokenizer_file, transformer_file = save_both(spec, tmp_path, suffix)
    model = load_model(None, checkpoint=transformer_file, tokenizer=tokenizer_file)
    assert model.spec == spec
    assert (model.preset, model.labels) == ("", ())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_recognised(preset: str) -> None:
    spec = PRESETS[preset].spec
    drawn = load_model(preset, random_weights=0)
    assert recognise(drawn.tokenizer, drawn.transformer) == spec


def test_loaded_weights_are_those_saved(tmp_path: Path, family_member: Member) -> None:
    tokenizer_file, transformer_file = save_both(family_member(), tmp_path, ".pth")
    model = load_model(None, checkpoint=transformer_file, tokenizer=tokenizer_file)
    for path, module in zip((tokenizer_file, transformer_file), build_modules(model), strict=True):
        saved = torch.load(path, weights_only=True)
        loaded = module.state_dict()
        assert list(loaded) == list(saved)
        for key, tensor in saved.items():
            assert loaded[key].dtype == tensor.dtype, key
            assert torch.equal(loaded[key], tensor), key


def test_heads_come_from_the_option_where_nothing_tells_them(
    tmp_path: Path, family_member: Member
) -> None:
    spec = family_member(qk_l2_norm=False, width=96, heads=3)
    tokenizer_file, transformer_file = save_both(spec, tmp_path, ".pth")
    files = {"checkpoint": transformer_file, "tokenizer": tokenizer_file}
    assert load_model(None, **files, hints=Hints(heads=3)).spec == spec
    with pytest.raises(UsageError, match=r"width 96 is not a multiple of 64; give it with --heads"):
        load_model(None, **files)
    for wrong in (5, 0, -3):
        with pytest.raises(UsageError, match=rf"must divide the width 96, found {wrong}"):
            load_model(None, **files, hints=Hints(heads=wrong))


def test_heads_that_contradict_the_checkpoint(tmp_path: Path, family_member: Member) -> None:
    tokenizer_file, transformer_file = save_both(family_member(), tmp_path, ".pth")
    files = {"checkpoint": transformer_file, "tokenizer": tokenizer_file}
    assert load_model(None, **files, hints=Hints(heads=2)).spec.transformer.heads == 2
    with pytest.raises(UsageError, match=r"--heads 4 contradicts .*scale_mul_1H11 has 2 heads"):
        load_model(None, **files, hints=Hints(heads=4))


def edited(spec: ModelSpec, edit: Callable[[dict[str, torch.Tensor]], object], path: Path) -> Path:
    state = dict(Transformer(spec).state_dict())
    edit(state)
    torch.save(state, path)
    return path


def test_scales_without_lvl_1l(tmp_path: Path, family_member: Member) -> None:
    """A preset with as many tokens tells the side lengths; otherwise nothing does."""

    def drop(state: dict[str, torch.Tensor]) -> None:
        for key in [k for k in state if "lvl_1L" in k or "masking" in k or "zero_k" in k]:
            del state[key]

    known = family_member(patch_nums=PRESETS["pocket"].spec.patch_nums)
    tokenizer_file, _ = save_both(known, tmp_path, ".pth")
    file = edited(known, drop, tmp_path / "bare.pth")
    model = load_model(None, checkpoint=file, tokenizer=tokenizer_file)
    assert model.spec == known
    _, transformer = build_modules(model)  # derived buffers are computed
    whole = Transformer(known)
    for key, buffer in whole.named_buffers():
        assert torch.equal(transformer.get_buffer(key), buffer), key
    strange = family_member(patch_nums=(1, 2, 5))
    tokenizer_file, _ = save_both(strange, tmp_path, ".pth")
    file = edited(strange, drop, tmp_path / "strange.pth")
    with pytest.raises(CheckpointError, match=r"lacks lvl_1L.*3 scales.*no preset has 30 tokens"):
        load_model(None, checkpoint=file, tokenizer=tokenizer_file)
    with pytest.raises(CheckpointError, match=r"--patch-nums, such as 1,2,3 .* add up to 30"):
        load_model(None, checkpoint=file, tokenizer=tokenizer_file)


PARAMETERS_ONLY = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")


@pytest.fixture
def parameters_only(tmp_path: Path, family_member: Member) -> dict[str, Path]:
    """Files of a model of sizes of its own, without buffers."""
    spec = family_member(patch_nums=(1, 2, 3, 5, 8))
    tokenizer_file, _ = save_both(spec, tmp_path, ".pth")

    def drop(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if key.endswith(PARAMETERS_ONLY)]:
            del state[key]

    return {"checkpoint": edited(spec, drop, tmp_path / "x.pth"), "tokenizer": tokenizer_file}


def test_patch_nums_that_are_told(parameters_only: dict[str, Path]) -> None:
    told = Hints(patch_nums=(1, 2, 3, 5, 8))
    assert load_model(None, **parameters_only, hints=told).spec.patch_nums == (1, 2, 3, 5, 8)
    assert load_model(None, **parameters_only, fallback=told).spec.patch_nums == (1, 2, 3, 5, 8)
    for wrong in ((1, 2, 3, 5, 9), (1, 2, 3, 5), (1, 3, 2, 5, 8), (), (2, 3)):
        with pytest.raises(UsageError, match=r"^--patch-nums .*found|^--patch-nums .*expected 103"):
            load_model(None, **parameters_only, hints=Hints(patch_nums=wrong))
    with pytest.raises(CheckpointError, match="lacks lvl_1L"):
        load_model(None, **parameters_only, fallback=Hints(patch_nums=(1, 2, 4)))


def test_patch_nums_that_contradict_the_checkpoint(tmp_path: Path, family_member: Member) -> None:
    tokenizer_file, transformer_file = save_both(family_member(), tmp_path, ".pth")
    files = {"checkpoint": transformer_file, "tokenizer": tokenizer_file}
    assert load_model(None, **files, hints=Hints(patch_nums=(1, 2, 4))).spec == family_member()
    assert load_model(None, **files, fallback=Hints(patch_nums=(1, 3))).spec == family_member()
    with pytest.raises(UsageError, match=r"--patch-nums 1,3,4 contradicts .*: lvl_1L has 1,2,4$"):
        load_model(None, **files, hints=Hints(patch_nums=(1, 3, 4)))
    with pytest.raises(
        UsageError, match=r"--patch-nums 1,2,4 contradicts preset pocket, .* 1,2,3,"
    ):
        load_model("pocket", hints=Hints(patch_nums=(1, 2, 4)))


def test_sums_that_fit_several_scales_are_told_apart(tmp_path: Path, family_member: Member) -> None:
    """As many tokens in as many scales: without a word it is the preset's, with one it is not."""
    preset = PRESETS["var-d16"].spec.patch_nums
    candidates = ((1, *rest) for rest in combinations(range(2, 17), len(preset) - 1))
    twin = next(c for c in candidates if c != preset and sum(n * n for n in c) == 680)
    spec = family_member(patch_nums=twin)
    tokenizer_file, _ = save_both(spec, tmp_path, ".pth")
    file = edited(spec, lambda state: state.pop("lvl_1L"), tmp_path / "twin.pth")
    files = {"checkpoint": file, "tokenizer": tokenizer_file}
    assert load_model(None, **files).spec.patch_nums == preset
    for told in ({"hints": Hints(patch_nums=twin)}, {"fallback": Hints(patch_nums=twin)}):
        assert load_model(None, **files, **told).spec.patch_nums == twin


def test_heads_of_the_bundle_come_before_a_guess(tmp_path: Path, family_member: Member) -> None:
    spec = family_member(qk_l2_norm=False, width=128, heads=4)
    tokenizer_file, transformer_file = save_both(spec, tmp_path, ".pth")
    files = {"checkpoint": transformer_file, "tokenizer": tokenizer_file}
    assert load_model(None, **files).spec.transformer.heads == 2
    assert load_model(None, **files, fallback=Hints(heads=4)).spec == spec
    assert load_model(None, **files, fallback=Hints(heads=4), hints=Hints(heads=8)).spec != spec


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([0, 1, 1, 1], r"does not list square token maps"),
        ([1] * 21, r"does not list square token maps"),
        ([0, -1, 1, 1, 1], r"numbers from -1 to 1, expected scales from 0 to 2"),
        ([0, 1, 1, 1, 3 * 10**8], r"numbers from 0 to 300000000, expected scales from 0 to 2"),
        ([0] * 20_000, r"lvl_1L is \[1, 20000\], expected at most 16384 tokens"),
        ([], r"no numbers, expected scales from 0 to 2"),
        ([0, 1, 1, 1, 1], r"5 tokens in 2 scales, expected 21 \(pos_1LC \[1, 21, 64\]\) in 3"),
    ],
)
def test_damaged_lvl_1l(
    levels: list[int], message: str, tmp_path: Path, family_member: Member
) -> None:
    tokenizer_file, _ = save_both(family_member(), tmp_path, ".pth")
    file = edited(
        family_member(),
        lambda s: s.update(lvl_1L=torch.tensor([levels]).long()),
        tmp_path / "x.pth",
    )
    with pytest.raises(CheckpointError, match=message):
        load_model(None, checkpoint=file, tokenizer=tokenizer_file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code_width": 16}, r"word_embed.weight is \[64, 16\], expected \[64, 8\]"),
        ({"vocab_size": 50}, r"head.weight is \[50, 64\], expected \[48, 64\]"),
        ({"patch_nums": (1, 2, 3, 4)}, r"3 φ .*expected 4"),
    ],
)
def test_a_tokenizer_of_another_model(
    change: dict[str, Any], message: str, tmp_path: Path, family_member: Member
) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    tokenizer_file, _ = save_both(family_member(shared_phi=0), mine, ".pth")
    _, transformer_file = save_both(family_member(shared_phi=0, **change), other, ".pth")
    with pytest.raises(CheckpointError, match=message):
        load_model(None, checkpoint=transformer_file, tokenizer=tokenizer_file)


def test_a_codebook_per_scale_must_suit_the_scales(tmp_path: Path, family_member: Member) -> None:
    tokenizer_file, _ = save_both(family_member(codebook_per_scale=True), tmp_path, ".pth")
    _, transformer_file = save_both(
        family_member(patch_nums=(1, 4)), tmp_path, ".safetensors"
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"2 scales, expected 3 \(quantize.embedding.k\)"):
        load_model(None, checkpoint=transformer_file, tokenizer=tokenizer_file)


NAMES_ALONE = {
    "transformer": [
        ("blocks.{}.attn.q_bias", r"lists more than 256 blocks, expected a model of this family"),
    ],
    "tokenizer": [
        ("encoder.down.{}.block.0.conv1.weight", r"lists more than 8 encoder levels"),
        ("encoder.down.0.block.{}.conv1.weight", r"lists more than 16 residual blocks"),
        ("quantize.quant_resi.qresi_ls.{}.weight", r"lists more than 64 φ"),
    ],
}


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [(part, *case) for part, cases in NAMES_ALONE.items() for case in cases],
)
def test_models_of_names_alone(
    part: str, name: str, message: str, tmp_path: Path, family_member: Member
) -> None:
    paths = save_both(family_member(), tmp_path, ".pth")
    files = dict(zip(("tokenizer", "checkpoint"), paths, strict=True))
    file = files["tokenizer" if part == "tokenizer" else "checkpoint"]
    state = torch.load(file, weights_only=True)
    state = {name.format(n): torch.zeros(32, 32, 3, 3) for n in range(300)} | state
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=message):
        load_model(None, **files)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("pos_1LC", (1, 20_000, 64), r"pos_1LC is \[1, 20000, 64\], expected 1 to 16384 in dimen"),
        ("lvl_embed.weight", (65, 64), r"expected 1 to 64 in dimension 0"),
        ("class_emb.weight", (0, 64), r"expected 1 to 16777216 in dimension 0"),
        ("class_emb.weight", (1, 64), r"class_emb.weight has 1 row, expected one per class and"),
        ("class_emb.weight", (10**15, 0), r"expected 1 to 16777216 in dimension 0"),
        ("blocks.0.attn.scale_mul_1H11", (1, 3, 1, 1), r"64 is not divisible by 3 heads"),
    ],
)
def test_sizes_that_no_model_has(
    key: str, shape: tuple[int, ...], message: str, tmp_path: Path, family_member: Member
) -> None:
    tokenizer_file, _ = save_both(family_member(), tmp_path, ".pth")
    file = edited(family_member(), lambda s: s.update({key: torch.zeros(shape)}), tmp_path / "x")
    with pytest.raises(CheckpointError, match=message):
        load_model(None, checkpoint=file, tokenizer=tokenizer_file)


def test_swapped_sources(family_member: Member) -> None:
    model = load_model("pocket", random_weights=0)
    with pytest.raises(CheckpointError, match="were --checkpoint and --tokenizer swapped"):
        recognise(model.transformer, model.tokenizer)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (None, r"lacks class_emb.weight"),
        ((), r"class_emb.weight is \[\], expected at least 2 dimensions"),
        ((7,), r"class_emb.weight is \[7\], expected at least 2 dimensions"),
    ],
)
def test_a_tensor_that_cannot_be_read_off(
    shape: tuple[int, ...] | None, message: str, tmp_path: Path, family_member: Member
) -> None:
    tokenizer_file, transformer_file = save_both(family_member(), tmp_path, ".pth")
    whole = open_checkpoint(transformer_file, "transformer")
    shapes = {k: whole.shape(k) for k in whole.keys() if k != "lvl_1L"}  # noqa: SIM118
    shapes |= {"pos_1LC": (1, 680, 64), "lvl_embed.weight": (10, 64)}
    del shapes["class_emb.weight"]
    if shape is not None:
        shapes["class_emb.weight"] = shape
    with pytest.raises(CheckpointError, match=message):
        recognise(open_checkpoint(tokenizer_file, "tokenizer"), RandomWeights(shapes, 0))
