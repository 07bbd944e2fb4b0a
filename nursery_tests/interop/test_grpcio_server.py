"""Our client against a grpcio server, in threads, over loopback."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import anyio
import grpc
import pytest
import trio
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value, StringValue

from meshlocal.net.grpc.client import Channel, open_channel
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.wire.grpc.method import Method
from meshlocal.wire.grpc.status import GrpcError, StatusCode

DOUBLE = Method("/test.Echo/Double", StringValue, StringValue)
BYTES = Method("/test.Echo/Bytes", BytesValue, BytesValue)
COUNT = Method("/test.Echo/Count", Int64Value, Int64Value, server_streaming=True)
SUM = Method("/test.Echo/Sum", Int64Value, Int64Value, client_streaming=True)
CHAT = Method("/test.Echo/Chat", StringValue, StringValue, client_streaming=True, server_streaming=True)
ABORT = Method("/test.Echo/Abort", StringValue, StringValue)
WAIT = Method("/test.Echo/Wait", StringValue, StringValue)
METADATA = Method("/test.Echo/Metadata", StringValue, StringValue)

CALLS = 200


class _Echo:
    def __init__(self) -> None:
        self.everyone = threading.Barrier(CALLS)
        self.started = threading.Event()
        self.ended = threading.Event()
        self.remaining: list[float] = []

    def double(self, request: StringValue, context: grpc.ServicerContext) -> StringValue:
        if request.value == "all":
            self.everyone.wait()
        return StringValue(value=request.value * 2)

    def bytes_(self, request: BytesValue, context: grpc.ServicerContext) -> BytesValue:
        return request

    def count(self, request: Int64Value, context: grpc.ServicerContext) -> Iterator[Int64Value]:
        for number in range(request.value):
            yield Int64Value(value=number)

    def sum(self, requests: Iterator[Int64Value], context: grpc.ServicerContext) -> Int64Value:
        return Int64Value(value=sum(request.value for request in requests))

    def chat(self, requests: Iterator[StringValue], context: grpc.ServicerContext) -> Iterator[StringValue]:
        for request in requests:
            yield StringValue(value=f"{request.value}!")

    def abort(self, request: StringValue, context: grpc.ServicerContext) -> StringValue:
        context.set_trailing_metadata((("why-bin", b"\x00\xff"), ("why", "so")))
        context.abort(grpc.StatusCode.ABORTED, "höchst 100% ärgerlich\n")
        raise AssertionError

    def wait(self, request: StringValue, context: grpc.ServicerContext) -> StringValue:
        self.remaining.append(context.time_remaining())
        context.add_callback(self.ended.set)
        self.started.set()
        self.ended.wait()
        return StringValue()

    def metadata(self, request: StringValue, context: grpc.ServicerContext) -> StringValue:
        received = [tuple(pair) for pair in context.invocation_metadata() if pair[0].startswith("x-")]
        context.send_initial_metadata(received)
        context.set_trailing_metadata(received)
        return StringValue(value=context.peer())

    def handler(self) -> grpc.GenericRpcHandler:
        behaviours: dict[Method[Any, Any], Any] = {
            DOUBLE: self.double,
            BYTES: self.bytes_,
            COUNT: self.count,
            SUM: self.sum,
            CHAT: self.chat,
            ABORT: self.abort,
            WAIT: self.wait,
            METADATA: self.metadata,
        }
        return grpc.method_handlers_generic_handler(
            "test.Echo", {method.path.split("/")[2]: _rpc(method, each) for method, each in behaviours.items()}
        )


def _rpc(method: Method[Any, Any], behaviour: Any) -> Any:
    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = kinds[method.client_streaming, method.server_streaming]
    return make(behaviour, method.request_type.FromString, method.response_type.SerializeToString)


class Served(NamedTuple):
    port: int
    server: grpc.Server
    echo: _Echo


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    echo = _Echo()
    with ThreadPoolExecutor(CALLS + 8) as pool:
        server = grpc.server(
            pool,
            handlers=[echo.handler()],
            options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)],
            compression=grpc.Compression.Gzip,
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield Served(port, server, echo)
        finally:
            echo.ended.set()
            stopped = server.stop(None)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(stopped.wait)


@pytest.fixture
async def channel(served: Served) -> AsyncIterator[Channel]:
    async with open_channel("127.0.0.1", served.port, options=GrpcOptions(max_concurrent_streams=256)) as channel:
        yield channel


async def test_every_kind_of_call(channel: Channel) -> None:
    with trio.fail_after(10):
        assert (await channel.unary(DOUBLE, StringValue(value="ab"))).value == "abab"
        async with channel.call(COUNT) as count:
            await count.send(Int64Value(value=5), end=True)
            assert [each.value async for each in count] == [0, 1, 2, 3, 4]
        async with channel.call(SUM) as total:
            for number in range(101):
                await total.send(Int64Value(value=number))
            await total.end()
            assert await total.receive() == Int64Value(value=5050)
            assert await total.receive() is None
        async with channel.call(CHAT) as chat:
            for word in ("a", "b", "c"):
                await chat.send(StringValue(value=word))
                assert await chat.receive() == StringValue(value=f"{word}!")
            await chat.end()
            assert await chat.receive() is None


async def test_the_scopes_deadline_is_known_to_the_server(channel: Channel, served: Served) -> None:
    with trio.move_on_after(0.3) as scope:
        await channel.unary(WAIT, StringValue())
    # The server's time starts when the call reaches it, so this scope always ends first.
    assert scope.cancelled_caught
    assert 0 < served.echo.remaining[0] <= 0.3


async def test_a_cancelled_call_is_cancelled_on_the_server(channel: Channel, served: Served) -> None:
    with trio.fail_after(10):
        with trio.CancelScope() as scope:
            async with channel.call(WAIT) as call:
                await call.send(StringValue(), end=True)
                await trio.to_thread.run_sync(served.echo.started.wait)
                scope.cancel()
                await call.receive()
        assert scope.cancelled_caught
        await trio.to_thread.run_sync(served.echo.ended.wait)
        assert (await channel.unary(DOUBLE, StringValue(value="x"))).value == "xx"


async def test_four_mebibytes_go_both_ways_and_more_is_refused(channel: Channel) -> None:
    limit = GrpcOptions().max_message_size
    payload = bytes(range(256)) * (limit // 256)
    largest = BytesValue(value=payload[:-5])
    assert largest.ByteSize() == limit
    with trio.fail_after(20):
        assert await channel.unary(BYTES, largest) == largest
        with pytest.raises(GrpcError) as caught:
            await channel.unary(BYTES, BytesValue(value=payload))
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
        assert (await channel.unary(DOUBLE, StringValue(value="x"))).value == "xx"


async def test_two_hundred_calls_at_once(channel: Channel) -> None:
    answers: list[str] = []

    async def call() -> None:
        answers.append((await channel.unary(DOUBLE, StringValue(value="all"))).value)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for _ in range(CALLS):
                nursery.start_soon(call)
    assert answers == ["allall"] * CALLS


async def test_gzip_both_ways(served: Served) -> None:
    request = BytesValue(value=b"compressible " * 10_000)
    with trio.fail_after(10):
        async with (
            open_channel("127.0.0.1", served.port, options=GrpcOptions(gzip=True)) as channel,
            channel.call(BYTES) as call,
        ):
            await call.send(request, end=True)
            assert await call.receive() == request
            assert await call.receive() is None


async def test_an_abort_with_non_ascii_message_and_binary_metadata(channel: Channel) -> None:
    with trio.fail_after(10), pytest.raises(GrpcError) as caught:
        await channel.unary(ABORT, StringValue())
    assert caught.value.code is StatusCode.ABORTED
    assert caught.value.message == "höchst 100% ärgerlich\n"
    assert {("why-bin", b"\x00\xff"), ("why", "so")} <= set(caught.value.trailing)
    assert not caught.value.unprocessed


async def test_metadata_both_ways(channel: Channel) -> None:
    sent: list[tuple[str, str | bytes]] = [("x-text", "a b"), ("x-raw-bin", bytes(range(256))), ("x-text", "again")]
    with trio.fail_after(10):
        async with channel.call(METADATA, sent) as call:
            await call.send(StringValue(), end=True)
            assert await call.receive() is not None
            assert await call.receive() is None
    assert call.initial_metadata is not None
    assert call.trailing_metadata is not None
    assert {pair for pair in call.initial_metadata if pair[0].startswith("x-")} == set(sent)
    assert {pair for pair in call.trailing_metadata if pair[0].startswith("x-")} == set(sent)


async def test_an_unknown_method_is_unimplemented(channel: Channel) -> None:
    with trio.fail_after(10), pytest.raises(GrpcError) as caught:
        await channel.unary(Method("/test.Echo/Other", StringValue, StringValue), StringValue())
    assert caught.value.code is StatusCode.UNIMPLEMENTED


async def test_a_stopping_server_finishes_a_call_and_gets_no_new_one(channel: Channel, served: Served) -> None:
    with trio.fail_after(10):
        async with channel.call(CHAT) as call:
            await call.send(StringValue(value="before"))
            assert await call.receive() == StringValue(value="before!")
            stopped = served.server.stop(grace=10)
            assert "GOAWAY" in await channel.wait_closing()
            with pytest.raises(GrpcError) as caught:
                await channel.unary(DOUBLE, StringValue(value="x"))
            assert caught.value.code is StatusCode.UNAVAILABLE
            assert caught.value.unprocessed
            await call.send(StringValue(value="after"), end=True)
            assert await call.receive() == StringValue(value="after!")
            assert await call.receive() is None
        assert "GOAWAY" in await channel.wait_closed()
        await trio.to_thread.run_sync(stopped.wait)


async def test_a_refused_connection_is_unavailable_and_unprocessed() -> None:
    with trio.socket.socket() as unused:
        await unused.bind(("127.0.0.1", 0))
        with pytest.raises(GrpcError) as caught:
            async with open_channel("127.0.0.1", unused.getsockname()[1]):
                raise AssertionError("connected")
    assert caught.value.code is StatusCode.UNAVAILABLE
    assert caught.value.unprocessed


def test_the_client_runs_on_asyncio() -> None:
    echo = _Echo()

    async def main(port: int) -> None:
        with anyio.fail_after(10):
            async with open_channel("127.0.0.1", port) as channel:
                assert (await channel.unary(DOUBLE, StringValue(value="ab"))).value == "abab"
                async with channel.call(CHAT) as chat:
                    for word in ("a", "b" * 200_000):
                        await chat.send(StringValue(value=word))
                        assert await chat.receive() == StringValue(value=f"{word}!")
                with pytest.raises(GrpcError) as caught:
                    await channel.unary(ABORT, StringValue())
                assert caught.value.code is StatusCode.ABORTED
                with anyio.move_on_after(0.1) as scope:
                    await channel.unary(WAIT, StringValue())
                assert scope.cancelled_caught

    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool, handlers=[echo.handler()], options=[("grpc.so_reuseport", 0)])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            anyio.run(main, port, backend="asyncio")
        finally:
            echo.ended.set()
            server.stop(None).wait()
