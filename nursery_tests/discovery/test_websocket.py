"""The Discovery service over WebSocket: the same calls as over gRPC, and how connections end (D3, D4, S1)."""

from __future__ import annotations

import base64
import json
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio_websocket
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked
from trio_websocket import ConnectionClosed, WebSocketConnection

from meshlocal.discovery.websocket import WebSocketOptions, WebSocketServer
from meshlocal.net.grpc.server import Routes, unary
from meshlocal.net.websocket_stream import WatchedStream
from meshlocal.wire.discovery_methods import LIST_SERVICES, WATCH_INSTANCES
from meshlocal.wire.discovery_websocket import JSON, PROTO
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import discovery_pb2 as pb

wrap_client_stream: Any = trio_websocket.wrap_client_stream
"""Its hints name sockets only; it takes any stream."""

REQUEST = pb.WatchInstancesRequest(subscriptions=[pb.Subscription(service="b")])
EVENT = pb.WatchInstancesResponse(snapshot=pb.ServiceSnapshot(service="b", version="1"))


class Calls:
    """Handlers that do as they are told, and what they saw."""

    def __init__(self) -> None:
        self.metadata: list[object] = []
        self.cancelled = 0
        self.events = [EVENT]
        self.then: Callable[[], Any] = trio.sleep_forever

    async def watch(self, call: Any) -> None:
        request = await call.receive()
        assert request == REQUEST
        assert await call.receive() is None
        self.metadata.append(call.metadata)
        try:
            for event in self.events:
                await call.send(event)
            await self.then()
        except trio.Cancelled:
            self.cancelled += 1
            raise

    async def list(self, request: pb.ListServicesRequest, call: Any) -> pb.ListServicesResponse:
        return pb.ListServicesResponse(services=[pb.Service(name=f"in {request.zone}", instances=3)])

    def routes(self) -> Routes:
        return {WATCH_INSTANCES: self.watch, LIST_SERVICES: unary(self.list)}


class Served:
    def __init__(self, server: WebSocketServer, calls: Calls, nursery: trio.Nursery) -> None:
        self.server = server
        self.calls = calls
        self._nursery = nursery

    def stream(self) -> Any:
        near, far = memory_stream_pair()
        self._nursery.start_soon(self.server.serve_stream, far)
        return near

    async def closed(self) -> None:
        while self.server.connections:  # noqa: ASYNC110 - the server tells nobody
            await trio.sleep(0.5)

    @asynccontextmanager
    async def connect(
        self,
        *subprotocols: str,
        path: str = WATCH_INSTANCES.path,
        headers: list[tuple[bytes, bytes]] | None = None,
        host: str = "test:1",
    ) -> AsyncIterator[WebSocketConnection]:
        connection = await wrap_client_stream(
            self._nursery,
            self.stream(),
            host,
            path,
            subprotocols=subprotocols or (PROTO,),
            extra_headers=headers,
        )
        async with connection:
            yield connection


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Served]:
    calls = Calls()
    server = WebSocketServer(calls.routes(), WebSocketOptions(**options))
    async with trio.open_nursery() as nursery:
        yield Served(server, calls, nursery)
        nursery.cancel_scope.cancel()
    assert server.connections == 0


async def end(connection: WebSocketConnection) -> tuple[int, str | None]:
    """The code and reason that the server closes with."""
    reason = None
    try:
        while True:
            await connection.get_message()
    except ConnectionClosed as closed:
        reason = closed.reason
    assert reason is not None
    return reason.code, reason.reason


async def test_protobuf_in_binary_frames() -> None:
    """The messages of gRPC, as they are."""
    async with serving() as served, served.connect(PROTO) as connection:
        assert connection.subprotocol == PROTO
        await connection.send_message(REQUEST.SerializeToString())
        assert await connection.get_message() == EVENT.SerializeToString()


async def test_json_in_text_frames() -> None:
    """The JSON that protobuf defines, for browsers."""
    async with serving() as served, served.connect(JSON) as connection:
        await connection.send_message('{"subscriptions": [{"service": "b"}]}')
        assert json.loads(await connection.get_message()) == {"snapshot": {"service": "b", "version": "1"}}


