"""Connections: dead, stalled, hostile and draining peers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
import trio
from google.protobuf.wrappers_pb2 import BytesValue, StringValue
from h2.errors import ErrorCodes
from h2.events import ResponseReceived, StreamReset, TrailersReceived, WindowUpdated
from hyperframe.frame import DataFrame, PingFrame, RstStreamFrame, SettingsFrame
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from meshlocal.net.grpc.client import channel_over
from meshlocal.net.grpc.connection import READ_MARK, READ_SIZE, SEND_MARK
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.net.grpc.server import GrpcServer, ServerCall, unary
from meshlocal.wire.grpc.framing import encode_message
from meshlocal.wire.grpc.metadata import decode_grpc_message, header
from meshlocal.wire.grpc.method import Method
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from nursery_tests.h2_peer import DEFAULT_WINDOW, MAX_STREAM_ID, PREFACE, GoAway, H2Peer

ECHO = Method("/test.Echo/Echo", StringValue, StringValue)
STREAM = Method("/test.Echo/Stream", BytesValue, BytesValue, client_streaming=True, server_streaming=True)
REQUEST = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/test.Echo/Echo"),
    (b":authority", b"test"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc+proto"),
]
LONG = 20.0
"""Seconds, less than a keepalive's."""
HI = encode_message(StringValue(value="hi").SerializeToString())


async def echo(request: StringValue, call: ServerCall[StringValue, StringValue]) -> StringValue:
    return request


async def hang(call: ServerCall[Any, Any]) -> None:
    await trio.sleep_forever()


def preamble() -> bytes:
    return bytes(H2Peer(client=True, max_streams=100, max_header_list_size=16_384).outgoing)


# Dead and stalled peers


async def test_keepalive_ends_a_channel_whose_server_froze(autojump_clock: object, raw_peer: Any) -> None:
    ours, theirs = memory_stream_pair()
    peer = raw_peer(theirs, client=False)
    async with channel_over(ours) as channel:
        await peer.settle()
        start = trio.current_time()
        with pytest.raises(GrpcError, match="keepalive") as caught:
            await channel.unary(STREAM, BytesValue())
        assert caught.value.code is StatusCode.UNAVAILABLE
        assert not caught.value.unprocessed
        assert trio.current_time() - start == pytest.approx(40, abs=0.1)
        assert "keepalive" in await channel.wait_closed()
        with pytest.raises(GrpcError) as refused:
            await channel.unary(STREAM, BytesValue())
        assert refused.value.unprocessed


async def test_a_server_that_never_said_a_word_fails_the_waiting_call(autojump_clock: object) -> None:
    ours, _theirs = memory_stream_pair()
    async with channel_over(ours) as channel:
        with pytest.raises(GrpcError, match="keepalive") as caught:
            await channel.unary(STREAM, BytesValue())
        assert caught.value.unprocessed


async def test_keepalive_cancels_the_handlers_of_a_client_that_froze(autojump_clock: object, raw_peer: Any) -> None:
    ours, theirs = memory_stream_pair()
    server = GrpcServer({ECHO: hang})
    peer = raw_peer(ours, client=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs)
        peer.protocol.send_headers(1, REQUEST)
        await peer.settle()
        assert server.connections == 1
        await trio.sleep(41)
        assert server.connections == 0


async def test_keepalive_leaves_an_idle_peer_that_answers(connect: Any, autojump_clock: object) -> None:
    async with connect({ECHO: unary(echo)}) as link:
        await trio.sleep(3600)
        assert link.channel.closed_reason is None
        assert await link.channel.unary(ECHO, StringValue(value="x")) == StringValue(value="x")


async def test_a_server_that_takes_no_bytes_loses_the_channel(autojump_clock: object) -> None:
    ours, theirs = lockstep_stream_pair()
    async with channel_over(ours, options=GrpcOptions(keepalive_interval=None)) as channel:
        start = trio.current_time()
        with pytest.raises(GrpcError, match="stalled"):
            await channel.unary(STREAM, BytesValue())
        assert trio.current_time() - start == pytest.approx(30)
    await theirs.aclose()


async def test_leaving_a_channel_whose_server_takes_no_bytes_is_quick(autojump_clock: object) -> None:
    ours, _theirs = lockstep_stream_pair()
    start = trio.current_time()
    async with channel_over(ours):
        await wait_all_tasks_blocked()
    assert trio.current_time() - start <= 2


