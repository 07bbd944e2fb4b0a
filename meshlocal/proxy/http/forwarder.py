"""What http listeners hand their connections to."""

from __future__ import annotations

import logging
import math
import random
import socket
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from heapq import nsmallest
from operator import attrgetter
from typing import TYPE_CHECKING

import trio

from meshlocal.client.services import ServiceTable
from meshlocal.client.tried import in_a_row
from meshlocal.net.listen import CAPACITY_PAUSE
from meshlocal.net.log import RateLimited, get_log
from meshlocal.net.sockets import format_address
from meshlocal.net.supervision import Supervision
from meshlocal.policy.config import ProxyConfig
from meshlocal.policy.limits import Limit
from meshlocal.policy.model import ServiceKey
from meshlocal.proxy.http import answers, pump, tunnel  # noqa: F401 - once the loop runs nothing is imported (P1)
from meshlocal.proxy.http.account import log_refused
from meshlocal.proxy.http.answers import Answer
from meshlocal.proxy.http.connection import DRAIN_GRACE, ClientConnection
from meshlocal.proxy.http.service import HttpService
from meshlocal.proxy.http.settings import HttpSettings
from meshlocal.proxy.http.waiting import Patience
from meshlocal.wire.http1.request import RequestHead

if TYPE_CHECKING:
    from meshlocal.proxy.http.exchange import Exchange

_log = get_log(__name__)