async def test_the_first_subprotocol_that_is_known_is_taken() -> None:
    async with serving() as served, served.connect("other", JSON, PROTO) as connection:
        assert connection.subprotocol == JSON


async def test_a_call_that_ends_well_closes_with_1000() -> None:
    async with serving() as served, served.connect(path=LIST_SERVICES.path) as connection:
        await connection.send_message(pb.ListServicesRequest(zone="z").SerializeToString())
        answer = await connection.get_message()
        assert isinstance(answer, bytes)
        assert pb.ListServicesResponse.FromString(answer).services[0].name == "in z"
        assert await end(connection) == (1000, None)


@pytest.mark.parametrize(
    ("subprotocol", "frame", "code", "reason"),
    [
        (PROTO, "text", 1003, "text frame"),
        (JSON, b"binary", 1003, "binary frame"),
        (PROTO, b"\xff\xff", 1007, "is no meshlocal.discovery.v1.WatchInstancesRequest"),
        (JSON, "no json", 1007, "is no meshlocal.discovery.v1.WatchInstancesRequest"),
        (JSON, '{"unknown": 1}', 1007, "is no meshlocal.discovery.v1.WatchInstancesRequest"),
        (JSON, "[" * 16_000, 1007, ""),
        (JSON, "[" * 16_385, 1009, "a request in JSON has 16384 characters at most"),
        (PROTO, b"x" * 5000, 1009, "5000"),
        (JSON, "x" * 5000, 1009, "5000"),
    ],
)
async def test_frames_that_are_refused(subprotocol: str, frame: str | bytes, code: int, reason: str) -> None:
    """Each kind of bad frame has its close code (RFC 6455, 7.4.1), and harms no other connection."""
    limit = 4096 if len(frame) == 5000 else 1 << 20
    async with serving(max_message_size=limit) as served, served.connect() as other:
        async with served.connect(subprotocol) as connection:
            await connection.send_message(frame)
            got, said = await end(connection)
            assert got == code
            assert reason.replace("5000", "4096") in (said or "")
        await other.send_message(REQUEST.SerializeToString())
        assert await other.get_message() == EVENT.SerializeToString()


async def test_a_second_request_is_refused() -> None:
    """A connection is for one request: 1008, and the handler is cancelled."""
    async with serving() as served, served.connect() as connection:
        await connection.send_message(REQUEST.SerializeToString())
        assert await connection.get_message()
        await connection.send_message(REQUEST.SerializeToString())
        assert await end(connection) == (1008, "a connection is for one request")
        assert served.calls.cancelled == 1


@pytest.mark.parametrize(
    ("error", "draining", "code", "reason"),
    [
        (GrpcError(StatusCode.INVALID_ARGUMENT, "no such thing"), False, 4003, "no such thing"),
        (GrpcError(StatusCode.UNAVAILABLE, "away"), False, 4014, "away"),
        (GrpcError(StatusCode.UNAVAILABLE, "away"), True, 1001, "away"),
        (GrpcError(StatusCode.INTERNAL, "ü" * 200), False, 4013, "ü" * 61),
    ],
)
async def test_a_status_becomes_a_close_code(error: GrpcError, draining: bool, code: int, reason: str) -> None:
    async with serving() as served, served.connect() as connection:

        async def fail() -> None:
            raise error

        served.calls.then = fail
        served.server.draining = draining
        await connection.send_message(REQUEST.SerializeToString())
        assert await end(connection) == (code, reason)


async def test_a_fault_in_a_handler_is_told_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as served, served.connect() as connection:

        async def fail() -> None:
            raise ValueError("secret")

        served.calls.then = fail
        await connection.send_message(REQUEST.SerializeToString())
        assert await end(connection) == (1011, "the handler failed")
    assert "secret" in caplog.text


HANDSHAKE = """GET {path} HTTP/1.1\r\nHost: test:1\r\nUpgrade: websocket\r\nConnection: Upgrade\r
Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{fields}\r\n"""


