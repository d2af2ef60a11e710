"""Goes through the runtime half of an installed wheel: every command and the Python API.

    python tests/pythons/runtime_half.py BUNDLE CHECKOUT OUT

Runs in an environment that holds the wheel, its extras for devices, and nothing else; so this is
one plain file that imports what a device has. BUNDLE is pocket in fp32, fp16 and int8; CHECKOUT is
a folder whose files shadow modules; what is made lies in OUT afterwards, for a comparison with
other Pythons: files called after the precision that they depend on. Any failure ends it with a
message and exit code 1. Warnings are errors, here and in all that is started.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PROGRAM = Path(sys.executable).parent / ("var-deploy.exe" if os.name == "nt" else "var-deploy")
PATIENCE = 120.0  # seconds for a command
PRECISIONS = ("fp32", "fp16", "int8")
BUILD_ONLY = ("torch", "onnx", "safetensors")
VERSIONS = ("numpy", "onnxruntime", "pillow", "click", "fastapi", "pyarrow")
GIVEN = ("--threads", 1, "--quiet")
SETTINGS = ("--labels", "star,heart,3,2,4,5,6,7", "--seed", 5)
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    "PYTHONWARNINGS": "error",
}


class FailureError(Exception):
    """What went wrong, for the last line."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise FailureError(what)


