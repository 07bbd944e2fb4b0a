"""The WebSocket client against a server that does as it is told, to the byte, on each loop (RFC 6455)."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.abc import SocketStream

from meshlocal.net.websocket_client import ClosedError, RejectedError, WebSocket, WebSocketOptions, open_websocket
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
UNHURRIED = WebSocketOptions(max_message_size=1000, keepalive_interval=LIMIT, keepalive_timeout=LIMIT)
Run = Callable[[Callable[[], Awaitable[None]]], None]


@pytest.fixture(params=["trio", "asyncio"])
def on_loop(request: pytest.FixtureRequest) -> Run:
    def run(main: Callable[[], Awaitable[None]]) -> None:
        async def limited() -> None:
            with anyio.fail_after(LIMIT):
                await main()

        anyio.run(limited, backend=request.param)

    return run


class Peer:
    """The server's side of a connection."""

    def __init__(self, stream: SocketStream) -> None:
        self.stream = stream
        self.head = ""
        self._received = b""

    async def read_head(self) -> None:
        while b"\r\n\r\n" not in self._received:
            self._received += await self.stream.receive()
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        self.head = head.decode()

    def accepting(self, subprotocol: str | None = "p", key: str | None = None) -> bytes:
        sent = re.search("(?i)sec-websocket-key: (.*)", self.head)
        assert sent is not None
        digest = hashlib.sha1((sent[1].strip() + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
        lines = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade"]
        lines.append(f"Sec-WebSocket-Accept: {key or base64.b64encode(digest).decode()}")
        if subprotocol is not None:
            lines.append(f"Sec-WebSocket-Protocol: {subprotocol}")
        return "\r\n".join([*lines, "", ""]).encode()

    async def send(self, data: bytes) -> None:
        await self.stream.send(data)

    async def receive(self) -> Frame:
        """The client's next frame; clients mask all that they send."""
        while (found := cut(self._received)) is None:
            self._received += await self.stream.receive()
        got, self._received = found
        assert got.masked
        return got


@asynccontextmanager
async def serving(script: Callable[[Peer], Awaitable[None]]) -> AsyncIterator[int]:
    """A server that follows the script on each connection, then closes it."""

    async def handle(stream: SocketStream) -> None:
        async with stream:
            peer = Peer(stream)
            await peer.read_head()
            await script(peer)

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, handle)
        yield listener.extra(anyio.abc.SocketAttribute.local_port)
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def connected(
    script: Callable[[Peer], Awaitable[None]], options: WebSocketOptions = UNHURRIED
) -> AsyncIterator[WebSocket]:
    """A connection whose server accepts, and then follows the script."""
    done = anyio.Event()

    async def accept(peer: Peer) -> None:
        await peer.send(peer.accepting())
        await script(peer)
        done.set()

    async with serving(accept) as port:
        async with open_websocket("127.0.0.1", port, "/path", ["p"], options=options) as websocket:
            yield websocket
        await done.wait()


async def ended(websocket: WebSocket) -> tuple[int, str]:
    with pytest.raises(ClosedError) as caught:
        await websocket.receive()
    with pytest.raises(ClosedError) as again:
        await websocket.receive()
    assert again.value is caught.value
    with pytest.raises(ClosedError):
        await websocket.send(b"more")
    return caught.value.code, caught.value.reason


def test_messages_both_ways(on_loop: Run) -> None:
    """Text and binary, whole and in pieces; pings are answered; the goodbye has its code."""

    async def script(peer: Peer) -> None:
        assert peer.head.startswith("GET /path HTTP/1.1\r\n")
        assert await peer.receive() == Frame(BINARY, b"asked", masked=True)
        assert await peer.receive() == Frame(TEXT, "würde".encode(), masked=True)
        await peer.send(frame(BINARY, b"x" * 1000, masked=False))
        pieces = [frame(TEXT, "ü".encode()[:1], fin=False, masked=False), frame(PING, b"so", masked=False)]
        for byte in b"".join([*pieces, frame(CONTINUATION, "ü".encode()[1:], masked=False)]):
            await peer.send(bytes([byte]))
        assert await peer.receive() == Frame(PONG, b"so", masked=True)
        goodbye = await peer.receive()
        assert (goodbye.opcode, code_of(goodbye.payload)) == (CLOSE, 1000)

    async def main() -> None:
        async with connected(script) as websocket:
            assert websocket.subprotocol == "p"
            await websocket.send(b"asked")
            await websocket.send("würde")
            assert await websocket.receive() == b"x" * 1000
            assert await websocket.receive() == "ü"

    on_loop(main)


@pytest.mark.parametrize(
    ("sent", "code", "reason"),
    [
        (close_frame(1000, masked=False), 1000, ""),
        (close_frame(1001, "going away", masked=False), 1001, "going away"),
        (close_frame(4014, "ü" * 61, masked=False), 4014, "ü" * 61),
        (frame(CLOSE, masked=False), 1005, ""),
    ],
)
def test_how_a_server_ends_is_told(on_loop: Run, sent: bytes, code: int, reason: str) -> None:
    """The close is answered in kind, and what it said is told, now and later."""

    async def script(peer: Peer) -> None:
        await peer.send(sent)
        answer = await peer.receive()
        assert (answer.opcode, code_of(answer.payload)) == (CLOSE, code)

    async def main() -> None:
        async with connected(script) as websocket:
            assert await ended(websocket) == (code, reason)

    on_loop(main)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(BINARY, b"x" * 1001, masked=False), 1009),
        (frame(BINARY, b"x" * 60_000, masked=False), 1009),
        (frame(BINARY, b"x" * 600, fin=False, masked=False) + frame(CONTINUATION, b"x" * 600, masked=False), 1009),
        (frame(BINARY, b"masked"), 1002),
        (frame(BINARY, b"x", reserved=2, masked=False), 1002),
        (frame(5, masked=False), 1002),
        (frame(CONTINUATION, b"x", masked=False), 1002),
        (frame(PING, b"x", fin=False, masked=False), 1002),
        (frame(TEXT, b"\xff", masked=False), 1007),
        (close_frame(1005, masked=False), 1002),
    ],
)
def test_what_breaks_the_protocol_ends_the_connection(on_loop: Run, sent: bytes, code: int) -> None:
    """The server is told why, by the code that RFC 6455 has for it."""

    async def script(peer: Peer) -> None:
        await peer.send(sent)
        told = await peer.receive()
        assert (told.opcode, code_of(told.payload)) == (CLOSE, code)

    async def main() -> None:
        async with connected(script) as websocket:
            assert (await ended(websocket))[0] == code

    on_loop(main)


