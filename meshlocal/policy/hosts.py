"""Under which names a server is asked for its pages, so that no page of the web reads them in an operator's browser.

A page can make a name of its own lead to any address (DNS rebinding), a loopback address too, and is then of the same
origin as what is served there. The browser still sends that name in Host, and in Origin.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit


def host_of(authority: str) -> str | None:
    """The host in lower case of what stands in Host or behind a scheme; None if that makes no sense."""
    try:
        return urlsplit(f"//{authority}").hostname
    except ValueError:
        return None


def is_own_host(host: str | None, local: str, names: Collection[str]) -> bool:
    """Whether a server may be meant by a host.

    Args:
        host: in lower case, as `host_of` gives it.
        local: the address that the connection was made to.
        names: hosts that the configuration names beside, in lower case.
    """
    if not host:
        return False
    if host in names or host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
        return address.is_loopback or address == ipaddress.ip_address(local.partition("%")[0])
    except ValueError:
        return False


def is_own_origin(origin: str, host: str | None, origins: Collection[str]) -> bool:
    """Whether a page of an origin may read what a server says: one of the very host, or one that the configuration
    names.

    Args:
        origin: as the browser sent it.
        host: the request's, which the server goes by.
        origins: that the configuration names.
    """
    if origin in origins:
        return True
    try:
        return urlsplit(origin).hostname == host is not None
    except ValueError:
        return False
