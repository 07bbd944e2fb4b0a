"""The proxy's listeners: opened together, changed without losing one that stays (behaviour rule S2)."""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Protocol

import trio

from meshlocal.client.services import ServiceTable
from meshlocal.net.descriptors import connections_ceiling
from meshlocal.net.listen import Started, Take, accept_each, accept_queued, open_tcp_listeners, wanted_by
from meshlocal.net.log import RateLimited, get_log
from meshlocal.net.sockets import abort, close, format_address
from meshlocal.net.supervision import Supervision
from meshlocal.policy.addresses import ListenAddress
from meshlocal.policy.config import ProxyConfig
from meshlocal.policy.model import ServiceKey
from meshlocal.proxy.tcp.forwarder import TcpForwarder

_log = get_log(__name__)
_ERROR_INTERVAL = 5.0


class HttpServer(Protocol):
    """What serves the connections of http listeners: an interface, so that a proxy without any loads no HTTP code."""

    async def serve(self, service: ServiceKey | None, client: socket.socket, peer: object) -> None:
        """Serve one connection to its end. `service` is None if each request says its own."""
        ...

    def shed(self) -> None:
        """Close what is idle: descriptors ran out."""
        ...


class Listener:
    """One configured listener: one socket, or two for `localhost`.

    Attributes:
        configured: as the config has it.
        service: the registry's name of its service; None if it routes each request.
        accept_errors: how often the system could not give another connection.
    """

    def __init__(self, configured: ListenAddress, service: ServiceKey | None, sockets: Sequence[socket.socket]) -> None:
        self.configured = configured
        self.service = service
        self.sockets = sockets
        self.accept_errors = 0
        self.accepting = trio.CancelScope()
        self._report = RateLimited(_log, logging.ERROR, "cannot accept; trying again", interval=_ERROR_INTERVAL)

    @property
    def bound(self) -> list[str]:
        """The addresses that it listens on, with the ports that the system chose."""
        return [format_address(sock.getsockname()) for sock in self.sockets]

    def on_accept_error(self, error: OSError) -> None:
        """Count and report that descriptors or memory ran out."""
        self.accept_errors += 1
        self._report(
            trio.current_time(), listener=self.bound[0], problem=os.strerror(error.errno or 0), service=self.service
        )

    def close(self) -> None:
        """Close the sockets. Only once nothing accepts on them."""
        for sock in self.sockets:
            close(sock)


class Listeners:
    """All listeners, and their acceptors.

    Args:
        services: where a listener's service is looked up for each connection.
        forwarder: serves the connections of tcp listeners.
        http: serves those of http listeners; may be set later, before there are any.
        shared: other processes listen on the same addresses (see `open_tcp_listeners`).
        supervision: of the acceptors, which are vital.
    """

    def __init__(
        self,
        services: ServiceTable,
        forwarder: TcpForwarder,
        http: HttpServer | None = None,
        *,
        shared: bool = False,
        supervision: Supervision | None = None,
    ) -> None:
        self._supervision = supervision or Supervision(random.Random())
        self._services = services
        self._shared = shared
        self._forwarder = forwarder
        self.http = http
        self._nurseries: tuple[trio.Nursery, trio.Nursery] | None = None
        self.current: list[Listener] = []

    def prepare(self, config: ProxyConfig) -> list[Listener]:
        """Open what `config` has and the current listeners have not; `adopt` takes the result.

        A listener whose address stays keeps its sockets, whatever its service. Where several have the same address (on
        port 0), those go on that have the same service, too.

        Raises:
            ListenError: an address cannot be listened on. Nothing is left open, and the current listeners go on.
        """
        kept = keep(self.current, config)
        prepared: list[Listener] = []
        try:
            for position, (configured, there) in enumerate(zip(config.listen, kept, strict=True)):
                if there is None:
                    with wanted_by(f"proxy.listen[{position}]"):
                        sockets = open_tcp_listeners(configured.host, configured.port, shared=self._shared)
                    there = Listener(configured, service_key(config, configured), sockets)
                prepared.append(there)
        except BaseException:
            self.discard(prepared)
            raise
        return prepared

    def discard(self, prepared: Iterable[Listener]) -> None:
        """Close what `prepare` opened and nobody adopted."""
        for listener in prepared:
            if listener not in self.current:
                listener.close()

    def adopt(self, prepared: Sequence[Listener], config: ProxyConfig) -> None:
        """Make what `prepare` returned for `config` the current listeners: accept on the new, stop the rest.

        Connections that were accepted go on.
        """
        before, self.current = self.current, list(prepared)
        for listener in before:
            if listener not in prepared:
                listener.accepting.cancel()
        for listener, configured in zip(prepared, config.listen, strict=True):
            listener.configured = configured
            listener.service = service_key(config, configured)
            if listener not in before:
                self._start(listener)

    def start(self, acceptors: trio.Nursery, connections: trio.Nursery) -> None:
        """Accept on the current listeners, and on each that is adopted later.

        Args:
            acceptors: the nursery of the accept loops; its cancellation closes the listeners.
            connections: the nursery of the connections, which outlives them.
        """
        self._nurseries = acceptors, connections
        for listener in self.current:
            self._start(listener)

    def _start(self, listener: Listener) -> None:
        if self._nurseries is not None:
            self._nurseries[0].start_soon(self._accept, listener, self._nurseries[1])

    async def _accept(self, listener: Listener, connections: trio.Nursery) -> None:
        take = partial(self._take, listener, connections)
        with self._forwarder.keeping_tasks():
            try:
                with listener.accepting:
                    async with trio.open_nursery() as nursery:
                        for sock in listener.sockets:
                            accept = partial(self._accept_on, listener, sock, take)
                            name = f"accept on {listener.bound[0]}"
                            nursery.start_soon(partial(self._supervision.keep, name, accept, vital=True))
            finally:
                # Their clients know no better than that they are connected.
                for sock in listener.sockets:
                    accept_queued(sock, take)
                listener.close()

    async def _accept_on(self, listener: Listener, sock: socket.socket, take: Take) -> None:
        try:
            await accept_each(sock, take, on_error=partial(self._on_full, listener), ceiling=connections_ceiling())
        except OSError as error:
            # The socket is of no use any more, and would be of none to who began again with it.
            self._supervision.die(f"accept on {listener.bound[0]}", os.strerror(error.errno or 0))

    def _on_full(self, listener: Listener, error: OSError) -> None:
        listener.on_accept_error(error)
        if self.http is not None:
            self.http.shed()

    def _take(self, listener: Listener, connections: trio.Nursery, client: socket.socket, peer: object) -> Started:
        """See `meshlocal.net.listen.Take`."""
        if listener.configured.scheme == "http" and self.http is not None:
            connections.start_soon(self.http.serve, listener.service, client, peer)
            return Started.NOW
        service = self._services.get(listener.service) if listener.service is not None else None
        if service is None:
            # The config lost the service, and its listeners are about to go.
            abort(client)
            return Started.NOTHING
        return self._forwarder.take(connections, service, client, peer)


def keep(current: Sequence[Listener], config: ProxyConfig) -> list[Listener | None]:
    """For each of the config's listeners the current one that goes on as it, if any."""
    left = list(current)

    def take(configured: ListenAddress, *, same_service: bool) -> Listener | None:
        for listener in left:
            before = listener.configured
            if (before.host, before.port) != (configured.host, configured.port):
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