# Hostile peers


@pytest.mark.parametrize(
    "frame",
    [
        PingFrame(0, opaque_data=b"12345678").serialize(),
        SettingsFrame(0).serialize(),
        SettingsFrame(0, settings={4: 1000}).serialize(),
    ],
)
async def test_a_flood_from_a_peer_that_does_not_read_stops_at_the_mark(frame: bytes, autojump_clock: object) -> None:
    ours, theirs = lockstep_stream_pair()
    server = GrpcServer({ECHO: unary(echo)}, GrpcOptions(keepalive_interval=None))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs)
        await ours.send_all(preamble())

        async def flood() -> None:
            with suppress(trio.BrokenResourceError):
                while True:
                    await ours.send_all(frame * (READ_SIZE // len(frame)))

        nursery.start_soon(flood)
        await wait_all_tasks_blocked()
        (connection,) = server._connections
        assert READ_MARK <= len(connection.outgoing) < READ_MARK + 2 * READ_SIZE
        await trio.sleep(31)
        assert server.connections == 0


async def test_handlers_that_still_clean_up_count_against_the_limit(autojump_clock: object, raw_peer: Any) -> None:
    ours, theirs = memory_stream_pair()
    running = most = 0

    async def slow_to_leave(call: ServerCall[Any, Any]) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(10)
            running -= 1

    server = GrpcServer({ECHO: slow_to_leave}, GrpcOptions(max_concurrent_streams=5))
    peer = raw_peer(ours, client=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs)
        for stream_id in range(1, 401, 2):  # rapid reset
            peer.protocol.send_headers(stream_id, REQUEST)
            await peer.send()
            await wait_all_tasks_blocked()
            peer.protocol.reset(stream_id, ErrorCodes.CANCEL)
        await peer.settle()
        assert most == 5
        (connection,) = server._connections
        assert connection._handlers == 5
        assert connection.streams.keys() <= set(range(1, 11, 2))
        await trio.sleep(11)
        assert connection._handlers == 0
        assert connection.streams == {}
        peer.protocol.send_headers(1001, REQUEST)
        await peer.settle()
        assert connection._handlers == 1
        nursery.cancel_scope.cancel()


async def test_a_call_over_the_limit_is_refused_and_says_so(autojump_clock: object, raw_peer: Any) -> None:
    ours, theirs = memory_stream_pair()
    server = GrpcServer({ECHO: hang}, GrpcOptions(max_concurrent_streams=2))
    peer = raw_peer(ours, client=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs)
        for stream_id in (1, 3, 5):  # before the server's SETTINGS came
            peer.protocol.send_headers(stream_id, REQUEST)
        await peer.settle()
        (reset,) = peer.seen(StreamReset)
        assert (reset.stream_id, reset.error_code) == (5, ErrorCodes.REFUSED_STREAM)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "wire",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),  # TLS
        PREFACE + b"\0\0\x01\x06\0\0\0\0\0x",  # a PING of one byte
        PREFACE + b"\xff\xff\xff\x00\0\0\0\0\x01",  # a frame of 16 MB
        PREFACE + b"\0\0\0\x04\0\0\0\0\0" + b"\0\0\x04\x01\x05\0\0\0\x01\xff\xff\xff\xff",  # HPACK garbage
        PREFACE + b"\0\0\0\x04\0\0\0\0\0" + b"\0\0\x01\x00\0\0\0\0\x07x",  # DATA on an idle stream
        PREFACE + b"\0\0\0\x04\0\0\0\0\0" + b"\0\0\x04\x08\0\0\0\0\0\0\0\0\0",  # WINDOW_UPDATE by zero
        PREFACE + b"\0\0\x04\x07\0\0\0\0\0\0\0\0\0",  # a GOAWAY of four bytes
        PREFACE + b"\0\0\0\x04\0\0\0\0\0" + b"\0\0\x01\x09\0\0\0\0\x01x",  # CONTINUATION of nothing
    ],
)
async def test_malformed_bytes_cost_their_connection_only(connect: Any, wire: bytes) -> None:
    async with connect({ECHO: unary(echo)}) as link:
        ours, theirs = memory_stream_pair()
        await ours.send_all(wire)
        with trio.fail_after(5):
            await link.server.serve_stream(theirs)
        assert link.server.connections == 1
        assert await link.channel.unary(ECHO, StringValue(value="x")) == StringValue(value="x")


