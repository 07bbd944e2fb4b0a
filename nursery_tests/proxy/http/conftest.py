"""A proxy's HTTP data path over real loopback sockets: instances that fail on cue, clients that see every byte.

Each test that takes the fixture `proxy` runs twice: with the relay's loop, so that plain requests go through the fast
lane (`meshlocal.proxy.http.lane`), and without, so that tasks serve them. The rules know no difference.
"""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import nullcontext
from typing import Any, Self, TypeAlias

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from meshlocal.client.services import ServiceTable
from meshlocal.client.statistics import RequestKey
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.net.relay_loop import current_loop, open_relay_loop
from meshlocal.policy import model
from meshlocal.policy.addresses import ListenAddress
from meshlocal.policy.config import AttemptPolicy, ProxyConfig, ServiceConfig
from meshlocal.policy.config_http import Http2Config, HttpConfig
from meshlocal.policy.locality import Locality
from meshlocal.policy.model import Instance, ServiceKey, ServiceSnapshot, make_instance
from meshlocal.proxy.http.forwarder import HttpForwarder
from meshlocal.proxy.listeners import Listeners
from meshlocal.proxy.tcp.forwarder import TcpForwarder

LIMIT = 30.0
"""Seconds that anything awaited may take; reached only by a failure."""


async def until(holds: Callable[[], object]) -> None:
    """Wait until something holds."""
    with trio.fail_after(LIMIT):
        while not holds():  # noqa: ASYNC110 - the counts are plain numbers, with no event to wait for
            await trio.sleep(0.001)


async def forward(clock: MockClock, seconds: float, *, steps: int = 1) -> None:
    """Put the clock forward, and let all that this wakes do what it has to, after each of so many steps."""
    for _ in range(steps):
        clock.jump(seconds / steps)
        await wait_all_tasks_blocked()


class EndedError(Exception):
    """The other side ended the connection where more was awaited."""


