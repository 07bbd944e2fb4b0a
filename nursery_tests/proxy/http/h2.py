"""Clients and instances that speak HTTP/2, over another engine than the proxy's (h2), and fail on cue."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Self, TypeAlias

import trio
from h2.events import (
    DataReceived,
    InformationalResponseReceived,
    PingAckReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)

from meshlocal.net.listen import open_tcp_listeners
from meshlocal.policy.model import Instance, ServiceKey, make_instance
from nursery_tests.h2_peer import GoAway, H2Peer, H2PeerError, Headers
from nursery_tests.proxy.http.conftest import LIMIT

Fields: TypeAlias = "list[tuple[bytes, bytes]]"

GET: Fields = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"b"), (b":path", b"/")]
POST: Fields = [(b":method", b"POST"), *GET[1:]]
CALL: Fields = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":authority", b"b"),
    (b":path", b"/s/m"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
]
OK: Fields = [(b":status", b"200")]
GRPC_OK: Fields = [(b":status", b"200"), (b"content-type", b"application/grpc")]
DONE: Fields = [(b"grpc-status", b"0")]
MESSAGE = b"\0\0\0\0\2hi"


def asking(fields: Fields, **changes: str) -> Fields:
    """The fields with others in their place, or behind them: a `_` in a name is a `-`, a leading `_` a `:`."""
    named = {
        (":" + name[1:] if name[0] == "_" else name).replace("_", "-").encode(): value.encode()
        for name, value in changes.items()
    }
    return [(name, named.pop(name, value)) for name, value in fields] + list(named.items())


class Seen:
    """What came on one stream.

    Attributes:
        head: its fields; empty until it came.
        interim: heads before that.
        data: all bytes.
        trailers: fields behind it.
        ended: its sender's side of it did.
        reset: the code with which it was reset; None if it was not.
    """

    def __init__(self) -> None:
        self.head: Fields = []
        self.interim: list[Fields] = []
        self.data = bytearray()
        self.trailers: Fields = []
        self.ended = False
        self.reset: int | None = None

    def __getitem__(self, name: str) -> str | None:
        """A field of the head, or else of the trailers."""
        wanted = name.encode()
        found = [value.decode() for key, value in [*self.head, *self.trailers] if key == wanted]
        return found[-1] if found else None

    @property
    def status(self) -> int:
        """Of a response; 0 before it came."""
        return int(self[":status"] or 0)

    @property
    def grpc(self) -> int | None:
        """The call's status."""
        status = self["grpc-status"]
        return int(status) if status is not None else None

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None


