"""Fetches released checkpoints from the Hugging Face Hub."""

from __future__ import annotations

import logging
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from var_deploy.errors import CheckpointError
from var_deploy.host.installation import pip_install

PATIENCE = 3.0  # seconds until a Hub that does not answer counts as out of reach


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
    constants = huggingface_hub.constants
    # the library would try again and again, for half a minute
    if not constants.HF_HUB_OFFLINE and (problem := _out_of_reach(constants.ENDPOINT)):
        raise CheckpointError(f"{filename} could not be fetched from {repo} ({problem}); {by_hand}")
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


def _out_of_reach(endpoint: str) -> str:
    """Why the server behind a URL, or the proxy on the way, takes no connection; "" where it does.

    Takes no longer than PATIENCE, whatever the resolver of names does.
    """
    url = urllib.parse.urlsplit(endpoint)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    said = [f"{host} does not answer within {PATIENCE:.0f} s"]

    def connect() -> None:
        try:
            with socket.create_connection((host, port), timeout=PATIENCE):
                said[0] = ""
        except OSError as error:
            said[0] = f"{host} cannot be reached: {error.strerror or error}"

    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(PATIENCE)
    return said[0]


def _root(error: BaseException) -> str:
    """Return the first cause of an error in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = (str(error).strip().splitlines() or [""])[0][:120].rstrip(".: ")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
