"""What `emulate.py` runs on this machine and on an emulated one, to compare what comes out.

    python tests/arm64/runtime_half.py WORK PART...

One process does many things, since each start costs the emulator ten seconds. WORK holds `pocket`,
the bundle, `photo.png`, and `tokens.npz`, which every machine decodes; arrays go to OUT/PART.npz,
what the commands make beside them. The parts:

    fp32     tokens and images of the library, and the commands edit, sample and doctor
    fp16, int8  tokens and images of the library, and the command generate
    refuse   int8 is refused by name, and "auto" takes fp32 with a reason
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from var_deploy import Pipeline, VarDeployError
from var_deploy.cli import main as program

LABEL, SEED = 1, 5
BOX = "16,16,48,48"


class Parts:
    def __init__(self, work: Path, out: Path) -> None:
        self.work, self.out, self.bundle = work, out, work / "pocket"
        self.arrays: dict[str, Any] = {}

    def command(self, *words: object) -> str:
        """Run a command of the program in this process; what it printed."""
        out, errors = io.StringIO(), io.StringIO()
        code: object = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                program([str(word) for word in words], prog_name="var-deploy")
            except SystemExit as end:
                code = end.code
        if code:
            raise SystemExit(f"{' '.join(map(str, words[:2]))}: {code}: {errors.getvalue()}")
        return out.getvalue()

    def library(self, precision: str) -> None:
        """One image drawn, with its tokens, and the given tokens decoded."""
        with np.load(self.work / "tokens.npz") as loaded:
            given = [loaded[name] for name in sorted(loaded.files)]
        drawn: list[Any] = []
        with Pipeline.load(self.bundle, precision=precision, threads=1) as pipe:
            image = pipe.generate([LABEL], seed=SEED, on_scale=lambda e: drawn.append(e.tokens))
            self.arrays["image"] = np.asarray(image)
            self.arrays |= {f"drawn_{k}": tokens for k, tokens in enumerate(drawn)}
            self.arrays["decoded"] = pipe.decode(given)
            if precision == "fp32":
                found = pipe.encode(self.work / "photo.png")
                self.arrays |= {f"encoded_{k}": tokens for k, tokens in enumerate(found)}

    def fp32(self) -> None:
        self.library("fp32")
        chosen = ("--precision", "fp32", "--threads", 1, "--quiet")
        edited, folder = self.out / "edited.png", self.out / "set"
        words = (self.work / "photo.png", "--box", BOX, "--seed", 3)
        self.command("edit", self.bundle, *words, *chosen, "--out", edited)
        self.arrays["edited"] = np.asarray(Image.open(edited))
        words = ("--per-class", 1, "--shard-size", 1, "--shards", "1/10", "--out", folder)
        self.command("sample", self.bundle, *words, *chosen)
        self.arrays["sample"] = np.frombuffer((folder / "000000.tar").read_bytes(), np.uint8)
        (self.out / "doctor.json").write_text(self.command("doctor", "--json"))

    def fp16(self) -> None:
        self.library("fp16")

    def int8(self) -> None:
        self.library("int8")
        out = self.out / "int8.png"
        words = ("--labels", LABEL, "--seed", SEED, "--precision", "int8", "--threads", 1)
        self.command("generate", self.bundle, *words, "--quiet", "--out", out)
        self.arrays["command"] = np.asarray(Image.open(out))

    def refuse(self) -> None:
        try:
            Pipeline.load(self.bundle, precision="int8", threads=1).close()
        except VarDeployError as error:
            said = str(error)
        else:
            raise SystemExit("int8 was not refused")
        if "int8" not in said or "\n" in said:
            raise SystemExit(f"int8 was not refused by name: {said}")
        with Pipeline.load(self.bundle, threads=1) as pipe:
            about = pipe.describe()
        if about.precision != "fp32" or "int8" not in about.reason:
            raise SystemExit(f"auto does not take fp32 with a reason: {about}")


def main() -> int:
    work, out, *parts = sys.argv[1:]
    sys.executable = os.environ.get("ARM64_PYTHON", sys.executable)  # for what it starts
    for part in parts:
        began = time.process_time()
        run = Parts(Path(work), Path(out))
        getattr(run, part)()
        np.savez(Path(out) / f"{part}.npz", **run.arrays)
        print(f"{part} {time.process_time() - began:.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