class H2Wire:
    """One side of a connection.

    Attributes:
        peer: its frames.
        streams: what came, by number.
        goaways: all that came.
        closed: the other side ended the connection.
        takes: data is given credit for as it comes.
    """

    def __init__(self, stream: trio.SocketStream, *, client: bool, max_streams: int = 100) -> None:
        self.stream = stream
        self.peer = H2Peer(client=client, max_streams=max_streams, max_header_list_size=65_536)
        self.streams: dict[int, Seen] = {}
        self.goaways: list[GoAway] = []
        self.acknowledged: list[bytes] = []
        self.settled = False
        self.closed = False
        self.broken = False
        self.takes = True
        self.on_request: Callable[[int], None] = lambda stream_id: None
        self._sending = trio.Lock()
        self._changed = trio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await trio.aclose_forcefully(self.stream)

    async def flush(self) -> None:
        """Send what there is."""
        async with self._sending:
            out = bytes(self.peer.outgoing)
            self.peer.outgoing.clear()
            if out:
                with trio.fail_after(LIMIT):
                    await self.stream.send_all(out)

    async def raw(self, data: bytes) -> None:
        """Send what there is, and then these bytes."""
        await self.flush()
        with trio.fail_after(LIMIT):
            await self.stream.send_all(data)

    def reset_connection(self) -> None:
        self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.stream.socket.close()

    async def step(self) -> bool:
        """Wait for bytes, and take them in; false once the other side has ended the connection."""
        await self.flush()
        try:
            data = await self.stream.receive_some(65_536)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.broken, data = True, b""
        if not data:
            self.closed = True
            self._wake()
            return False
        try:
            events = self.peer.receive(bytes(data))
        except H2PeerError as error:
            raise AssertionError(f"the proxy broke the protocol: {error}") from error
        for event in events:
            self._take(event)
        await self.flush()
        self._wake()
        return True

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _take(self, event: Any) -> None:
        if isinstance(event, GoAway):
            self.goaways.append(event)
            return
        if isinstance(event, RemoteSettingsChanged):
            self.settled = True
        if isinstance(event, PingAckReceived):
            self.acknowledged.append(event.ping_data)
        stream_id = getattr(event, "stream_id", None)
        if stream_id is None or isinstance(event, WindowUpdated):
            return
        seen = self.streams.setdefault(stream_id, Seen())
        if isinstance(event, RequestReceived | ResponseReceived):
            seen.head = list(event.headers)
            if isinstance(event, RequestReceived):
                self.on_request(stream_id)
        elif isinstance(event, InformationalResponseReceived):
            seen.interim.append(list(event.headers))
        elif isinstance(event, DataReceived):
            seen.data += event.data
            if self.takes:
                self.peer.acknowledge(stream_id, event.flow_controlled_length)
        elif isinstance(event, TrailersReceived):
            seen.trailers = list(event.headers)
        elif isinstance(event, StreamEnded):
            seen.ended = True
        elif isinstance(event, StreamReset) and event.remote_reset:
            seen.reset = int(event.error_code)

    async def until(self, holds: Callable[[], object]) -> None:
        """Take in what comes until something holds."""
        with trio.fail_after(LIMIT):
            while not holds():
                if self.closed or not await self.step():
                    assert holds(), "the connection ended"
                    return

    async def wait(self, holds: Callable[[], object]) -> None:
        """The same where another task takes in what comes."""
        with trio.fail_after(LIMIT):
            while not holds():
                assert not self.closed, "the connection ended"
                await self._changed.wait()

    # Sending.

    def open(self, fields: Headers, *, end: bool = True) -> int:
        """Begin a request; gives its stream."""
        stream_id = self.peer.next_stream_id()
        self.streams[stream_id] = Seen()
        self.peer.send_headers(stream_id, fields, end_stream=end)
        return stream_id

    async def data(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        """Send data, as far as it goes at once: the windows must allow it."""
        while data:
            size = self.peer.sendable(stream_id)
            assert size, "no window"
            piece, data = data[:size], data[size:]
            self.peer.send_data(stream_id, piece, end_stream=end and not data)
        await self.flush()

    async def end(self, stream_id: int) -> None:
        self.peer.send_data(stream_id, b"", end_stream=True)
        await self.flush()

    async def trailers(self, stream_id: int, fields: Headers) -> None:
        self.peer.send_headers(stream_id, fields, end_stream=True)
        await self.flush()

    async def reset(self, stream_id: int, code: int = 8) -> None:
        self.peer.reset(stream_id, code)
        await self.flush()

    async def ask(self, fields: Headers = GET, body: bytes | None = None) -> Seen:
        """One request, and its whole response."""
        stream_id = self.open(fields, end=body is None)
        if body is not None:
            await self.flush()
            self.peer.send_data(stream_id, body, end_stream=True)
        seen = self.streams[stream_id]
        await self.until(lambda: seen.over)
        return seen

    async def call(self, message: bytes = MESSAGE, **changes: str) -> Seen:
        """One unary gRPC call."""
        return await self.ask(asking(CALL, **changes), message)


async def h2_client(port: int, *, max_streams: int = 100) -> H2Wire:
    """A client of the proxy's."""
    return H2Wire(await trio.open_tcp_stream("127.0.0.1", port), client=True, max_streams=max_streams)


Behaviour: TypeAlias = Callable[["H2Instance", H2Wire, int], Awaitable[None]]
"""Serves one stream, in a task of its own, from its head on."""


async def whole(wire: H2Wire, stream_id: int) -> Seen:
    """Wait for all of a request."""
    seen = wire.streams[stream_id]
    await wire.wait(lambda: seen.over)
    return seen


async def answers(instance: H2Instance, wire: H2Wire, stream_id: int) -> None:
    """With its name, or in gRPC with the message and OK."""
    seen = await whole(wire, stream_id)
    if seen.reset is not None:
        return
    if seen["content-type"] == "application/grpc":
        wire.peer.send_headers(stream_id, GRPC_OK)
        wire.peer.send_data(stream_id, bytes(seen.data))
        wire.peer.send_headers(stream_id, DONE, end_stream=True)
    elif seen[":method"] == "HEAD":
        wire.peer.send_headers(stream_id, [*OK, (b"content-length", b"5")], end_stream=True)
    else:
        wire.peer.send_headers(stream_id, OK)
        wire.peer.send_data(stream_id, instance.name.encode(), end_stream=True)
    await wire.flush()


def refuses(code: int) -> Behaviour:
    """Reset the stream at once."""

    async def behaviour(instance: H2Instance, wire: H2Wire, stream_id: int) -> None:
        await wire.reset(stream_id, code)

    return behaviour


def says(head: Fields, data: bytes = b"", trailers: Fields | None = None) -> Behaviour:
    """Answer with this, once the request is whole."""

    async def behaviour(instance: H2Instance, wire: H2Wire, stream_id: int) -> None:
        await whole(wire, stream_id)
        wire.peer.send_headers(stream_id, head, end_stream=not data and trailers is None)
        if data:
            wire.peer.send_data(stream_id, data, end_stream=trailers is None)
        if trailers is not None:
            wire.peer.send_headers(stream_id, trailers, end_stream=True)
        await wire.flush()

    return behaviour


async def stalls(instance: H2Instance, wire: H2Wire, stream_id: int) -> None:
    """Say nothing."""
    await trio.sleep_forever()


async def ends(instance: H2Instance, wire: H2Wire, stream_id: int) -> None:
    """End the connection without a word."""
    await wire.stream.aclose()


async def resets(instance: H2Instance, wire: H2Wire, stream_id: int) -> None:
    """Reset the connection."""
    wire.reset_connection()


class H2Instance:
    """An instance that speaks HTTP/2.

    Attributes:
        wires: the connections that are open.
        accepted: how many there were.
        asked: the streams that there were.
        behaviour: what it does with a request.
    """

    def __init__(self, name: str, node: str | None, nursery: trio.Nursery, *, port_name: str = "") -> None:
        self.name = name
        self.accepted = 0
        self.wires: list[H2Wire] = []
        self.asked: list[Seen] = []
        self.behaviour: Behaviour = answers
        self.max_streams = 100
        self.service = ServiceKey("b")
        self._nursery = nursery
        (self._socket,) = open_tcp_listeners("127.0.0.1", 0)
        self.port: int = self._socket.getsockname()[1]
        labels = {} if node is None else {"node": node}
        self.instance: Instance = make_instance("127.0.0.1", self.port, port_name, labels=labels)
        self._scope = trio.CancelScope()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self._scope:
            async with trio.SocketListener(trio.socket.from_stdlib_socket(self._socket)) as listener:
                task_status.started()
                while True:
                    self._nursery.start_soon(self._converse, await listener.accept())

    def refuse(self) -> None:
        """Refuse connections from now on; those that are open go on."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._scope.cancel()

    async def _converse(self, stream: trio.SocketStream) -> None:
        self.accepted += 1
        wire = H2Wire(stream, client=False, max_streams=self.max_streams)
        self.wires.append(wire)
        try:
            async with wire, trio.open_nursery() as nursery:

                def begin(stream_id: int) -> None:
                    self.asked.append(wire.streams[stream_id])
                    # What it does from here on is for requests that come from here on.
                    nursery.start_soon(self.behaviour, self, wire, stream_id)

                wire.on_request = begin
                while await wire.step():
                    pass
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass
        finally:
            self.wires.remove(wire)


def names(fields: Sequence[tuple[bytes, bytes]]) -> list[str]:
    """The fields' names."""
    return [name.decode() for name, _ in fields]
