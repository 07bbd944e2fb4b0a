"""`open_mesh`: what a sidecar does, inside an application (rules A1 to A8, D1 to D5, H1, L1 to L6, O1 to O5, R1, R2).

A mesh is the feed of instances, the table of services and their cursors: the
very parts that the proxy is made of. Its background tasks live in the block of
`open_mesh`. A service is followed from its first use, and until it was not used
for some minutes.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from socket import gethostname
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import anyio
import anyio.lowlevel

import meshlocal
from meshlocal.client.feed import Feed, SnapshotSink
from meshlocal.discovery.feeds import make_feed
from meshlocal.library.core import MeshCore
from meshlocal.library.errors import MeshConfigError
from meshlocal.library.options import mesh_config
from meshlocal.library.views import MeshStatistics, ServicePlan, plan_of, statistics_of
from meshlocal.net.groups import single
from meshlocal.policy.config import AttemptPolicy, ServiceConfig
from meshlocal.policy.config_health import EjectionConfig
from meshlocal.policy.model import NODE, Caller, ServiceKey, ServiceSnapshot
from meshlocal.wire.grpc.framing import DEFAULT_MAX_MESSAGE_SIZE

if TYPE_CHECKING:
    import trio

    from meshlocal.library.grpc_channel import GrpcChannel


@runtime_checkable
class InstanceSource(Protocol):
    """What instances come from beside a URL: `meshlocal.testing.FakeSource`, or an application's own."""

    def feed(self, sink: SnapshotSink) -> Feed:
        """A task that keeps snapshots coming into the sink."""
        ...


class Mesh:
    """Services, seen from where this application runs. Made by `open_mesh`.

    Its methods take a service's name as its registry gives it: `b`, or `b.namespace`.

    Attributes:
        core: its parts, for what meshlocal itself builds on a mesh; not for applications.
    """

    def __init__(self, core: MeshCore) -> None:
        self.core = core

    @property
    def node(self) -> str:
        """The node that this mesh takes for its own; empty if unknown (L1)."""
        return self.core.services.locality.node

    @property
    def tiers(self) -> tuple[str, ...]:
        """The names of the tiers, nearest first (L3)."""
        return self.core.services.locality.tiers

    async def open_tcp_stream(self, service: str) -> trio.SocketStream:
        """Connect to an instance of a service: one of this node, else another one (A1, A2, O1). Needs trio.

        Returns:
            A stream as `trio.open_tcp_stream` gives; it is the caller's to close.

        Raises:
            NoInstanceError: there is no instance to try.
            AttemptsFailedError: each that was tried failed.
            DeadlineError: the deadline came first.
            NotTrioError: this is not trio's loop.
            MeshClosedError, TooManyServicesError: see there.
            ValueError: the name can be no service's.
        """
        # Imported here: an application on another loop has no use for it.
        from meshlocal.library.streams import open_tcp_stream

        return await open_tcp_stream(self.core, self.core.key(service))

    def grpc_channel(
        self, service: str, *, max_message_size: int = DEFAULT_MAX_MESSAGE_SIZE, gzip: bool = False
    ) -> GrpcChannel:
        """Call a service over gRPC: each call goes to an instance of this node, else to another one (A1 to A4, C1, C3).

        What it gives has the methods that stubs made by grpcio's compiler call: `GreeterStub(mesh.grpc_channel("b"))`.
        It needs no closing.

        Args:
            service: its name.
            max_message_size: bytes of the largest response that is taken.
            gzip: compress requests of 1 KiB and more.

        Raises:
            ValueError: the name can be no service's.
        """
        # Imported here: few applications call over gRPC.
        from meshlocal.library.grpc_channel import open_grpc_channel

        return open_grpc_channel(self.core, self.core.key(service), max_message_size=max_message_size, gzip=gzip)

    def plan(self, service: str) -> ServicePlan:
        """The order in which the next request would try the service's instances, and why (R2). Moves no cursor.

        A service that was not used before is followed from now on; its plan has steps once `wait_heard` returns.
        """
        return plan_of(self.core.demand(self.core.key(service)))

    async def wait_heard(self, service: str) -> None:
        """Wait until something is known of the service, were it only that no registry knows it.

        It waits as long as it takes: the caller's cancel scope is the limit.
        """
        await anyio.lowlevel.checkpoint()
        key = self.core.key(service)
        while self.core.demand(key).picker is None:
            await self.core.wait_changed(key)

    def watch(self, service: str) -> ServiceWatch:
        """Follow the service's instances: an async iterator of snapshots, the present one first.

        A loop that is slower than the changes gets the latest state, and no queue of those between (D4).
        """
        return ServiceWatch(self.core, self.core.key(service))

    def statistics(self) -> MeshStatistics:
        """What was counted, and how discovery is doing."""
        return statistics_of(self.core.services, self.core.feed.status, anyio.current_time())


