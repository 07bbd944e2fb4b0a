"""The proxy's listeners: opened together, changed without losing one that stays (behaviour rule S2)."""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from types import MappingProxyType
from typing import Protocol

import trio

from meshlocal.net.blocking import BlockedError, Blocking
from meshlocal.net.descriptors import connections_ceiling
from meshlocal.net.listen import Started, Take, accept_each, accept_queued, open_tcp_listeners, wanted_by
from meshlocal.net.log import RateLimited, get_log
from meshlocal.net.supervision import Supervision
from meshlocal.net.unix import OpenUnix, UnixFile
from meshlocal.policy.addresses import ListenAddress
from meshlocal.policy.config import ProxyConfig
from meshlocal.policy.model import ServiceKey
from meshlocal.proxy.bound import BoundAddress, keep, service_key

_log = get_log(__name__)
_ERROR_INTERVAL = 5.0


_REMOVAL = 1.0
"""Seconds that the removal of a socket's file is waited for."""


class Server(Protocol):
    """What serves the connections of one kind of listeners.

    An interface, so that a proxy without listeners of a kind loads no code for it.
    """

    def take(
        self, connections: trio.Nursery, service: ServiceKey | None, client: socket.socket, peer: object
    ) -> Started:
        """Serve an accepted connection to its end, by which its socket is closed or reset.

        Args:
            connections: where its task lives.
            service: what it is for; None if each of its requests says its own.
            client: its socket.
            peer: the client's address.

        Returns:
            What Trio has to do for it now.
        """
        ...

    def accepting(self) -> AbstractContextManager[None]:
        """Entered for as long as there may be more connections."""
        ...

    def shed(self) -> None:
        """Close what is idle: descriptors ran out."""
        ...


class Listener(BoundAddress):
    """One configured listener.

    Args:
        configured: as the config has it.
        service: the registry's name of its service; None if each request says its own.
        sockets: that listen on its address.
        file: of its Unix socket; None: it has none.

    Attributes:
        server: serves its connections; None until it is adopted.
        accept_errors: how often the system could not give another connection.
        accepting: its cancellation ends the accept loops.
    """

    def __init__(
        self,
        configured: ListenAddress,
        service: ServiceKey | None,
        sockets: Sequence[socket.socket],
        file: UnixFile | None = None,
    ) -> None:
        super().__init__(configured, service, sockets, file)
        self.server: Server | None = None
        self.accept_errors = 0
        self.accepting = trio.CancelScope()
        self._report = RateLimited(_log, logging.ERROR, "cannot accept; trying again", interval=_ERROR_INTERVAL)

    def resolve(self, client: socket.socket, peer: object) -> ServiceKey | None:
        """What an accepted connection is for; None if each of its requests says its own.

        A step of its own: a listener that intercepts connections looks here where they were to go.
        """
        return self.service

    def take(self, connections: trio.Nursery, client: socket.socket, peer: object) -> Started:
        """Have an accepted connection served; see `meshlocal.net.listen.Take`."""
        assert self.server is not None
        return self.server.take(connections, self.resolve(client, peer), client, peer)

    def on_accept_error(self, error: OSError) -> None:
        """Count and report that descriptors or memory ran out."""
        self.accept_errors += 1
        self._report(
            trio.current_time(), listener=self.bound[0], problem=os.strerror(error.errno or 0), service=self.service
        )


class Listeners:
    """All listeners, and their acceptors.

    Args:
        servers: what serves each kind of listener, by the scheme of its address; one may be added before there is a
            listener of its kind.
        shared: other processes listen on the same addresses (see `open_tcp_listeners`).
        supervision: of the acceptors, which are vital.
    """

    def __init__(
        self,
        servers: Mapping[str, Server],
        *,
        shared: bool = False,
        supervision: Supervision | None = None,
    ) -> None:
        self._supervision = supervision or Supervision(random.Random())
        self._servers = servers
        self._shared = shared
        self._nurseries: tuple[trio.Nursery, trio.Nursery] | None = None
        self.current: list[Listener] = []

    def paths(self, config: ProxyConfig) -> list[tuple[str, str, UnixFile | None]]:
        """The Unix sockets of `config`: keys of the configuration, paths, and the files of listeners that have them.

        Who prepares opens those that are not there before, as the file system may block.
        """
        return [
            (f"proxy.listen[{position}]", configured.path, there.file if there is not None else None)
            for position, (configured, there) in enumerate(zip(config.listen, keep(self.current, config), strict=True))
            if configured.path
        ]

    def prepare(self, config: ProxyConfig, opened: Mapping[str, OpenUnix] = MappingProxyType({})) -> list[Listener]:
        """Open what `config` has and the current listeners have not; `adopt` takes the result.

        A listener whose address stays keeps its sockets, whatever its service. Where several have the same address (on
        port 0), those go on that have the same service, too.

        Args:
            config: what is to be listened on.
            opened: the sockets of `paths` that were not there, by path.

        Raises:
            ListenError: an address cannot be listened on. Nothing is left open but `opened`, and the current listeners
                go on.
        """
        kept = keep(self.current, config)
        prepared: list[Listener] = []
        try:
            for position, (configured, there) in enumerate(zip(config.listen, kept, strict=True)):
                if there is None or configured.path in opened:
                    with wanted_by(f"proxy.listen[{position}]"):
                        there = self._open(configured, service_key(config, configured), opened)
                prepared.append(there)
        except BaseException:
            self.discard(prepared)
            raise
        return prepared

    def _open(self, configured: ListenAddress, service: ServiceKey | None, opened: Mapping[str, OpenUnix]) -> Listener:
        if configured.path:
            sock, file = opened[configured.path]
            return Listener(configured, service, [sock], file)
        sockets = open_tcp_listeners(configured.host, configured.port, shared=self._shared)
        return Listener(configured, service, sockets)

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
            listener.reconfigure(config, configured)
            listener.server = self._servers[configured.scheme]
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
        take = partial(listener.take, connections)
        with ExitStack() as stack:
            # All of them: another configuration may give the listener another server.
            for server in self._servers.values():
                stack.enter_context(server.accepting())
            try:
                with listener.accepting:
                    async with trio.open_nursery() as nursery:
                        for sock in listener.sockets:
                            accept = partial(self._accept_on, listener, sock, take)
                            name = f"accept on {listener.bound[0]}"
                            nursery.start_soon(partial(self._supervision.keep, name, accept, vital=True))
            finally:
                if listener.file is not None:
                    await _remove(listener.file)
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
        for server in self._servers.values():
            server.shed()


async def _remove(file: UnixFile) -> None:
    """Remove a socket's file, so that nobody connects there any more; one that hangs is left."""
    with trio.CancelScope(shield=True), suppress(BlockedError):
        await Blocking(limit=_REMOVAL).run(file.remove)
