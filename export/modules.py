"""Exports PyTorch modules that are in memory, and imports modules that the command line names."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from var_deploy.config import LayoutSet, Precision
from var_deploy.errors import UsageError, one_line
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import as_loaded_model
from var_deploy.files.paths import utf8_path
from var_deploy.manifest import Manifest
from var_deploy.progress import Progress
from var_deploy.sampling import Sampling


def export_modules(
    transformer: nn.Module,
    tokenizer: nn.Module,
    out: Path | str,
    *,
    precisions: Sequence[Precision] = ("fp32",),
    batch: int = 1,
    guidance: bool | None = None,
    more_smooth: bool = False,
    layout: LayoutSet = "both",
    calibration: int = 8,
    labels: Sequence[str] = (),
    defaults: Sampling | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write the bundle of two PyTorch modules that were never saved to a file.

    Such modules are, for example, fine-tuned, averaged or randomly initialised:

        export_modules(var, vae, "build/mine", precisions=("fp32", "fp16"))
        verify_bundle(Path("build/mine"), modules=(var, vae))

    Args:
        transformer: the published code's VAR, this package's, what `var.build` returned, or any
            module whose state dict has the keys of one of these. The wrappers of torch.compile and
            of parallel training are looked through.
        tokenizer: the published VQVAE, this package's Tokenizer, or what `var.build_tokenizer`
            returned (either of the two).
        out: folder of the bundle.
        precisions: of "fp32", "fp16" and "int8".
        batch: B, images per launch; fixed in the graphs.
        guidance: 2B rows for classifier-free guidance; None: where the model has classes.
        more_smooth: mix codes as the published `more_smooth` does.
        layout: per-scale static graphs, the one `step` graph ("shared"), or both.
        calibration: images that the ranges of int8 are taken from.
        labels: class names, index = label.
        defaults: sampling settings used where a call gives none.
        replace: whether a bundle at `out` is replaced; its engines stay.

    Weights of any float type become fp32 first. The modules are read and stay as they are. Sizes
    that state dicts do not tell are read off the attributes `patch_nums`, `num_heads`, `eps` and
    `resi_ratio`. Raises CheckpointError for modules that are not of this family, UsageError for
    arguments that do not fit them, ExportError where the bundle cannot be written.
    """
    folder = Path(out)
    utf8_path(folder.absolute(), "the library of ONNX")
    model = as_loaded_model(transformer, tokenizer, defaults=defaults, labels=tuple(labels))
    options = ExportOptions(
        precisions=tuple(precisions),
        batch=batch,
        guidance=guidance,
        more_smooth=more_smooth,
        layout=layout,
        calibration=calibration,
    )
    return export_bundle(model, folder, options, progress, replace=replace)


def call_module_function(place: str) -> tuple[nn.Module, nn.Module]:
    """Call "package.file:function" and return its result: the transformer and the tokenizer.

    The file is looked for in the current folder first, as `python -m` does. Raises UsageError where
    it cannot be imported, or returns anything else.
    """
    name, _, attribute = place.partition(":")
    if not name or not attribute:
        raise UsageError(
            f"--module must be PACKAGE.FILE:FUNCTION, such as models.mine:load, found {place!r}"
        )
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        function: Any = importlib.import_module(name)
        for part in attribute.split("."):
            function = getattr(function, part)
        found: object = function()
    except Exception as error:  # the user's code may raise any exception
        raise UsageError(
            f"--module {place} cannot be called: {type(error).__name__}: {one_line(error)}"
        ) from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
    if isinstance(found, (list, tuple)) and len(found) == 2:
        transformer, tokenizer = found
        if isinstance(transformer, nn.Module) and isinstance(tokenizer, nn.Module):
            return transformer, tokenizer
    raise UsageError(
        f"--module {place} returned a {type(found).__name__}, expected two PyTorch modules "
        "(transformer, tokenizer)"
    )
