"""A program that speaks as a worker does, or fails to.

    python fake_worker.py NAME LOG [MANNER]

Every generation adds a line with its name to the file LOG.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from var_deploy.bench.rates import amounts
from var_deploy.bench.worker import About, Sample, serve

LAUNCHES = {"condition": 0.001, "scale_00": 0.002, "decoder": 0.005}
RATE = 1e9  # operations and bytes a second of the manner "rates"


class FakeWorker:
    def __init__(self, name: str, log: Path, manner: str) -> None:
        self.name, self.log, self.manner, self.count = name, log, manner, 0
        if manner == "refuses":
            raise ValueError("no such\nprecision")
        if manner == "dies loading":
            sys.stderr.write("something\nSegmentation fault, or so\n\n")
            sys.stderr.flush()
            os._exit(3)
        if manner == "hangs loading":
            time.sleep(60)
        if manner == "noisy":
            print("a banner")
            os.write(1, b"a line from C\n")
        if manner == "has a child":
            child = subprocess.Popen(["sleep", "60"])
            log.write_text(str(child.pid))

    def describe(self) -> About:
        settings = {"threads": "2", "precision": "fp32", "name": self.name}
        loading = {"checking": 0.0001, "opening": 0.0002}
        if self.manner == "says little":
            loading = {}
        return About(settings=settings, graphs="fp32", threads=2, loading=loading)

    def generate(self) -> Sample:
        self.count += 1
        if self.manner == "dies later" and self.count > 2:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.manner == "hangs":
            time.sleep(60)
        if self.manner == "fails":
            raise MemoryError
        if self.manner == "noisy":
            print("{")
        if self.manner != "has a child":
            with self.log.open("a") as stream:
                stream.write(f"{self.name}\n")
        if self.manner == "rates":
            launches = {name: amount / RATE for name, amount in amounts(2).items()}
            return Sample(seconds=0.5, launches=launches)
        return Sample(seconds=0.010, launches=LAUNCHES)

    def close(self) -> None:
        pass


def command(name: str, log: Path, manner: str = "") -> list[str]:
    """How a test starts it."""
    return [sys.executable, __file__, name, str(log), manner]


if __name__ == "__main__":
    name, log, manner = sys.argv[1:]
    if manner == "babbles":
        print("good morning", flush=True)
        time.sleep(60)
    sys.exit(serve(lambda: FakeWorker(name, Path(log), manner)))
