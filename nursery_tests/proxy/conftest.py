"""A proxy's data path over real loopback sockets: instances that answer on cue, and clients."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import trio

from meshlocal.client.services import ServiceTable
from meshlocal.client.statistics import RequestKey
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.net.relay_loop import open_relay_loop
from meshlocal.policy import model
from meshlocal.policy.addresses import ListenAddress
from meshlocal.policy.config import AttemptPolicy, ProxyConfig, ServiceConfig
from meshlocal.policy.locality import Locality
from meshlocal.policy.model import Instance, ServiceKey, ServiceSnapshot, make_instance
from meshlocal.proxy.listeners import Listeners
from meshlocal.proxy.tcp.forwarder import TcpForwarder

B = ServiceKey("b")


class Upstream:
    """An instance: greets each connection with its name, then echoes until the client's end, and ends too."""

    def __init__(self, name: str, node: str | None, nursery: trio.Nursery) -> None:
        self.name = name
        self.accepted = 0
        self._nursery = nursery
        (self._socket,) = open_tcp_listeners("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        labels = {} if node is None else {"node": node}
        self.instance: Instance = make_instance("127.0.0.1", self.port, labels=labels)
        self._scope = trio.CancelScope()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self._scope:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._socket))
            async with listener:
                task_status.started()
                while True:
                    self._nursery.start_soon(self._echo, await listener.accept())

    def stop(self) -> None:
        """Refuse connections from now on; those that are open go on."""
        self._scope.cancel()

    async def _echo(self, stream: trio.SocketStream) -> None:
        self.accepted += 1
        try:
            async with stream:
                await stream.send_all(self.name.encode() + b"\n")
                async for received in stream:
                    await stream.send_all(received)
                await stream.send_eof()
        except trio.BrokenResourceError:
            return


class Proxy:
    """The data path of a proxy with one listener, without discovery: the test publishes snapshots itself."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.address = ListenAddress.parse("tcp://127.0.0.1:0=b")
        self.config = ProxyConfig(listen=(self.address,))
        self.table = ServiceTable(self.config, Locality({"node": "n1"}), random.Random(1))
        self.forwarder = TcpForwarder(self.table)
        self.listeners = Listeners({"tcp": self.forwarder})
        self.acceptors: trio.Nursery | None = None
        self.connections: trio.Nursery | None = None
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self._version = 0

    def configure(self, policy: AttemptPolicy, **service: Any) -> None:
        self.config = ProxyConfig(
            listen=(self.address,),
            attempts=policy,
            services={B: ServiceConfig(**service)},
        )
        self.table.reconfigure(self.config, self.table.locality)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self.listeners.adopt(self.listeners.prepare(self.config), self.config)
        try:
            with self.scope:
                async with trio.open_nursery() as self.connections, trio.open_nursery() as self.acceptors:
                    self.listeners.start(self.acceptors, self.connections)
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            self.ended.set()

    def publish(self, instances: Iterable[Instance | Upstream], *, unknown: bool = False) -> None:
        self._version += 1
        listed = [each.instance if isinstance(each, Upstream) else each for each in instances]
        self.table.publish(ServiceSnapshot(B, str(self._version), model.index(listed), unknown))

    @property
    def port(self) -> int:
        return int(self.listeners.current[0].sockets[0].getsockname()[1])

    async def connect(self) -> trio.SocketStream:
        """Connected before anything else runs: trio's own connect can find that the connection was reset already."""
        await trio.lowlevel.checkpoint()
        client = socket.create_connection(("127.0.0.1", self.port))
        client.setblocking(False)
        return trio.SocketStream(trio.socket.from_stdlib_socket(client))

    async def ask(self) -> str:
        """Who serves a new connection; empty if it was reset or ended before a greeting."""
        try:
            async with await self.connect() as stream:
                answer = await stream.receive_some(64)
                await stream.send_eof()
                while await stream.receive_some(64):
                    pass
                return answer.decode().strip()
        except (trio.BrokenResourceError, ConnectionResetError):
            return ""

    @property
    def requests(self) -> dict[RequestKey, int]:
        return dict(self.table[B].statistics.requests)


@pytest.fixture(params=["loop", "tasks"])
async def proxy(request: pytest.FixtureRequest, nursery: trio.Nursery) -> AsyncIterator[Proxy]:
    """With the relay loop that a whole process has, and without."""
    with open_relay_loop() if request.param == "loop" else nullcontext():
        made = Proxy(nursery)
        await nursery.start(made.serve)
        yield made
        # Nothing may be left of it while the loop goes.
        made.scope.cancel()
        await made.ended.wait()


class Upstreams:
    """Makes instances."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    async def __call__(self, name: str, node: str | None = None) -> Upstream:
        upstream = Upstream(name, node, self._nursery)
        await self._nursery.start(upstream.serve)
        return upstream


@pytest.fixture
def upstream(nursery: trio.Nursery) -> Upstreams:
    return Upstreams(nursery)
