"""How connections to the instances of a service are secured."""

from __future__ import annotations

import socket
from typing import Protocol

from meshlocal.net.pipe import Pipe
from meshlocal.policy.model import Instance
from meshlocal.policy.picker import Pick


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
