"""The PyTorch baselines on a GPU, against which engines are measured.

    python -m var_deploy.export.baselines.torch_peers BUNDLE
    python -m var_deploy.export.baselines.torch_peers --rates

The first times our own modules with the bundle's sizes and random weights, eager and compiled, in
fp16 throughout. The second measures the GPU: bandwidth and rates. Both print lines of JSON: what
they ran on, or {"problem": …} where PyTorch finds no GPU; then each result as soon as it is known,
since compiling a large model takes minutes.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import click
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from var_deploy.errors import BackendError, VarDeployError, one_line
from var_deploy.export.baselines.published_path import Mark, generate_as_published
from var_deploy.export.checkpoint.assemble import load_into
from var_deploy.export.checkpoint.random_weights import RandomWeights
from var_deploy.export.families import export_family_of
from var_deploy.export.models.sampler import filter_logits, guide
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.models.transformer import (
    Cache,
    Modulation,
    NextScaleTransformer,
    Transformer,
)
from var_deploy.labels import spread_labels
from var_deploy.manifest import read_manifest
from var_deploy.sampling import Sampling
from var_deploy.spec import ModelSpec

BUDGET = 10.0  # seconds a case
FEWEST, MOST, WARM_UPS = 5, 100, 3
COPY_BYTES = 1 << 28
MATRIX_SIDES = (4096, 8192)  # the second one only where the first is too short to time
SHORT = 0.005
MEASURED = 20
RECOMPILE_LIMIT = 64  # a compiled function has one version a scale; PyTorch allows eight

Compiler = str | Callable[..., Any]
PUBLISHED = "published"  # in the place of a compiler: the authors' way of generating
MODES: tuple[tuple[str, Compiler | None], ...] = (
    ("published, autocast", PUBLISHED),
    ("eager", None),
    ("torch.compile", "inductor"),
)
Function = TypeVar("Function", bound=Callable[..., Any])
Timer = Callable[[Callable[[], object], int, float], list[float]]


class without_initialisation(TorchFunctionMode):  # noqa: N801 (used like a function)
    """Leaves parameters uninitialised while modules are built whose weights are replaced next."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def random_modules(spec: ModelSpec) -> tuple[Tokenizer, NextScaleTransformer]:
    """Build the modules of a generation (no encoder) with random fp32 weights on the CPU.

    The meta device is not used: computing on it loads PyTorch's compiler, which costs 50 MB and a
    second even where nothing is compiled.
    """
    with without_initialisation():
        tokenizer = Tokenizer(spec.tokenizer).eval()
        transformer = export_family_of(spec.transformer).transformer(spec).eval()
    del tokenizer.encoder, tokenizer.quant_conv
    for module in (tokenizer, transformer):
        fill_randomly(module)
    return tokenizer, transformer


def fill_randomly(module: nn.Module, spreads: Mapping[str, float] | None = None) -> None:
    """Give a module the parameters of `RandomWeights` with seed 0."""
    shapes = {key: tuple(p.shape) for key, p in module.named_parameters()}
    load_into(module, RandomWeights(shapes, 0, spreads))


def compiled(function: Function, compiler: Compiler) -> Function:
    """Compile a function for static shapes, of which it may meet as many as there are scales."""
    from torch import _dynamo  # not at the top: see random_modules

    _dynamo.config.recompile_limit = RECOMPILE_LIMIT
    return cast(Function, torch.compile(function, dynamic=False, backend=compiler))


