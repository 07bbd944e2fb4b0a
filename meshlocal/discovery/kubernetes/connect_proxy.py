"""The HTTP proxy on the way to an API server: one that a kubeconfig or the environment names.

The environment's are `HTTPS_PROXY` and `NO_PROXY` (`HTTP_PROXY` for an API server without TLS), in capitals or small
letters, read as kubectl reads them: see `ProxyFromEnvironment` of Go's golang.org/x/net/http/httpproxy. Unlike
there, only proxies that are spoken to in plain HTTP can be used.
"""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from contextlib import suppress
from urllib.parse import unquote, urlsplit

from meshlocal.net.http_client import ConnectProxy


def parse_proxy(text: str) -> ConnectProxy:
    """Read a proxy's URL.

    Raises:
        ValueError: it cannot be used; the text says why.
    """
    try:
        url = urlsplit(text)
        port = url.port or 80
    except ValueError:
        raise ValueError("is no URL") from None
    if url.scheme != "http" or not url.hostname:
        raise ValueError("only http:// proxies are supported")
    authorization = ""
    if url.username is not None:
        pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
        authorization = "Basic " + base64.b64encode(pair.encode()).decode()
    return ConnectProxy(url.hostname, port, authorization)


def proxy_of_environment(scheme: str, host: str, port: int, environment: Mapping[str, str]) -> ConnectProxy | None:
    """The proxy that the environment names for an API server; None: none.

    Args:
        scheme: `https` or `http`.
        host: of the API server.
        port: of the API server.
        environment: as `os.environ`.

    Raises:
        ValueError: it cannot be used; the text names the variable.
    """
    for name in (f"{scheme.upper()}_PROXY", f"{scheme}_proxy"):
        text = environment.get(name, "")
        if text:
            break
    else:
        return None
    excepted = environment.get("NO_PROXY", "") or environment.get("no_proxy", "")
    if _is_excepted(host.lower(), port, excepted):
        return None
    try:
        # A name without a scheme is an http proxy's.
        return parse_proxy(text if "://" in text else f"http://{text}")
    except ValueError as error:
        # Not the value: it may hold a password.
        raise ValueError(f"environment {name}: {error}") from None


def _is_excepted(host: str, port: int, excepted: str) -> bool:
    """Whether a list of exceptions has the host: `*`, a name (with those below it), an address, or a network."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    return any(_covers(each.strip().lower(), host, address, port) for each in excepted.split(","))


def _covers(entry: str, host: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address | None, port: int) -> bool:
    if entry == "*":
        return True
    if address is not None:
        with suppress(ValueError):
            return address in ipaddress.ip_network(entry, strict=False)
    name, separator, number = entry.rpartition(":")
    if separator and number.isdecimal():
        if int(number) != port:
            return False
        entry = name.strip("[]")
        if address is not None:
            return entry == host
    suffix = "." + entry.lstrip("*").lstrip(".")
    return len(suffix) > 1 and (host.endswith(suffix) or (host == suffix[1:] and not entry.startswith((".", "*"))))
