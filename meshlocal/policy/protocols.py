"""Which version of HTTP an instance is spoken to in."""

from __future__ import annotations

from typing import Literal, TypeAlias

from meshlocal.policy.model import Instance

APP_PROTOCOL = "app_protocol"
"""The label that says what is spoken on an instance's port, in the words of Kubernetes' appProtocol."""

HttpVersion: TypeAlias = Literal["http1", "http2"]

_HTTP2_NAMES = frozenset({"grpc", "http2", "h2c", "kubernetes.io/h2c"})
_HTTP2_PREFIXES = ("grpc-", "http2-")


def says_http2(name: str) -> bool:
    """Whether a port's name, or its appProtocol, says that HTTP/2 is spoken there."""
    return name in _HTTP2_NAMES or name.startswith(_HTTP2_PREFIXES)


def speaks_http2(instance: Instance, configured: HttpVersion | None, *, client: bool) -> bool:
    """Whether an instance is spoken to in HTTP/2.

    Args:
        instance: the one.
        configured: what the configuration says of its service; None: nothing.
        client: the client speaks it.
    """
    if configured is not None:
        return configured == "http2"
    return client or says_http2(instance.key.port_name) or says_http2(instance.labels.get(APP_PROTOCOL, ""))