class Peer:
    """A generation in PyTorch: B labels and uniforms [B, T] → images [B, 3, S, S] in [-1, 1].

    Nothing waits for the GPU in between. Everything is of one type, also what the graphs keep in
    fp32: this is about time, and the fastest that a user would run. It drives the modules of
    `reference`, in a loop of its own: each scale is one function that can be compiled and records
    nothing, where the reference records everything and draws in fp64.

    Args:
        compiler: a backend of torch.compile, such as "inductor"; None leaves the modules as they
            are.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        batch: int,
        guidance: bool,
        sampling: Sampling,
        device: torch.device,
        dtype: torch.dtype,
        compiler: Compiler | None = None,
    ) -> None:
        self.spec, self.batch, self.guidance = spec, batch, guidance
        self._sampling = [sampling.at(k, spec.scales) for k in range(spec.scales)]
        self.device, self.dtype = device, dtype
        tokenizer, transformer = random_modules(spec)
        self.tokenizer, self.transformer = (
            tokenizer.to(device, dtype),
            transformer.to(device, dtype),
        )
        self._scale, self._decode = self._eager_scale, tokenizer.decode
        if compiler is not None:
            self._scale = compiled(self._scale, compiler)
            self._decode = compiled(self._decode, compiler)

    @torch.inference_mode()
    def __call__(self, labels_B: Tensor, uniforms_BT: Tensor, mark: Mark = lambda: None) -> Tensor:
        """Generate; `mark` is called at the start and after every launch of a bundle's
        generation."""
        spec, t = self.spec, self.spec.transformer
        mark()
        rows = labels_B
        if self.guidance:
            rows = torch.cat((labels_B, torch.full_like(labels_B, t.classes)))
        mod = self.transformer.modulation(rows)
        cache, side = Cache(t.depth), spec.tokenizer.latent_side
        f_hat = torch.zeros(
            *(self.batch, spec.tokenizer.code_width, side, side),
            device=self.device,
            dtype=self.dtype,
        )
        following: Tensor | None = None
        if t.conditional:
            mark()
        for k, draws in enumerate(uniforms_BT.split(list(spec.scale_lengths), dim=1)):
            f_hat, following = self._scale(k, following, mod, cache, f_hat, draws)
            mark()
        image: Tensor = self._decode(f_hat)
        mark()
        return image

    def _eager_scale(
        self,
        scale: int,
        following: Tensor | None,
        mod: Modulation,
        cache: Cache,
        f_hat: Tensor,
        draws_BL: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        spec, sampling, quantize = self.spec, self._sampling[scale], self.tokenizer.quantize
        logits = self.transformer.step(scale, following, mod, cache).float()
        logits = guide(logits, sampling.guidance, self.batch)
        kept = filter_logits(logits / sampling.temperature, sampling.top_k, sampling.top_p)
        cdf = kept.softmax(dim=-1).cumsum(dim=-1)
        tokens = (cdf > draws_BL.unsqueeze(-1) * cdf[..., -1:]).int().argmax(dim=-1)
        f_hat = f_hat + quantize.contribution(scale, quantize.lookup(scale, tokens))
        if scale + 1 == spec.scales:
            return f_hat, None
        family = export_family_of(spec.transformer)
        return f_hat, family.next_input(self.transformer, self.tokenizer, scale, tokens, f_hat)


class PublishedPeer:
    """A generation as the VAR authors' demo runs it: fp32 weights, under autocast to `dtype`."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        batch: int,
        guidance: bool,
        sampling: Sampling,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.spec, self.batch, self.device = spec, batch, device
        self._sampling, self._guidance, self._dtype = sampling, guidance, dtype
        tokenizer, transformer = random_modules(spec)
        if not isinstance(transformer, Transformer):
            raise BackendError("the published path is that of the VAR family alone")
        self._tokenizer, self._transformer = tokenizer.to(device), transformer.to(device)

    def __call__(self, labels_B: Tensor, uniforms_BT: Tensor) -> Tensor:
        """B labels and uniforms [B, T] → images [B, channels, S, S] in [0, 1]."""
        with torch.autocast(self.device.type, self._dtype):
            return generate_as_published(
                *(self._tokenizer, self._transformer, labels_B, uniforms_BT, self._sampling),
                guidance=self._guidance,
            ).image


def time_peers(
    spec: ModelSpec,
    *,
    guidance: bool,
    sampling: Sampling,
    batches: Sequence[int],
    device: torch.device,
    dtype: torch.dtype = torch.float16,
    modes: Sequence[tuple[str, Compiler | None]] = MODES,
    budget: float = BUDGET,
) -> Iterator[dict[str, Any]]:
    """Return a row per mode and batch: median, p10, p95 in milliseconds and peak memory, or the
    problem that kept it from running.

    `modes` are (name, compiler or PUBLISHED).
    """
    from torch import _dynamo

    for name, compiler in modes:
        for batch in batches:
            row: dict[str, Any] = {"mode": name, "batch": batch}
            peer: Peer | PublishedPeer | None = None
            how: dict[str, Any] = {"batch": batch, "guidance": guidance, "sampling": sampling}
            try:
                if compiler == PUBLISHED:
                    peer = PublishedPeer(spec, **how, device=device, dtype=dtype)
                else:
                    peer = Peer(spec, **how, device=device, dtype=dtype, compiler=compiler)
                row |= _time_peer(peer, budget)
            except Exception as error:  # other cases may still run
                row["problem"] = one_line(error)[:300]
            finally:
                del peer  # free its memory for the next case
                _dynamo.reset()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            yield row


