"""The proxy's composition root: the nursery tree, from start to drain (behaviour rules L5, S1, S2).

    lifetime nursery      feed (discovery watch, or hub and file source) · admin server ·
                          health checks · gentle return · idle sweep · signals
      connections nursery   one task per client connection
        acceptors nursery     one task per listening socket

A stop cancels the acceptors, puts a deadline on the connections nursery, then
cancels the lifetime nursery.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import trio

from meshlocal.admin.server import AdminServer
from meshlocal.app.proxy_pages import proxy_routes
from meshlocal.app.readiness import Readiness, announce, notify_service_manager
from meshlocal.app.signals import Stop, cancel_when_set, handle_signals
from meshlocal.client.feed import Refreshable
from meshlocal.client.place import locality_of
from meshlocal.client.services import ServiceTable
from meshlocal.discovery.feeds import make_feed
from meshlocal.net.descriptors import raise_limit
from meshlocal.net.listen import ListenError, open_tcp_listeners
from meshlocal.net.log import configure_logging, get_log
from meshlocal.net.relay_loop import open_relay_loop
from meshlocal.net.sockets import close, format_address
from meshlocal.policy.config import Config, ProxyConfig
from meshlocal.policy.config_build import ConfigError
from meshlocal.proxy.listeners import Listeners
from meshlocal.proxy.tcp import TcpForwarder

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

    from meshlocal.client.cache import SnapshotCache
    from meshlocal.policy.model import ServiceKey
    from meshlocal.proxy.http.forwarder import HttpForwarder

_log = get_log(__name__)

LoadConfig = Callable[[], Config]
"""Reads the whole configuration; raises ConfigError."""

_FIXED = ("discovery", "admin")
"""Sections of `proxy` that only a restart changes."""


class ProxyProcess:
    """One running proxy.

    Args:
        load: reads the configuration: once now, and again on SIGHUP.
        rng: for cursors and backoff.
        environment: for the service manager's socket.

    Raises:
        ConfigError: the configuration cannot be used.
    """

    def __init__(self, load: LoadConfig, rng: Random, environment: Mapping[str, str]) -> None:
        self._load = load
        self._environment = environment
        self.config = load()
        configure_logging(self.config.log.level, self.config.log.format)
        proxy = self.config.proxy
        self.services = ServiceTable(proxy, locality_of(proxy), rng)
        self.forwarder = TcpForwarder(self.services, access_log=proxy.access_log)
        self.listeners = Listeners(self.services, self.forwarder)
        self.http: HttpForwarder | None = None
        self._lifetime: trio.Nursery | None = None
        self._rng = rng
        self._checking = False
        self._returning = False
        self._serve_http(proxy)
        self.cache = self._open_cache(proxy)
        held = self.cache.load() if self.cache is not None else []
        self.feed = make_feed(proxy.discovery, self.services.keys, self.cache or self.services, rng, held)
        if self.cache is not None:
            self.cache.status = self.feed.status
        self.services.on_followed = self._follow
        if isinstance(self.feed, Refreshable):
            self.services.on_failing = self.feed.refresh
        self.readiness = Readiness("waiting for the first snapshot of every service")
        self.stop = Stop()

    def collectors(self) -> list[Collector]:
        """What the metrics are made of."""
        # Imported here, as prometheus_client is large: see meshlocal.admin.metrics_page.
        from meshlocal.app.http_metrics import HttpCollector
        from meshlocal.app.process_metrics import ProcessCollector
        from meshlocal.app.proxy_metrics import ProxyCollector

        return [
            ProxyCollector(self.services, self.forwarder, self.listeners, self.feed.status, self.readiness),
            HttpCollector(lambda: self.http),
            ProcessCollector(),
        ]

    def _serve_http(self, config: ProxyConfig) -> None:
        """Make what serves http listeners once there is one."""
        if self.http is not None or all(listen.scheme != "http" for listen in config.listen):
            return
        # Imported here: a proxy without http listeners holds no HTTP code.
        from meshlocal.proxy.http.forwarder import HttpForwarder

        self.http = self.listeners.http = HttpForwarder(self.services, config)
        if self._lifetime is not None:
            self._lifetime.start_soon(self.http.run)

    def _open_cache(self, config: ProxyConfig) -> SnapshotCache | None:
        if config.discovery.cache_file is None:
            return None
        # Imported here: most proxies have no cache file.
        from meshlocal.client.cache import SnapshotCache

        return SnapshotCache(Path(config.discovery.cache_file), self.services, lambda: self.services.keys)

    def _follow(self, services: list[ServiceKey]) -> None:
        if self.cache is not None and self.cache.recall(services):
            self.cache.mark_stale()
        self.feed.follow(services)

    def _check_health(self, lifetime: trio.Nursery, config: ProxyConfig) -> None:
        """Check instances from now on, once there is a service that wants it (H3)."""
        if self._checking or all(service.health_check is None for service in config.services.values()):
            return
        # Imported here: a proxy without checks holds no code for them.
        from meshlocal.proxy.checks import HealthChecks

        self._checking = True
        lifetime.start_soon(HealthChecks(self.services, self._rng).run)

    def _return_connections(self, lifetime: trio.Nursery, config: ProxyConfig) -> None:
        """Send long-lived connections back from now on, once there is a service that wants it (F2)."""
        if self._returning or all(service.failback is None for service in config.services.values()):
            return
        # Imported here, likewise.
        from meshlocal.proxy.returning import Returning

        self._returning = True
        lifetime.start_soon(Returning(self.services, self.forwarder, self._rng).run)

    async def run(self) -> int:
        """Serve until told to stop; returns the exit status, 0 if no connection was cut.

        Raises:
            ListenError: an address cannot be listened on.
        """
        raise_limit()
        with ExitStack() as opened:
            opened.enter_context(open_relay_loop())
            config = self.config.proxy
            admin_sockets = [] if config.admin is None else open_tcp_listeners(config.admin.host, config.admin.port)
            for sock in admin_sockets:
                opened.callback(close, sock)
            self.listeners.adopt(self.listeners.prepare(config), config)
            for listener in self.listeners.current:
                opened.callback(listener.close)
            if self.services.node_unknown:
                _log.warning("the node is unknown: no instance counts as local; set NODE_NAME, or proxy.node_name")
            admin = AdminServer(proxy_routes(self))
            async with trio.open_nursery() as lifetime:
                self._lifetime = lifetime
                if self.http is not None:
                    lifetime.start_soon(self.http.run)
                await lifetime.start(handle_signals, self.stop, self.reload)
                if self.cache is not None:
                    lifetime.start_soon(self.cache.run)
                lifetime.start_soon(self.feed.run)
                lifetime.start_soon(self.forwarder.sweep_idle)
                self._check_health(lifetime, config)
                self._return_connections(lifetime, config)
                if admin_sockets:
                    await lifetime.start(admin.serve, admin_sockets)
                lifetime.start_soon(self._become_ready, [format_address(sock.getsockname()) for sock in admin_sockets])
                cut = await self._serve_connections(lifetime)
                lifetime.cancel_scope.cancel()
        return 1 if cut else 0

    async def _serve_connections(self, lifetime: trio.Nursery) -> int:
        """Serve until the drain is over; returns how many connections it cut."""
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as acceptors:
                self.listeners.start(acceptors, connections)
                await self.stop.requested.wait()
                drain = self.config.proxy.drain
                self.readiness.drain()
                notify_service_manager(self._environment, "STOPPING=1")
                with trio.move_on_after(drain.delay):
                    await self.stop.now.wait()
                acceptors.cancel_scope.cancel()
                if self.http is not None:
                    self.http.drain()
            connections.cancel_scope.deadline = trio.current_time() + drain.timeout
            lifetime.start_soon(cancel_when_set, self.stop.now, connections.cancel_scope)
        cut = self.forwarder.drained + (self.http.drained if self.http is not None else 0)
        if cut:
            _log.warning("connections cut at the end of the drain", count=cut)
        return cut

    async def _become_ready(self, admin: list[str]) -> None:
        start = trio.current_time()
        for service in list(self.services):
            with trio.move_on_at(start + service.policy.first_snapshot_wait):
                await service.first_snapshot.wait()
        self.readiness.set_ready()
        node = self.services.locality.node or "unknown"
        parts = [f"meshlocal proxy ready: node={node}"]
        for listener in self.listeners.current:
            scheme = listener.configured.scheme
            service_part = f"={listener.service}" if listener.service is not None else ""
            parts += [f"{scheme}://{bound}{service_part}" for bound in listener.bound]
        parts += [f"admin=http://{bound}" for bound in admin]
        if self.feed.status.stale:
            parts.append("(from the cache file)")
        if waiting := self.services.waiting():
            parts.append(f"(nothing heard yet of: {', '.join(waiting)})")
        announce(" ".join(parts))
        notify_service_manager(self._environment, "READY=1")

    def reload(self) -> None:
        """Read the configuration again and apply it, whole or not at all (S2)."""
        if self.stop.requested.is_set():
            # Nothing new is listened on any more, and what is under way ends as it began.
            _log.error("config not applied", problem="draining")
            return
        try:
            config = self._load()
            proxy = config.proxy
            changed = [key for key in _FIXED if getattr(proxy, key) != getattr(self.config.proxy, key)]
            if changed:
                names = ", ".join(f"proxy.{key}" for key in changed)
                _log.error("config not applied", problem=f"{names}: takes a restart to change")
                return
            prepared = self.listeners.prepare(proxy)
        except ConfigError as error:
            for problem in error.problems:
                _log.error("config not applied", problem=str(problem))
            return
        except ListenError as error:
            _log.error("config not applied", problem=f"proxy.listen: {error}")
            return
        self.config = config
        configure_logging(config.log.level, config.log.format)
        self.services.reconfigure(proxy, locality_of(proxy))
        if self.http is not None:
            self.http.reconfigure(proxy)
        self._serve_http(proxy)
        if self._lifetime is not None:
            self._check_health(self._lifetime, proxy)
            self._return_connections(self._lifetime, proxy)
        self.listeners.adopt(prepared, proxy)
        self.forwarder.access_log = proxy.access_log
        self._follow(self.services.keys)
        bound = [address for listener in self.listeners.current for address in listener.bound]
        _log.info("config applied", listeners=",".join(bound), services=",".join(self.services.keys))


def run_proxy(load: LoadConfig) -> int:
    """Run a proxy in this process; returns its exit status.

    Raises:
        ConfigError: the configuration cannot be used.
        ListenError: an address cannot be listened on.
    """
    process = ProxyProcess(load, Random(), os.environ)
    # What was made so far stays for ever: the collector's pauses, which stop all traffic, need not go through it.
    gc.collect()
    gc.freeze()
    return trio.run(process.run)