@settings(max_examples=60, deadline=None)
@given(
    frames=st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 255), st.sampled_from([0, 1, 2, 3, 5]), st.binary(max_size=24)),
        max_size=8,
    )
)
def test_no_frames_get_past_the_connection(frames: list[tuple[int, int, int, bytes]]) -> None:
    async def main() -> None:
        server = GrpcServer({ECHO: unary(echo)})
        ours, theirs = memory_stream_pair()
        wire = b"".join(
            len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body
            for kind, flags, stream, body in frames
        )
        await ours.send_all(preamble() + wire)
        await ours.send_stream.aclose()
        await server.serve_stream(theirs)
        assert server.connections == 0

    trio.run(main)


# What a peer that is not ours answers


@pytest.fixture
async def asked(raw_peer: Any) -> AsyncIterator[Any]:
    """A raw client of a server: sends one request with changed headers, returns the answer's fields."""
    ours, theirs = memory_stream_pair()
    server = GrpcServer({ECHO: unary(echo), STREAM: hang})
    peer = raw_peer(ours, client=True)

    async def ask(changes: dict[bytes, bytes], body: bytes = HI, wait: float = 0) -> dict[bytes, bytes]:
        stream_id = peer.protocol.next_stream_id()
        headers = [(name, changes.pop(name, value)) for name, value in REQUEST] + list(changes.items())
        peer.protocol.send_headers(stream_id, headers)
        peer.protocol.send_data(stream_id, body, end_stream=True)
        await peer.settle()
        await trio.sleep(wait)
        await peer.settle()
        events = [*peer.seen(ResponseReceived), *peer.seen(TrailersReceived)]
        return {name: value for event in events if event.stream_id == stream_id for name, value in event.headers}

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs)
        yield ask
        nursery.cancel_scope.cancel()


async def test_a_request_of_another_content_type_is_415(autojump_clock: object, asked: Any) -> None:
    assert (await asked({b"content-type": b"application/json"}))[b":status"] == b"415"
    assert (await asked({b"content-type": b"application/grpc-web"}))[b":status"] == b"415"
    assert (await asked({b":method": b"GET"}))[b":status"] == b"405"
    assert (await asked({b"content-type": b"application/grpc;x=y"}))[b"grpc-status"] == b"0"


@pytest.mark.parametrize(
    ("changes", "body", "code", "text"),
    [
        ({b":path": b"/test.Echo/None"}, HI, StatusCode.UNIMPLEMENTED, "/test.Echo/None"),
        ({b"grpc-timeout": b"soon"}, HI, StatusCode.INTERNAL, "grpc-timeout"),
        ({b"grpc-encoding": b"snappy"}, HI, StatusCode.UNIMPLEMENTED, "snappy"),
        ({b"raw-bin": b"!!"}, HI, StatusCode.INTERNAL, "raw-bin"),
        ({b"large": b"x" * 17_000}, HI, StatusCode.RESOURCE_EXHAUSTED, "metadata"),
        ({}, b"\x01" + HI[1:], StatusCode.INTERNAL, "compress"),
        ({}, HI[:-1], StatusCode.INTERNAL, "within a message"),
    ],
)
async def test_bad_requests_get_a_status_that_says_why(
    autojump_clock: object, asked: Any, changes: dict[bytes, bytes], body: bytes, code: StatusCode, text: str
) -> None:
    answer = await asked(dict(changes), body)
    assert int(answer[b"grpc-status"]) == code
    assert text in decode_grpc_message(answer[b"grpc-message"])
    assert b"gzip" in answer[b"grpc-accept-encoding"]
    assert (await asked({}))[b"grpc-status"] == b"0"


