"""Calls between our client and our server: cancellation, deadlines, flow control, limits."""

from __future__ import annotations

import gzip
import logging
import socket
from contextlib import suppress
from typing import Any

import anyio
import pytest
import trio
from google.protobuf.wrappers_pb2 import BytesValue, StringValue
from trio.testing import wait_all_tasks_blocked

from meshlocal.net.grpc.client import channel_over
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.net.grpc.server import GrpcServer, ServerCall, unary
from meshlocal.net.grpc.transport import TrioByteStream
from meshlocal.wire.grpc.framing import encode_message
from meshlocal.wire.grpc.method import Method
from meshlocal.wire.grpc.status import GrpcError, StatusCode

ECHO = Method("/test.Echo/Echo", StringValue, StringValue)
BYTES = Method("/test.Echo/Bytes", BytesValue, BytesValue)
STREAM = Method("/test.Echo/Stream", BytesValue, BytesValue, client_streaming=True, server_streaming=True)

WINDOW = 65_535
Chat = ServerCall[BytesValue, BytesValue]


async def echo(request: StringValue, call: ServerCall[StringValue, StringValue]) -> StringValue:
    return request


async def hang(call: ServerCall[Any, Any]) -> None:
    await trio.sleep_forever()


async def test_cancelling_a_call_wherever_it_waits_leaves_nothing_behind(connect: Any, autojump_clock: object) -> None:
    async def answer_half(call: Chat) -> None:
        request = await call.receive()
        assert request is not None
        if request.value == b"headers":
            call.send_initial_metadata()
        if request.value == b"one":
            await call.send(request)
        await trio.sleep_forever()

    async def wait_for_the_window(link: Any) -> None:
        async with link.channel.call(STREAM) as call:
            await call.send(BytesValue(value=bytes(10 * WINDOW)))

    async def wait_for(link: Any, kind: bytes) -> None:
        async with link.channel.call(STREAM) as call:
            await call.send(BytesValue(value=kind), end=True)
            if kind == b"one":
                await call.receive()
            await call.receive()

    async def wait_for_metadata(link: Any) -> None:
        async with link.channel.call(STREAM) as call:
            await call.wait_initial_metadata()

    async def wait_for_a_place(link: Any) -> None:
        async with link.channel.call(STREAM), link.channel.call(STREAM):
            await wait_for(link, b"")

    async with connect(
        {STREAM: answer_half, ECHO: unary(echo)}, server_options=GrpcOptions(max_concurrent_streams=2)
    ) as link:
        steps: list[Any] = [wait_for_the_window, wait_for_metadata, wait_for_a_place]
        for step in [*steps, *((kind,) for kind in (b"", b"headers", b"one"))]:
            for moment in ("at once", "blocked"):
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        if isinstance(step, tuple):
                            nursery.start_soon(wait_for, link, step[0])
                        else:
                            nursery.start_soon(step, link)
                        if moment == "blocked":
                            await wait_all_tasks_blocked()
                        scope.cancel()
                await wait_all_tasks_blocked()
                link.assert_nothing_left()
                assert await link.channel.unary(ECHO, StringValue(value="x")) == StringValue(value="x")


async def test_leaving_the_block_early_cancels_the_handler(connect: Any) -> None:
    cancelled = trio.Event()

    async def handler(call: Chat) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with connect({STREAM: handler}) as link:
        async with link.channel.call(STREAM):
            await wait_all_tasks_blocked()
            assert not cancelled.is_set()
        await wait_all_tasks_blocked()
        assert cancelled.is_set()
        link.assert_nothing_left()


async def test_the_scopes_deadline_reaches_the_handler(connect: Any, autojump_clock: object) -> None:
    left: list[float] = []

    async def handler(call: Chat) -> None:
        left.append(call.deadline - trio.current_time())
        await trio.sleep_forever()

    async with connect({STREAM: handler}) as link:
        with pytest.raises(TimeoutError):
            with anyio.fail_after(5):
                await link.channel.unary(STREAM, BytesValue())
        assert left == [pytest.approx(5)]
        await wait_all_tasks_blocked()
        link.assert_nothing_left()


