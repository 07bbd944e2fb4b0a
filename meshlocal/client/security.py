"""How connections to the instances of a service are secured, and by which way they are made."""

from __future__ import annotations

import socket
from typing import NamedTuple, Protocol

from meshlocal.net.pipe import Pipe
from meshlocal.policy.model import Instance
from meshlocal.policy.picker import Pick
from meshlocal.policy.unix_sockets import UnixSockets


class Security(Protocol):
    """How connections to the instances of a service are secured (T1)."""

    def skips(self, instance: Instance, tier: int) -> bool:
        """Whether an instance of a tier is spoken to in plaintext all the same, at its own port."""
        ...

    def port(self, instance: Instance) -> int:
        """Where an instance speaks TLS."""
        ...

    async def secure(self, sock: socket.socket, pick: Pick, protocol: str | None) -> Pipe:
        """Shake hands on a connection that was made. The caller's cancel scope is the deadline.

        Args:
            sock: the connection's.
            pick: the instance.
            protocol: what is to be spoken inside, as ALPN calls it (RFC 7301); None: nothing is said of it.

        Returns:
            What holds the socket from here on; if there is nothing to return, it is closed.

        Raises:
            OSError: the connection failed, or the instance did not prove what it must (`TlsError`).
        """
        ...


class Reach(NamedTuple):
    """How one instance is connected to.

    Attributes:
        port: of its address.
        path: of its Unix socket, which is tried before; None: it has none here, or speaks TLS, which is at its port.
        security: what is spoken over the connection; None: nothing but what is said.
    """

    port: int
    path: str | None
    security: Security | None


def reach(instance: Instance, tier: int, security: Security | None, sockets: UnixSockets | None) -> Reach:
    """How an instance is connected to.

    Args:
        instance: the instance.
        tier: that it is in.
        security: of its service; None: none.
        sockets: where its service's instances have Unix sockets; None: nowhere.
    """
    if security is not None and not security.skips(instance, tier):
        return Reach(security.port(instance), None, security)
    return Reach(instance.key.port, sockets.of(instance) if sockets is not None else None, None)