async def test_the_servers_own_clock_ends_a_call(autojump_clock: object, asked: Any) -> None:
    answer = await asked({b":path": b"/test.Echo/Stream", b"grpc-timeout": b"5S"}, wait=6)
    assert int(answer[b"grpc-status"]) == StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([(b":status", b"503"), (b"content-type", b"text/html")], StatusCode.UNAVAILABLE),
        ([(b":status", b"404")], StatusCode.UNIMPLEMENTED),
        ([(b":status", b"200"), (b"content-type", b"text/html")], StatusCode.UNKNOWN),
        ([(b":status", b"200"), (b"content-type", b"application/grpc")], StatusCode.UNKNOWN),
        ([(b":status", b"200"), (b"content-type", b"application/grpc"), (b"grpc-status", b"5")], StatusCode.NOT_FOUND),
        ([(b":status", b"200"), (b"content-type", b"application/grpc"), (b"grpc-status", b"99")], StatusCode.UNKNOWN),
        (
            [(b":status", b"200"), (b"grpc-encoding", b"br"), (b"content-type", b"application/grpc")],
            StatusCode.UNIMPLEMENTED,
        ),
    ],
)  # fmt: skip  # a line each where it fits
async def test_answers_of_other_servers(
    autojump_clock: object, raw_peer: Any, headers: list[tuple[bytes, bytes]], code: StatusCode
) -> None:
    ours, theirs = memory_stream_pair()
    peer = raw_peer(theirs, client=False)
    codes: list[StatusCode] = []
    async with channel_over(ours) as channel, trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(GrpcError) as caught:
                await channel.unary(ECHO, StringValue())
            codes.append(caught.value.code)

        nursery.start_soon(call)
        await peer.settle()
        assert not codes
        peer.protocol.send_headers(1, headers, end_stream=True)
        await peer.settle()
        assert codes == [code]


GRPC = [(b":status", b"200"), (b"content-type", b"application/grpc")]
DONE = [(b"grpc-status", b"0")]


@pytest.mark.parametrize(
    ("headers", "body", "code", "text"),
    [
        ([(b":status", b"200"), (b"content-type", b"text/html")], HI, StatusCode.UNKNOWN, "content-type b'text/html'"),
        ([(b":status", b"200")], HI, StatusCode.UNKNOWN, "content-type None"),
        ([(b":status", b"503"), (b"content-type", b"application/grpc")], HI, StatusCode.UNAVAILABLE, "HTTP status 503"),
        (GRPC, HI[:-1], StatusCode.INTERNAL, "within a message"),
        (GRPC, HI[:3], StatusCode.INTERNAL, "within a message"),
        (GRPC, HI + HI[:-1], StatusCode.INTERNAL, "within a message"),
    ],
)
@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_an_answer_that_is_not_whole_or_not_grpcs_is_no_answer(
    autojump_clock: object,
    raw_peer: Any,
    kind: str,
    headers: list[tuple[bytes, bytes]],
    body: bytes,
    code: StatusCode,
    text: str,
) -> None:
    """Though it ends with the status OK."""
    ours, theirs = memory_stream_pair()
    peer = raw_peer(theirs, client=False)
    caught: list[GrpcError] = []
    async with channel_over(ours) as channel, trio.open_nursery() as nursery:

        async def ask() -> None:
            if kind == "unary":
                await channel.unary(ECHO, StringValue())
                return
            async with channel.call(ECHO) as call:
                await call.send(StringValue(), end=True)
                async for response in call:
                    assert response.value == "hi"

        async def fail() -> None:
            with pytest.raises(GrpcError) as error:
                await ask()
            caught.append(error.value)

        nursery.start_soon(fail)
        await peer.settle()
        peer.protocol.send_headers(1, headers)
        peer.protocol.send_data(1, body)
        peer.protocol.send_headers(1, DONE, end_stream=True)
        await peer.settle()
        assert [(each.code, text in each.message) for each in caught] == [(code, True)]


# Windows


