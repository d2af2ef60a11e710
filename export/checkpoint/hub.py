"""Fetches released checkpoints from the Hugging Face Hub."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from var_deploy.errors import CheckpointError
from var_deploy.host.installation import pip_install


def fetch(
    repo: str,
    filename: str,
    progress: Callable[[str], None] | None = None,
    *,
    option: str = "--checkpoint or --tokenizer",
) -> Path:
    """Return the local path of a file of a Hub repository; it is downloaded unless it is cached.

    `huggingface_hub` shows the transfer on a terminal. `option` is the command-line option that a
    failure's message names as the way to give the file by hand. Raises CheckpointError where the
    file cannot be fetched.
    """
    by_hand = f"download {filename} from https://huggingface.co/{repo} and give it with {option}"
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"fetching {filename} needs huggingface_hub: run "
            f"{pip_install('export', 'huggingface_hub')}, or {by_hand}"
        ) from None
    # a released file never changes: asking the Hub first would make a cached one wait offline
    cached = huggingface_hub.try_to_load_from_cache(repo, filename)
    if isinstance(cached, str):
        return Path(cached)
    if progress:
        progress(f"fetching {filename} from {repo}")
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # its log of retries would be a dozen lines
        return Path(huggingface_hub.hf_hub_download(repo, filename))
    except Exception as error:  # the HTTP library below has changed, and its errors with it
        raise CheckpointError(
            f"{filename} could not be fetched from {repo} ({_root(error)}); {by_hand}"
        ) from None
    finally:
        logger.setLevel(level)


def _root(error: BaseException) -> str:
    """Return the first cause of an error in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = (str(error).strip().splitlines() or [""])[0][:120].rstrip(".: ")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