class ServiceWatch:
    """An async iterator of a service's snapshots. Made by `Mesh.watch`; needs no closing."""

    def __init__(self, core: MeshCore, key: ServiceKey) -> None:
        self._core = core
        self._key = key
        self._last: ServiceSnapshot | None = None

    def __aiter__(self) -> ServiceWatch:
        return self

    async def __anext__(self) -> ServiceSnapshot:
        """Wait for a state that differs from the one before.

        Raises:
            MeshClosedError: the mesh's block was left.
        """
        await anyio.lowlevel.checkpoint()
        while True:
            picker = self._core.demand(self._key).picker
            if picker is not None and not _equal(self._last, picker.snapshot):
                self._last = picker.snapshot
                return picker.snapshot
            await self._core.wait_changed(self._key)


def _equal(last: ServiceSnapshot | None, latest: ServiceSnapshot) -> bool:
    return last is not None and last.version == latest.version and last.unknown == latest.unknown


@asynccontextmanager
async def open_mesh(
    *sources: str | InstanceSource,
    node_name: str | None = None,
    prefer: Sequence[str] = (NODE,),
    labels: Mapping[str, str] | None = None,
    within: str | None = None,
    namespace: str | None = None,
    attempts: AttemptPolicy | None = None,
    services: Mapping[str, ServiceConfig] | None = None,
    ejection: EjectionConfig | None = None,
    ca_file: str | os.PathLike[str] | None = None,
    token_file: str | os.PathLike[str] | None = None,
    allow_plaintext_tokens: bool = False,
    certificate_file: str | os.PathLike[str] | None = None,
    key_file: str | os.PathLike[str] | None = None,
    cache_file: str | os.PathLike[str] | None = None,
    socket_folder: str | os.PathLike[str] | None = None,
    rng: random.Random | None = None,
) -> AsyncIterator[Mesh]:
    """Know the instances of services for as long as the block lasts, nearest first.

    Nothing of discovery is waited for here: the first use of a service waits for its instances (A7). Runs on trio and
    on asyncio.

    Args:
        sources: discovery servers (`grpc://HOST:PORT`, over TLS `grpcs://`, over WebSocket `ws://` and `wss://`),
            tried in turn; or one file (`file:PATH`); or one `InstanceSource`.
        node_name: the node that this application runs on; by default the environment's NODE_NAME (L1).
        prefer: label keys, nearest tier first (L3).
        labels: this application's own labels beside node, such as zone.
        within: a label key: instances that do not share this application's value are never used (L6).
        namespace: the namespace that a service's name without a dot belongs to.
        attempts: how long and how often a request is tried.
        services: what holds for single services, by name.
        ejection: when an instance on which requests fail is tried last of all, and for how long (H1).
        ca_file: the authorities, in PEM, of which one must have signed the certificate of a `grpcs://` or `wss://`
            server; by default those of the system.
        token_file: a file with the token that is sent to discovery servers, read for each connection.
        allow_plaintext_tokens: whether the token may go over plaintext to a server beyond this machine.
        certificate_file: the certificate, in PEM, that `grpcs://` and `wss://` servers are shown; by default none.
        key_file: its key, in PEM; by default it stands with the certificate.
        cache_file: a file that keeps the last snapshots over a restart, one for each mesh, in a directory that exists
            (D2).
        socket_folder: the folder in which instances of this node have Unix sockets: what their label `socket` names
            there is connected to instead of their port, where it can be; by default none is.
        rng: for the cursors' first positions and the jitter of reconnects.

    Raises:
        MeshConfigError: an argument cannot be used.
    """
    urls = [each for each in sources if isinstance(each, str)]
    own = [each for each in sources if not isinstance(each, str)]
    if own and len(sources) > 1:
        raise MeshConfigError(["sources: an InstanceSource stands alone, with no other source"])
    if not sources:
        raise MeshConfigError(["sources: none is given; such as grpc://127.0.0.1:7070 or file:instances.yaml"])
    config = mesh_config(
        urls,
        os.environ,
        node_name=node_name,
        prefer=prefer,
        labels=labels,
        within=within,
        namespace=namespace,
        attempts=attempts,
        services=services,
        ejection=ejection,
        ca_file=ca_file,
        token_file=token_file,
        allow_plaintext_tokens=allow_plaintext_tokens,
        certificate_file=certificate_file,
        key_file=key_file,
        cache_file=cache_file,
        socket_folder=socket_folder,
    )
    rng = rng or random.Random()
    core = MeshCore(config, rng)
    file = config.discovery.cache_file
    sink: SnapshotSink = core if file is None else await core.open_cache(file)
    caller = Caller(gethostname(), core.services.locality.node, f"meshlocal library {meshlocal.__version__}")
    feed = own[0].feed(sink) if own else make_feed(config.discovery, (), sink, rng, caller=caller)
    failure: Exception | None = None
    try:
        async with anyio.create_task_group() as tasks:
            core.open(feed, tasks, own=bool(own))
            try:
                yield Mesh(core)
            except Exception as error:  # noqa: BLE001 - raised below: the task group would wrap it in a group
                failure = error
            finally:
                core.close()
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if failure is not None:
            # Two failures: neither is lost.
            raise BaseExceptionGroup("the block of open_mesh and its mesh failed", [failure, single(group)]) from None
        raise single(group) from None
    if failure is not None:
        raise failure