async def test_padding_is_given_back_to_the_windows(autojump_clock: object, raw_peer: Any) -> None:
    """It counts against them as data does: a peer that pads what it sends is not cut off for it."""
    ours, theirs = memory_stream_pair()
    peer = raw_peer(ours, client=True)
    got = 0

    async def handler(call: ServerCall[BytesValue, BytesValue]) -> None:
        nonlocal got
        async for _ in call:
            got += 1

    server = GrpcServer({STREAM: handler}, GrpcOptions(max_concurrent_streams=1))
    message = encode_message(BytesValue(value=b"x").SerializeToString())
    padded = DataFrame(1, data=message, pad_length=255, flags=["PADDED"]).serialize()
    empty = DataFrame(1, data=b"", pad_length=255, flags=["PADDED"]).serialize()
    rounds = 20
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs)
        peer.protocol.send_headers(1, [(name, b"/test.Echo/Stream" if name == b":path" else v) for name, v in REQUEST])
        await peer.settle()
        for _ in range(rounds):  # each is a quarter of the stream's window, and an eighth of the connection's
            await peer.send((padded + empty) * 32)
            await peer.settle()
        assert not peer.closed
        assert got == rounds * 32
        sent = rounds * 32 * (len(message) + 2 * 256)
        given = sum(event.delta for event in peer.seen(WindowUpdated) if event.stream_id == 1)
        assert sent - DEFAULT_WINDOW <= given <= sent
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("refused", ["over the limit", "no gRPC"])
async def test_data_of_a_call_that_is_not_served_is_given_back_to_the_connections_window(
    autojump_clock: object, raw_peer: Any, refused: str
) -> None:
    """Else a few refused calls would leave no room for any other."""
    ours, theirs = memory_stream_pair()
    peer = raw_peer(ours, client=True)

    async def slow_to_leave(call: ServerCall[Any, Any]) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(LONG)

    server = GrpcServer({ECHO: unary(echo), STREAM: slow_to_leave}, GrpcOptions(max_concurrent_streams=1))
    headers = dict(REQUEST)
    if refused == "no gRPC":
        headers[b"content-type"] = b"text/plain"
    size = 16_384
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs)
        if refused == "over the limit":
            stream_id = peer.protocol.next_stream_id()
            peer.protocol.send_headers(stream_id, list((headers | {b":path": b"/test.Echo/Stream"}).items()))
            await peer.settle()
            peer.protocol.reset(stream_id, ErrorCodes.CANCEL)
        await peer.settle()
        for _ in range(20):  # more than twice the connection's window
            stream_id = peer.protocol.next_stream_id()
            peer.protocol.send_headers(stream_id, list(headers.items()))
            assert peer.protocol.sendable(stream_id) == size
            peer.protocol.send_data(stream_id, bytes(size))
            await peer.settle()
        assert not peer.closed
        await trio.sleep(LONG)
        stream_id = peer.protocol.next_stream_id()
        peer.protocol.send_headers(stream_id, REQUEST)
        peer.protocol.send_data(stream_id, HI, end_stream=True)
        await peer.settle()
        trailers = {event.stream_id: header(event.headers, b"grpc-status") for event in peer.seen(TrailersReceived)}
        assert trailers == {stream_id: b"0"}
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("error_code", "status", "unprocessed"),
    [
        (ErrorCodes.REFUSED_STREAM, StatusCode.UNAVAILABLE, True),
        (ErrorCodes.CANCEL, StatusCode.CANCELLED, False),
        (ErrorCodes.ENHANCE_YOUR_CALM, StatusCode.RESOURCE_EXHAUSTED, False),
        (ErrorCodes.NO_ERROR, StatusCode.INTERNAL, False),
    ],
)
async def test_a_reset_becomes_a_status(
    autojump_clock: object, raw_peer: Any, error_code: ErrorCodes, status: StatusCode, unprocessed: bool
) -> None:
    ours, theirs = memory_stream_pair()
    peer = raw_peer(theirs, client=False)
    told: list[tuple[StatusCode, bool]] = []
    async with channel_over(ours) as channel, trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(GrpcError) as caught:
                await channel.unary(ECHO, StringValue())
            told.append((caught.value.code, caught.value.unprocessed))

        nursery.start_soon(call)
        await peer.settle()
        assert not told
        peer.protocol.reset(1, error_code)
        await peer.settle()
        assert told == [(status, unprocessed)]


# GOAWAY and drain


async def test_goaway_fails_streams_above_it_and_lets_the_others_end(autojump_clock: object, raw_peer: Any) -> None:
    ours, theirs = memory_stream_pair()
    peer = raw_peer(theirs, client=False)
    results: dict[str, object] = {}

    async with channel_over(ours) as channel, trio.open_nursery() as nursery:

        async def call(name: str) -> None:
            try:
                results[name] = (await channel.unary(ECHO, StringValue(value=name))).value
            except GrpcError as error:
                results[name] = (error.code, error.unprocessed)

        nursery.start_soon(call, "first")
        await peer.settle()
        nursery.start_soon(call, "second")
        await peer.settle()
        peer.protocol.send_goaway(1, ErrorCodes.NO_ERROR, b"going")
        await peer.settle()
        nursery.start_soon(call, "third")
        await peer.settle()
        assert results == dict.fromkeys(("second", "third"), (StatusCode.UNAVAILABLE, True))
        assert "going" in await channel.wait_closing()
        peer.protocol.send_headers(1, [(b":status", b"200"), (b"content-type", b"application/grpc")])
        peer.protocol.send_data(1, HI)
        peer.protocol.send_headers(1, [(b"grpc-status", b"0")], end_stream=True)
        await peer.settle()
        assert results["first"] == "hi"
        assert "going" in await channel.wait_closed()