async def test_a_server_that_is_not_read_stops_at_the_window_and_its_neighbour_flows(connect: Any) -> None:
    sent = 0

    async def pour(call: Chat) -> None:
        nonlocal sent
        while True:
            await call.send(BytesValue(value=bytes(10_000)))
            sent += 10_000

    async with connect({STREAM: pour, BYTES: unary(lambda request, call: _same(request))}) as link:
        async with link.channel.call(STREAM) as unread:
            await wait_all_tasks_blocked()
            assert WINDOW - 10_000 < sent <= WINDOW
            stream = unread._stream
            assert len(stream._inbox) == WINDOW
            large = BytesValue(value=bytes(40 * WINDOW))
            assert await link.channel.unary(BYTES, large) == large
            assert len(stream._inbox) == WINDOW
            for _ in range(100):
                assert await unread.receive() is not None
        await wait_all_tasks_blocked()
        link.assert_nothing_left()


@pytest.mark.parametrize("side", ["client", "server"])
async def test_what_nobody_took_of_a_call_is_given_back_to_the_connections_window(
    connect: Any, autojump_clock: object, side: str
) -> None:
    """Else a few calls that were left would leave no room for any other."""
    left = 0

    async def pour(call: Chat) -> None:
        await call.send(BytesValue(value=bytes(WINDOW // 2)))
        await trio.sleep_forever()

    async def pass_over(call: Chat) -> None:
        await wait_all_tasks_blocked()
        raise GrpcError(StatusCode.ABORTED, "not read")

    narrow = GrpcOptions(max_concurrent_streams=1)
    handler = pour if side == "client" else pass_over
    async with connect(
        {STREAM: handler, BYTES: unary(lambda request, call: _same(request))},
        client_options=narrow,
        server_options=narrow,
    ) as link:
        with trio.move_on_after(20):
            for _ in range(10):  # of the connection's window, each takes a quarter
                async with link.channel.call(STREAM) as call:
                    if side == "server":
                        with suppress(GrpcError):
                            await call.send(BytesValue(value=bytes(WINDOW // 2)))
                    await wait_all_tasks_blocked()
                await wait_all_tasks_blocked()  # the server's handler has ended, too
                left += 1
            large = BytesValue(value=bytes(2 * WINDOW))
            assert await link.channel.unary(BYTES, large) == large
            left += 1
        assert left == 11
        link.assert_nothing_left()


async def _same(request: Any) -> Any:
    return request


async def test_a_client_whose_handler_does_not_read_stops_at_the_window(connect: Any) -> None:
    async with connect({STREAM: hang, ECHO: unary(echo)}) as link:
        async with trio.open_nursery() as nursery, link.channel.call(STREAM) as call:
            nursery.start_soon(call.send, BytesValue(value=bytes(100 * WINDOW)))
            await wait_all_tasks_blocked()
            (connection,) = link.server._connections
            (stream,) = connection.streams.values()
            assert len(stream._inbox) == WINDOW
            assert not link.channel._connection.outgoing
            assert await link.channel.unary(ECHO, StringValue(value="x")) == StringValue(value="x")
            nursery.cancel_scope.cancel()
        await wait_all_tasks_blocked()
        link.assert_nothing_left()


async def test_ninety_nine_stalled_streams_do_not_stop_the_hundredth(connect: Any) -> None:
    async def pour(call: Chat) -> None:
        while True:
            await call.send(BytesValue(value=bytes(30_000)))

    async with connect({STREAM: pour, BYTES: unary(lambda request, call: _same(request))}) as link:

        async def stall() -> None:
            async with link.channel.call(STREAM):
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            for _ in range(99):
                nursery.start_soon(stall)
            await wait_all_tasks_blocked()
            large = BytesValue(value=bytes(3_000_000))
            assert await link.channel.unary(BYTES, large) == large
            nursery.cancel_scope.cancel()


async def test_calls_over_the_servers_limit_wait_their_turn(connect: Any) -> None:
    running = most = 0

    async def count(request: StringValue, call: ServerCall[StringValue, StringValue]) -> StringValue:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await wait_all_tasks_blocked()
        running -= 1
        return request

    async with connect({ECHO: unary(count)}, server_options=GrpcOptions(max_concurrent_streams=3)) as link:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(link.channel.unary, ECHO, StringValue())
        assert most == 3
        link.assert_nothing_left()


async def test_a_place_that_a_cancelled_call_was_given_goes_to_the_next(connect: Any, autojump_clock: object) -> None:
    """Cancelled at the moment that the place comes free."""
    answered: list[str] = []

    async with connect({STREAM: hang, ECHO: unary(echo)}, client_options=GrpcOptions(max_concurrent_streams=1)) as link:

        async def ask(name: str, scope: trio.CancelScope) -> None:
            with scope:
                answered.append((await link.channel.unary(ECHO, StringValue(value=name))).value)

        async with trio.open_nursery() as nursery:
            scopes = [trio.CancelScope() for _ in range(3)]
            async with link.channel.call(STREAM):
                for name, scope in zip("abc", scopes, strict=True):
                    nursery.start_soon(ask, name, scope)
                    await wait_all_tasks_blocked()
                scopes[0].cancel()
            await wait_all_tasks_blocked()
            assert answered == ["b", "c"]
            nursery.cancel_scope.cancel()
        link.assert_nothing_left()


@pytest.mark.parametrize("first", ["the place", "the cancellation"])
async def test_a_call_that_is_cancelled_as_it_is_given_a_place_ends_as_cancelled(
    connect: Any, autojump_clock: object, first: str
) -> None:
    """Whichever of the two came first; and its place goes to the next."""
    ended: list[str] = []

    async with connect({STREAM: hang, ECHO: unary(echo)}, client_options=GrpcOptions(max_concurrent_streams=1)) as link:

        async def ask(name: str, scope: trio.CancelScope) -> None:
            with scope:
                try:
                    ended.append((await link.channel.unary(ECHO, StringValue(value=name))).value)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is wrong
                    ended.append(f"{name}: {error!r}")

        async with trio.open_nursery() as nursery:
            scopes = [trio.CancelScope(), trio.CancelScope()]
            async with link.channel.call(STREAM):
                for name, scope in zip("ab", scopes, strict=True):
                    nursery.start_soon(ask, name, scope)
                    await wait_all_tasks_blocked()
                if first == "the cancellation":
                    scopes[0].cancel()
            scopes[0].cancel()
            await wait_all_tasks_blocked()
            assert ended == ["b"]
            assert scopes[0].cancelled_caught
            nursery.cancel_scope.cancel()
        link.assert_nothing_left()


async def test_a_place_of_a_call_that_cannot_start_goes_to_the_next(connect: Any, autojump_clock: object) -> None:
    """As where its metadata exceeds what the server takes, which is known only once there is a place."""
    ended: list[object] = []

    async with connect({STREAM: hang, ECHO: unary(echo)}, client_options=GrpcOptions(max_concurrent_streams=1)) as link:

        async def ask(name: str, size: int) -> None:
            try:
                answer = await link.channel.unary(ECHO, StringValue(value=name), [("large", "x" * size)])
                ended.append(answer.value)
            except GrpcError as error:
                ended.append(error.code)

        async with trio.open_nursery() as nursery:
            async with link.channel.call(STREAM):
                for name, size in (("a", 20_000), ("b", 1)):
                    nursery.start_soon(ask, name, size)
                    await wait_all_tasks_blocked()
            await wait_all_tasks_blocked()
            assert ended == [StatusCode.RESOURCE_EXHAUSTED, "b"]
            nursery.cancel_scope.cancel()
        link.assert_nothing_left()


async def test_a_call_that_is_cancelled_in_the_queue_costs_nobody_a_place(connect: Any, autojump_clock: object) -> None:
    answered: list[str] = []

    async with connect({STREAM: hang, ECHO: unary(echo)}, client_options=GrpcOptions(max_concurrent_streams=1)) as link:

        async def ask(name: str, scope: trio.CancelScope) -> None:
            with scope:
                answered.append((await link.channel.unary(ECHO, StringValue(value=name))).value)

        async with trio.open_nursery() as nursery:
            scopes = [trio.CancelScope() for _ in range(3)]
            async with link.channel.call(STREAM):
                for name, scope in zip("abc", scopes, strict=True):
                    nursery.start_soon(ask, name, scope)
                    await wait_all_tasks_blocked()
                scopes[1].cancel()
                await wait_all_tasks_blocked()
                assert answered == []
            await wait_all_tasks_blocked()
            assert answered == ["a", "c"]
            nursery.cancel_scope.cancel()
        link.assert_nothing_left()


async def test_a_message_over_the_limit_is_resource_exhausted_on_either_side(connect: Any) -> None:
    small = GrpcOptions(max_message_size=1000)
    handlers = {BYTES: unary(lambda request, call: _same(request)), ECHO: unary(echo)}
    for options in ({"client_options": small}, {"server_options": small}):
        async with connect(handlers, **options) as link:
            with pytest.raises(GrpcError, match="limit 1000") as caught:
                await link.channel.unary(BYTES, BytesValue(value=bytes(100_000)))
            assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
            assert await link.channel.unary(ECHO, StringValue(value="x")) == StringValue(value="x")
            await wait_all_tasks_blocked()
            link.assert_nothing_left()


async def test_a_gzip_bomb_is_resource_exhausted(connect: Any) -> None:
    bomb = BytesValue(value=bytes(20_000_000))
    assert len(gzip.compress(bomb.SerializeToString())) < 50_000
    async with connect({BYTES: unary(lambda request, call: _same(request))}, GrpcOptions(gzip=True)) as link:
        with pytest.raises(GrpcError, match="decompresses") as caught:
            await link.channel.unary(BYTES, bomb)
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED


async def test_an_encoded_payload_is_sent_as_it_is_and_compressed_if_accepted(connect: Any) -> None:
    payload = BytesValue(value=b"a" * 5000).SerializeToString()

    async def handler(call: Chat) -> None:
        await call.send_encoded(payload)
        await call.send_encoded(payload)

    async with (
        connect({STREAM: handler}, server_options=GrpcOptions(gzip=True)) as link,
        link.channel.call(STREAM) as call,
    ):
        assert [each.value async for each in call] == [b"a" * 5000] * 2
        assert (b"grpc-encoding", b"gzip") in call._stream.headers


@pytest.mark.parametrize("plain", [True, False])
async def test_what_is_sent_at_once_keeps_its_place(plain: bool) -> None:
    """Messages sent without waiting, and those that had to wait, come in order, to a peer that reads late too."""
    count, size = 400, 5000
    at_once = 0
    rest = trio.Event()

    async def handler(call: Chat) -> None:
        nonlocal at_once
        call.send_initial_metadata()
        for number in range(count):
            payload = BytesValue(value=b"%d " % number + bytes(size)).SerializeToString()
            if call.try_send_encoded(payload):
                at_once += 1
            else:
                rest.set()
                await call.send_encoded(payload)
            if not number % 10:
                await trio.lowlevel.checkpoint()

    near, far = socket.socketpair()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    ours = trio.SocketStream(trio.socket.from_stdlib_socket(near))
    theirs = trio.SocketStream(trio.socket.from_stdlib_socket(far))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(GrpcServer({STREAM: handler}).serve_stream, TrioByteStream(theirs, far if plain else None))
        async with channel_over(ours) as channel, channel.call(STREAM) as call:
            await call.send(BytesValue(value=b"go"), end=True)
            with trio.fail_after(20):
                await rest.wait()
            got = [int(each.value.split()[0]) async for each in call]
        nursery.cancel_scope.cancel()
    assert got == list(range(count))
    assert 0 < at_once < count


async def test_nothing_is_sent_at_once_before_the_headers_or_after_the_end(connect: Any) -> None:
    said: list[bool] = []
    left = trio.Event()

    async def handler(call: Chat) -> None:
        payload = BytesValue(value=b"x").SerializeToString()
        said.append(call.try_send_encoded(payload))
        call.send_initial_metadata()
        said.append(call.try_send_encoded(payload))
        with trio.CancelScope(shield=True):
            await left.wait()
            await wait_all_tasks_blocked()
        said.append(call.try_send_encoded(payload))

    async with connect({STREAM: handler}) as link:
        async with link.channel.call(STREAM) as call:
            await call.send(BytesValue(), end=True)
            await call.receive()
        left.set()
        await wait_all_tasks_blocked()
    assert said == [False, True, False]


async def test_a_handlers_crash_is_logged_and_costs_its_call_only(
    connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def crash(call: Chat) -> None:
        raise RuntimeError("the password is hunter2")

    async with connect({STREAM: crash, ECHO: unary(echo)}) as link:
        with caplog.at_level(logging.ERROR), pytest.raises(GrpcError) as caught:
            await link.channel.unary(STREAM, BytesValue())
        assert (caught.value.code, caught.value.message) == (StatusCode.UNKNOWN, "the handler failed")
        assert "hunter2" in caplog.text
        assert await link.channel.unary(ECHO, StringValue(value="x")) == StringValue(value="x")


async def test_a_status_raised_in_a_handlers_nursery_is_the_calls(connect: Any) -> None:
    async def refuse() -> None:
        raise GrpcError(StatusCode.PERMISSION_DENIED, "no", (("why", "so"),))

    async def handler(call: Chat) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refuse)

    async with connect({STREAM: handler}) as link:
        with pytest.raises(GrpcError, match="no") as caught:
            await link.channel.unary(STREAM, BytesValue())
        assert caught.value.code is StatusCode.PERMISSION_DENIED
        assert caught.value.trailing == (("why", "so"),)


@pytest.mark.parametrize("other", [RuntimeError("the password is hunter2"), trio.TooSlowError("hunter2")])
async def test_a_status_beside_a_crash_is_not_the_calls(
    connect: Any, caplog: pytest.LogCaptureFixture, other: Exception
) -> None:
    """What a handler's nursery raises beside a status is a fault, which is logged and not told."""

    async def handler(call: Chat) -> None:
        raise ExceptionGroup("both", [GrpcError(StatusCode.PERMISSION_DENIED, "no"), ExceptionGroup("one", [other])])

    async with connect({STREAM: handler}) as link:
        with pytest.raises(GrpcError) as caught:
            await link.channel.unary(STREAM, BytesValue())
    assert (caught.value.code, caught.value.message) == (StatusCode.UNKNOWN, "the handler failed")
    assert "hunter2" in caplog.text


@pytest.mark.parametrize(("fault", "logged"), [(None, ""), (RuntimeError("hunter2"), "grpc handler failed")])
async def test_a_call_that_fails_while_its_connection_is_cancelled_fails_alone(
    connect: Any, caplog: pytest.LogCaptureFixture, fault: Exception | None, logged: str
) -> None:
    """What a handler's nursery raises then has both in it: the cancellation goes on, the rest stays here."""

    async def handler(call: Chat) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await call.receive()
            except GrpcError:
                raise fault or GrpcError(StatusCode.CANCELLED, "gone") from None

    async with connect({STREAM: handler}) as link, link.channel.call(STREAM):
        await wait_all_tasks_blocked()
        [connection] = link.server._connections
        [stream] = connection.streams.values()
        stream.fail(GrpcError(StatusCode.CANCELLED, "stream reset"))
        connection.tasks.cancel_scope.cancel()
        await wait_all_tasks_blocked()
        assert "grpc connection failed" not in caplog.text
        assert logged in caplog.text
        assert not link.server.connections


async def test_a_status_within_nurseries_within_nurseries_is_the_calls(connect: Any) -> None:
    async def handler(call: Chat) -> None:
        no = GrpcError(StatusCode.PERMISSION_DENIED, "no")
        raise ExceptionGroup("outer", [ExceptionGroup("inner", [no, no]), no])

    async with connect({STREAM: handler}) as link:
        with pytest.raises(GrpcError) as caught:
            await link.channel.unary(STREAM, BytesValue())
    assert (caught.value.code, caught.value.message) == (StatusCode.PERMISSION_DENIED, "no")


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        (StatusCode.ABORTED, StatusCode.INTERNAL),
        (StatusCode.DEADLINE_EXCEEDED, StatusCode.CANCELLED),
        (StatusCode.RESOURCE_EXHAUSTED, StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_after_half_a_message_the_reset_says_what_it_can(
    connect: Any, code: StatusCode, seen: StatusCode
) -> None:
    """A status cannot follow half a message. It must not pass for a whole one either."""

    async def handler(call: Chat) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call.send, BytesValue(value=bytes(10 * WINDOW)))
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        raise GrpcError(code, "unseen")

    async with connect({STREAM: handler, ECHO: unary(echo)}) as link:
        async with link.channel.call(STREAM) as call:
            await wait_all_tasks_blocked()
            with pytest.raises(GrpcError, match="reset") as caught:
                await call.receive()
        assert caught.value.code is seen
        assert await link.channel.unary(ECHO, StringValue(value="x")) == StringValue(value="x")
        await wait_all_tasks_blocked()
        link.assert_nothing_left()


@pytest.mark.parametrize(("size", "sent"), [(1000, True), (5000, False)])
async def test_trailing_metadata_over_the_clients_limit_is_left_out(
    connect: Any, caplog: pytest.LogCaptureFixture, size: int, sent: bool
) -> None:
    """The status itself arrives, whatever its handler adds to it."""

    async def handler(call: Chat) -> None:
        call.trailing_metadata.append(("one", "x" * (size // 2)))
        raise GrpcError(StatusCode.ABORTED, "no", (("other", "y" * (size // 2)),))

    limited = GrpcOptions(max_header_list_size=2000)
    async with connect({STREAM: handler}, client_options=limited) as link:
        with pytest.raises(GrpcError) as caught:
            await link.channel.unary(STREAM, BytesValue())
    assert (caught.value.code, caught.value.message) == (StatusCode.ABORTED, "no")
    assert [name for name, _ in caught.value.trailing] == (["one", "other"] if sent else [])
    assert ("exceeds the client's limit" in caplog.text) == (not sent)


async def test_a_failure_after_half_a_message_resets_the_stream(connect: Any) -> None:
    async def handler(call: Chat) -> None:
        with trio.move_on_after(0):
            await call.send(BytesValue(value=bytes(10 * WINDOW)))
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call.send, BytesValue(value=bytes(10 * WINDOW)))
                await wait_all_tasks_blocked()
                scope.cancel()
        with pytest.raises(anyio.BusyResourceError):
            await call.send(BytesValue())
        raise GrpcError(StatusCode.ABORTED, "unseen")

    async with connect({STREAM: handler}) as link:
        async with link.channel.call(STREAM) as call:
            await wait_all_tasks_blocked()
            with pytest.raises(GrpcError, match="reset") as caught:
                await call.receive()
            assert caught.value.code is StatusCode.INTERNAL
        await wait_all_tasks_blocked()
        link.assert_nothing_left()


async def test_sending_to_a_call_that_the_server_ended(connect: Any) -> None:
    async def handler(call: Chat) -> None:
        request = await call.receive()
        if request is not None and request.value:
            raise GrpcError(StatusCode.ABORTED, "enough")

    async with connect({STREAM: handler}) as link:
        for value, error in ((b"", anyio.BrokenResourceError), (b"x", GrpcError)):
            async with link.channel.call(STREAM) as call:
                await call.send(BytesValue(value=value))
                await wait_all_tasks_blocked()
                with pytest.raises(error):
                    await call.send(BytesValue())
                if not value:
                    await call.end()
                    assert await call.receive() is None
        async with link.channel.call(STREAM) as call:
            await call.end()
            with pytest.raises((anyio.ClosedResourceError, anyio.BrokenResourceError)):
                await call.send(BytesValue())


@pytest.mark.parametrize(("count", "message"), [(0, "no request"), (2, "more than one request")])
async def test_a_unary_handler_wants_one_request(connect: Any, count: int, message: str) -> None:
    async with connect({ECHO: unary(echo)}) as link, link.channel.call(ECHO) as call:
        for _ in range(count):
            await call.send(StringValue())
        await call.end()
        with pytest.raises(GrpcError, match=message):
            await call.receive()


@pytest.mark.parametrize(("count", "message"), [(0, "no response"), (2, "more than one response")])
async def test_a_unary_call_wants_one_response(connect: Any, count: int, message: str) -> None:
    async def handler(call: ServerCall[StringValue, StringValue]) -> None:
        for _ in range(count):
            await call.send(StringValue())

    async with connect({ECHO: handler}) as link:
        with pytest.raises(GrpcError, match=message) as caught:
            await link.channel.unary(ECHO, StringValue())
        assert caught.value.code is StatusCode.INTERNAL


async def test_what_is_no_such_message_is_internal(connect: Any) -> None:
    async def garbage(call: ServerCall[StringValue, StringValue]) -> None:
        await call.send_encoded(b"\xff")

    async with connect({BYTES: unary(lambda request, call: _same(request)), ECHO: garbage}) as link:
        async with link.channel.call(BYTES) as call:
            await call._send(encode_message(b"\xff"), end=True)
            with pytest.raises(GrpcError, match=r"request is no google\.protobuf\.BytesValue") as caught:
                await call.receive()
            assert caught.value.code is StatusCode.INTERNAL
        with pytest.raises(GrpcError, match=r"response is no google\.protobuf\.StringValue"):
            await link.channel.unary(ECHO, StringValue())


async def test_metadata_over_the_peers_limit_is_not_sent(connect: Any) -> None:
    async with connect({ECHO: unary(echo)}) as link:
        assert await link.channel.unary(ECHO, StringValue(value="x")) == StringValue(value="x")
        with pytest.raises(GrpcError, match="limit") as caught:
            await link.channel.unary(ECHO, StringValue(), [("large", "x" * 20_000)])
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(ValueError, match="reserved"):
            await link.channel.unary(ECHO, StringValue(), [("grpc-status", "0")])
        await wait_all_tasks_blocked()
        link.assert_nothing_left()


async def test_an_exception_of_the_channels_user_comes_out_as_it_is(connect: Any) -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="mine")):  # the test's own nursery wraps it, once
        async with connect({}):
            raise RuntimeError("mine")
