"""Addresses and URLs as the configuration writes them.

Each type has a `parse` that raises `AddressError`, and a `str()` that `parse` reads again.
"""

from __future__ import annotations

import ipaddress
import os.path
import re

import msgspec

from meshlocal.policy.model import FIXED, ModelError, ServiceKey, is_fixed, parse_service_key
from meshlocal.policy.problems import quote
from meshlocal.policy.unix_sockets import PATH_LIMIT

_DNS_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_COLLECTOR = re.compile(r"(https?)://([^/?#@]+)(/[!-\"$-~]*)?", re.IGNORECASE)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", re.DOTALL)
_PORT = re.compile(r"[0-9]{1,5}")
_HTTP_SCHEMES = ("http", "https")
TLS_SCHEMES = ("tls", "https")
"""Of listeners that speak TLS."""

_UNIX = "unix:"
_SERVER_SCHEMES = ("grpc", "grpcs", "ws", "wss")


class AddressError(ValueError):
    """A text that is no address, or none of the kind that is wanted. Its text says why."""


class SocketAddress(msgspec.Struct, frozen=True):
    """Where something listens: an IP address or `localhost`, without brackets, and a port (0: any free one)."""

    host: str
    port: int

    def __str__(self) -> str:
        return format_host_port(self.host, self.port)

    @classmethod
    def parse(cls, text: str) -> SocketAddress:
        """Read `HOST:PORT`, an IPv6 address in brackets.

        Raises:
            AddressError: it is written otherwise, or its host is neither an IP address nor `localhost`.
        """
        host, port = parse_host_port(text, "HOST:PORT", text)
        return cls(_bindable(host), port)


class ListenAddress(msgspec.Struct, frozen=True):
    """A listener of the proxy: where it listens, and whose instances its traffic goes to.

    Attributes:
        scheme: `tcp` or `http`; over TLS `tls` or `https`.
        host, port: as a `SocketAddress` has them; empty and 0 if it listens on a Unix socket.
        service: None for an http or https listener that finds the service of each request in the request.
        path: of the Unix socket that it listens on; empty: it listens on an address.
    """

    scheme: str
    host: str
    port: int
    service: ServiceKey | None
    path: str = ""

    def __str__(self) -> str:
        place = f"{_UNIX}{self.path}" if self.path else format_host_port(self.host, self.port)
        where = f"{self.scheme}://{place}"
        return f"{where}={self.service}" if self.service is not None else where

    @property
    def address(self) -> SocketAddress | None:
        """Where it listens; None: on a Unix socket."""
        return SocketAddress(self.host, self.port) if not self.path else None

    @property
    def place(self) -> tuple[str, int, str]:
        """What it has in common with other listeners of the same place."""
        return self.host, self.port, self.path

    @property
    def is_http(self) -> bool:
        """Whether requests are picked for one by one, rather than connections."""
        return self.scheme in _HTTP_SCHEMES

    @property
    def is_tls(self) -> bool:
        """Whether it speaks TLS."""
        return self.scheme in TLS_SCHEMES

    @classmethod
    def parse(cls, text: str) -> ListenAddress:
        """Read `tcp://HOST:PORT=SERVICE`, `http://HOST:PORT=SERVICE` or `http://HOST:PORT`; likewise with `tls` and
        `https`. In place of `HOST:PORT`, `unix:PATH` is a Unix socket, without TLS; in place of a service,
        `@ADDRESS:PORT` is the one address that traffic goes to.

        Raises:
            AddressError: it is written otherwise.
        """
        form = "tcp://HOST:PORT=SERVICE or http://HOST:PORT[=SERVICE] (or tls, https)"
        scheme, separator, rest = text.partition("://")
        if not separator:
            raise AddressError(f"expected {form}, got {quote(text)}")
        scheme = scheme.lower()
        if scheme not in ("tcp", "tls", *_HTTP_SCHEMES):
            raise AddressError(f"unknown scheme {quote(scheme)}; expected {form}")
        where, separator, service = rest.partition("=")
        if not service and (separator or scheme not in _HTTP_SCHEMES):
            raise AddressError(f"names no service; expected {form}, got {quote(text)}")
        where = where.removesuffix("/") if not separator else where
        try:
            key = parse_target(service) if service else None
        except ModelError as error:
            raise AddressError(str(error)) from None
        if where.startswith(_UNIX):
            if scheme in TLS_SCHEMES:
                raise AddressError(f"a Unix socket has no TLS: write tcp://{where} or http://{where}")
            return cls(scheme, "", 0, key, _socket_path(where))
        host, port = parse_host_port(where, form, text)
        return cls(scheme, _bindable(host), port, key)


def parse_target(text: str) -> ServiceKey:
    """A service's name, or one fixed address.

    Raises:
        AddressError: it is no such address.
        ModelError: it is no such name.
    """
    if not text.startswith(FIXED):
        return parse_service_key(text)
    place = SocketAddress.parse(text.removeprefix(FIXED))
    if place.port == 0:
        raise AddressError("port 0 is not within 1 to 65535")
    return ServiceKey(f"{FIXED}{SocketAddress('127.0.0.1' if place.host == 'localhost' else place.host, place.port)}")


def fixed_place(key: ServiceKey) -> SocketAddress | None:
    """The one address that a name stands for (`ListenAddress.parse`); None: it is a service's."""
    return SocketAddress.parse(key.removeprefix(FIXED)) if is_fixed(key) else None