@pytest.mark.parametrize(
    ("path", "fields", "status", "text"),
    [
        ("/other", f"Sec-WebSocket-Protocol: {PROTO}\r\n", 404, "no method /other"),
        (WATCH_INSTANCES.path, "", 400, "offer the subprotocol"),
        (WATCH_INSTANCES.path, "Sec-WebSocket-Protocol: other\r\n", 400, "offer the subprotocol"),
        (WATCH_INSTANCES.path, "Origin: http://evil.test\r\n", 403, "pages of http://evil.test may not connect"),
        (WATCH_INSTANCES.path, "Origin: null\r\n", 403, "pages of null"),
        (WATCH_INSTANCES.path, "Origin: http://[bad\r\n", 403, "pages of"),
    ],
)
async def test_handshakes_that_are_refused(path: str, fields: str, status: int, text: str) -> None:
    """A path that is no method, no known subprotocol, a page of another host: an HTTP status says so."""
    async with serving() as served:
        stream = served.stream()
        await stream.send_all(HANDSHAKE.format(path=path, fields=fields).encode())
        answer = b"".join([bytes(part) async for part in stream]).decode()
        assert answer.startswith(f"HTTP/1.1 {status} ")
        assert text in answer


@pytest.mark.parametrize("origin", ["http://test", "https://test:8443", "https://page.test"])
async def test_pages_that_may_connect(origin: str) -> None:
    """Pages of the same host, whatever their port, and of the origins that the config names."""
    async with (
        serving(origins=("https://page.test",), names=("test",)) as served,
        served.connect(headers=[(b"Origin", origin.encode())]) as connection,
    ):
        assert connection.subprotocol == PROTO