class Half:
    """The steps; what each makes goes into `out`.

    Args:
        folder: where the commands are run.
    """

    def __init__(self, bundle: Path, checkout: Path, out: Path) -> None:
        self.bundle, self.checkout, self.out = bundle, checkout, out
        self.folder = out / "elsewhere"
        self.folder.mkdir(parents=True)

    def command(self, *words: object, folder: Path | None = None, code: int = 0) -> str:
        """Run `var-deploy …`; its standard output."""
        return self.program(PROGRAM, *words, folder=folder, code=code)

    def program(self, *words: object, folder: Path | None = None, code: int = 0) -> str:
        done = subprocess.run(
            [str(word) for word in words],
            cwd=folder or self.folder,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        said, errors = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
        shown = " ".join(str(word) for word in words[1:4])
        check(done.returncode == code, f"{shown} … ended with {done.returncode}: {errors[-1500:]}")
        if code == 0:
            check(not errors, f"{shown} … wrote to stderr: {errors[-1500:]}")
        return said + errors

    def keep(self, name: str, text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        (self.out / name).write_bytes(data)

    # steps

    def environment(self) -> None:
        present = [name for name in BUILD_ONLY if importlib.util.find_spec(name)]
        check(not present, f"the runtime half is to be tried without {present}")
        import var_deploy

        packages = [Path(entry) for entry in sys.path if entry.endswith("-packages")]
        package = Path(var_deploy.__file__).parent
        check(package.parent in packages, f"{package} is not the installed package")

    def help(self) -> None:
        from click.testing import CliRunner

        from var_deploy.cli import main

        pages = [CliRunner().invoke(main, ["--help"])]
        pages += [CliRunner().invoke(main, [name, "--help"]) for name in main.commands]
        for page in pages:
            check(page.exit_code == 0 and "--help" in page.output, f"--help: {page.output}")
        self.keep("text-help.txt", "\n".join(page.output for page in pages))
        check("Usage:" in self.program(sys.executable, "-m", "var_deploy", "--help"), "-m")

    def generate(self) -> None:
        for precision in PRECISIONS:
            out = self.out / f"{precision}-grid.png"
            words = ("generate", self.bundle, *SETTINGS, *GIVEN, "--precision", precision)
            self.command(*words, "--out", out)
        out = self.out / "fp32-per-scale.png"
        words = ("generate", self.bundle, "--labels", "star", "--layout", "per-scale", *GIVEN)
        self.command(*words, "--precision", "fp32", "--out", out)

    def pictures(self) -> None:
        """edit, encode and reconstruct, from a picture that numbers alone decide."""
        y, x = np.mgrid[:64, :64]
        values = np.stack([4 * x, 4 * y, 2 * (x + y)], -1).astype(np.uint8)
        photo = self.folder / "photo.png"
        Image.fromarray(values).save(photo)
        fp32 = ("--precision", "fp32", *GIVEN)
        edited = self.out / "fp32-edited.png"
        words = ("edit", self.bundle, photo, "--box", "16,16,48,48", "--seed", 3)
        self.command(*words, *fp32, "--out", edited)
        tokens = self.out / "fp32-tokens.npz"
        self.command("encode", self.bundle, photo, "--out", tokens, *fp32)
        strip = self.out / "fp32-strip.png"
        self.command("reconstruct", self.bundle, tokens, "--out", strip, *fp32)

    def sample(self) -> None:
        sets: dict[str, list[bytes]] = {}
        for form in ("tar", *(["parquet"] if importlib.util.find_spec("pyarrow") else [])):
            folder = self.folder / form
            words = ("sample", self.bundle, "--per-class", 1, "--shard-size", 5, "--format", form)
            self.command(*words, "--precision", "fp32", "--out", folder, *GIVEN)
            self.command(*words, "--out", folder, "--check", "--quiet")
            shards = sorted(folder.glob(f"*.{form}"))
            check(len(shards) == 2, f"two shards of {form}: {shards}")
            sets[form] = [png for shard in shards for png in _pictures(shard)]
            check(len(sets[form]) == 10, f"ten pictures in {form}")
        check(len(set(map(tuple, sets.values()))) == 1, "both formats hold the same pictures")
        for number, png in enumerate(sets["tar"][:4]):
            self.keep(f"fp32-sample-{number}.png", png)
        self.keep("fp32-shard.tar", (self.folder / "tar" / "000000.tar").read_bytes())

    def reports(self) -> None:
        """What only reads or looks: inspect, plan, doctor, triton."""
        self.keep("text-inspect.txt", self.command("inspect", self.bundle))
        planned = self.command("plan", self.bundle, "--device", "orin-nano-8gb", "--json")
        self.keep("text-plan.json", planned)
        self.command("plan", self.bundle, "--device", "this")
        self.command("triton", self.bundle, "--out", self.folder / "models")
        names = sorted(p.name for p in (self.folder / "models").rglob("*"))
        self.keep("text-triton.txt", "\n".join(names))

    def doctor(self, folder: Path | None = None) -> None:
        report = self.command("doctor", "--json", folder=folder)
        version = importlib.metadata.version("onnxruntime")
        check(version in report, f"doctor does not see onnxruntime {version}: {report}")

    def bench(self, folder: Path | None = None) -> None:
        words = ("bench", self.bundle, "--repeat", 1, "--warm-up", 0, "--threads", 1)
        told = json.loads(self.command(*words, "--quiet", "--json", "-", folder=folder))
        for run in told["runs"]:
            problems = [each["problem"] for each in run["contenders"]] + [run["rates_problem"]]
            check(not any(problems), f"bench: {problems}")

    def shadows(self) -> None:
        """In a folder of files called like modules the program and its children work."""
        self.doctor(self.checkout)
        self.bench(self.checkout)
        out = self.folder / "there.png"
        words = ("generate", self.bundle, *SETTINGS, *GIVEN, "--precision", "fp32", "--out", out)
        self.command(*words, folder=self.checkout)
        same = out.read_bytes() == (self.out / "fp32-grid.png").read_bytes()
        check(same, "the same picture, wherever it is made")

    def half_a_package(self) -> None:
        """`python -m` in a real checkout finds `var_deploy/` alone: one line says so."""
        bare = self.folder / "checkout"
        (bare / "var_deploy").mkdir(parents=True)
        import var_deploy

        for path in Path(var_deploy.__file__).parent.rglob("*.py"):
            inside = path.relative_to(Path(var_deploy.__file__).parent)
            if inside.parts[0] not in ("export", "runtime"):
                copy = bare / "var_deploy" / inside
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
        words = (sys.executable, "-m", "var_deploy", "generate", self.bundle, "--labels", 0)
        said = self.program(*words, "--out", self.folder / "no.png", folder=bare, code=1)
        check(said.count("\n") == 1 and "hides the installed package" in said, said)
        self.command("generate", self.bundle, *SETTINGS, *GIVEN, "--out", "x.png", folder=bare)

    def serve(self) -> None:
        with self.served() as address:
            body = json.dumps({"labels": ["star", 3], "seed": 7}).encode()
            request = urllib.request.Request(
                f"{address}/v1/images", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
                answer = json.load(reply)
            check(len(answer["images"]) == 2, f"two images: {str(answer)[:300]}")
            for path in ("/health", "/metrics", "/v1/model", "/openapi.json", "/"):
                with urllib.request.urlopen(address + path, timeout=PATIENCE) as reply:
                    check(reply.status == 200, f"{path}: {reply.status}")
        self.keep("fp32-served.json", json.dumps(_without_times(answer), sort_keys=True))

    @contextlib.contextmanager
    def served(self) -> Iterator[str]:
        words = ("serve", self.bundle, "--port", 0, "--threads", 1, "--precision", "fp32")
        errors = self.folder / "serve.txt"
        with (
            errors.open("wb") as stderr,
            subprocess.Popen(
                [str(PROGRAM), *map(str, words)],
                cwd=self.checkout,
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            ) as process,
        ):
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                found = re.search(r"http://[\d.]+:\d+", line)
                check(found is not None, f"serve: {line}{errors.read_text()[-1500:]}")
                assert found is not None
                yield found[0]
                process.send_signal(signal.SIGTERM)
                check(process.wait(PATIENCE) == 0, "serve ends with 0")
            finally:
                process.kill()
        said = errors.read_text()
        check("Warning" not in said and "Traceback" not in said, f"serve: {said[-1500:]}")

    def api(self) -> None:
        from var_deploy import CancelledError, Pipeline

        for precision in PRECISIONS:
            with Pipeline.load(self.bundle, precision=precision, threads=1) as pipe:
                check(pipe.describe().precision == precision, str(pipe.describe()))
                events: list[Any] = []
                images = pipe.generate(["star", 3], seed=7, on_scale=events.append)
                scales = pipe.manifest.model.scales
                check(images.shape[0] == 2 and images.dtype == np.uint8, "two images")
                check(isinstance(images, np.ndarray), "an array")
                check(images.scales_done.tolist() == [scales, scales], "scales_done")
                check(images[:1].scales_done.size == 0, "views have none")
                check([event.scale for event in events[:scales]] == list(range(scales)), "on_scale")
                tokens = pipe.encode(np.asarray(images))
                again = pipe.decode(tokens)
                check(again.shape == images.shape, "decode")
                mask = np.zeros(images.shape[1:3], np.bool_)
                mask[16:48, 16:48] = True
                edited = pipe.edit(np.asarray(images[0]), mask, "heart", seed=[1, 2])
                varied = pipe.vary(np.asarray(images[0]), scales - 1, 3, seed=4)
                short = pipe.generate(["star"], seed=7, deadline=1e-3)
                check(1 <= int(short.scales_done[0]) <= scales, "deadline")

                def stop(event: Any, pipe: Pipeline = pipe) -> None:
                    threading.Thread(target=pipe.cancel).run()

                with contextlib.suppress(CancelledError):
                    pipe.generate(["star"], on_scale=stop)
                    raise FailureError("cancel ends a generation")
            made = {"images": images, "decoded": again, "edited": edited, "varied": varied}
            for name, array in made.items():
                buffer = io.BytesIO()
                Image.fromarray(np.concatenate(list(np.asarray(array)))).save(buffer, "png")
                self.keep(f"{precision}-api-{name}.png", buffer.getvalue())


def _pictures(shard: Path) -> list[bytes]:
    """The PNGs of a shard, in order."""
    if shard.suffix == ".tar":
        with tarfile.open(shard) as archive:
            members = [m for m in archive.getmembers() if m.name.endswith(".png")]
            return [archive.extractfile(m).read() for m in members]  # type: ignore[union-attr]
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(shard).to_pylist()
    return [row["image"]["bytes"] for row in rows]


def _without_times(answer: Any) -> Any:
    """A JSON answer without what the clock decides."""
    if isinstance(answer, dict):
        kept = {k: v for k, v in answer.items() if not re.search("seconds|ms|time", k)}
        return {key: _without_times(value) for key, value in kept.items()}
    return [_without_times(item) for item in answer] if isinstance(answer, list) else answer


def main() -> int:
    half = Half(*(Path(argument).resolve() for argument in sys.argv[1:4]))
    steps = [
        half.environment,
        half.help,
        half.generate,
        half.pictures,
        half.sample,
        half.reports,
        half.doctor,
        half.bench,
        half.shadows,
        half.half_a_package,
        half.api,
    ]
    if importlib.util.find_spec("fastapi"):
        steps.append(half.serve)
    began = time.perf_counter()
    for step in steps:
        try:
            step()
        except FailureError as failure:
            print(f"{step.__name__}: {failure}")
            return 1
    versions = {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    about = {"versions": versions, "seconds": time.perf_counter() - began, "steps": len(steps)}
    half.keep("about.json", json.dumps(about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
