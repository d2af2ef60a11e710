"""Checks the `Host` headers of requests, against DNS rebinding.

A web page of a stranger can let its own name point to an address inside of the reader's network
(DNS rebinding), and the browser then takes the service for a part of that page. Such a request
carries the stranger's name in its `Host` header. A name is therefore answered only where the
operator has named it; an IP address always is, since no name can be made to point elsewhere there.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence

from var_deploy.errors import UsageError

LONGEST_NAME = 253  # characters, RFC 1035
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*", re.A)


class HostError(UsageError):
    """The `Host` header is missing, doubled or not a host."""


def is_address(host: str) -> bool:
    """Whether `host` is an IP address, an IPv6 one without its brackets."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def validate_host(pattern: str) -> None:
    """Raise UsageError where `pattern` is not a host name, IP address, "*.NAME" or "*"."""
    name = pattern.lower().rstrip(".").removeprefix("*.")
    known = pattern == "*" or is_address(pattern) or _NAME.fullmatch(name)
    if not known or len(name) > LONGEST_NAME:
        raise UsageError(
            f"a host is a name without scheme and port, as in images.example.org, or *.NAME, or *, "
            f"found {pattern!r}"
        )


def own_names(host: str) -> tuple[str, ...]:
    """Return the host names that a service listening on `host` answers without being configured.

    They are `host` itself, and where it lets other machines in, the name of this machine.
    """
    if not is_address(host):
        return (host,) if host else ()
    if ipaddress.ip_address(host).is_loopback:
        return ()
    name = socket.gethostname().lower()
    return (name, f"{name}.local") if _NAME.fullmatch(name) else ()


class Hosts:
    """The hosts that the service answers: IP addresses, localhost, and `patterns`."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = {pattern.lower().rstrip(".") for pattern in ("localhost", *patterns)}

    def allow(self, host: str) -> bool:
        """Whether the service answers a host, which is as `host_of` returns it."""
        if "*" in self._patterns or host in self._patterns or is_address(host):
            return True
        parents = (host[n:] for n, character in enumerate(host) if character == ".")
        return any(f"*{parent}" in self._patterns for parent in parents)


def host_of(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """Return the host of a request from its headers, without the port.

    It is a name in lower case or an IP address. Raises HostError.
    """
    found = [value for name, value in headers if name == b"host"]
    if len(found) != 1:
        raise HostError(f"a request needs one Host header, found {len(found)}")
    text = found[0].decode("latin-1").strip().lower()
    bracket = re.fullmatch(r"\[([^\]]*)\](:[0-9]{0,5})?", text, re.A)
    name = bracket[1] if bracket else re.sub(r":[0-9]{0,5}$", "", text, flags=re.A).rstrip(".")
    if len(name) <= LONGEST_NAME and (is_address(name) or (not bracket and _NAME.fullmatch(name))):
        return name
    raise HostError("the Host header is no host name and no IP address")
