"""Addresses of the configuration that are listened on, and which of them go on under another one (rule S2)."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import TypeVar

from meshlocal.net.sockets import close, format_address
from meshlocal.net.unix import UnixFile
from meshlocal.policy.addresses import ListenAddress
from meshlocal.policy.config import ProxyConfig
from meshlocal.policy.model import ServiceKey


class BoundAddress:
    """One configured address: one socket, or two for `localhost`.

    Attributes:
        configured: as the config has it.
        service: the registry's name of its service; None if each request says its own.
        sockets: that listen on it.
        file: of its Unix socket, for the holder to remove; None: it has none.
    """

    def __init__(
        self,
        configured: ListenAddress,
        service: ServiceKey | None,
        sockets: Sequence[socket.socket],
        file: UnixFile | None = None,
    ) -> None:
        self.configured = configured
        self.service = service
        self.sockets = sockets
        self.file = file

    @property
    def bound(self) -> list[str]:
        """The addresses that it listens on, with the ports that the system chose."""
        return [format_address(sock.getsockname()) for sock in self.sockets]

    def reconfigure(self, config: ProxyConfig, configured: ListenAddress) -> None:
        """Go on as this one of the config's listeners."""
        self.configured = configured
        self.service = service_key(config, configured)

    def close(self) -> None:
        """Close the sockets. Only once nothing accepts on them."""
        for sock in self.sockets:
            close(sock)


Bound = TypeVar("Bound", bound=BoundAddress)


def keep(current: Sequence[Bound], config: ProxyConfig) -> list[Bound | None]:
    """For each of the config's listeners the current one that goes on as it, if any."""
    left = list(current)

    def take(configured: ListenAddress, *, same_service: bool) -> Bound | None:
        for listener in left:
            before = listener.configured
            if before.place != configured.place:
                continue
            if same_service and listener.service != service_key(config, configured):
                continue
            left.remove(listener)
            return listener
        return None

    kept = [take(configured, same_service=True) for configured in config.listen]
    for position, configured in enumerate(config.listen):
        if kept[position] is None:
            kept[position] = take(configured, same_service=False)
    return kept


def service_key(config: ProxyConfig, configured: ListenAddress) -> ServiceKey | None:
    """The registry's name of a listener's service; None if it routes each request."""
    return config.service_key(configured.service) if configured.service is not None else None