_SWEEP_LONGEST = 1.0
_SWEEP_SHORTEST = 0.01
_WARNING_INTERVAL = 5.0

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

    Attributes:
        settings: what the config says.
        tells: every request is logged, or its response tells how it came about.
        draining: connections end with their next response (S1).
        drained: requests that a drain cut (S1).
        refused: requests that no instance was tried for, by reason.
        patience: see `meshlocal.proxy.http.waiting`.
    """

    def __init__(self, services: ServiceTable, config: ProxyConfig, supervision: Supervision | None = None) -> None:
        self._supervision = supervision or Supervision(random.Random())
        self._table = services
        self._services: dict[ServiceKey, HttpService] = {}
        self._connections: dict[ClientConnection, None] = {}
        self.settings = HttpSettings(config)
        self.access_log = config.access_log
        self.draining = False
        self._drain_begins = trio.Event()
        self._busy = trio.Event()
        """There is something to sweep."""
        self.drained = 0
        self._shed_again = -math.inf
        self.refused: defaultdict[str, int] = defaultdict(int)
        self.patience = Patience()
        self._failed = RateLimited(_log, logging.WARNING, "request failed", interval=_WARNING_INTERVAL)

    @property
    def access_log(self) -> bool:
        """One log line for each request, at its end."""
        return self._access_log

    @access_log.setter
    def access_log(self, access_log: bool) -> None:
        self._access_log = access_log
        self.tells = access_log or self.settings.config.response_headers

    def __len__(self) -> int:
        return len(self._connections)

    def __iter__(self) -> Iterator[ClientConnection]:
        return iter(self._connections)

    @property
    def services(self) -> dict[ServiceKey, HttpService]:
        """The services that had requests."""
        return self._services

    async def serve(self, service: ServiceKey | None, client: socket.socket, peer: object) -> None:
        """Serve one accepted connection to its end; the socket is closed or reset then."""
        connection = ClientConnection(self, service, client, peer)
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
                for name, run in (("http deadlines", self.patience.run), ("http sweep", self._sweep)):
                    nursery.start_soon(partial(self._supervision.keep, name, run, vital=True))
        finally:
            for service in self._services.values():
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
        for service in self._services.values():
            service.pool.sweep(now)
        # One that had a request a moment ago most likely has another on its way, which would be lost.
        latest = now + self.settings.config.keep_alive_timeout - SHED_REST
        idle = (each for each in self._connections if each.is_idle and not each.fresh and each.deadline <= latest)
        for connection in nsmallest(SHED_AT_ONCE, idle, key=attrgetter("deadline")):
            if not connection.has_input():
                connection.expire()

    def reconfigure(self, config: ProxyConfig) -> None:
        """Apply another configuration: requests that begin now go by it (S2)."""
        self.settings = HttpSettings(config)
        self.access_log = config.access_log
        for service in self._services.values():
            service.reconfigure(config.http)

    def drain(self) -> None:
        """Let every connection end with its next response, or soon if no request comes (S1).

        Its client may be sending one at this moment, and could not know what became of it if the connection closed:
        so it gets the time to, and the answer says that the connection closes.
        """
        self.draining = True
        now = trio.current_time()
        for connection in self._connections:
            if connection.is_idle:
                connection.await_request(now)
        self._drain_begins.set()

    # The service of a request.

    def find(self, fixed: ServiceKey | None, head: RequestHead, now: float) -> HttpService | Answer:
        """The service that a request is for, or what to answer instead."""
        key = fixed if fixed is not None else self.settings.service_of(head.host, head.target)
        if key is None:
            return answers.UNKNOWN_HOST
        return self._service(key, now, demand=fixed is None)

    def find_known(self, fixed: ServiceKey | None, head: RequestHead, now: float) -> HttpService | None:
        """The service that a request is for, if it had one before, so that nothing has to be begun or told for it."""
        key = fixed if fixed is not None else self.settings.service_of(head.host, head.target)
        service = self._services.get(key) if key is not None else None
        if service is None or self._table.get(service.state.key) is not service.state:
            return None
        service.state.last_used = now
        return service

    def find_tunnel(self, fixed: ServiceKey | None, head: RequestHead, now: float) -> HttpService | Answer:
        """The service that a CONNECT is for, or what to answer instead."""
        key = self.settings.service_of_tunnel(head.host)
        if key is None or (fixed is not None and key != fixed):
            return answers.CONNECT_FORBIDDEN
        return self._service(key, now, demand=fixed is None)

    def _service(self, key: ServiceKey, now: float, *, demand: bool) -> HttpService | Answer:
        state = self._table.demand(key, now) if demand else self._table.get(key)
        if state is None:
            # Without demand: between the connection's accept and this request the config lost the service.
            return answers.TOO_MANY_SERVICES if demand else answers.UNKNOWN_SERVICE
        service = self._services.get(key)
        if service is None or service.state is not state:
            if service is not None:
                service.close()
            service = self._services[key] = HttpService(state, self.settings.config)
        return service

    # Time.

    async def _sweep(self) -> None:
        """Look at all connections and pools, again and again, while there are some (P3)."""
        while True:
            if not (self._connections or self._services):
                self._busy = trio.Event()
                await self._busy.wait()
            config = self.settings.config
            limits = (
                config.header_timeout,
                config.body_timeout,
                config.keep_alive_timeout,
                config.pool_idle_timeout,
                *(service.state.policy.idle_timeout or _SWEEP_LONGEST * 4 for service in self._services.values()),
            )
            pause = min(max(min(limits) / 4, _SWEEP_SHORTEST), _SWEEP_LONGEST)
            if self.draining:
                await trio.sleep(min(pause, DRAIN_GRACE / 4))
            else:
                with trio.move_on_after(pause):
                    await self._drain_begins.wait()
            self.sweep(trio.current_time())

    def sweep(self, now: float) -> None:
        """End what ran out of time; forget services and close connections to instances that nobody used for long."""
        for connection in list(self._connections):
            if (connection.deadline <= now and not (connection.is_idle and connection.has_input())) or (
                connection.counters is not None and connection.counters.last_activity + connection.idle_limit <= now
            ):
                connection.expire()
        self._table.drop_unused(now)
        oldest = now - self.settings.config.pool_idle_timeout
        for key, service in list(self._services.items()):
            if self._table.get(key) is not service.state:
                service.close()
                del self._services[key]
            else:
                service.pool.sweep(oldest)

    # What is told.

    def report_failure(self, exchange: Exchange, answer: Answer) -> None:
        """Say, not too often, that a request failed."""
        self._failed(
            trio.current_time(),
            service=exchange.service.state.key if exchange.service is not None else None,
            answer=answer.reason,
            attempts=exchange.attempts,
            tried=in_a_row(exchange.failures) if exchange.failures else None,
            last_error=exchange.error or None,
            problem=str(exchange.problem) if exchange.problem is not None else None,
        )

    def refuse(self, connection: ClientConnection, answer: Answer) -> None:
        """Count and log what is no request, or never became one."""
        self.refused[answer.reason] += 1
        if self.access_log:
            log_refused(connection, answer)
