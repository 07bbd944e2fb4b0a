"""What http listeners hand their connections to."""

from __future__ import annotations

import math
import random
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from heapq import nsmallest
from operator import attrgetter

import trio

from meshlocal.client.services import ServiceTable
from meshlocal.net.listen import CAPACITY_PAUSE, Started
from meshlocal.net.log import get_log
from meshlocal.net.pipe import Pipe, PlainPipe
from meshlocal.net.sockets import format_address
from meshlocal.net.supervision import Supervision
from meshlocal.policy.config import ProxyConfig
from meshlocal.policy.limits import Limit
from meshlocal.policy.model import ServiceKey
from meshlocal.proxy.http import answers
from meshlocal.proxy.http.access_log import HttpAccessLog
from meshlocal.proxy.http.connection import ClientConnection
from meshlocal.proxy.http.h1.client import DRAIN_GRACE
from meshlocal.proxy.http.h2.client import H2Client
from meshlocal.proxy.http.marks import RandomBits
from meshlocal.proxy.http.service import HttpService
from meshlocal.proxy.http.shared import HttpShared

_log = get_log(__name__)

_SWEEP_LONGEST = 1.0
"""Seconds between two looks at all connections at most."""

_SWEEP_SHORTEST = 0.01
"""Seconds between two such looks at least."""

SHED_AT_ONCE = 64
"""Idle clients that are closed at once when descriptors run out; that is looked at ten times a second."""

SHED_REST = 1.0
"""Seconds that a client must have been idle for, to be shed."""


