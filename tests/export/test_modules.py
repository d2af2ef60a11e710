"""Modules that the user holds: exported without a file, and compared with by their own forward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cli_steps import assert_one_line, run
from foreign_modules import ForeignVar, ForeignVqvae
from var_deploy import names
from var_deploy.errors import CheckpointError, UsageError
from var_deploy.export import export_modules, verify_bundle
from var_deploy.export import var as published_call
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel, build_modules
from var_deploy.export.verify.report import VerifyReport
from var_deploy.manifest import read_manifest

Model = Callable[..., LoadedModel]
Pair = tuple[ForeignVar, ForeignVqvae]


@pytest.fixture(scope="module")
def model(small_model: Model) -> LoadedModel:
    """Two blocks, three scales, two heads, without L2 norm: nothing in the weights tells heads."""
    return small_model(qk_l2_norm=False, width=96, heads=3)


def foreign(model: LoadedModel, twist: str = "", tokenizer_twist: str = "") -> Pair:
    weights = [
        {key: source.read(key) for key in source.keys()}  # noqa: SIM118
        for source in (model.transformer, model.tokenizer)
    ]
    sides = model.spec.patch_nums
    heads = model.spec.transformer.heads
    return (
        ForeignVar(weights[0], sides, heads, twist),
        ForeignVqvae(weights[1], sides, tokenizer_twist),
    )


@pytest.fixture(scope="module")
def bundle(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("modules") / "bundle"
    export_modules(*foreign(model), out, layout="shared", batch=2)
    return out


def verified(bundle: Path, modules: tuple[nn.Module, nn.Module], **options: Any) -> VerifyReport:
    return verify_bundle(bundle, modules=modules, precision="fp32", images=2, **options)


def failed(report: VerifyReport) -> dict[str, str]:
    return {check.graph: check.detail for check in report.checks if not check.passed}


# --- export


def test_the_bundle_is_that_of_the_same_weights_in_a_file(
    model: LoadedModel, bundle: Path, tmp_path: Path
) -> None:
    export_bundle(model, tmp_path / "file", ExportOptions(layout="shared", batch=2))
    ours, theirs = read_manifest(tmp_path / "file"), read_manifest(bundle)
    assert theirs.digest() == ours.digest()
    assert theirs.model == model.spec, "heads are told by an attribute"
    assert theirs.checkpoint["transformer"]["module"] == "ForeignVar"


def test_nothing_of_the_modules_changes(model: LoadedModel, tmp_path: Path) -> None:
    var, vae = foreign(model)
    var.train()
    before = {k: v.clone() for m in (var, vae) for k, v in m.state_dict().items()}
    export_modules(var, vae, tmp_path / "bundle", layout="shared")
    assert verified(tmp_path / "bundle", (var, vae)).passed
    assert var.training and all(m.training for m in var.modules())
    assert var.cond_drop_rate == 0.9
    after = {k: v for m in (var, vae) for k, v in m.state_dict().items()}
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_eps_and_phi_are_read_off_attributes(model: LoadedModel, tmp_path: Path) -> None:
    var, vae = foreign(model)
    var.norm = nn.LayerNorm(model.spec.transformer.width, eps=1e-5, elementwise_affine=False)
    vae.resi_ratio = 0.25  # type: ignore[assignment]
    manifest = export_modules(var, vae, tmp_path / "bundle", layout="shared")
    assert manifest.model.transformer.norm_eps == 1e-5
    assert manifest.model.tokenizer.phi_ratio == 0.25


class Wrapper(nn.Module):
    """As torch.compile wraps: the module under _orig_mod, its attributes passed on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, *given: Any) -> Any:
        return self._orig_mod(*given)


def test_wrappers_are_looked_through(model: LoadedModel, bundle: Path, tmp_path: Path) -> None:
    var, vae = foreign(model)
    manifest = export_modules(Wrapper(var), vae, tmp_path / "bundle", layout="shared", batch=2)
    assert manifest.digest() == read_manifest(bundle).digest()
    report = verified(tmp_path / "bundle", (Wrapper(var), vae))
    assert report.passed and report.oracle == "foreign_modules.ForeignVar"