def _time_peer(peer: Peer | PublishedPeer, budget: float) -> dict[str, Any]:
    device = peer.device
    spread = spread_labels(peer.spec.transformer.classes, peer.batch)
    labels = torch.tensor(spread, device=device)
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(peer.batch, peer.spec.total_tokens, generator=generator).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    peer(labels, draws)
    first = time.perf_counter() - started  # with a compiler: mostly its work
    seconds = timer_of(device)(lambda: peer(labels, draws), MOST, budget)
    tenths = statistics.quantiles(seconds, n=20, method="inclusive")
    found = {
        "median_ms": round(statistics.median(seconds) * 1e3, 4),
        "p10_ms": round(tenths[1] * 1e3, 4),
        "p95_ms": round(tenths[18] * 1e3, 4),
        "count": len(seconds),
        "first_seconds": round(first, 2),
    }
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def timer_of(device: torch.device) -> Timer:
    """Return the seconds of each of several runs: by CUDA events on a GPU, else by the clock."""
    return _time_on_gpu if device.type == "cuda" else _time_on_cpu


def _time_on_gpu(run: Callable[[], object], most: int, budget: float) -> list[float]:
    for _ in range(WARM_UPS):
        run()
    seconds: list[float] = []
    started = time.perf_counter()
    while len(seconds) < most and (
        len(seconds) < FEWEST or time.perf_counter() - started < budget
    ):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        after.synchronize()
        seconds.append(before.elapsed_time(after) / 1e3)
    return seconds


def _time_on_cpu(run: Callable[[], object], most: int, budget: float) -> list[float]:
    seconds: list[float] = []
    started = time.perf_counter()
    while len(seconds) < most and (
        len(seconds) < FEWEST or time.perf_counter() - started < budget
    ):
        before = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - before)
    return seconds


def measure_rates(
    device: torch.device, *, copy_bytes: int = COPY_BYTES, sides: Sequence[int] = MATRIX_SIDES
) -> dict[str, float]:
    """Measure bytes per second of a large copy (read and written), and operations per second of
    large products in fp16 and in fp32 without TF32; medians."""
    torch.backends.cuda.matmul.allow_tf32 = False
    timer = timer_of(device)
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = statistics.median(timer(lambda: target.copy_(source), MEASURED, BUDGET))
    rates = {"bandwidth": 2 * copy_bytes / seconds}
    for name, dtype in (("half_rate", torch.float16), ("full_rate", torch.float32)):
        rates[name] = 0.0
        for side in sides:
            a = torch.randn(side, side, device=device, dtype=torch.float32).to(dtype)
            seconds = statistics.median(timer(partial(torch.matmul, a, a), MEASURED, BUDGET))
            rates[name] = max(rates[name], 2 * side**3 / seconds)
            if seconds > SHORT:
                break
    return rates


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option("--rates", is_flag=True, help="Measure the GPU instead.")
@click.option("--batches", default="1,8", show_default=True, metavar="LIST")
@click.option("--budget", type=float, default=BUDGET, show_default=True, metavar="SECONDS")
def main(bundle: Path | None, rates: bool, batches: str, budget: float) -> None:
    """Time PyTorch with the sizes of BUNDLE on this machine's GPU; lines of JSON."""
    if (bundle is None) != rates:
        raise click.UsageError("give either a bundle or --rates")
    if not torch.cuda.is_available():
        click.echo(json.dumps({"problem": f"PyTorch {torch.__version__} finds no GPU"}))
        return
    device = torch.device("cuda")
    click.echo(
        json.dumps(
            {
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "device": torch.cuda.get_device_name(),
            }
        )
    )
    if bundle is None:
        click.echo(json.dumps(measure_rates(device)))
        return
    try:
        manifest = read_manifest(bundle)
    except VarDeployError as error:
        raise click.ClickException(str(error)) from None
    rows = time_peers(
        manifest.code_model("this measurement"),
        guidance=manifest.guidance,
        sampling=manifest.defaults,
        batches=[int(batch) for batch in batches.split(",")],
        device=device,
        budget=budget,
    )
    for row in rows:
        click.echo(json.dumps(row))  # flushes


if __name__ == "__main__":
    main()
