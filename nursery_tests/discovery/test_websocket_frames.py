"""WebSocket to the byte, over real sockets: what breaks RFC 6455 gets its close code, and harms nobody else."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from meshlocal.discovery.websocket import WebSocketOptions, WebSocketServer
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.wire.discovery_methods import WATCH_INSTANCES
from meshlocal.wire.discovery_websocket import JSON, PROTO
from meshlocal.wire.pb import discovery_pb2 as pb
from nursery_tests.net.websocket_frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Frame,
    close_frame,
    code_of,
    cut,
    frame,
)

LIMIT = 30
REQUEST = pb.WatchInstancesRequest(subscriptions=[pb.Subscription(service="b")]).SerializeToString()
EVENT = pb.WatchInstancesResponse(snapshot=pb.ServiceSnapshot(service="b", version="1"))


class Raw:
    """A connection whose bytes a test writes itself."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._received = b""

    async def shake_hands(self, subprotocol: str) -> None:
        await self.stream.send_all(
            f"GET {WATCH_INSTANCES.path} HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Protocol: {subprotocol}\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in self._received:
            await self._more()
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head

    async def _more(self) -> None:
        received = await self.stream.receive_some()
        if not received:
            raise EOFError
        self._received += received

    async def receive(self) -> Frame:
        """The server's next frame."""
        while (found := cut(self._received)) is None:
            await self._more()
        got, self._received = found
        assert not got.masked
        return got

    async def end(self, *, answer: bool = True) -> tuple[int, str]:
        """The code and reason of the server's close, which is answered, and after which nothing comes."""
        while (got := await self.receive()).opcode != CLOSE:
            pass
        if answer:
            await self.stream.send_all(frame(CLOSE, got.payload))
        with pytest.raises(EOFError):
            await self.receive()
        return code_of(got.payload), got.payload[2:].decode()


class Served:
    def __init__(self, port: int, server: WebSocketServer) -> None:
        self._port = port
        self.server = server
        self.requests: list[pb.WatchInstancesRequest] = []

    @asynccontextmanager
    async def connect(self, subprotocol: str = PROTO) -> AsyncIterator[Raw]:
        async with await trio.open_tcp_stream("127.0.0.1", self._port) as stream:
            raw = Raw(stream)
            await raw.shake_hands(subprotocol)
            yield raw

    async def no_connection(self) -> None:
        while self.server.connections:  # noqa: ASYNC110 - the server tells nobody
            await trio.sleep(0.01)


@pytest.fixture
async def served(nursery: trio.Nursery) -> Served:
    requests: list[Any] = []

    async def watch(call: Any) -> None:
        requests.append(await call.receive())
        await call.send(EVENT)
        await trio.sleep_forever()

    server = WebSocketServer({WATCH_INSTANCES: watch}, WebSocketOptions(max_message_size=1000))
    listeners = open_tcp_listeners("127.0.0.1", 0)
    port = listeners[0].getsockname()[1]

    async def serve(*, task_status: trio.TaskStatus[None]) -> None:
        await server.serve(listeners, task_status=task_status)

    await nursery.start(serve)
    made = Served(port, server)
    made.requests = requests
    return made


WRONG = {
    "unmasked": (PROTO, frame(BINARY, REQUEST, masked=False), 1002),
    "a reserved bit": (PROTO, frame(BINARY, REQUEST, reserved=4), 1002),
    "an opcode that is reserved": (PROTO, frame(3, REQUEST), 1002),
    "a control opcode that is reserved": (PROTO, frame(11), 1002),
    "a fragmented ping": (PROTO, frame(PING, fin=False), 1002),
    "a long ping": (PROTO, frame(PING, b"x" * 126), 1002),
    "a continuation of nothing": (PROTO, frame(CONTINUATION, REQUEST), 1002),
    "a message within a message": (PROTO, frame(BINARY, b"a", fin=False) + frame(BINARY, REQUEST), 1002),
    "a close of one byte": (PROTO, frame(CLOSE, b"\x03"), 1002),
    "a close with a code that none may send": (PROTO, close_frame(1006), 1002),
    "text that is no UTF-8": (JSON, frame(TEXT, b"\xff\xfe"), 1007),
    "a close whose reason is no UTF-8": (PROTO, frame(CLOSE, struct.pack("!H", 1000) + b"\xff"), 1007),
    "a text frame": (PROTO, frame(TEXT, b"{}"), 1003),
    "a binary frame": (JSON, frame(BINARY, REQUEST), 1003),
    "an unknown message": (PROTO, frame(BINARY, b"\xff\xff"), 1007),
    "no JSON": (JSON, frame(TEXT, b"{"), 1007),
    "oversize": (PROTO, frame(BINARY, b"x" * 1001), 1009),
    "oversize in pieces": (PROTO, frame(BINARY, b"x" * 600, fin=False) + frame(CONTINUATION, b"x" * 600), 1009),
    "oversize, announced": (PROTO, frame(BINARY, b"x" * 100_000), 1009),
}


@pytest.mark.parametrize("case", WRONG)
async def test_what_breaks_the_protocol_gets_its_code(served: Served, case: str) -> None:
    """RFC 6455, 7.4.1; the connection ends, others go on, and new ones are taken."""
    subprotocol, sent, code = WRONG[case]
    with trio.fail_after(LIMIT):
        async with served.connect() as other:
            async with served.connect(subprotocol) as raw:
                await raw.stream.send_all(sent)
                assert (await raw.end())[0] == code
            await other.stream.send_all(frame(BINARY, REQUEST))
            assert (await other.receive()).payload == EVENT.SerializeToString()
        await served.no_connection()
    assert len(served.requests) == 1


async def test_a_request_in_pieces_with_a_ping_between(served: Served) -> None:
    """Fragments make one message, a ping between them is answered, and the close is answered in kind."""
    with trio.fail_after(LIMIT):
        async with served.connect() as raw:
            pieces = [frame(BINARY, REQUEST[:1], fin=False), frame(PING, b"so"), frame(CONTINUATION, REQUEST[1:])]
            for byte in b"".join(pieces):
                await raw.stream.send_all(bytes([byte]))
            assert await raw.receive() == Frame(PONG, b"so")
            assert await raw.receive() == Frame(BINARY, EVENT.SerializeToString())
            await raw.stream.send_all(close_frame(1000, "bye"))
            assert (await raw.end(answer=False))[0] == 1000
        await served.no_connection()


@pytest.mark.parametrize(
    "sent", [frame(CLOSE), close_frame(1001), close_frame(1002), close_frame(3000), close_frame(4000)]
)
async def test_closes_that_are_right_are_answered(served: Served, sent: bytes) -> None:
    with trio.fail_after(LIMIT):
        async with served.connect() as raw:
            await raw.stream.send_all(sent)
            answered = cut(sent)
            assert answered is not None
            assert (await raw.end(answer=False))[0] == code_of(answered[0].payload)
        await served.no_connection()


async def test_a_reset_in_the_midst_of_a_frame(served: Served) -> None:
    """A peer that vanishes leaves nothing behind."""
    with trio.fail_after(LIMIT):
        for size in range(1, 8):
            async with served.connect() as raw:
                await raw.stream.send_all(frame(BINARY, REQUEST)[:size])
                raw.stream.socket.setsockopt(1, 13, struct.pack("ii", 1, 0))  # type: ignore[attr-defined]  # Trio's stream has a socket
        await served.no_connection()
        assert served.requests == [], "half a request is none"
        async with served.connect() as raw:
            await raw.stream.send_all(frame(BINARY, REQUEST))
            assert (await raw.receive()).payload == EVENT.SerializeToString()
