"""The command that runs golden cases: what fits passes, what does not is named and ends with 1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from golden_infinity import OWN

from tools.golden import compare, main
from var_deploy.errors import VarDeployError


@pytest.fixture
def case(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OWN / "seeded-small", tmp_path / "another"))


def test_a_case_from_any_folder(case: Path) -> None:
    done = CliRunner().invoke(main, [str(case)])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("another: ")
    assert done.output.endswith(": ok\n")


def test_a_bit_and_a_float_that_are_off(case: Path) -> None:
    with np.load(case / "golden.npz") as arrays:
        golden = dict(arrays)
    golden["sampled.bits.2"] = golden["sampled.bits.2"].copy()
    golden["sampled.bits.2"].flat[0] ^= 1
    golden["greedy.logits.1"] = golden["greedy.logits.1"] + np.float32(1e-3) * np.arange(40)
    golden["encode.z"] = golden["encode.z"][:, :, :1]
    np.savez(case / "golden.npz", **golden)
    found = compare(case)
    assert found.equal == found.total - 2, "once in each layout"
    off = " ".join(found.off)
    assert "sampled (shared) bits 2 differs in 1 of" in off
    assert "greedy (per-scale) logits 1 is off by 1.0" in off
    assert "encode.z is" in off
    assert CliRunner().invoke(main, [str(case)]).exit_code == 1


def test_what_is_not_a_case(case: Path) -> None:
    config = json.loads((case / "config.json").read_text())
    del config["bits"]
    (case / "config.json").write_text(json.dumps(config))
    with pytest.raises(VarDeployError, match="holds no golden case: KeyError"):
        compare(case)
