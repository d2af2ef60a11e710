"""What a report of `verify` says was shown, and how checks of several images become one."""

from __future__ import annotations

import math
from typing import Any

import pytest

from var_deploy.export.verify.report import REPORTED, Check, VerifyReport, merged


def loop(precision: str = "fp32", tokens: str = "84/84", **changes: Any) -> Check:
    usual: dict[str, Any] = {"graph": "loop shared", "tensor": "image", "error": 2e-6}
    return Check(precision=precision, tokens=tokens, **{**usual, "psnr": 130.0, **changes})


def verdict(*checks: Check, **changes: Any) -> list[str]:
    return VerifyReport(checks=checks, labels=(0, 7, 4, 1), seed=0, **changes).verdict()


def test_fp32_is_the_model_where_every_token_is() -> None:
    (line,) = verdict(loop(), loop(graph="loop per-scale", error=3e-6))
    assert line == (
        "fp32: 84 of 84 tokens of 4 images equal the PyTorch model's, images within 3.0e-06: the "
        "deployed graphs are the model"
    )
    (line,) = verdict(loop(), oracle="models.var.VAR")
    assert "84 of 84 tokens of 4 images equal those of models.var.VAR, images" in line


def test_the_layout_that_agrees_least_is_told() -> None:
    lines = verdict(loop(), loop(tokens="80/84", graph="loop per-scale"), loop("fp16"))
    assert lines == [
        "fp32: 80 of 84 tokens of 4 images equal the PyTorch model's, rounding decided the others: "
        "within the bounds for fp32",
        "fp16: 84 of 84 tokens of 4 images equal the PyTorch model's, images within 2.0e-06: "
        "within the bounds for fp16",
    ]


def test_int8_never_is_the_model() -> None:
    (line,) = verdict(loop("int8", "59/84", psnr=23.7))
    assert line == (
        "int8: within the bounds for int8; it draws other images than fp32 (59 of 84 tokens of 4 "
        "images equal the PyTorch model's, 23.7 dB)"
    )
    (line,) = verdict(loop("int8", psnr=38.0))
    assert line.startswith("int8: within the bounds for int8 (84 of 84 tokens of 4 images")


def test_a_failure_is_the_whole_verdict() -> None:
    bad = loop("fp16", passed=False, detail="image is off")
    assert verdict(loop(), bad) == ["FAILED fp16/loop shared: image is off"]
    report = VerifyReport(checks=(loop(), bad), labels=(1,), seed=0)
    assert report.to_json()["verdict"] == report.verdict()
    assert report.table().endswith("\n\nFAILED fp16/loop shared: image is off")


def scale(relative: float, tokens: str, **changes: Any) -> Check:
    return Check(
        precision="fp32", graph="step @ 1", tensor="logits", relative=relative, bound=2e-4,
        logits=relative, top_1="4/4", tokens=tokens, **changes,
    )  # fmt: skip


def test_checks_of_several_images_become_the_worst() -> None:
    found = merged([scale(1e-6, "4/4"), scale(3e-6, "3/4", detail="1 tokens differ"), scale(0, "")])
    assert (found.relative, found.logits, found.tokens, found.top_1) == (3e-6, 3e-6, "7/8", "12/12")
    assert found.passed and found.detail == "1 tokens differ (image 2 of 3)"
    assert merged([scale(1e-6, "4/4")]) == scale(1e-6, "4/4")


def test_one_image_that_fails_fails_all() -> None:
    for error in (1e-3, math.inf, math.nan):
        bad = scale(error, "0/4", passed=False, detail="logits is off")
        found = merged([scale(1e-4, "4/4"), bad])
        assert not found.passed and found.detail == "logits is off (image 2 of 2)"
        assert found.relative is bad.relative


@pytest.mark.parametrize("order", [1, -1])
def test_an_image_without_a_bound_is_shown_as_such(order: int) -> None:
    """Its tokens tipped, so that its error is no error; the others are bounded all the same."""
    tipped = loop(tokens="20/21", relative=0.6, error=0.6, psnr=17.0, detail=f"image {REPORTED}")
    found = merged([loop(relative=1e-6, bound=1e-3), tipped][::order])
    assert (found.bound, found.error, found.psnr) == (None, 0.6, 17.0)
    assert REPORTED in found.detail and found.passed


def test_images_are_judged_by_decibels() -> None:
    """The one of lower quality is nearer to its bound."""
    best, worst = (loop("int8", psnr=psnr, least_psnr=35.0, error=psnr) for psnr in (40.0, 36.0))
    assert merged([best, worst]).error == 36.0
