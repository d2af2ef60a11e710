"""Puts together the parts of a `Pipeline`: checked files, opened graphs, the scale loop."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from var_deploy import names
from var_deploy.bundle.files import BundleFiles
from var_deploy.bundle.hash_record import HashRecord
from var_deploy.config import Layout, Loaded
from var_deploy.errors import BackendError, BundleChangedError, BundleError
from var_deploy.manifest import Manifest
from var_deploy.runtime.backends.choice import Choice, choose_backend
from var_deploy.runtime.held_loop import OpenLoop, loop_opener
from var_deploy.runtime.loop import ScaleLoop
from var_deploy.runtime.tokenizer import TokenizerGraphs
from var_deploy.runtime.weights_check import check_weights


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a pipeline but for the text encoder.

    Attributes:
        manifest: with the batch of the precision that is run.
        loop: the scale loop, or a function that opens it each time that it is needed.
    """

    manifest: Manifest
    loop: ScaleLoop | OpenLoop
    loaded: Loaded
    tokenizer: TokenizerGraphs
    files: BundleFiles


def assemble(
    bundle: Path,
    manifest: Manifest,
    choice: Choice,
    *,
    check_first: bool = False,
    take_turns: bool = False,
) -> Parts:
    """Check the files of a bundle and open its graphs with the backend that was chosen.

    Args:
        check_first: hash all files before the first graph is opened instead of meanwhile, which
            takes longer and holds while other programs make hard links to the files.
        take_turns: scales and text encoder are never in memory together: the scales are opened at
            the first generation, and closed while the text encoder has its turn.

    The backend is closed where this fails, and with the loop otherwise. Errors are those of
    `Pipeline.load`; BundleChangedError where the bundle is no longer the one of the manifest.
    """
    backend, config = choice.backend, choice.config
    precision, hashes = config.precision, config.check != "sizes"
    launched = manifest.of(precision)
    record = HashRecord() if config.check == "changed" else None
    files = BundleFiles(bundle, manifest, precision, hashes=hashes, record=record)
    started = time.perf_counter()
    try:
        try:
            if choice.reads_graphs:
                files.begin_check(check_weights, beside=not check_first)
        except BaseException:
            backend.close()
            raise
        checked = time.perf_counter()
        loop: ScaleLoop | OpenLoop
        if take_turns:
            described = backend.describe()
            backend.close()
            files.verified()
            loop = loop_opener(bundle, files, launched, config)
        else:
            layout = cast(Layout, config.layout)
            loop = ScaleLoop(files, launched, backend, precision, layout)
            described = backend.describe()
        opened = time.perf_counter()
    except BaseException as error:
        first = _first_failure(files) if isinstance(error, Exception) else None
        changed = isinstance(error, (BundleError, BackendError)) and files.replaced()
        files.close()
        if changed:
            raise BundleChangedError(
                f"the bundle at {bundle} changed while it was read; load it again once it is "
                "complete"
            ) from None
        if first is not None:
            raise first from None
        raise
    graphs = manifest.graphs[precision] if take_turns else (names.ENCODER, names.ACCUMULATE)
    files.loaded(tuple(graphs))
    settings = {name: told for name, told in described.items() if name != "backend"}
    loaded = Loaded(
        precision=precision,
        backend=backend.name,
        layout=config.layout,
        settings=settings,
        reason=choice.reason,
        threads=config.threads,
        loading={"checking": checked - started, "opening": opened - checked},
    )
    tokenizer = TokenizerGraphs(
        files, launched, precision, lambda: choose_backend(bundle, manifest, config).backend
    )
    return Parts(
        manifest=launched, loop=loop, loaded=loaded, tokenizer=tokenizer, files=files
    )


def _first_failure(files: BundleFiles) -> BundleError | None:
    """The error of a file that was still being hashed when opening the graphs failed: it explains
    the other one."""
    try:
        files.verified()
    except BundleError as error:
        return error
    return None
