"""Attempts that show that the harness notices what it is there for."""

from __future__ import annotations

import os
import signal
import time

from var_deploy.errors import BundleError


def misbehave(case: str) -> None:
    if case == "refuse":
        raise BundleError("no bundle; export it again")
    if case == "ramble":
        raise BundleError("two\nlines")
    if case == "repeat":
        raise BundleError("x" * 100_000)
    if case == "half":
        raise AssertionError("half a file was left")
    if case == "crash":
        raise KeyError("sizes")
    if case == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if case == "hang":
        time.sleep(1000)
    if case == "swell":
        bytearray(os.urandom(1 << 20) * 80)
    if case == "burst":
        bytearray(4 << 30)
    if case == "shout":
        os.write(2, b"\x1b[31mE:onnxruntime\x1b[m\n")
