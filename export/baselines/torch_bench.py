"""The three PyTorch baselines on the CPU that `bench` compares with a bundle.

    python -m var_deploy.export.baselines.torch_bench BUNDLE --baseline torch --batch N --threads N

`torch` is the published path in fp32, `torch-bf16` the same under autocast. `torch-compile` is
inductor over our own modules, which compute the modulation once per image: projecting it at every
scale reads 0.4 GB of weights a scale in a d16, which no compiler takes away, so this is the faster
of the two to compile. All have the bundle's sizes and settings and random weights. For a
text-to-image bundle see `text_path`.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from var_deploy import names
from var_deploy.bench.conditions import SEED, bench_prompts
from var_deploy.bench.worker import About, Sample, serve, worker_parser
from var_deploy.errors import BackendError, UsageError, one_line
from var_deploy.export.baselines.published_path import Mark, generate_as_published
from var_deploy.export.baselines.text_path import (
    TextPeer,
    generate_text_as_published,
    random_text_modules,
)
from var_deploy.export.baselines.torch_peers import Compiler, Peer, random_modules
from var_deploy.export.families import export_family_of
from var_deploy.export.models.transformer import Transformer
from var_deploy.host.machine import Machine, check_threads, usable_cores
from var_deploy.labels import spread_labels
from var_deploy.manifest import Manifest, read_manifest
from var_deploy.runtime.measure import WallClock, launch_names
from var_deploy.sampling import BitSampling, call_keys, stack_uniforms
from var_deploy.spec import TextModelSpec

BASELINES = ("torch", "torch-bf16", "torch-compile")
LONGEST = 300  # characters kept of a compiler's message, which may have pages

# uniforms [B, `NextScaleSpec.draws`] → images [B, channels, height, width] in [0, 1]
Generate = Callable[[Tensor, Mark], Tensor]


class TorchBaseline:
    """A PyTorch baseline that generates all images at once, since PyTorch needs no fixed batch.

    Args:
        name: one of BASELINES.
        images: of one generation.
        threads: 0 takes every core that the process may use.
        compiler: the backend of torch.compile for `torch-compile`.

    Attributes:
        images: of the last generation, [N, side, side, channels] uint8.

    Raises BundleError where the folder is not a bundle, BackendError where PyTorch finds no C++
    compiler that it needs, UsageError for an unknown name or fewer than 0 threads.
    """

    def __init__(
        self,
        bundle: Path,
        name: str,
        images: int,
        *,
        threads: int = 0,
        compiler: Compiler = "inductor",
    ) -> None:
        if name not in BASELINES:
            raise UsageError(f"baseline must be one of {', '.join(BASELINES)}, found {name!r}")
        if threads < 0:
            raise UsageError(f"threads must be 0 (every core) or more, found {threads}")
        threads = check_threads(threads or None, machine=Machine()) or usable_cores() or 0
        self._manifest = manifest = read_manifest(bundle)
        model = manifest.model
        self._name, self._clock = name, WallClock(lambda: None)
        if threads:
            torch.set_num_threads(threads)
        self._launches = launch_names(manifest)
        if name == "torch-compile" and compiler == "inductor":
            _check_compiler()
        if isinstance(model, TextModelSpec):
            # rows with and without a prompt are computed together
            self._launches = [n for n in self._launches if n != names.UNCONDITIONAL]
            compiled = compiler if name == "torch-compile" else None
            path, self._path = _text(manifest, model, images, compiled)
        elif name == "torch-compile":
            path = "our modules, AdaLN once an image, compiled by inductor"
            self._path = _own(manifest, images, compiler)
        elif not export_family_of(model.transformer).published_loop:
            path = "our modules: this family has no published generation code"
            self._path = _own(manifest, images, None)
        else:
            path = "as published: AdaLN in every block at every scale, concatenated cache"
            self._path = _published(manifest, images)
        self._how = {"path": path, "images a launch": str(images)}
        t = model.tokenizer
        self.images = np.empty((images, *t.image_size, t.image_channels), np.uint8)

    def describe(self) -> About:
        precision = graphs = "fp32"
        if self._name == "torch-bf16":
            graphs = ""  # autocast converts the weights at every use
            precision = "bf16 by autocast, which casts the fp32 weights at every use"
            if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                precision += " (oneDNN has no bf16 for this CPU)"
        settings = {
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
            "precision": precision,
            "weights": "random, of the bundle's sizes",
            **self._how,
        }
        return About(settings=settings, graphs=graphs)

    def generate(self) -> Sample:
        """Generate labels, or features of prompts, to uint8 images. The first call of
        `torch-compile` compiles."""
        self._clock.laps()  # marks of earlier calls are dropped
        started = time.perf_counter()
        draws = stack_uniforms(call_keys(SEED, len(self.images)), self._manifest.model.draws)
        try:
            with self._autocast():
                image = self._path(torch.from_numpy(draws), self._clock.mark)
        except Exception as error:  # a compiler's own types, memory that runs out
            raise BackendError(f"{self._name} failed: {_line(error)}") from error
        pixels = image.float().mul_(255).round_().to(torch.uint8)
        self.images[...] = pixels.permute(0, 2, 3, 1).numpy()
        seconds = time.perf_counter() - started
        laps = self._clock.laps()
        return Sample(
            seconds=seconds,
            launches=dict(zip(self._launches, laps, strict=True)),
        )

    def close(self) -> None:
        """Do nothing: the process ends next."""

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._name == "torch-bf16":
            return torch.autocast("cpu", torch.bfloat16)
        return contextlib.nullcontext()


def _published(manifest: Manifest, images: int) -> Generate:
    tokenizer, transformer = random_modules(manifest.code_model("bench --against torch"))
    assert isinstance(transformer, Transformer)  # the caller has checked the family

    def generate(draws: Tensor, mark: Mark) -> Tensor:
        return generate_as_published(
            tokenizer,
            transformer,
            _labels(manifest, images),
            draws,
            manifest.defaults,
            guidance=manifest.guidance,
            mark=mark,
        ).image

    return generate


def _own(manifest: Manifest, images: int, compiler: Compiler | None) -> Generate:
    peer = Peer(
        manifest.code_model("bench --against torch"),
        batch=images,
        guidance=manifest.guidance,
        sampling=manifest.defaults,
        device=torch.device("cpu"),
        dtype=torch.float32,
        compiler=compiler,
    )

    def generate(draws: Tensor, mark: Mark) -> Tensor:
        return peer(_labels(manifest, images), draws, mark).add(1).mul(0.5)

    return generate


def _labels(manifest: Manifest, images: int) -> Tensor:
    return torch.tensor(spread_labels(manifest.model.transformer.classes, images))


def _text(
    manifest: Manifest, model: TextModelSpec, images: int, compiler: Compiler | None
) -> tuple[str, Generate]:
    """Return what generates text to image, in words and as a function."""
    prompts, sampling = bench_prompts(model, images), manifest.defaults
    assert isinstance(sampling, BitSampling)  # the settings of every text-to-image bundle
    if compiler is not None:
        peer = TextPeer(
            model, prompts, sampling, guidance=manifest.guidance, compiler=compiler
        )
        path = "our modules, keys and values of the text once an image, compiled by inductor"
        return path, lambda draws, mark: peer(draws, mark).add(1).mul(0.5)
    tokenizer, transformer = random_text_modules(model)

    def generate(draws: Tensor, mark: Mark) -> Tensor:
        return generate_text_as_published(
            tokenizer,
            transformer,
            prompts,
            draws,
            sampling,
            guidance=manifest.guidance,
            mark=mark,
        ).image

    path = "as published: keys and values of the text in every block at every scale, "
    return f"{path}concatenated cache", generate


def _check_compiler() -> None:
    """Raise BackendError where none of the C++ compilers that inductor would use is installed."""
    from torch._inductor import config

    named = config.cpp.cxx
    compilers = [named] if isinstance(named, str) else [name for name in named if name]
    if not any(map(shutil.which, compilers)):
        raise BackendError(
            f"torch.compile needs a C++ compiler and finds none ({', '.join(compilers)}); install "
            "one, or leave torch-compile out of --against"
        )


def _line(error: Exception) -> str:
    """Return PyTorch's message on one line."""
    said = one_line(error)
    return said if len(said) <= LONGEST else f"{said[:LONGEST]}…"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = worker_parser(
        "var_deploy.export.baselines.torch_bench", threads="every core that the process may use"
    )
    parser.add_argument("--baseline", choices=BASELINES, default="torch")
    options: Any = parser.parse_args(arguments)

    def load() -> TorchBaseline:
        return TorchBaseline(
            options.bundle, options.baseline, options.batch, threads=options.threads
        )

    return serve(load)


if __name__ == "__main__":
    sys.exit(main())