class Wire:
    """One side of a connection, byte by byte.

    Attributes:
        received: what came and was not read yet.
        stream: the connection.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.received: bytes | bytearray = bytearray()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await trio.aclose_forcefully(self.stream)

    async def send(self, data: bytes | bytearray) -> None:
        with trio.fail_after(LIMIT):
            await self.stream.send_all(data)

    async def send_eof(self) -> None:
        await self.stream.send_eof()

    def reset(self) -> None:
        """End the connection with a reset, at once."""
        self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.stream.socket.close()

    async def more(self) -> bool:
        """Wait for bytes; false at the end of the stream."""
        with trio.fail_after(LIMIT):
            data = await self.stream.receive_some(65536)
        self.received += data
        return bool(data)

    async def until(self, mark: bytes) -> bytes:
        """What comes up to and with a mark."""
        while mark not in self.received:
            if not await self.more():
                raise EndedError(bytes(self.received))
        end = self.received.index(mark) + len(mark)
        return self._take(end)

    def _take(self, size: int) -> bytes:
        found = bytes(self.received[:size])
        self.received = bytearray(self.received[size:])
        return found

    async def exactly(self, size: int) -> bytes:
        while len(self.received) < size:
            if not await self.more():
                raise EndedError(bytes(self.received))
        return self._take(size)

    async def rest(self) -> bytes:
        """All that comes until the stream ends in good order.

        Raises:
            trio.BrokenResourceError: it was reset.
        """
        while await self.more():
            pass
        return self._take(len(self.received))

    async def is_reset(self) -> bool:
        """Wait for the end; tells whether it was a reset, with nothing before it."""
        try:
            assert await self.rest() == b""
        except trio.BrokenResourceError:
            return True
        return False

    async def fields(self, head: bytes) -> dict[str, str]:
        lines = head[:-4].decode("latin-1").split("\r\n")[1:]
        return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    async def chunks(self) -> bytes:
        """A chunked body as it is on the wire, to its last byte."""
        raw = b""
        while True:
            line = await self.until(b"\r\n")
            raw += line
            size = int(line.partition(b";")[0], 16)
            if not size:
                break
            raw += await self.exactly(size + 2)
        while (line := await self.until(b"\r\n")) != b"\r\n":
            raw += line
        return raw + line


class Response:
    """What a client got.

    Attributes:
        status: its status.
        fields: by name in small letters; of a repeated one the last.
        body: decoded, if it was chunked.
        head: as it came.
        raw: the body as it came.
    """

    def __init__(self, head: bytes, fields: Mapping[str, str], raw: bytes, body: bytes) -> None:
        self.head = head
        self.status = int(head.split(b" ", 2)[1])
        self.fields = fields
        self.raw = raw
        self.body = body

    def __repr__(self) -> str:
        return repr(self.head + self.raw)

    @property
    def error(self) -> str | None:
        return self.fields.get("x-meshlocal-error")

    @property
    def told(self) -> tuple[int, str | None]:
        """Status and error."""
        return self.status, self.error


class Client(Wire):
    """A client of the proxy."""

    async def get(self, path: str = "/", **fields: Any) -> Response:
        return await self.ask("GET", path, **fields)

    async def ask(self, method: str = "GET", path: str = "/", body: bytes | None = None, **fields: str) -> Response:
        """Send a request whole, and wait for its response. A `_` in a field's name is a `-`."""
        fields = {"host": "b", **fields}
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
        if body is not None:
            lines += f"content-length: {len(body)}\r\n"
        await self.send(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + (body or b""))
        return await self.response(method)

    async def response(self, method: str = "GET") -> Response:
        """The next final response; interim ones are passed over."""
        while (head := await self.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 1"):
            pass
        assert head.startswith(b"HTTP/1.1 "), head
        fields = await self.fields(head)
        status = int(head.split(b" ", 2)[1])
        if method == "HEAD" or status in (204, 304):
            raw = body = b""
        elif fields.get("transfer-encoding") == "chunked":
            raw = await self.chunks()
            body = decode_chunks(raw)
        elif "content-length" in fields:
            raw = body = await self.exactly(int(fields["content-length"]))
        else:
            raw = body = await self.rest()
        return Response(head, fields, raw, body)


def decode_chunks(raw: bytes) -> bytes:
    body = b""
    while True:
        line, _, raw = raw.partition(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        if not size:
            return body
        body += raw[:size]
        raw = raw[size + 2 :]


def response(body: bytes = b"", status: str = "200 OK", **fields: str) -> bytes:
    """A response with a Content-Length."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status}\r\n{lines}content-length: {len(body)}\r\n\r\n".encode() + body


class Served(Wire):
    """A connection as an instance sees it.

    Attributes:
        number: the how manieth request on it is being answered, from 1.
        head, body: of the request; the body as it is on the wire.
    """

    number = 0
    head = b""
    body = b""

    async def request(self, *, body: bool = True) -> bool:
        """Read the next request; false if the connection ends before it."""
        try:
            self.head = await self.until(b"\r\n\r\n")
        except EndedError:
            if self.received:
                raise
            return False
        self.number += 1
        self.body = b""
        if body:
            await self.read_body()
        return True

    async def read_body(self) -> bytes:
        fields = await self.fields(self.head)
        if "transfer-encoding" in fields:
            self.body = await self.chunks()
        else:
            self.body = await self.exactly(int(fields.get("content-length", 0)))
        return self.body


Behaviour: TypeAlias = Callable[["Upstream", Served], Awaitable[bool | None]]
"""Answers one request; false: the connection ends with it, in good order."""


async def ok(upstream: Upstream, served: Served) -> None:
    await served.send(response(upstream.name.encode()))


async def closes(upstream: Upstream, served: Served) -> bool:
    """End without a word."""
    return False


async def resets(upstream: Upstream, served: Served) -> None:
    served.reset()


async def stalls(upstream: Upstream, served: Served) -> bool:
    """Say nothing for as long as the connection lasts."""
    while await served.more():
        pass
    return False


def says(data: bytes, *, closing: bool = False) -> Behaviour:
    """Answer with these bytes, whatever was asked."""

    async def behaviour(upstream: Upstream, served: Served) -> bool:
        await served.send(data)
        return not closing

    return behaviour


class Upstream:
    """An instance.

    Attributes:
        accepted: connections.
        open: connections that are.
        heads: of all requests.
        bodies: likewise, as they were on the wire.
        behaviour: what it does with a request.
        reads_bodies: it reads a request whole before it answers.
        greets: on a connection that was accepted, before its first request; false ends it.
    """

    def __init__(self, name: str, node: str | None, nursery: trio.Nursery, service: str = "b") -> None:
        self.name = name
        self.accepted = 0
        self.open: list[Served] = []
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.behaviour: Behaviour = ok
        self.greets: Behaviour | None = None
        self.reads_bodies = True
        self.service = ServiceKey(service)
        self._nursery = nursery
        (self._socket,) = open_tcp_listeners("127.0.0.1", 0)
        self.port: int = self._socket.getsockname()[1]
        self.instance: Instance = make_instance("127.0.0.1", self.port, labels={} if node is None else {"node": node})
        self._scope = trio.CancelScope()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self._scope:
            async with trio.SocketListener(trio.socket.from_stdlib_socket(self._socket)) as listener:
                task_status.started()
                while True:
                    self._nursery.start_soon(self._converse, await listener.accept())

    def refuse(self) -> None:
        """Refuse connections from now on; those that are open go on."""
        # The task that accepts closes it, a moment later; from here on it refuses.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._scope.cancel()

    async def _converse(self, stream: trio.SocketStream) -> None:
        self.accepted += 1
        served = Served(stream)
        self.open.append(served)
        try:
            async with stream:
                if self.greets is not None and await self.greets(self, served) is False:
                    return
                while await served.request(body=self.reads_bodies):
                    self.heads.append(served.head)
                    self.bodies.append(served.body)
                    if await self.behaviour(self, served) is False:
                        await served.send_eof()
                        while await served.more():
                            pass
                        return
        except (trio.BrokenResourceError, trio.ClosedResourceError, EndedError):
            return
        finally:
            self.open.remove(served)


B = ServiceKey("b")


class Proxy:
    """The data path of a proxy without discovery: the test publishes snapshots itself.

    Args:
        nursery: for its tasks.
        listen: its listeners.

    Attributes:
        scope: of all its tasks.
        ended: all of them have.
        acceptors, connections: the nurseries that it has in a whole process too.
        loop: the relay's; None if tasks serve all requests.
    """

    def __init__(self, nursery: trio.Nursery, *listen: str) -> None:
        self.nursery = nursery
        self.addresses = tuple(map(ListenAddress.parse, listen or ("http://127.0.0.1:0", "http://127.0.0.1:0=b")))
        self.config = ProxyConfig(listen=self.addresses)
        self.table = ServiceTable(self.config, Locality({"node": "n1"}), random.Random(1))
        self.forwarder = HttpForwarder(self.table, self.config)
        self.listeners = Listeners({"tcp": TcpForwarder(self.table), "http": self.forwarder})
        self.acceptors: trio.Nursery | None = None
        self.connections: trio.Nursery | None = None
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.loop = current_loop.get()
        self._version = 0

    def configure(
        self,
        *,
        attempts: Mapping[str, Any] | None = None,
        http: Mapping[str, Any] | None = None,
        service: Mapping[str, Any] | None = None,
        **keys: Any,
    ) -> None:
        """Apply a configuration: keys of `proxy.attempts`, `proxy.http` and its `http2`, `proxy.services.b`, and
        `proxy`."""
        if http and "http2" in http:
            http = {**http, "http2": Http2Config(**http["http2"])}
        self.config = ProxyConfig(
            listen=self.addresses,
            attempts=AttemptPolicy(**(attempts or {})),
            http=HttpConfig(**(http or {})),
            services={B: ServiceConfig(**service)} if service else {},
            **keys,
        )
        self.table.reconfigure(self.config, self.table.locality)
        self.forwarder.reconfigure(self.config)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self.listeners.adopt(self.listeners.prepare(self.config), self.config)
        try:
            with self.scope:
                async with trio.open_nursery() as lifetime:
                    lifetime.start_soon(self.forwarder.run)
                    async with trio.open_nursery() as self.connections, trio.open_nursery() as self.acceptors:
                        self.listeners.start(self.acceptors, self.connections)
                        task_status.started()
                        await trio.sleep_forever()
        finally:
            self.ended.set()

    def publish(self, *instances: Instance | Upstream, service: str = "b", unknown: bool = False) -> None:
        self._version += 1
        listed = [each.instance if isinstance(each, Upstream) else each for each in instances]
        self.table.publish(ServiceSnapshot(ServiceKey(service), str(self._version), model.index(listed), unknown))

    def port(self, listener: int = 0) -> int:
        return int(self.listeners.current[listener].sockets[0].getsockname()[1])

    async def connect(self, listener: int = 0) -> Client:
        """A connection to its listener that goes by Host, or to the one that is for `b` alone (1)."""
        return Client(await trio.open_tcp_stream("127.0.0.1", self.port(listener)))

    async def ask(self, method: str = "GET", path: str = "/", body: bytes | None = None, **fields: str) -> Response:
        """One request on a connection of its own."""
        async with await self.connect() as client:
            return await client.ask(method, path, body, **fields)

    async def idle(self) -> None:
        """Wait until no connection of a client is left."""
        await until(lambda: not len(self.forwarder))

    @property
    def pooled(self) -> int:
        return sum(len(service.pool) for service in self.forwarder.services.values())

    def requests(self, service: str = "b") -> dict[RequestKey, int]:
        return dict(self.table[ServiceKey(service)].statistics.requests)

    @property
    def retries(self) -> dict[str, int]:
        return dict(self.forwarder.services[B].statistics.retries)


@pytest.fixture
def clock() -> MockClock:
    """Goes as a real one does, but that a test that asks for it can put it `forward`."""
    return MockClock(rate=1.0)


@pytest.fixture(params=["lane", "tasks"])
async def proxy(
    request: pytest.FixtureRequest, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Proxy]:
    # Often enough for tests of what runs out of time.
    monkeypatch.setattr("meshlocal.proxy.http.forwarder._SWEEP_LONGEST", 0.02)
    with open_relay_loop() if request.param == "lane" else nullcontext():
        made = Proxy(nursery)
        await nursery.start(made.serve)
        # The service that tests ask for by its name; it is what the second listener is for, too.
        assert B in made.table.keys
        yield made
        # Nothing may be left of it while the loop goes.
        made.scope.cancel()
        await made.ended.wait()


@pytest.fixture
async def local(proxy: Proxy, nursery: trio.Nursery) -> Upstream:
    """An instance on the proxy's node; the only one that is known."""
    made = Upstream("local", "n1", nursery)
    await nursery.start(made.serve)
    proxy.publish(made)
    return made


@pytest.fixture
async def pair(proxy: Proxy, local: Upstream, nursery: trio.Nursery) -> tuple[Upstream, Upstream]:
    """Two instances: on the proxy's node, and on another."""
    far = Upstream("far", "n2", nursery)
    await nursery.start(far.serve)
    proxy.publish(local, far)
    return local, far


class Upstreams:
    """Makes instances, which are not published."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    async def __call__(self, name: str, node: str | None = None) -> Upstream:
        made = Upstream(name, node, self._nursery)
        await self._nursery.start(made.serve)
        return made


@pytest.fixture
def upstream(nursery: trio.Nursery) -> Upstreams:
    return Upstreams(nursery)