async def test_goaway_fails_what_waits_for_a_place_and_the_channel_lasts_as_long_as_its_last_call(
    autojump_clock: object, raw_peer: Any
) -> None:
    """Whoever waits, waits for nothing then. One of two open calls that ends does not end the other."""
    ours, theirs = memory_stream_pair()
    peer = raw_peer(theirs, client=False)
    results: dict[str, object] = {}
    two = GrpcOptions(max_concurrent_streams=2)

    async with channel_over(ours, options=two) as channel, trio.open_nursery() as nursery:

        async def call(name: str) -> None:
            try:
                results[name] = (await channel.unary(ECHO, StringValue(value=name))).value
            except GrpcError as error:
                results[name] = (error.code, error.unprocessed)

        async def answer(stream_id: int) -> None:
            peer.protocol.send_headers(stream_id, GRPC)
            peer.protocol.send_data(stream_id, HI)
            peer.protocol.send_headers(stream_id, DONE, end_stream=True)
            await peer.settle()

        for name in ("first", "second", "third", "fourth"):
            nursery.start_soon(call, name)
            await peer.settle()
        assert results == {}
        peer.protocol.send_goaway(3, ErrorCodes.NO_ERROR, b"going")
        await peer.settle()
        assert results == dict.fromkeys(("third", "fourth"), (StatusCode.UNAVAILABLE, True))
        await answer(1)
        assert results["first"] == "hi"
        assert not peer.closed
        await answer(3)
        assert results["second"] == "hi"
        assert peer.closed
        with trio.fail_after(LONG):
            assert "going" in await channel.wait_closed()
        nursery.cancel_scope.cancel()


async def test_goaway_ends_a_channel_without_calls(autojump_clock: object, raw_peer: Any) -> None:
    """And the end of its last call does not end a channel without GOAWAY."""
    ours, theirs = memory_stream_pair()
    peer = raw_peer(theirs, client=False)
    async with channel_over(ours) as channel:
        await peer.settle()
        async with channel.call(ECHO):
            await peer.settle()
        await peer.settle()
        assert channel.closed_reason is None
        peer.protocol.send_goaway(1, ErrorCodes.NO_ERROR, b"going")
        await peer.settle()
        assert peer.closed
        with trio.fail_after(LONG):
            assert "going" in await channel.wait_closed()


async def test_drain_announces_first_and_fixes_the_last_stream_after_the_answer(
    autojump_clock: object, raw_peer: Any
) -> None:
    ours, theirs = memory_stream_pair()
    peer = raw_peer(ours, client=True)
    finish = trio.Event()

    async def until_told(request: StringValue, call: ServerCall[StringValue, StringValue]) -> StringValue:
        await finish.wait()
        assert call.draining.is_set()
        return request

    server = GrpcServer({ECHO: unary(until_told)})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs)
        for stream_id in (1, 3):
            if stream_id == 3:
                nursery.start_soon(server.drain)
                await wait_all_tasks_blocked()  # its GOAWAY has left, and was not read yet
            peer.protocol.send_headers(stream_id, REQUEST)
            peer.protocol.send_data(stream_id, HI, end_stream=True)
            if stream_id == 1:
                await peer.settle()
        await peer.settle()
        assert [event.last_stream_id for event in peer.seen(GoAway)] == [MAX_STREAM_ID, 3]
        peer.protocol.send_headers(5, REQUEST, end_stream=True)
        await peer.settle()
        assert not peer.closed
        finish.set()
        await peer.settle()
        trailers = {event.stream_id: header(event.headers, b"grpc-status") for event in peer.seen(TrailersReceived)}
        assert trailers == {1: b"0", 3: b"0"}
        assert peer.closed
    assert server.connections == 0


