"""The discovery server's composition root (behaviour rules D3, D4, S1, S2).

    lifetime nursery      hub (one task per source) · admin server · health · signals
      servers               one task per listening socket, one per connection, one per call; of a stream of xDS a few

A stop ends every watch with UNAVAILABLE, so that proxies turn to another server,
lets calls end within the drain's time, then cancels the lifetime nursery.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias

import trio

from meshlocal.admin.access import AdminAccess
from meshlocal.admin.server import AdminServer, AsyncRoute, Route
from meshlocal.app.certificates import expiring_now, make_workload
from meshlocal.app.discovery_access import DiscoveryAccess
from meshlocal.app.log_page import LOG
from meshlocal.app.readiness import Readiness, announce, notify_service_manager, tell_exposures
from meshlocal.app.signals import Stop, cancel_when_set, handle_signals
from meshlocal.app.sources import make_sources
from meshlocal.discovery.hub import Hub
from meshlocal.discovery.limits import ServerLimits
from meshlocal.discovery.service import DiscoveryService
from meshlocal.discovery.watches import Watches
from meshlocal.net.blocking import BlockedError, Blocking
from meshlocal.net.descriptors import raise_limit
from meshlocal.net.following import FileProblemError, Followed, Following
from meshlocal.net.groups import first_of
from meshlocal.net.grpc.health import HealthStatus
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.net.grpc.reflection import Reflection
from meshlocal.net.grpc.server import GrpcServer, Routes
from meshlocal.net.listen import open_tcp_listeners, wanted_by
from meshlocal.net.log import configure_logging, get_log
from meshlocal.net.sockets import close, format_address
from meshlocal.net.supervision import DEAD_STATUS, Supervision, TaskDeadError
from meshlocal.policy.addresses import SocketAddress
from meshlocal.policy.config import Config, DiscoveryServerConfig
from meshlocal.policy.config_build import ConfigError
from meshlocal.policy.config_discovery import ServerLimitsConfig
from meshlocal.policy.exposure import of_server
from meshlocal.policy.lineage import Lineage
from meshlocal.policy.problems import Problem
from meshlocal.wire.discovery_methods import SERVICE_NAME
from meshlocal.wire.pb.health_pb2 import HealthCheckResponse

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

    from meshlocal.discovery.websocket import WebSocketServer
    from meshlocal.discovery.xds.service import XdsService

_log = get_log(__name__)

CONFIG_LIMIT = 30.0
"""Seconds that reading the configuration again may take."""

ANNOUNCE_WAIT = 5.0
"""Seconds that the line which says that the process is ready waits for the sources."""


MakeRoutes: TypeAlias = "Callable[[DiscoveryProcess], Mapping[str, Route | AsyncRoute]]"


class DiscoveryProcess:
    """One running discovery server.

    Args:
        load: reads the configuration: once now, and again on SIGHUP.
        rng: for backoff.
        environment: for the service manager's socket.
        routes: makes the pages of its admin address.

    Raises:
        ConfigError: the configuration cannot be used.
    """

    def __init__(
        self, load: Callable[[], Config], rng: Random, environment: Mapping[str, str], routes: MakeRoutes
    ) -> None:
        self._load = load
        self._routes = routes
        self._environment = environment
        self._files = Blocking(limit=CONFIG_LIMIT)
        self.supervision = Supervision(rng)
        self.config = load()
        configure_logging(self.config.log.level, self.config.log.format, levels=self.config.log.levels)
        config = self.config.discovery
        lineage = Lineage(f"{rng.getrandbits(64):016x}")
        self.hub = Hub(make_sources(config, rng, environment, lineage), rng, self.supervision)
        self.limits = ServerLimits(config.limits)
        self.watches = Watches()
        self.service = DiscoveryService(self.hub, config.heartbeat_interval, self.limits, lineage, self.watches)
        self.websocket_sockets: list[socket.socket] = []
        self.health = HealthStatus()
        self._served = ["", SERVICE_NAME]
        self._set_health(serving=False)
        self.workload = make_workload(config.tls_workload_api, rng)
        self.access = DiscoveryAccess(config, self.workload)
        try:
            self.admin_access = AdminAccess(config.admin_access, "discovery")
        except FileProblemError as error:
            raise ConfigError([Problem("discovery.admin_access", str(error), "")]) from None
        self.exposures = of_server(config)
        self._following = Following(self.followed, partial(expiring_now, self.followed))
        guarded = self.access.guard(self.service.handlers())
        self.server = self._grpc_server(guarded)
        self.websocket = _websocket_server(config, self.limits.guard(guarded)) if config.websocket_bind else None
        self.xds: XdsService | None = None
        self.xds_server: GrpcServer | None = None
        if config.xds_bind:
            self.xds = _xds_service(self.hub, self.service, self.limits, self.watches, config)
            handlers = self.xds.handlers()
            self._served += [method.service for method in handlers]
            self._set_health(serving=False)
            self.xds_server = self._grpc_server(self.access.guard(handlers))
        self.readiness = Readiness("waiting for the sources")
        self.supervision.on_dead = self._die
        self.stop = Stop()

    def _grpc_server(self, guarded: Routes) -> GrpcServer:
        """A server of these handlers, of health and of reflection."""
        config = self.config.discovery
        handlers = {**guarded, **self.health.handlers()}
        names = sorted({method.service for method in handlers})
        return GrpcServer(
            self.limits.guard({**handlers, **Reflection(names).handlers()}),
            GrpcOptions(
                max_message_size=config.limits.message_size,
                keepalive_interval=config.keepalive_interval,
                keepalive_timeout=config.keepalive_timeout,
                stall_timeout=config.limits.stall_timeout,
                send_timeout=config.limits.stall_timeout,
                receive_rate=config.limits.bytes_per_second,
                receive_burst=_receive_burst(config.limits),
                holding=self.limits,
            ),
            max_connections=config.limits.connections,
            max_client_connections=config.limits.client_connections,
        )

    def collectors(self) -> list[Collector]:
        """What the metrics are made of."""
        # Imported here, as prometheus_client is large: see meshlocal.admin.metrics_page.
        from meshlocal.app.discovery_metrics import DiscoveryCollector
        from meshlocal.app.process_metrics import ProcessCollector

        return [
            DiscoveryCollector(
                self.hub,
                self.service,
                self.limits,
                [server for server in (self.server, self.xds_server) if server is not None],
                self.readiness,
                self.websocket,
                self.xds,
                access=self.access,
                exposures=self.exposures,
                followed=self.followed,
            ),
            ProcessCollector(self.supervision),
        ]

    async def run(self) -> int:
        """Serve until told to stop; returns the exit status.

        Raises:
            ListenError: an address cannot be listened on.
        """
        dead = False
        try:
            await self._run()
        except* TaskDeadError:
            dead = True
        return DEAD_STATUS if dead else 0

    async def _run(self) -> None:
        raise_limit()
        config = self.config.discovery
        with ExitStack() as opened:
            admin = {} if config.admin is None else {"admin": config.admin}
            admin_sockets = _listen(opened, admin)
            sockets = _listen(opened, _named("bind", config.bind))
            self.websocket_sockets = _listen(opened, _named("websocket_bind", config.websocket_bind))
            xds_sockets = _listen(opened, _named("xds_bind", config.xds_bind))
            over = "grpcs" if self.access.tls else "grpc"
            bound = [
                f"{scheme}://{format_address(sock.getsockname())}"
                for scheme, group in (
                    (over, sockets),
                    ("wss" if self.access.tls else "ws", self.websocket_sockets),
                    (f"xds={over}", xds_sockets),
                    (f"admin={self.admin_access.scheme}", admin_sockets),
                )
                for sock in group
            ]
            pages = AdminServer(self._routes(self), self.admin_access, changing=[LOG])
            tell_exposures(self.exposures)
            async with trio.open_nursery() as lifetime:
                keep = self.supervision.keep
                await lifetime.start(self._take_orders)
                await lifetime.start(self.hub.run)
                if admin_sockets:
                    lifetime.start_soon(keep, "admin server", partial(pages.serve, admin_sockets))
                if any(True for _ in self.followed()):
                    lifetime.start_soon(keep, "files", self._following.run)
                if self.workload is not None:
                    self.workload.on_update = self._following.look
                    lifetime.start_soon(keep, "workload api", self.workload.run)
                tls = self.access.grpc_context if self.access.tls else None
                serve = partial(self.server.serve, sockets, tls=tls)
                await lifetime.start(self._serve_or_die, "grpc server", serve)
                if self.xds_server is not None:
                    serve = partial(self.xds_server.serve, xds_sockets, tls=tls)
                    await lifetime.start(self._serve_or_die, "xds server", serve)
                if self.websocket is not None:
                    tls = self.access.websocket_context if self.access.tls else None
                    serve = partial(self.websocket.serve, self.websocket_sockets, tls=tls)
                    await lifetime.start(self._serve_or_die, "websocket server", serve)
                lifetime.start_soon(partial(keep, "readiness", self._become_ready, may_end=True))
                lifetime.start_soon(partial(keep, "announcement", self._announce, bound, may_end=True))
                await self.stop.requested.wait()
                await self._drain()
                lifetime.cancel_scope.cancel()

    def followed(self) -> Iterator[Followed[Any]]:
        """What is made of files (T3)."""
        yield from self.access.followed()
        yield from self.admin_access.followed()

    async def _take_orders(self, *, task_status: trio.TaskStatus[None]) -> None:
        await self.supervision.start("orders", handle_signals, self.stop, self.reload, task_status=task_status)

    async def _serve_or_die(
        self, name: str, serve: Callable[..., Awaitable[None]], *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Accept connections. It closes its sockets at its end, so that nobody could begin it again (P1)."""
        try:
            await serve(task_status=task_status)
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody can connect any more
            problem = first_of(error)
            self.supervision.die(name, f"{type(problem).__name__}: {problem}")

    def _die(self, task: str, problem: str) -> None:
        self.readiness.fail(f"{task}: {problem}")
        self._set_health(serving=False)

    async def _become_ready(self) -> None:
        await self.hub.wait_in_sync()
        self.readiness.set_ready()
        if self.readiness.ready:
            self._set_health(serving=True)

    async def _announce(self, bound: list[str]) -> None:
        """Say where it listens, once it is in sync, or after a while: then a source's outage holds nobody up."""
        with trio.move_on_after(ANNOUNCE_WAIT):
            await self.hub.wait_in_sync()
        waiting = [state.source.name for state in self.hub.sources if not state.in_sync]
        note = [f"(not in sync yet: {', '.join(waiting)})"] if waiting else []
        announce(" ".join(["meshlocal discovery ready:", *bound, *note]))
        notify_service_manager(self._environment, "READY=1")

    async def _drain(self) -> None:
        drain = self.config.discovery.drain
        self.readiness.drain()
        self._set_health(serving=False)
        notify_service_manager(self._environment, "STOPPING=1")
        with trio.move_on_after(drain.delay):
            await self.stop.now.wait()
        if self.websocket is not None:
            self.websocket.draining = True
        with trio.move_on_after(drain.timeout):
            async with trio.open_nursery() as draining:
                draining.start_soon(cancel_when_set, self.stop.now, draining.cancel_scope)
                async with trio.open_nursery() as parts:
                    # None waits for another: a WebSocket that hangs costs gRPC's clients none of their time.
                    parts.start_soon(self.watches.drain, drain.timeout)
                    if self.websocket is not None:
                        parts.start_soon(self.websocket.drain)
                    parts.start_soon(self.server.drain)
                    if self.xds_server is not None:
                        parts.start_soon(self.xds_server.drain)
                draining.cancel_scope.cancel()

    def _set_health(self, *, serving: bool) -> None:
        status = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        for name in self._served:
            self.health.set(name, status)

    async def reload(self) -> None:
        """Read the configuration again (S2), and the files of certificates and tokens: all of it holds, or nothing.

        Of the configuration only logging can change; sources watch themselves, and those files are followed beside.
        """
        try:
            config = await self._files.run(self._load)
            if config.discovery != self.config.discovery:
                raise ConfigError([Problem("discovery", "takes a restart to change", "")])
            await self._files.run(self.access.reload)
        except ConfigError as error:
            for problem in error.problems:
                _log.error("config not applied", problem=str(problem))
            return
        except BlockedError as error:
            _log.error("config not applied", problem=str(error))
            return
        self.config = config
        configure_logging(config.log.level, config.log.format, levels=config.log.levels)
        _log.info("config applied")


