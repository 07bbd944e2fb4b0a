"""The proxy's composition root: the nursery tree, from start to drain (behaviour rules L5, S1, S2).

    lifetime nursery      feed (discovery watch, or hub and file source) · admin server ·
                          health checks · gentle return · idle sweep · signals
      connections nursery   one task per client connection, and some that wait for one
        acceptors nursery     one task per listening socket

A stop cancels the acceptors, puts a deadline on the connections nursery, then
cancels the lifetime nursery. What lives in the lifetime nursery is supervised
(`meshlocal.net.supervision`, rule P1).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from random import Random
from socket import gethostname
from typing import TYPE_CHECKING, Any, Protocol

import trio

import meshlocal
from meshlocal.admin.access import AdminAccess
from meshlocal.admin.server import AdminServer, AsyncRoute, Route
from meshlocal.app.certificates import expiring_now, make_collector, make_tls, make_workload
from meshlocal.app.config_loader import UNUSED_VARIABLE, LoadConfig, unused_variables
from meshlocal.app.followed_pages import streams
from meshlocal.app.history import History
from meshlocal.app.log_page import LOG
from meshlocal.app.readiness import Readiness, tell_exposures
from meshlocal.app.signals import Stop, cancel_when_set
from meshlocal.client.feed import Refreshable
from meshlocal.client.place import LABEL_UNKNOWN, locality_of, unknown_labels
from meshlocal.client.services import ServiceTable
from meshlocal.discovery.feeds import make_feed
from meshlocal.net.blocking import BlockedError, Blocking
from meshlocal.net.descriptors import raise_limit
from meshlocal.net.following import FileProblemError, Followed, Following
from meshlocal.net.listen import ListenError, open_tcp_listeners, wanted_by
from meshlocal.net.log import configure_logging, get_log
from meshlocal.net.relay_loop import RelayLoop, open_relay_loop
from meshlocal.net.sockets import close, format_address
from meshlocal.net.supervision import DEAD_STATUS, Supervision, TaskDeadError
from meshlocal.net.unix import UnixOpening
from meshlocal.net.wall_clock import wall_clock
from meshlocal.policy.config import Config, ProxyConfig
from meshlocal.policy.config_build import ConfigError
from meshlocal.policy.config_unused import unused_keys
from meshlocal.policy.exposure import of_proxy
from meshlocal.policy.model import Caller
from meshlocal.policy.problems import Problem
from meshlocal.proxy.listeners import Listeners, Server
from meshlocal.proxy.tcp.forwarder import TcpForwarder

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

    from meshlocal.app.tracing import CollectorFiles, Exporter
    from meshlocal.client.cache import SnapshotCache
    from meshlocal.policy.model import ServiceKey
    from meshlocal.proxy.bypass.bypass import Bypass
    from meshlocal.proxy.http.forwarder import HttpForwarder
    from meshlocal.proxy.returning import Lasting
    from meshlocal.proxy.tls import PipeServer, ProxyTls, TlsServer
    from meshlocal.wire.otlp import Value

_log = get_log(__name__)

CONFIG_LIMIT = 30.0
"""Seconds that reading the configuration again may take."""

WORKLOAD_WAIT = 10.0
"""Seconds for which a proxy is not ready because it has no certificate of the Workload API yet."""

_FIXED = ("discovery", "admin", "admin_access", "workers", "bypass")
"""Keys of `proxy` that only a restart changes."""


class Superior(Protocol):
    """Whom a proxy reports to, and who tells it what to do: its operator, or the process above it."""

    async def command(self, process: ProxyProcess, *, task_status: trio.TaskStatus[None]) -> None:
        """Pass orders on, until cancelled. Started once there is nothing that an order could be lost to."""
        ...

    async def ready(self, process: ProxyProcess, admin: Sequence[str]) -> None:
        """The proxy may be sent work; it has these admin addresses."""
        ...

    def draining(self) -> None:
        """The proxy drains, and then ends (S1)."""
        ...

    def routes(self, process: ProxyProcess) -> Mapping[str, Route | AsyncRoute]:
        """The pages that the proxy itself serves."""
        ...


class ProxyProcess:
    """One running proxy.

    Args:
        load: reads the configuration: once now, and again on SIGHUP.
        rng: for cursors and backoff.
        superior: whom it reports to.
        config: what `load` gave already, if it was asked.
        worker: which of several it is that listen on the same addresses, such as `1 of 2`; empty: the only one.

    Raises:
        ConfigError: the configuration cannot be used.
    """

    def __init__(
        self,
        load: LoadConfig,
        rng: Random,
        superior: Superior,
        *,
        config: Config | None = None,
        worker: str = "",
    ) -> None:
        self._load = load
        self._superior = superior
        self.worker = worker
        self._files = Blocking(limit=CONFIG_LIMIT)
        self.supervision = Supervision(rng)
        self.config = config if config is not None else load()
        configure_logging(self.config.log.level, self.config.log.format, levels=self.config.log.levels)
        proxy = self.config.proxy
        self.services = ServiceTable(proxy, locality_of(proxy), rng)
        self.forwarder = TcpForwarder(self.services, access_log=proxy.access_log)
        self._servers: dict[str, Server] = {"tcp": self.forwarder}
        self.listeners = Listeners(self._servers, shared=bool(worker), supervision=self.supervision)
        self.http: HttpForwarder | None = None
        self.tls: ProxyTls | None = None
        self.tls_servers: dict[str, TlsServer] = {}
        self._lifetime: trio.Nursery | None = None
        self._loop: RelayLoop | None = None
        self._rng = rng
        self._checking = False
        self._returning = False
        self._following_files = False
        self.exporter: Exporter | None = None
        self._exporting = False
        self._following = Following(self.followed, partial(expiring_now, self.followed))
        self.workload = make_workload(proxy.tls.workload_api, rng)
        import_parts(proxy)
        try:
            self._use_tls(make_tls(proxy, self.workload))
            self._use_collector(make_collector(proxy))
            self.admin_access = AdminAccess(proxy.admin_access, "proxy")
        except FileProblemError as error:
            raise ConfigError([Problem("proxy", str(error), "")]) from None
        self.services.reconfigure(proxy, self.services.locality)
        self._serve_http(proxy)
        self.cache = self._open_cache(proxy)
        held = self.cache.load() if self.cache is not None else []
        if self.cache is not None:
            self.cache.try_path()
        self.feed = make_feed(
            proxy.discovery,
            self.services.keys,
            self.cache or self.services,
            rng,
            held,
            self.workload,
            self._caller(),
        )
        if self.cache is not None:
            self.cache.status = self.feed.status
        self.services.on_followed = self._follow
        self.services.is_away = lambda: not self.feed.status.connected
        if isinstance(self.feed, Refreshable):
            self.services.on_failing = self.feed.refresh
        self.history = History(lambda: self.services)
        self.bypass = self._make_bypass(proxy)
        self.readiness = Readiness("waiting for the first snapshot of every service")
        self.supervision.on_dead = lambda task, problem: self.readiness.fail(f"{task}: {problem}")
        self.stop = Stop()

    def _make_bypass(self, config: ProxyConfig) -> Bypass | None:
        if config.bypass.cgroup is None:
            return None
        # Imported here: a proxy without a bypass holds no code for it.
        from meshlocal.proxy.bypass.bypass import Bypass

        return Bypass(config.bypass.cgroup, self.services, lambda: self.listeners.current, config.bypass.pin)

    def _caller(self) -> Caller:
        """What it says of itself to discovery servers."""
        name = f"{gethostname()}, worker {self.worker}" if self.worker else gethostname()
        return Caller(name, self.services.locality.node, f"meshlocal proxy {meshlocal.__version__}")

    def collectors(self) -> list[Collector]:
        """What the metrics are made of."""
        # Imported here, as prometheus_client is large: see meshlocal.admin.metrics_page.
        from meshlocal.app.http_metrics import HttpCollector
        from meshlocal.app.process_metrics import ProcessCollector
        from meshlocal.app.proxy_metrics import ProxyCollector

        busy_poll = self._loop.busy_poll if self._loop is not None else None
        return [
            ProxyCollector(
                self.services,
                self.forwarder,
                self.listeners,
                self.feed.status,
                self.readiness,
                busy_poll,
                self.tls_servers,
                followed=self.followed,
                exposures=of_proxy(self.config.proxy) if not self.worker else None,
                each_instance=self.config.proxy.metrics.instances,
                bypass=self.bypass,
            ),
            HttpCollector(lambda: self.http, lambda: self.exporter.spans if self.exporter is not None else {}),
            ProcessCollector(self.supervision),
        ]

    def _serve_http(self, config: ProxyConfig) -> None:
        """Make what serves http listeners once there is one."""
        if self.http is not None or not any(listen.is_http for listen in config.listen):
            return
        # Imported here: a proxy without http listeners holds no HTTP code.
        from meshlocal.proxy.http.forwarder import HttpForwarder

        self.http = self._servers["http"] = HttpForwarder(self.services, config, self.supervision, self._rng)
        self._observe()
        self._serve_tls("https", self.http)
        if self._lifetime is not None:
            self._lifetime.start_soon(self.http.run)

    def _use_collector(self, files: CollectorFiles | None) -> None:
        """Have spans go to this collector from now on; None: to none."""
        if self.exporter is not None:
            self.exporter.use(files)
        elif files is not None:
            # Imported here: a proxy without tracing holds no code for it.
            from meshlocal.app.tracing import Exporter

            self.exporter = Exporter(files, self._resource(), meshlocal.__version__, self._rng, wall_clock)

    def _resource(self) -> dict[str, Value]:
        """What spans say of this process."""
        caller = self._caller()
        instance = f"{caller.name}, process {os.getpid()}"
        found: dict[str, Value] = {"service.version": meshlocal.__version__, "service.instance.id": instance}
        return {**found, "host.name": gethostname(), "meshlocal.node": caller.node}

    def _observe(self) -> None:
        """Have the exporter told of HTTP requests that are traced, once there are both."""
        if self.exporter is not None and self.http is not None:
            self.http.shared.traced = self.exporter.ended

    def _export(self, lifetime: trio.Nursery) -> None:
        """Export spans from now on, once there are some."""
        if self.exporter is not None and not self._exporting:
            self._exporting = True
            lifetime.start_soon(self.supervision.keep, "tracing", self.exporter.run)

    def _use_tls(self, tls: ProxyTls | None) -> None:
        """Have what is connected from now on speak TLS as this says, once the services are configured again."""
        self.tls = tls
        self.services.security_of = tls.security if tls is not None else lambda key: None
        self._serve_tls("tls", self.forwarder)
        if self.http is not None:
            self._serve_tls("https", self.http)

    def _serve_tls(self, scheme: str, inner: PipeServer) -> None:
        """Have what serves listeners of a kind go by the configuration, once there is one."""
        listening = self.tls.listeners.get(scheme) if self.tls is not None else None
        if listening is None:
            return
        # Imported here: a proxy without TLS holds no code for it.
        from meshlocal.proxy.tls import TlsServer

        server = self.tls_servers.get(scheme)
        if server is not None:
            server.tls = listening
        else:
            self._servers[scheme] = self.tls_servers[scheme] = TlsServer(listening, inner)

    def followed(self) -> Iterator[Followed[Any]]:
        """What is made of files (T3)."""
        yield from self.admin_access.followed()
        if self.tls is not None:
            yield from self.tls.followed()
        if self.exporter is not None and self.exporter.files is not None:
            yield from self.exporter.files.followed()

    def _follow_files(self, lifetime: trio.Nursery) -> None:
        """Follow the files of certificates and tokens from now on, once there are some."""
        if self._following_files or not any(True for _ in self.followed()):
            return
        self._following_files = True
        lifetime.start_soon(self.supervision.keep, "files", self._following.run)

    def _open_cache(self, config: ProxyConfig) -> SnapshotCache | None:
        # An instances file is there after a restart as it was before.
        urls = config.discovery.urls
        if config.discovery.cache_file is None or not urls or urls[0].scheme == "file":
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
        lifetime.start_soon(self.supervision.keep, "health checks", HealthChecks(self.services, self._rng).run)

    def _return_connections(self, lifetime: trio.Nursery, config: ProxyConfig) -> None:
        """Send long-lived connections back from now on, once there is a service that wants it (F2)."""
        if self._returning or all(service.failback is None for service in config.services.values()):
            return
        # Imported here, likewise.
        from meshlocal.proxy.returning import Returning

        self._returning = True
        returning = Returning(self.services, self._lasting, self._rng)
        lifetime.start_soon(self.supervision.keep, "gentle return", returning.run)

    def _lasting(self) -> Iterator[Lasting]:
        yield from self.forwarder
        if self.http is not None:
            yield from self.http.streams()

    def _set_busy_poll(self, config: ProxyConfig) -> None:
        if self._loop is not None:
            self._loop.busy_poll.limit = config.busy_poll * 1e-6

    async def run(self) -> int:
        """Serve until told to stop; returns the exit status, 0 if no connection was cut.

        Raises:
            ListenError: an address cannot be listened on.
        """
        dead = False
        cut = 0
        try:
            cut = await self._run()
        except* TaskDeadError:
            dead = True
        return DEAD_STATUS if dead else 1 if cut else 0

    async def _run(self) -> int:
        raise_limit()
        with ExitStack() as opened:
            self._loop = opened.enter_context(open_relay_loop())
            config = self.config.proxy
            self._set_busy_poll(config)
            with wanted_by("proxy.admin"):
                admin_sockets = [] if config.admin is None else open_tcp_listeners(config.admin.host, config.admin.port)
            for sock in admin_sockets:
                opened.callback(close, sock)
            opening = UnixOpening(self.listeners.paths(config))
            opened.callback(opening.give_up)
            opening.open()
            self.listeners.adopt(self.listeners.prepare(config, opening.opened), config)
            opening.give_away()
            for listener in self.listeners.current:
                opened.callback(listener.close)
                if listener.file is not None:
                    # Its acceptor does, but for one that never began.
                    opened.callback(listener.file.remove)
            self._tell_unknown_labels()
            routes = self._superior.routes(self)
            admin = AdminServer(routes, self.admin_access, streams=streams(routes), changing=[LOG])
            tell_exposures(of_proxy(config))
            async with trio.open_nursery() as lifetime:
                self._lifetime = lifetime
                if self.http is not None:
                    lifetime.start_soon(self.http.run)
                await lifetime.start(self._take_orders)
                keep = self.supervision.keep
                if self._loop is not None:
                    lifetime.start_soon(self._watch_loop, self._loop)
                if self.cache is not None:
                    lifetime.start_soon(keep, "cache file", self.cache.run)
                lifetime.start_soon(keep, "discovery", self.feed.run)
                lifetime.start_soon(partial(keep, "idle sweep", self.forwarder.sweep_idle, vital=True))
                self._check_health(lifetime, config)
                self._return_connections(lifetime, config)
                self._follow_files(lifetime)
                self._export(lifetime)
                if self.bypass is not None:
                    lifetime.start_soon(keep, "bypass", self.bypass.run)
                if self.workload is not None:
                    self.workload.on_update = self._following.look
                    lifetime.start_soon(keep, "workload api", self.workload.run)
                if admin_sockets or self.worker:
                    lifetime.start_soon(keep, "history", self.history.run)
                if admin_sockets:
                    lifetime.start_soon(keep, "admin server", partial(admin.serve, admin_sockets))
                bound = [format_address(sock.getsockname()) for sock in admin_sockets]
                lifetime.start_soon(partial(keep, "readiness", self._become_ready, bound, may_end=True))
                cut = await self._serve_connections(lifetime)
                lifetime.cancel_scope.cancel()
            if self.exporter is not None and not self.stop.now.is_set():
                await self.exporter.flush()
        return cut

    async def _take_orders(self, *, task_status: trio.TaskStatus[None]) -> None:
        command = partial(self._superior.command, self)
        await self.supervision.start("orders", command, task_status=task_status)

    async def _watch_loop(self, loop: RelayLoop) -> None:
        """Established connections and accepts live in the relay loop: when it is dead, the process is (P1)."""
        await loop.died.wait()
        self.supervision.die("relay loop", loop.problem)

    async def _serve_connections(self, lifetime: trio.Nursery) -> int:
        """Serve until the drain is over; returns how many connections it cut."""
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as acceptors:
                self.listeners.start(acceptors, connections)
                await self.stop.requested.wait()
                drain = self.config.proxy.drain
                self.readiness.drain()
                self._superior.draining()
                with trio.move_on_after(drain.delay):
                    await self.stop.now.wait()
                acceptors.cancel_scope.cancel()
                if self.bypass is not None:
                    self.bypass.drain()
                if self.http is not None:
                    self.http.drain()
            connections.cancel_scope.deadline = trio.current_time() + drain.timeout
            lifetime.start_soon(cancel_when_set, self.stop.now, connections.cancel_scope)
        cut = self.forwarder.drained + (self.http.shared.drained if self.http is not None else 0)
        if cut:
            _log.warning("connections cut at the end of the drain", count=cut)
        return cut

    async def _become_ready(self, admin: list[str]) -> None:
        start = trio.current_time()
        if self.workload is not None:
            with trio.move_on_at(start + WORKLOAD_WAIT):
                await self.workload.arrived.wait()
        for service in list(self.services):
            with trio.move_on_at(start + service.policy.first_snapshot_wait):
                await service.first_snapshot.wait()
        self.readiness.set_ready()
        await self._superior.ready(self, admin)

    def _tell_unknown_labels(self) -> None:
        if self.services.is_selecting:
            for line in unknown_labels(self.services.locality, "proxy."):
                _log.warning(LABEL_UNKNOWN, problem=line)

    def standing(self) -> tuple[list[str], list[str]]:
        """What the line says that announces the proxy: what it is and serves, and what is to be noted of it."""
        node = self.services.locality.node or "unknown"
        parts = [f"meshlocal proxy ready: node={node}"]
        for listener in self.listeners.current:
            scheme = listener.configured.scheme
            service_part = f"={listener.service}" if listener.service is not None else ""
            parts += [f"{scheme}://{bound}{service_part}" for bound in listener.bound]
        notes = ["(from the cache file)"] if self.feed.status.stale else []
        if waiting := self.services.waiting():
            notes.append(f"(nothing heard yet of: {', '.join(waiting)})")
        return parts, notes

    async def reload(self) -> None:
        """Read the configuration again and apply it, whole or not at all (S2)."""
        config, problems = await read_again(self._files, self._load, self.config, self.stop)
        if config is not None:
            problems = await self.import_and_apply(config)
        for problem in problems:
            _log.error("config not applied", problem=problem)

    async def import_and_apply(self, config: Config) -> list[str]:
        """`apply`, after what the configuration needs was imported: an import reads files, and so may hang (P1)."""
        try:
            await self._files.run(import_parts, config.proxy)
            tls = await self._files.run(make_tls, config.proxy, self.workload)
            collector = await self._files.run(make_collector, config.proxy)
        except (BlockedError, FileProblemError) as error:
            return [str(error)]
        opening = UnixOpening(self.listeners.paths(config.proxy))
        try:
            await self._files.run(opening.open)
            return self.apply(config, tls, collector, opening)
        except (BlockedError, ListenError) as error:
            return [str(error)]
        finally:
            left = opening.leave()
            with trio.CancelScope(shield=True), suppress(BlockedError):
                for file in left:
                    await self._files.run(file.remove)

    def apply(
        self, config: Config, tls: ProxyTls | None, collector: CollectorFiles | None, opening: UnixOpening
    ) -> list[str]:
        """Apply a configuration that `read_again` let pass; returns what prevents it, empty if it holds now.

        Args:
            config: the configuration.
            tls: made of its files.
            collector: likewise.
            opening: its new Unix sockets, which are open.
        """
        if self.stop.requested.is_set():
            return ["draining"]
        proxy = config.proxy
        try:
            prepared = self.listeners.prepare(proxy, opening.opened)
        except ListenError as error:
            return [str(error)]
        self.config = config
        configure_logging(config.log.level, config.log.format, levels=config.log.levels)
        before = self.services.locality
        self._use_tls(tls)
        self._use_collector(collector)
        self.services.reconfigure(proxy, locality_of(proxy))
        if self.services.locality.unknown != before.unknown:
            self._tell_unknown_labels()
        if self.http is not None:
            self.http.reconfigure(proxy)
        self._serve_http(proxy)
        self._observe()
        if self._lifetime is not None:
            self._check_health(self._lifetime, proxy)
            self._return_connections(self._lifetime, proxy)
            self._follow_files(self._lifetime)
            self._export(self._lifetime)
        self.listeners.adopt(prepared, proxy)
        opening.give_away()
        if self.bypass is not None:
            self.bypass.wake()
        self.forwarder.access_log = proxy.access_log
        self._set_busy_poll(proxy)
        self._follow(self.services.keys)
        bound = [address for listener in self.listeners.current for address in listener.bound]
        _log.info("config applied", listeners=",".join(bound), services=",".join(self.services.keys))
        return []


async def read_again(files: Blocking, load: LoadConfig, current: Config, stop: Stop) -> tuple[Config | None, list[str]]:
    """Read the configuration again: what came of it, or why it cannot be applied (S2)."""
    if stop.requested.is_set():
        return None, ["draining"]
    try:
        config = await files.run(load)
    except ConfigError as error:
        return None, [str(problem) for problem in error.problems]
    except BlockedError as error:
        return None, [str(error)]
    if stop.requested.is_set():
        return None, ["draining"]
    tell_unused(config.proxy, os.environ)
    changed = [key for key in _FIXED if getattr(config.proxy, key) != getattr(current.proxy, key)]
    if config.proxy.tls.workload_api != current.proxy.tls.workload_api:
        changed.append("tls.workload_api")
    if changed:
        names = ", ".join(f"proxy.{key}" for key in changed)
        return None, [f"{names}: {'takes' if len(changed) == 1 else 'take'} a restart to change"]
    return config, []


def tell_unused(config: ProxyConfig, environment: Mapping[str, str]) -> None:
    """Say what was given and does nothing: most likely it is misspelt."""
    for name in unused_variables(environment):
        _log.warning("environment variable has no use", problem=UNUSED_VARIABLE.format(name))
    for line in unused_keys(config):
        _log.warning("configuration key has no use", problem=line)


def import_parts(config: ProxyConfig) -> None:
    """Import what this configuration needs, and others do not."""
    if any(listen.is_http for listen in config.listen):
        import meshlocal.proxy.http.forwarder
    if any(service.health_check is not None for service in config.services.values()):
        import meshlocal.proxy.checks

        meshlocal.proxy.checks.import_checkers(config)
    if any(service.failback is not None for service in config.services.values()):
        import meshlocal.proxy.returning
    if config.tracing.endpoint is not None:
        import meshlocal.app.tracing
    if config.bypass.cgroup is not None:
        import meshlocal.proxy.bypass.bypass


def freeze_garbage_collector() -> None:
    """What was made so far stays for ever: the collector's pauses, which stop all traffic, need not go through it."""
    gc.collect()
    gc.freeze()
