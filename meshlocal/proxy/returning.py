"""Gentle return: what lasts on other nodes ends, one by one, once the local tier is back (behaviour rule F2).

Only new requests go back to the local tier by themselves (F1). A tcp connection, or an HTTP/2 stream, that stays open
for days keeps the instance that it got in an outage. There is no way to ask its client to come again but to end it, so
this is only for services whose clients bear that, and only what is silent is ended: what was silent longest first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import trio

from meshlocal.client.services import ServiceState, ServiceTable
from meshlocal.net.log import get_log
from meshlocal.policy.backoff import UniformSource
from meshlocal.policy.failback import Failback
from meshlocal.policy.model import ServiceKey

_log = get_log(__name__)

LOOK = 0.1
"""Seconds between two looks at the services while something may have to return."""

LOOK_AT_REST = 1.0
"""The same while there is none."""


class Lasting(Protocol):
    """What may stay where it is for days: a tcp connection, or an HTTP/2 stream."""

    def away_since(self, service: ServiceState) -> float | None:
        """Since when it was silent, by trio.current_time(), if it is of this service, and with an instance of another
        tier, and can be ended; else None."""
        ...

    def send_home(self) -> None:
        """End it, so that its client comes again."""
        ...


class Returning:
    """Ends what lasts on other nodes, of all services that want it.

    Args:
        services: the services.
        lasting: gives what may have to return.
        rng: for the jitter.
    """

    def __init__(self, services: ServiceTable, lasting: Callable[[], Iterable[Lasting]], rng: UniformSource) -> None:
        self._services = services
        self._lasting = lasting
        self._rng = rng
        self._paces: dict[ServiceKey, Failback] = {}

    async def run(self) -> None:
        """Look after them until cancelled."""
        while True:
            self.look(trio.current_time())
            await trio.sleep(LOOK if self._some_away() else LOOK_AT_REST)

    def _some_away(self) -> bool:
        """Whether something of such a service is with an instance of another tier."""
        states = [state for state in self._services if state.key in self._paces]
        return any(each.away_since(state) is not None for each in self._lasting() for state in states)

    def look(self, now: float) -> None:
        """End one connection or stream of each service for which it is time."""
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
                    longest.send_home()

    def _longest_silent(self, service: ServiceState, before: float) -> Lasting | None:
        """What was silent longest on another tier, if that is long enough."""
        found: Lasting | None = None
        for each in self._lasting():
            since = each.away_since(service)
            if since is not None and since <= before:
                found, before = each, since
        return found


def _has_room(service: ServiceState) -> bool:
    """Whether a request that came now would get an instance of the first tier."""
    return next((pick.tier == 0 and pick.passed_over is None for pick in service.preview()), False)
