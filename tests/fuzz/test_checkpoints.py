"""Checkpoint files that are damaged at random, or made to take for ever or all memory."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

pytest.importorskip("torch")

from fuzz.checkpoint_cases import MUTATIONS, load, load_file, packed, transformer_state
from fuzz.harness import run_cases, scaled

SECONDS, MEGABYTES = 20.0, 300.0  # 2 s are meant, on a machine with nothing else to do


def test_damaged_checkpoints_are_refused_in_one_line() -> None:
    cases = [(name, seed) for seed in range(scaled(20)) for name in MUTATIONS]
    counts = run_cases("checkpoints", cases, load, SECONDS, MEGABYTES, valid=("valid", 0))
    assert counts.failures == []
    assert counts.refused > counts.tried / 2
    assert counts.accepted > counts.tried / 20


def test_small_files_that_ask_for_much(tmp_path: Path) -> None:
    from fuzz.checkpoint_cases import write_attacks

    (tmp_path / "attacks").mkdir()
    attacks = [str(path) for path in write_attacks(tmp_path / "attacks")]
    valid = tmp_path / "valid.pth"
    valid.write_bytes(packed(transformer_state(), "zip"))
    counts = run_cases("attacks", attacks, load_file, SECONDS, MEGABYTES, valid=str(valid))
    assert counts.failures == []
    # a record that nobody reads may say of itself what it likes
    assert counts.accepted == 2
    assert counts.refused == len(attacks) - 2


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    valid = tmp_path / "valid.pth"
    valid.write_bytes(packed(transformer_state(), "zip"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder.pth").mkdir()
    cases = [str(tmp_path / name) for name in ("pipe", "loop", "folder.pth", "socket", "absent")]
    cases += ["/dev/zero", "/dev/null", "/proc/self/status", "/proc/self/mem", "a\0b", "x" * 300]
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        counts = run_cases("places", cases, load_file, SECONDS, MEGABYTES, valid=str(valid))
    assert counts.failures == []
    assert counts.refused == len(cases)