async def test_drain_serves_what_comes_with_the_answer_to_its_ping(autojump_clock: object, raw_peer: Any) -> None:
    """S1."""
    ours, theirs = memory_stream_pair()
    peer = raw_peer(ours, client=True)
    server = GrpcServer({ECHO: unary(echo)})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs)
        await peer.settle()
        nursery.start_soon(server.drain)
        await wait_all_tasks_blocked()  # its GOAWAY and PING have left, and were not read yet
        answers = peer.protocol.receive(await ours.receive_some())
        assert [event.last_stream_id for event in answers if isinstance(event, GoAway)] == [MAX_STREAM_ID]
        peer.protocol.send_headers(1, REQUEST)
        peer.protocol.send_data(1, HI, end_stream=True)
        await peer.settle()
        assert [header(event.headers, b"grpc-status") for event in peer.seen(TrailersReceived)] == [b"0"]
        assert peer.closed


async def test_drain_lets_calls_end_and_refuses_new_ones(connect: Any, autojump_clock: object) -> None:
    async def slow(request: StringValue, call: ServerCall[StringValue, StringValue]) -> StringValue:
        await trio.sleep(5)
        return request

    async with connect({ECHO: unary(slow)}) as link:
        async with trio.open_nursery() as nursery:

            async def call() -> None:
                assert await link.channel.unary(ECHO, StringValue(value="x")) == StringValue(value="x")

            nursery.start_soon(call)
            await wait_all_tasks_blocked()
            nursery.start_soon(link.server.drain)
            await wait_all_tasks_blocked()
            with pytest.raises(GrpcError) as caught:
                await link.channel.unary(ECHO, StringValue())
            assert caught.value.code is StatusCode.UNAVAILABLE
            assert caught.value.unprocessed
        assert trio.current_time() == pytest.approx(5, abs=0.1)
        assert link.server.connections == 0
        assert "draining" in await link.channel.wait_closed()


async def test_the_scope_around_drain_ends_what_does_not_end_by_itself(connect: Any, autojump_clock: object) -> None:
    cancelled = trio.Event()

    async def stubborn(call: ServerCall[Any, Any]) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with connect({STREAM: stubborn}) as link, link.channel.call(STREAM) as call:
        await wait_all_tasks_blocked()
        with trio.move_on_after(10) as scope:
            await link.server.drain()
        assert scope.cancelled_caught
        with pytest.raises(GrpcError) as caught:
            await call.receive()
        assert caught.value.code is StatusCode.UNAVAILABLE
        await cancelled.wait()
        await link.channel.wait_closed()
        await wait_all_tasks_blocked()
        assert link.server.connections == 0


async def test_a_connection_that_comes_during_drain_is_told_at_once(connect: Any) -> None:
    async with connect({ECHO: unary(echo)}) as link:
        await link.server.drain()
        ours, theirs = memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.server.serve_stream, theirs)
            async with channel_over(ours) as channel:
                assert "draining" in await channel.wait_closing()


async def test_connections_over_the_limit_are_closed(connect: Any) -> None:
    server = GrpcServer({}, max_connections=1)
    async with trio.open_nursery() as nursery:
        first, theirs = memory_stream_pair()
        nursery.start_soon(server.serve_stream, theirs)
        await wait_all_tasks_blocked()
        second, theirs = memory_stream_pair()
        await server.serve_stream(theirs)
        assert await second.receive_some() == b""
        assert server.connections == 1
        await first.aclose()


async def test_cancelling_the_server_closes_its_connections(connect: Any) -> None:
    server = GrpcServer({STREAM: hang})
    ours, theirs = memory_stream_pair()
    async with channel_over(ours) as channel, trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs)
        async with channel.call(STREAM) as call:
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True), pytest.raises(GrpcError) as caught:
                await call.receive()
        assert caught.value.code is StatusCode.UNAVAILABLE
    assert server.connections == 0


async def test_a_stream_that_waits_to_send_ends_with_its_connection(connect: Any) -> None:
    ours, theirs = memory_stream_pair()
    server = GrpcServer({STREAM: hang})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs)
        async with channel_over(ours) as channel, channel.call(STREAM) as call:
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True), pytest.raises(GrpcError, match="closed by the peer"):
                await call.send(BytesValue(value=bytes(4 * SEND_MARK)))


async def test_a_reset_for_an_unknown_stream_is_ignored(connect: Any) -> None:
    ours, theirs = memory_stream_pair()
    server = GrpcServer({ECHO: unary(echo)})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs)
        await ours.send_all(preamble() + PingFrame(0).serialize())
        await wait_all_tasks_blocked()
        assert server.connections == 1
        await ours.send_all(RstStreamFrame(1, error_code=8).serialize())
        await wait_all_tasks_blocked()
        await ours.aclose()
    assert server.connections == 0
