"""What all connections of http listeners share: settings, services, counts, and who is told of each request."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable

import trio

from meshlocal.client.services import ServiceTable
from meshlocal.client.tried import in_a_row
from meshlocal.net.log import RateLimited, get_log
from meshlocal.net.sockets import format_address
from meshlocal.policy.config import ProxyConfig
from meshlocal.policy.model import ServiceKey
from meshlocal.proxy.http import answers
from meshlocal.proxy.http.answers import Answer
from meshlocal.proxy.http.links import UpstreamLink
from meshlocal.proxy.http.marks import Marker, RandomBits
from meshlocal.proxy.http.record import HttpRecord, Observer
from meshlocal.proxy.http.service import HttpService
from meshlocal.proxy.http.settings import HttpSettings
from meshlocal.proxy.http.waiting import Patience
from meshlocal.wire.http1.request import RequestHead

_log = get_log("meshlocal.proxy.http.forwarder")

_WARNING_INTERVAL = 5.0
"""Seconds between two warnings of requests that failed, at least."""


class HttpShared:
    """Made once; each connection has it.

    Args:
        table: the services that listeners name, and those that requests do.
        config: the proxy's section.
        rng: draws ids.

    Attributes:
        table: as given.
        settings: what the config says; replaced by another config (S2).
        marker: gives requests ids and traces; replaced likewise.
        services: those that had requests.
        patience: tells those who wait how late it is.
        refused: requests that no instance was tried for, by reason.
        draining: connections end with their next response (S1).
        drained: requests that a drain cut (S1).
        observers: who is told of each request's end.
        traced: is told of the end of those that are traced; None: nobody is.
        nursery: where shared connections to instances live.
    """

    def __init__(self, table: ServiceTable, config: ProxyConfig, rng: RandomBits) -> None:
        self.table = table
        self._rng = rng
        self.reconfigure(config)
        self.services: dict[ServiceKey, HttpService] = {}
        self.patience = Patience()
        self.refused: defaultdict[str, int] = defaultdict(int)
        self.draining = False
        self.drained = 0
        self.observers: tuple[Observer, ...] = ()
        self.traced: Callable[[HttpRecord, float], None] | None = None
        self.nursery: trio.Nursery | None = None
        self._broken = RateLimited(_log, logging.WARNING, "http2 connection ended", interval=_WARNING_INTERVAL)
        self._failed = RateLimited(_log, logging.WARNING, "request failed", interval=_WARNING_INTERVAL)

    def reconfigure(self, config: ProxyConfig) -> None:
        """Have requests that begin from now on go by another configuration (S2)."""
        self.settings = HttpSettings(config)
        self.marker = Marker(config.tracing.share, self._rng, makes_ids=config.http.request_id == "make")

    # The service of a request.

    def find(self, fixed: ServiceKey | None, head: RequestHead, now: float) -> HttpService | Answer:
        """The service that a request is for, or what to answer instead.

        Args:
            fixed: what all requests of its connection are for; None: each says its own.
            head: of the request.
            now: by trio.current_time().
        """
        if head.method == b"CONNECT":
            key = self.settings.service_of_tunnel(head.host)
            if key is None or (fixed is not None and key != fixed):
                return answers.CONNECT_FORBIDDEN
        else:
            found = fixed if fixed is not None else self.settings.service_of(head.host, head.target)
            if found is None:
                return answers.UNKNOWN_HOST
            key = found
        state = self.table.demand(key, now) if fixed is None else self.table.get(key)
        if state is None:
            # Without demand: between the connection's accept and this request the config lost the service.
            return answers.TOO_MANY_SERVICES if fixed is None else answers.UNKNOWN_SERVICE
        service = self.services.get(key)
        if service is None or service.state is not state:
            if service is not None:
                service.close()
            service = self.services[key] = HttpService(state, self.settings.config, self._keep_link)
        return service

    def _keep_link(self, link: UpstreamLink) -> None:
        assert self.nursery is not None
        self.nursery.start_soon(self._serve_link, link)

    async def _serve_link(self, link: UpstreamLink) -> None:
        try:
            await link.serve()
        except Exception:  # noqa: BLE001 - a fault of ours in one connection must not take the others with it
            _log.exception("connection to an instance failed by a fault in the proxy", instance=f"{link.place}")

    def find_known(self, fixed: ServiceKey | None, head: RequestHead, now: float) -> HttpService | None:
        """What `find` gives, if the service had a request before, so that nothing has to be begun or told for it."""
        key = fixed if fixed is not None else self.settings.service_of(head.host, head.target)
        service = self.services.get(key) if key is not None else None
        if service is None or self.table.get(service.state.key) is not service.state:
            return None
        service.state.last_used = now
        return service

    # What is told.

    def report_failure(self, record: HttpRecord, answer: Answer) -> None:
        """Say, not too often, that a request failed, and what its client is told."""
        self._failed(
            trio.current_time(),
            service=record.state.key if record.state is not None else None,
            answer=answer.reason,
            request_id=record.request_id or None,
            trace_id=record.trace_id or None,
            attempts=record.attempts,
            tried=in_a_row(list(map(str, record.failures))) if record.failures else None,
            last_error=record.error or None,
            problem=str(record.problem) if record.problem is not None else None,
        )

    def report_broken(self, peer: object, problem: str) -> None:
        """Say, not too often, that an HTTP/2 connection ended because its client broke a rule or was not heard of."""
        self._broken(trio.current_time(), client=format_address(peer), problem=problem)

    def refuse(self, peer: object, answer: Answer) -> None:
        """Count and log what is no request, or never became one."""
        self.refused[answer.reason] += 1
        for observer in self.observers:
            observer.refused(peer, answer)