@pytest.mark.parametrize(
    ("headers", "subprotocols", "metadata"),
    [
        ([], (PROTO,), ()),
        ([(b"Authorization", b"Bearer t1")], (PROTO,), (("authorization", "Bearer t1"),)),
        (
            [],
            (PROTO, "meshlocal.bearer." + base64.urlsafe_b64encode(b"t2").decode().rstrip("=")),
            (("authorization", "Bearer t2"),),
        ),
        ([], (PROTO, "meshlocal.bearer.!"), ()),
        ([], (PROTO, "meshlocal.bearer._w"), ()),
    ],
)
async def test_tokens(headers: list[tuple[bytes, bytes]], subprotocols: tuple[str, ...], metadata: object) -> None:
    """A token comes in a header, or, from browsers, in a subprotocol; handlers see it as gRPC's metadata."""
    async with serving() as served, served.connect(*subprotocols, headers=headers) as connection:
        assert connection.subprotocol == PROTO
        await connection.send_message(REQUEST.SerializeToString())
        await connection.get_message()
        assert served.calls.metadata == [metadata]


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x00\xa5",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        b"x" * 100_000,
        b"",
    ],
)
async def test_what_is_no_handshake(data: bytes, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever comes in place of a handshake ends its connection in time, without an error in the log."""
    async with serving() as served:
        stream = served.stream()
        await stream.send_all(data)
        with trio.fail_after(11):
            async for _ in stream:
                pass
            await wait_all_tasks_blocked()
        assert served.server.connections == 0
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_client_that_leaves_before_its_handshake_is_not_waited_for() -> None:
    async with serving() as served:
        stream = served.stream()
        await wait_all_tasks_blocked()
        assert served.server.connections == 1
        await stream.aclose()
        await wait_all_tasks_blocked()
        assert served.server.connections == 0


async def test_a_client_that_leaves_cancels_its_handler() -> None:
    """With a close or without one."""
    async with serving() as served:
        for politely in (True, False):
            async with served.connect() as connection:
                await connection.send_message(REQUEST.SerializeToString())
                assert await connection.get_message()
                if not politely:
                    await trio.aclose_forcefully(connection._stream)
        await wait_all_tasks_blocked()
        assert served.calls.cancelled == 2
        assert served.server.connections == 0


async def test_a_client_that_sends_no_request(autojump_clock: MockClock) -> None:
    async with serving() as served, served.connect() as connection:
        assert await end(connection) == (1008, "no request came")


async def test_a_client_that_answers_no_ping_is_given_up(autojump_clock: MockClock) -> None:
    """A peer that is gone without a word is found by pings."""
    async with serving(keepalive_interval=5, keepalive_timeout=2, close_timeout=1) as served:
        near, far = memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served.server.serve_stream, far)
            connection = await wrap_client_stream(
                nursery, near, "test", WATCH_INSTANCES.path, subprotocols=[PROTO], message_queue_size=0
            )
            await connection.send_message(REQUEST.SerializeToString())
            # Nobody takes its message, so that its reader stands still, and answers no ping.
            start = trio.current_time()
            await served.closed()
            assert trio.current_time() - start == pytest.approx(8, abs=0.5)
            nursery.cancel_scope.cancel()


async def test_a_client_that_reads_nothing_is_given_up(autojump_clock: MockClock) -> None:
    """Nothing waits for ever for a reader: what is not taken in time ends the connection."""
    async with serving(stall_timeout=3) as served:
        served.calls.events = [EVENT] * 10
        near, far = lockstep_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served.server.serve_stream, far)
            connection = await wrap_client_stream(
                nursery, near, "test", WATCH_INSTANCES.path, subprotocols=[PROTO], message_queue_size=0
            )
            start = trio.current_time()
            await connection.send_message(REQUEST.SerializeToString())
            await served.closed()
            assert trio.current_time() - start <= 6
            assert served.calls.cancelled + len(served.calls.metadata) >= 1
            nursery.cancel_scope.cancel()


async def test_more_connections_than_allowed() -> None:
    calls = Calls()
    server = WebSocketServer(calls.routes(), max_connections=1)
    async with trio.open_nursery() as nursery:
        first, far = memory_stream_pair()
        nursery.start_soon(server.serve_stream, far)
        await wait_all_tasks_blocked()
        second, far = memory_stream_pair()
        await server.serve_stream(far)
        assert await second.receive_some() == b""
        assert server.connections == 1
        await first.aclose()


async def test_a_drain_ends_with_a_handshake_that_fails() -> None:
    """S1: also over TLS, and also if that was the last connection."""
    async with serving() as served, trio.open_nursery() as nursery:
        near, far = memory_stream_pair()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        nursery.start_soon(partial(served.server.serve_stream, far, tls=lambda: context))
        await wait_all_tasks_blocked()
        assert served.server.connections == 1
        with trio.fail_after(5):
            nursery.start_soon(near.send_all, b"no handshake at all")
            await served.server.drain()


async def test_a_drain_waits_for_the_last_connection() -> None:
    """S1: the server is drained once every call has ended."""
    async with serving() as served:
        drained = trio.Event()

        async def drain(nursery: trio.Nursery) -> None:
            await served.server.drain()
            drained.set()

        async with trio.open_nursery() as nursery:
            async with served.connect() as connection:
                await connection.send_message(REQUEST.SerializeToString())
                await connection.get_message()
                nursery.start_soon(drain, nursery)
                await wait_all_tasks_blocked()
                assert not drained.is_set()
            await drained.wait()


@pytest.mark.parametrize("steps", range(12))
async def test_cancellation_at_any_step(steps: int) -> None:
    """A server that is cancelled in the midst of whatever leaves no connection open."""
    calls = Calls()
    server = WebSocketServer(calls.routes())
    near, far = memory_stream_pair()
    async with trio.open_nursery() as client:

        async def talk() -> None:
            try:
                connection = await wrap_client_stream(client, near, "test", WATCH_INSTANCES.path, subprotocols=[PROTO])
                await connection.send_message(REQUEST.SerializeToString())
                await connection.get_message()
            except (trio_websocket.HandshakeError, ConnectionClosed, trio.BrokenResourceError):
                pass

        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.serve_stream, far)
                client.start_soon(talk)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        assert server.connections == 0
        client.cancel_scope.cancel()


async def test_a_message_that_is_cut_is_followed_by_nothing() -> None:
    """RFC 6455: a closing frame within another frame would be read as its rest."""
    near, far = lockstep_stream_pair()
    watched = WatchedStream(near, 10.0)
    with trio.move_on_after(0.05):
        await watched.send_all(b"x" * 200_000)
    assert watched.ended.is_set()
    with pytest.raises(trio.ClosedResourceError):
        await watched.send_all(b"goodbye")
    await far.aclose()
    # Who was cancelled before the first byte may say goodbye.
    ours, theirs = memory_stream_pair()
    watched = WatchedStream(ours, 10.0)
    with trio.CancelScope() as scope:
        scope.cancel()
        await watched.send_all(b"x")
    await watched.send_all(b"goodbye")
    assert await theirs.receive_some(10) == b"goodbye"
