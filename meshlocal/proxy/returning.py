"""Gentle return: tcp connections to other nodes end, one by one, once the local tier is back (behaviour rule F2).

Only new connections go back to the local tier by themselves (F1). One that stays open for days keeps the instance
that it got in an outage. TCP has no way to ask a client to come again but to end its connection, so this is only for
services whose clients bear that, and only connections that are silent are ended: those that were silent longest
first.
"""

from __future__ import annotations

import trio

from meshlocal.client.services import ServiceState, ServiceTable
from meshlocal.net.log import get_log
from meshlocal.policy.backoff import UniformSource
from meshlocal.policy.failback import Failback
from meshlocal.policy.model import ServiceKey
from meshlocal.proxy.tcp.connection import RETURNED, TcpConnection
from meshlocal.proxy.tcp.forwarder import TcpForwarder

_log = get_log(__name__)

LOOK = 0.1
"""Seconds between two looks at the services while a connection may have to return."""

LOOK_AT_REST = 1.0
"""The same while there is none."""


class Returning:
    """Ends connections of all services that want it.

    Args:
        services: the services.
        forwarder: whose connections end.
        rng: for the jitter.
    """

    def __init__(self, services: ServiceTable, forwarder: TcpForwarder, rng: UniformSource) -> None:
        self._services = services
        self._forwarder = forwarder
        self._rng = rng
        self._paces: dict[ServiceKey, Failback] = {}

    async def run(self) -> None:
        """Look after them until cancelled."""
        while True:
            self.look(trio.current_time())
            await trio.sleep(LOOK if self._some_away() else LOOK_AT_REST)

    def _some_away(self) -> bool:
        """Whether a connection of such a service is with an instance of another tier."""
        return any(
            connection.service.key in self._paces and connection.pick is not None and connection.pick.tier
            for connection in self._forwarder
        )

    def look(self, now: float) -> None:
        """End one connection of each service for which it is time."""
        for service in self._services:
            config = self._services.config.service(service.key).failback
            pace = self._paces.get(service.key)
            if config is None:
                self._paces.pop(service.key, None)
                continue
            if pace is None or pace.config != config:
                pace = self._paces[service.key] = Failback(config, self._rng)
            if pace.may_return(now, fit=_has_room(service)):
                longest = self._longest_silent(service, now - config.quiet)
                if longest is not None:
                    pace.returned(now)
                    longest.cut = RETURNED
                    longest.scope.cancel()

    def _longest_silent(self, service: ServiceState, before: float) -> TcpConnection | None:
        """The connection to another tier that was silent longest, if that is long enough."""
        found: TcpConnection | None = None
        for connection in self._forwarder:
            counters, pick = connection.counters, connection.pick
            if (
                connection.service is service
                and counters is not None
                and pick is not None
                and pick.tier
                and counters.last_activity <= before
                and not connection.cut
            ):
                found, before = connection, counters.last_activity
        return found


def _has_room(service: ServiceState) -> bool:
    """Whether a request that came now would get an instance of the first tier."""
    return next((pick.tier == 0 and pick.passed_over is None for pick in service.preview()), False)
