"""How many connections a server has, in all and from each client, and how often it had no room for one."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager

from meshlocal.net.log import get_log

log = get_log(__name__)


class Crowding:
    """Counts connections, and says once that there are too many, and not again before a tenth of the places were free:
    who floods a server shall not flood its log.

    Args:
        what: is refused, for the log.
        limit: connections at once.
        client_limit: the same from one client (`client_of`); None: no matter how many.

    Attributes:
        open: connections that are.
        refused: how many were refused because there were `limit`.
        client_refused: how many because one client had `client_limit`.
    """

    def __init__(self, what: str, limit: int, client_limit: int | None = None) -> None:
        self._what = what
        self._limit = limit
        self._client_limit = client_limit
        self._of_client: dict[str, int] = {}
        self._said = False
        self.open = 0
        self.refused = 0
        self.client_refused = 0

    @contextmanager
    def place(self, peer: str) -> Iterator[bool]:
        """A place for one more connection of a peer (`HOST:PORT`), for the block; False: there is none."""
        client = client_of(peer)
        of_client = self._of_client.get(client, 0)
        if self.open >= self._limit:
            self.refused += 1
            self._say(peer, self._limit)
            yield False
            return
        if self._client_limit is not None and of_client >= self._client_limit:
            self.client_refused += 1
            self._say(peer, self._client_limit)
            yield False
            return
        if self.open <= self._limit * 9 // 10:
            self._said = False
        self.open += 1
        self._of_client[client] = of_client + 1
        try:
            yield True
        finally:
            self.open -= 1
            left = self._of_client.pop(client) - 1
            if left:
                self._of_client[client] = left

    def _say(self, peer: str, limit: int) -> None:
        if not self._said:
            self._said = True
            log.warning("connection refused: too many are open", server=self._what, peer=peer, limit=limit)


def client_of(peer: str) -> str:
    """Whom a peer's address, `HOST:PORT`, counts as: its address; of IPv6 its /64, within which who has one has all."""
    host = peer.rpartition(":")[0] or peer
    if host.startswith("["):
        try:
            return str(ipaddress.ip_network((host.strip("[]").partition("%")[0], 64), strict=False))
        except ValueError:
            return host
    return host