class DiscoveryUrl(msgspec.Struct, frozen=True):
    """Where instances come from.

    Attributes:
        scheme: `grpc`, `grpcs` (over TLS), `ws` or `wss` (a discovery server), or `file` (an instances file, read by
            this process).
        host: an IP address without brackets, or a DNS name; empty for a file.
        port: 1 to 65535; 0 for a file.
        path: the file's path as it was written; empty for a server.
    """

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        return f"file:{self.path}" if self.scheme == "file" else f"{self.scheme}://{self.authority}"

    @property
    def authority(self) -> str:
        """`HOST:PORT`, an IPv6 address in brackets."""
        return format_host_port(self.host, self.port)

    @classmethod
    def parse(cls, text: str) -> DiscoveryUrl:
        """Read `grpc://HOST:PORT`, likewise with `grpcs`, `ws` or `wss`, or `file:PATH`.

        Raises:
            AddressError: it is written otherwise.
        """
        forms = "grpc://HOST:PORT (or grpcs, ws, wss) or file:PATH"
        match = _SCHEME.fullmatch(text)
        if match is None:
            raise AddressError(f"expected {forms}, got {quote(text)}")
        scheme = match[1].lower()
        if scheme == "file":
            return cls("file", path=file_path(match[2]))
        if scheme not in _SERVER_SCHEMES or not match[2].startswith("//"):
            # `localhost:7070` looks like a scheme too.
            raise AddressError(f"expected {forms}, got {quote(text)}")
        host, port = parse_host_port(match[2][2:].removesuffix("/"), f"{scheme}://HOST:PORT", text)
        if port == 0:
            raise AddressError("port 0 is not within 1 to 65535")
        return cls(scheme, check_host(host), port)


class CollectorUrl(msgspec.Struct, frozen=True):
    """A collector of spans, by OTLP over HTTP.

    Attributes:
        scheme: `http` or `https`.
        host: an IP address without brackets, or a DNS name.
        port: 1 to 65535.
        path: what is asked there, from its slash.
    """

    scheme: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{format_host_port(self.host, self.port)}{self.path}"

    @classmethod
    def parse(cls, text: str) -> CollectorUrl:
        """Read `http://HOST:PORT` or `https://HOST:PORT`, with a path or without one, which is `/v1/traces` then.

        Raises:
            AddressError: it is written otherwise.
        """
        form = "http://HOST:PORT or https://HOST:PORT"
        match = _COLLECTOR.fullmatch(text)
        if match is None:
            raise AddressError(f"expected {form}, got {quote(text)}")
        host, port = parse_host_port(match[2], form, text)
        if port == 0:
            raise AddressError("port 0 is not within 1 to 65535")
        return cls(match[1].lower(), check_host(host), port, match[3] if match[3] not in (None, "/") else "/v1/traces")


def format_host_port(host: str, port: int) -> str:
    """`HOST:PORT`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_host_port(text: str, form: str, given: str) -> tuple[str, int]:
    """A host and a port: `text` is the part of what was `given` that should be an address; `form` is what was expected.

    Raises:
        AddressError: it is none.
    """
    host, separator, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if ":" not in host:
            raise AddressError(f"only an IPv6 address stands in brackets, not {quote(host)}")
    elif ":" in host or text.startswith("["):
        raise AddressError(f"expected {form}, an IPv6 address in brackets; got {quote(given)}")
    if not separator or not host or not port:
        raise AddressError(f"expected {form}, got {quote(given)}")
    if not _PORT.fullmatch(port) or int(port) > 65535:
        raise AddressError(f"port {quote(port)} is not a number within 0 to 65535")
    return host, int(port)


def _ip_address(host: str) -> str | None:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None


def _bindable(host: str) -> str:
    if host.lower() == "localhost":
        return "localhost"
    address = _ip_address(host)
    if address is None:
        raise AddressError(f"host {quote(host)} is neither an IP address nor localhost")
    return address


def check_host(host: str) -> str:
    """A host as it is compared: an IP address, or a DNS name in lower case.

    Raises:
        AddressError: it is neither.
    """
    if (address := _ip_address(host)) is not None:
        return address
    labels = host.removesuffix(".").split(".")
    # A last label of digits only makes a mistyped IPv4 address, no name (RFC 1123, section 2.1).
    if len(host) > 253 or labels[-1].isdigit() or not all(_DNS_LABEL.fullmatch(label) for label in labels):
        raise AddressError(f"host {quote(host)} is neither an IP address nor a DNS name")
    return host.lower()


def unix_path(text: str) -> str:
    """The path of `unix:PATH` or `unix:///PATH`, which is absolute (SPIFFE Workload Endpoint, 4).

    Raises:
        AddressError: it names none.
    """
    scheme, separator, rest = text.partition(":")
    path = rest.removeprefix("//") if rest.startswith("///") else rest
    if scheme != "unix" or not separator or not path.startswith("/") or path.startswith("//") or "\0" in path:
        raise AddressError(f"expected unix:///PATH, got {quote(text)}")
    return path


def _socket_path(text: str) -> str:
    """The path of a socket to listen on: `unix_path`, of a length that the system takes.

    Raises:
        AddressError: it names none, or is too long.
    """
    # As it is compared: spelled in one way.
    path = os.path.normpath(unix_path(text))
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise AddressError(f"{quote(path)} cannot be written in UTF-8") from None
    if size > PATH_LIMIT:
        raise AddressError(f"{quote(path)} is longer than the {PATH_LIMIT} bytes that a socket's path may have")
    return path


def file_path(rest: str) -> str:
    """The path of `file:PATH` or `file:///PATH`, of what follows `file:`.

    Raises:
        AddressError: it names none.
    """
    if rest.startswith("//"):
        rest = rest.removeprefix("//")
        if not rest.startswith("/"):
            raise AddressError("a file URL names no host: write file:PATH or file:///PATH")
    if not rest or "\0" in rest:
        raise AddressError("names no file; expected file:PATH")
    return rest