class HttpForwarder:
    """Serves the connections of all http listeners.

    Args:
        services: the services that listeners name, and those that requests do.
        config: the proxy's section.
        supervision: of what keeps all limits of time, which is vital.
        rng: draws requests' ids, and which of them are traced.

    Attributes:
        shared: what the connections share.
    """

    def __init__(
        self,
        services: ServiceTable,
        config: ProxyConfig,
        supervision: Supervision | None = None,
        rng: RandomBits | None = None,
    ) -> None:
        self._supervision = supervision or Supervision(random.Random())
        self._table = services
        self._connections: dict[ClientConnection, None] = {}
        self.shared = HttpShared(services, config, rng or random.Random())
        self._drain_begins = trio.Event()
        self._busy = trio.Event()
        """There is something to sweep."""
        self._shed_again = -math.inf
        self._observe(config)

    def __len__(self) -> int:
        return len(self._connections)

    def __iter__(self) -> Iterator[ClientConnection]:
        return iter(self._connections)

    def streams(self) -> Iterator[H2Client]:
        """All streams of clients that speak HTTP/2."""
        for connection in self._connections:
            if connection.link is not None:
                yield from connection.link.streams.values()

    @property
    def services(self) -> dict[ServiceKey, HttpService]:
        """The services that had requests."""
        return self.shared.services

    def _observe(self, config: ProxyConfig) -> None:
        self.shared.observers = (HttpAccessLog(),) if config.access_log else ()

    def accepting(self) -> AbstractContextManager[None]:
        """See `Server.accepting`."""
        return nullcontext()

    def take(
        self, connections: trio.Nursery, service: ServiceKey | None, client: socket.socket, peer: object
    ) -> Started:
        """See `Server.take`."""
        connections.start_soon(self.serve, service, PlainPipe(client), peer)
        return Started.NOW

    async def serve(self, service: ServiceKey | None, pipe: Pipe, peer: object) -> None:
        """See `PipeServer.serve`."""
        connection = ClientConnection(self.shared, service, pipe, peer)
        state = self._table.get(service) if service is not None else None
        circuit = state.circuit if state is not None else self._table.circuit
        if not circuit.enter(Limit.CONNECTIONS):
            await connection.refuse(answers.TOO_MANY_CONNECTIONS)
            return
        self._connections[connection] = None
        self._busy.set()
        try:
            await connection.run()
        except Exception:  # noqa: BLE001 - a fault of ours in one connection must not take the others with it
            _log.exception("connection failed by a fault in the proxy", client=format_address(peer))
        finally:
            del self._connections[connection]
            circuit.leave(Limit.CONNECTIONS)

    async def run(self) -> None:
        """Keep all limits of time, until cancelled; then close what is pooled."""
        try:
            async with trio.open_nursery() as nursery:
                self.shared.nursery = nursery
                for name, run in (("http deadlines", self.shared.patience.run), ("http sweep", self._sweep)):
                    nursery.start_soon(partial(self._supervision.keep, name, run, vital=True))
        finally:
            self.shared.nursery = None
            for service in self.services.values():
                service.close()

    def shed(self) -> None:
        """Give descriptors back: what is idle goes before new clients are kept waiting.

        Connections to instances are made anew when they are wanted. Clients that wait between two requests expect that
        their connection may end (RFC 9112, 9.3); those that were idle longest go first.
        """
        now = trio.current_time()
        if now < self._shed_again:
            return  # each listener asks, again and again, when there is one descriptor too few
        self._shed_again = now + CAPACITY_PAUSE
        for service in self.services.values():
            service.pool.sweep(now)
        # One that had a request a moment ago most likely has another on its way, which would be lost.
        latest = now + self.shared.settings.config.keep_alive_timeout - SHED_REST
        idle = (each for each in self._connections if each.is_idle and not each.fresh and each.deadline <= latest)
        for connection in nsmallest(SHED_AT_ONCE, idle, key=attrgetter("deadline")):
            if not connection.has_input():
                connection.expire()
        left = SHED_AT_ONCE
        for link in [each.link for each in self._connections if each.link is not None]:
            if left and link.shed(now - SHED_REST):
                left -= 1

    def reconfigure(self, config: ProxyConfig) -> None:
        """Apply another configuration: requests that begin now go by it (S2)."""
        self.shared.reconfigure(config)
        self._observe(config)
        for service in self.services.values():
            service.reconfigure(config.http)

    def drain(self) -> None:
        """Let every connection end with its next response, or soon if no request comes (S1).

        Its client may be sending one at this moment, and could not know what became of it if the connection closed:
        so it gets the time to, and the answer says that the connection closes.
        """
        self.shared.draining = True
        now = trio.current_time()
        for connection in self._connections:
            if connection.link is not None:
                connection.link.drain()
            elif connection.is_idle:
                connection.await_request(now)
        self._drain_begins.set()

    # Time.

    async def _sweep(self) -> None:
        """Look at all connections and pools, again and again, while there are some (P3)."""
        while True:
            if not (self._connections or self.services):
                self._busy = trio.Event()
                await self._busy.wait()
            config = self.shared.settings.config
            limits = (
                config.header_timeout,
                config.body_timeout,
                config.keep_alive_timeout,
                config.pool_idle_timeout,
                *(service.state.policy.idle_timeout or _SWEEP_LONGEST * 4 for service in self.services.values()),
            )
            pause = min(max(min(limits) / 4, _SWEEP_SHORTEST), _SWEEP_LONGEST)
            if self.shared.draining:
                await trio.sleep(min(pause, DRAIN_GRACE / 4))
            else:
                with trio.move_on_after(pause):
                    await self._drain_begins.wait()
            self.sweep(trio.current_time())

    def sweep(self, now: float) -> None:
        """End what ran out of time; forget services and close connections to instances that nobody used for long."""
        for connection in list(self._connections):
            if connection.link is not None:
                connection.link.look(now)
            elif (connection.deadline <= now and not (connection.is_idle and connection.has_input())) or (
                connection.counters is not None and connection.counters.last_activity + connection.idle_limit <= now
            ):
                connection.expire()
        self._table.drop_unused(now)
        oldest = now - self.shared.settings.config.pool_idle_timeout
        for key, service in list(self.services.items()):
            if self._table.get(key) is not service.state:
                service.close()
                del self.services[key]
            else:
                service.pool.sweep(oldest)
                service.links.sweep(now)