def test_half_precision_is_exported_and_not_compared(model: LoadedModel, tmp_path: Path) -> None:
    var, vae = foreign(model)
    export_modules(var.half(), vae, tmp_path / "bundle", layout="shared")
    with pytest.raises(UsageError, match=r"float16 parameters, expected float32.*\.float\(\)"):
        verified(tmp_path / "bundle", (var, vae))


def test_what_cannot_be_exported_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    var, vae = foreign(model)
    vae.using_znorm = True  # type: ignore[assignment]
    with pytest.raises(UsageError, match="using_znorm"):
        export_modules(var, vae, out)
    var, vae = foreign(model)
    with pytest.raises(UsageError, match="labels must have a name for each of the 5 classes"):
        export_modules(var, vae, out, labels=["one"])
    with pytest.raises(CheckpointError, match="meta tensor"):
        export_modules(var.to("meta"), vae, out)
    with pytest.raises(CheckpointError, match="the Linear in memory lacks"):
        export_modules(nn.Linear(2, 2), vae, out)
    assert not list(tmp_path.iterdir())


# --- their own forward


def test_the_graphs_are_compared_with_it(model: LoadedModel, bundle: Path) -> None:
    report = verified(bundle, foreign(model))
    assert report.passed, report.table()
    tokens = 2 * model.spec.total_tokens
    (verdict,) = report.verdict()
    assert verdict.startswith(
        f"fp32: {tokens} of {tokens} tokens of 2 images equal those of foreign_modules.ForeignVar,"
    )
    assert verdict.endswith("the deployed graphs are the model")
    assert read_manifest(bundle).parity["oracle"] == "foreign_modules.ForeignVar"  # type: ignore[index]


def test_it_is_the_reference_indeed(model: LoadedModel, bundle: Path) -> None:
    """Each of the four calls is made, and what it gives is what the graphs are compared with."""
    var, vae = foreign(model)
    calls = []
    for owner, name in (
        (var, "forward"), (vae, "img_to_idxBl"), (vae, "idxBl_to_img"),
        (vae.quantize, "idxBl_to_var_input"),
    ):  # fmt: skip
        real = getattr(owner, name)

        def counted(*given: Any, real: Any = real, name: str = name, **how: Any) -> Any:
            calls.append(name)
            return real(*given, **how)

        setattr(owner, name, counted)
    assert verified(bundle, (var, vae)).passed
    assert set(calls) == {"forward", "img_to_idxBl", "idxBl_to_img", "idxBl_to_var_input"}


@pytest.mark.parametrize(
    ("twist", "tokenizer_twist", "graph", "tensor"),
    [
        ("relu", "", f"{names.STEP} @ 0", names.LOGITS),
        ("scales the other way round", "", f"{names.STEP} @ 0", names.LOGITS),
        ("sees a scale ahead", "", f"{names.STEP} @ 0", names.LOGITS),
        ("", "bilinear codes", f"{names.STEP} @ 1", names.NEXT_INPUT),
        ("", "tanh for the clamp", names.DECODER, names.IMAGE),
        ("", "nearest by L1", names.ENCODER, "tokens of the encoder"),
    ],
)
def test_another_forward_is_caught(
    twist: str, tokenizer_twist: str, graph: str, tensor: str, model: LoadedModel, bundle: Path
) -> None:
    """The weights are the same to the last bit; the code is not."""
    report = verified(bundle, foreign(model, twist, tokenizer_twist))
    first, detail = next(iter(failed(report).items()))
    assert first == graph and detail.startswith(tensor), report.table()
    assert report.verdict() == [f"FAILED {report.failure}"]


def test_other_weights_are_caught(small_model: Model, bundle: Path) -> None:
    other = small_model(2, qk_l2_norm=False, width=96, heads=3)
    assert names.CONDITION in failed(verified(bundle, foreign(other)))
    with pytest.raises(CheckpointError, match="does not fit"):
        verified(bundle, foreign(small_model(qk_l2_norm=False)))