def _named(key: str, addresses: Sequence[SocketAddress]) -> dict[str, SocketAddress]:
    return {f"{key}[{position}]": address for position, address in enumerate(addresses)}


def _listen(opened: ExitStack, addresses: Mapping[str, SocketAddress]) -> list[socket.socket]:
    """Listen on addresses, by the keys of `discovery` that name them."""
    sockets = []
    for key, address in addresses.items():
        with wanted_by(f"discovery.{key}"):
            found = open_tcp_listeners(address.host, address.port)
        for sock in found:
            opened.callback(close, sock)
            sockets.append(sock)
    return sockets


def _xds_service(
    hub: Hub, service: DiscoveryService, limits: ServerLimits, watches: Watches, config: DiscoveryServerConfig
) -> XdsService:
    # Imported here: a server without xDS has no use for its messages.
    from meshlocal.discovery.xds.service import XdsService

    return XdsService(hub, limits, watches, service.hide, config.xds_prefer)


def _websocket_server(config: DiscoveryServerConfig, handlers: Routes) -> WebSocketServer:
    # Imported here: a server without WebSocket has no use for it.
    from meshlocal.discovery.websocket import WebSocketOptions, WebSocketServer

    options = WebSocketOptions(
        keepalive_interval=config.keepalive_interval,
        keepalive_timeout=config.keepalive_timeout,
        stall_timeout=config.limits.stall_timeout,
        max_message_size=config.limits.message_size,
        receive_rate=config.limits.bytes_per_second,
        receive_burst=_receive_burst(config.limits),
        origins=config.websocket_origins,
        names=tuple(name.lower() for name in config.admin_access.names),
    )
    return WebSocketServer(
        handlers,
        options,
        max_connections=config.limits.connections,
        max_client_connections=config.limits.client_connections,
    )


def _receive_burst(limits: ServerLimitsConfig) -> int:
    # The largest request, and what goes around it.
    return limits.message_size + 65_536