@pytest.mark.parametrize("sent", [b"", b"\x82", frame(BINARY, b"x" * 10, masked=False)[:5]])
def test_a_connection_that_breaks_off(on_loop: Run, sent: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(sent)

    async def main() -> None:
        async with connected(script) as websocket:
            assert await ended(websocket) == (1006, "the connection broke off")

    on_loop(main)


def test_silence_is_probed_and_found(on_loop: Run) -> None:
    """A server that answers pings is waited for, one that does not is given up."""
    quick = WebSocketOptions(max_message_size=1000, keepalive_interval=0.02, keepalive_timeout=LIMIT)

    async def answers(peer: Peer) -> None:
        for _ in range(3):
            ping = await peer.receive()
            assert ping.opcode == PING
            await peer.send(frame(PONG, ping.payload, masked=False))
        await peer.send(frame(BINARY, b"at last", masked=False))

    async def mute(peer: Peer) -> None:
        assert (await peer.receive()).opcode == PING
        with pytest.raises(anyio.EndOfStream):
            await peer.receive()

    async def main() -> None:
        async with connected(answers, quick) as websocket:
            assert await websocket.receive() == b"at last"
        impatient = WebSocketOptions(max_message_size=1000, keepalive_interval=0.02, keepalive_timeout=0.05)
        async with connected(mute, impatient) as websocket:
            assert await ended(websocket) == (1006, "a ping was not answered in time")

    on_loop(main)


REJECTIONS: dict[str, tuple[Callable[[Peer], bytes], int, str]] = {
    "a page": (lambda peer: b"HTTP/1.1 403 Forbidden\r\nContent-Length: 3\r\n\r\nno\n", 403, "no"),
    "no body": (lambda peer: b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", 404, ""),
    "until the end": (lambda peer: b"HTTP/1.1 500 Oh\r\nConnection: close\r\n\r\nsorry", 500, "sorry"),
    "a long page": (lambda peer: b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + b"x" * 9999, 200, "x" * 4096),
    "no HTTP": (lambda peer: b"220 mail.test ESMTP\r\n", 0, "speaks no WebSocket"),
    "nothing": (lambda peer: b"", 0, "closed the connection"),
    "a wrong key": (lambda peer: peer.accepting(key="bm8="), 0, "speaks no WebSocket"),
    "no subprotocol": (lambda peer: peer.accepting(None), 0, "chose no subprotocol that was offered"),
    "another subprotocol": (lambda peer: peer.accepting("q"), 0, ""),
}


@pytest.mark.parametrize("case", REJECTIONS)
def test_handshakes_that_fail(on_loop: Run, case: str) -> None:
    """Whatever is at the other end, the error says what it said, in bounded space."""
    made, status, reason = REJECTIONS[case]

    async def script(peer: Peer) -> None:
        await peer.send(made(peer))

    async def main() -> None:
        async with serving(script) as port:
            with pytest.raises(RejectedError) as caught:
                async with open_websocket("127.0.0.1", port, "/path", ["p"], options=UNHURRIED):
                    raise AssertionError("accepted")
        assert caught.value.status == status
        assert reason in caught.value.reason
        assert len(caught.value.reason) <= 4096

    on_loop(main)


def test_no_connection(on_loop: Run) -> None:
    async def main() -> None:
        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            port: Any = listener.extra(anyio.abc.SocketAttribute.local_port)
        with pytest.raises(ConnectionError, match="connection refused"):
            async with open_websocket("127.0.0.1", port, "/", ["p"], options=UNHURRIED):
                raise AssertionError("connected")

    on_loop(main)