def test_a_tokenizer_with_fewer_methods(model: LoadedModel, bundle: Path) -> None:
    """f_hat is decoded, and the next inputs are ours, where the tokenizer does not make them."""

    class Plain(ForeignVqvae):
        encode = ForeignVqvae.img_to_idxBl
        img_to_idxBl = idxBl_to_img = None  # type: ignore[assignment]

    var, vae = foreign(model)
    plain = Plain({k: v.numpy() for k, v in vae.state_dict().items()}, model.spec.patch_nums)
    del plain.quantize.idxBl_to_var_input
    assert verified(bundle, (var, plain)).passed

    class Mute(ForeignVqvae):
        fhat_to_img = None  # type: ignore[assignment]

    mute = Mute({k: v.numpy() for k, v in vae.state_dict().items()}, model.spec.patch_nums)
    with pytest.raises(UsageError, match="Mute has no method fhat_to_img or decode"):
        verified(bundle, (var, mute))


def test_calls_that_fail_are_one_line(model: LoadedModel, bundle: Path) -> None:
    var, vae = foreign(model)
    var.forward = lambda *given: torch.zeros(2, 3)  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=r"ForeignVar\.forward gave \[2, 3\], expected \[4, 21"):
        verified(bundle, (var, vae))

    def stops(*given: Any) -> None:
        raise RuntimeError("out of\nmemory")

    var.forward = stops  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=r"ForeignVar\.forward failed: RuntimeError: out of mem"):
        verified(bundle, (var, vae))
    with pytest.raises(UsageError, match="leave the checkpoint files out"):
        verified(bundle, (var, vae), checkpoint=Path("x.pth"))


def test_mixed_codes_and_our_own_modules(model: LoadedModel, tmp_path: Path) -> None:
    tokenizer, transformer = build_modules(model)
    out = tmp_path / "bundle"
    export_modules(transformer, tokenizer, out, layout="shared", more_smooth=True)
    for pair in ((transformer, tokenizer), foreign(model)):
        assert verified(out, pair).passed


def test_the_unconditional_form(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt2 = published_call.build(
        hidden_size=32, num_layers=1, num_heads=2, scales=(1, 2), codebook_size=16
    )
    encoder, decoder = published_call.build_tokenizer(
        image_size=4, scales=(1, 2), codebook_size=16, embed_dim=8
    )
    export_modules(gpt2, encoder, tmp_path / "bundle", layout="shared")
    report = verified(tmp_path / "bundle", (gpt2, decoder))
    assert report.passed, report.table()
    with torch.no_grad():
        gpt2.head.bias.add_(torch.linspace(-1, 1, 16))
    assert f"{names.STEP} @ 0" in failed(verified(tmp_path / "bundle", (gpt2, decoder)))


# --- from the command line


@pytest.fixture
def file_of_mine(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    var, vae = foreign(model)
    torch.save([var, vae], tmp_path / "both.pt")
    path = tmp_path / "held_by_me.py"
    path.write_text(
        "import torch\n"
        "def load():\n"
        "    return torch.load('both.pt', weights_only=False)\n"
        "def one():\n"
        "    return load()[0]\n"
        "def broken():\n"
        "    raise KeyError('ema')\n"
    )
    monkeypatch.chdir(tmp_path)
    yield path
    sys.modules.pop("held_by_me", None)


def test_a_function_is_named_on_the_command_line(bundle: Path, file_of_mine: Path) -> None:
    searched = list(sys.path)
    result = run("verify", bundle, "--module", "held_by_me:load", "--images", 2, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "tokens of 2 images equal those of foreign_modules.ForeignVar" in result.output
    assert sys.path == searched


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("held_by_me", "must be PACKAGE.FILE:FUNCTION"),
        ("held_by_me:other", "AttributeError"),
        ("held_by_nobody:load", "ModuleNotFoundError"),
        ("held_by_me:broken", "KeyError: 'ema'"),
        ("held_by_me:one", "returned a ForeignVar, expected two PyTorch modules"),
    ],
)
def test_a_function_that_gives_no_modules(
    place: str, told: str, bundle: Path, file_of_mine: Path
) -> None:
    assert_one_line(run("verify", bundle, "--module", place), 2, "--module", told)


def test_a_bundle_of_modules_says_what_to_give(bundle: Path) -> None:
    result = run("verify", bundle)
    assert_one_line(result, 2, "ForeignVar, ForeignVqvae", "--module PACKAGE.FILE:FUNCTION")
