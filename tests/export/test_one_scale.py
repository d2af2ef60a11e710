"""A model with a single scale: it has no past and no next scale."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from var_deploy.errors import UsageError
from var_deploy.export.bundle import ExportOptions, export_bundle
from var_deploy.export.checkpoint.assemble import LoadedModel
from var_deploy.export.verify.bundle import verify_model
from var_deploy.pipeline import Pipeline
from var_deploy.spec import ModelSpec


@pytest.mark.parametrize("more_smooth", [False, True])
def test_it_runs_in_every_precision_and_layout(
    small_model: Callable[..., LoadedModel], tmp_path: Path, more_smooth: bool
) -> None:
    """`step` ended ONNX Runtime with an integer division by zero."""
    model, bundle = small_model(patch_nums=(1,)), tmp_path / "bundle"
    export_bundle(
        model,
        bundle,
        ExportOptions(precisions=("fp32", "fp16", "int8"), batch=2, more_smooth=more_smooth),
    )
    for precision in ("fp32", "fp16", "int8"):
        images = []
        for layout in ("shared", "per-scale"):
            with Pipeline.load(bundle, precision=precision, layout=layout, threads=1) as pipe:
                images.append(pipe.generate([0, 1, 2], seed=3))
                tokens = pipe.encode(list(images[-1]))
                assert [t.shape for t in tokens] == [(3, 1)]
                assert pipe.decode(tokens).shape == images[-1].shape
        np.testing.assert_array_equal(*images)
    # a latent of one pixel leaves GroupNorm next to nothing to normalise: fp32 alone is bound
    report = verify_model(bundle, model)
    assert {c.graph for c in report.checks if c.precision == "fp32"} >= {"step @ 0", "loop shared"}
    assert all(c.passed for c in report.checks if c.precision == "fp32"), report.table()


def test_the_gpt2_form_has_two_scales_at_least(family_member: Callable[..., ModelSpec]) -> None:
    """It embeds the tokens of one scale for the next."""
    sizes = {"family": "gpt2", "classes": 0, "qk_l2_norm": False, "codebook_per_scale": True}
    family_member(**sizes)
    with pytest.raises(UsageError, match=r"needs two scales, found \(1,\)"):
        family_member(**sizes, patch_nums=(1,))
