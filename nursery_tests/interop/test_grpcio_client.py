"""A grpcio client, in threads, against our server, over loopback."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import grpc
import pytest
import trio
from google.protobuf import descriptor_pb2
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value, StringValue

from meshlocal.net.grpc.health import CHECK, NOT_SERVING, SERVING, WATCH, HealthStatus
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.net.grpc.reflection import INFO, Reflection
from meshlocal.net.grpc.server import GrpcServer, ServerCall, unary
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.wire.grpc.method import Method
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import health_pb2, reflection_pb2

T = TypeVar("T")

DOUBLE = Method("/test.Echo/Double", StringValue, StringValue)
BYTES = Method("/test.Echo/Bytes", BytesValue, BytesValue)
COUNT = Method("/test.Echo/Count", Int64Value, Int64Value, server_streaming=True)
SUM = Method("/test.Echo/Sum", Int64Value, Int64Value, client_streaming=True)
CHAT = Method("/test.Echo/Chat", StringValue, StringValue, client_streaming=True, server_streaming=True)
FAIL = Method("/test.Echo/Fail", StringValue, StringValue)
CRASH = Method("/test.Echo/Crash", StringValue, StringValue)
WAIT = Method("/test.Echo/Wait", StringValue, StringValue)
METADATA = Method("/test.Echo/Metadata", StringValue, StringValue)


class Served(NamedTuple):
    target: str
    server: GrpcServer
    health: HealthStatus
    started: trio.Event
    cancelled: trio.Event
    deadlines: list[float]
    everyone: trio.Event


@pytest.fixture
async def served(nursery: trio.Nursery) -> AsyncIterator[Served]:
    started, cancelled, everyone = trio.Event(), trio.Event(), trio.Event()
    deadlines: list[float] = []
    waiting: list[object] = []

    async def double(request: StringValue, call: ServerCall[StringValue, StringValue]) -> StringValue:
        if request.value == "all":
            waiting.append(call)
            if len(waiting) == 200:
                everyone.set()
            await everyone.wait()
        return StringValue(value=request.value * 2)

    async def echo(request: BytesValue, call: ServerCall[BytesValue, BytesValue]) -> BytesValue:
        return request

    async def count(call: ServerCall[Int64Value, Int64Value]) -> None:
        request = await call.receive()
        assert request is not None
        for number in range(request.value):
            await call.send(Int64Value(value=number))

    async def total(call: ServerCall[Int64Value, Int64Value]) -> None:
        await call.send(Int64Value(value=sum([request.value async for request in call])))

    async def chat(call: ServerCall[StringValue, StringValue]) -> None:
        call.send_initial_metadata()
        async for request in call:
            await call.send(StringValue(value=f"{request.value}!"))

    async def fail(request: StringValue, call: ServerCall[StringValue, StringValue]) -> StringValue:
        raise GrpcError(StatusCode.ABORTED, "höchst 100% ärgerlich\n", (("why-bin", b"\x00\xff"), ("why", "so")))

    async def crash(request: StringValue, call: ServerCall[StringValue, StringValue]) -> StringValue:
        raise RuntimeError("the password is hunter2")

    async def wait(request: StringValue, call: ServerCall[StringValue, StringValue]) -> StringValue:
        deadlines.append(call.deadline - trio.current_time())
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()
        raise AssertionError

    async def metadata(request: StringValue, call: ServerCall[StringValue, StringValue]) -> StringValue:
        received = [pair for pair in call.metadata if pair[0].startswith("x-")]
        call.send_initial_metadata(received)
        call.trailing_metadata.extend(reversed(received))
        return StringValue(value=call.peer)

    health = HealthStatus()
    health.set("", SERVING)
    server = GrpcServer(
        {
            DOUBLE: unary(double),
            BYTES: unary(echo),
            COUNT: count,
            SUM: total,
            CHAT: chat,
            FAIL: unary(fail),
            CRASH: unary(crash),
            WAIT: unary(wait),
            METADATA: unary(metadata),
            **health.handlers(),
            **Reflection(["grpc.health.v1.Health"]).handlers(),
        },
        GrpcOptions(max_concurrent_streams=256, gzip=True),
    )
    listeners = open_tcp_listeners("127.0.0.1", 0)
    target = f"127.0.0.1:{listeners[0].getsockname()[1]}"
    await nursery.start(server.serve, listeners)
    yield Served(target, server, health, started, cancelled, deadlines, everyone)
    with trio.move_on_after(5) as scope:
        await server.drain()
    assert not scope.cancelled_caught


async def with_channel(target: str, use: Callable[[grpc.Channel], T], **options: Any) -> T:
    def run() -> T:
        arguments = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        with grpc.insecure_channel(target, options=arguments, **options) as channel:
            return use(channel)

    with trio.fail_after(30):
        return await trio.to_thread.run_sync(run)


def stub(channel: grpc.Channel, method: Method[Any, Any]) -> Any:
    kinds = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    return kinds[method.client_streaming, method.server_streaming](
        method.path,
        request_serializer=method.request_type.SerializeToString,
        response_deserializer=method.response_type.FromString,
    )


async def test_every_kind_of_call(served: Served) -> None:
    def use(channel: grpc.Channel) -> None:
        assert stub(channel, DOUBLE)(StringValue(value="ab")).value == "abab"
        assert [each.value for each in stub(channel, COUNT)(Int64Value(value=5))] == [0, 1, 2, 3, 4]
        assert stub(channel, SUM)(Int64Value(value=number) for number in range(101)).value == 5050
        chat = stub(channel, CHAT)(StringValue(value=word) for word in ("a", "b", "c"))
        assert [each.value for each in chat] == ["a!", "b!", "c!"]

    await with_channel(served.target, use)


async def test_a_deadline_is_known_to_the_handler_and_ends_it(served: Served) -> None:
    def use(channel: grpc.Channel) -> grpc.StatusCode:
        with pytest.raises(grpc.RpcError) as caught:
            stub(channel, WAIT)(StringValue(), timeout=0.3)
        return caught.value.code()

    assert await with_channel(served.target, use) is grpc.StatusCode.DEADLINE_EXCEEDED
    with trio.fail_after(5):
        await served.cancelled.wait()
    # grpcio sends whole milliseconds, counted from a clock that it read a little before: no exact bound.
    assert 0 < served.deadlines[0] < 1


async def test_a_cancelled_call_cancels_its_handler(served: Served) -> None:
    def use(channel: grpc.Channel) -> None:
        future = stub(channel, WAIT).future(StringValue())
        trio.from_thread.run(served.started.wait)
        future.cancel()
        trio.from_thread.run(served.cancelled.wait)
        assert stub(channel, DOUBLE)(StringValue(value="x")).value == "xx"

    await with_channel(served.target, use)


async def test_a_client_that_disconnects_cancels_its_handlers(served: Served) -> None:
    def use(channel: grpc.Channel) -> None:
        future = stub(channel, WAIT).future(StringValue())
        trio.from_thread.run(served.started.wait)
        assert not future.done()

    await with_channel(served.target, use)
    with trio.fail_after(5):
        await served.cancelled.wait()


async def test_four_mebibytes_go_both_ways_and_more_is_refused(served: Served) -> None:
    limit = GrpcOptions().max_message_size
    payload = bytes(range(256)) * (limit // 256)

    def use(channel: grpc.Channel) -> grpc.StatusCode:
        largest = BytesValue(value=payload[:-5])
        assert largest.ByteSize() == limit
        assert stub(channel, BYTES)(largest) == largest
        with pytest.raises(grpc.RpcError) as caught:
            stub(channel, BYTES)(BytesValue(value=payload))
        assert stub(channel, DOUBLE)(StringValue(value="x")).value == "xx"
        return caught.value.code()

    assert await with_channel(served.target, use) is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_two_hundred_calls_at_once(served: Served) -> None:
    def use(channel: grpc.Channel) -> None:
        # No handler answers before all 200 have begun.
        futures = [stub(channel, DOUBLE).future(StringValue(value="all")) for _ in range(200)]
        assert {future.result().value for future in futures} == {"allall"}

    await with_channel(served.target, use)


async def test_gzip_both_ways(served: Served) -> None:
    def use(channel: grpc.Channel) -> None:
        request = BytesValue(value=b"compressible " * 10_000)
        response, call = stub(channel, BYTES).with_call(request)
        assert response == request
        # grpcio keeps grpc-encoding to itself: that it decoded the answer shows that it was well formed.
        assert call.code() is grpc.StatusCode.OK

    await with_channel(served.target, use, compression=grpc.Compression.Gzip)


async def test_deflate_is_refused(served: Served) -> None:
    def use(channel: grpc.Channel) -> grpc.StatusCode:
        with pytest.raises(grpc.RpcError) as caught:
            stub(channel, BYTES)(BytesValue(value=b"a" * 10_000))
        return caught.value.code()

    code = await with_channel(served.target, use, compression=grpc.Compression.Deflate)
    assert code is grpc.StatusCode.UNIMPLEMENTED


async def test_a_status_with_non_ascii_message_and_binary_metadata(served: Served) -> None:
    def use(channel: grpc.Channel) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            stub(channel, FAIL)(StringValue())
        error = caught.value
        assert error.code() is grpc.StatusCode.ABORTED
        assert error.details() == "höchst 100% ärgerlich\n"
        assert {("why-bin", b"\x00\xff"), ("why", "so")} <= {tuple(pair) for pair in error.trailing_metadata()}

    await with_channel(served.target, use)


async def test_metadata_both_ways(served: Served) -> None:
    sent = [("x-text", "a b"), ("x-raw-bin", bytes(range(256))), ("x-text", "again")]

    def use(channel: grpc.Channel) -> None:
        response, call = stub(channel, METADATA).with_call(StringValue(), metadata=sent)
        assert response.value.startswith("127.0.0.1:")
        assert sorted(tuple(pair) for pair in call.initial_metadata() if pair[0].startswith("x-")) == sorted(sent)
        assert sorted(tuple(pair) for pair in call.trailing_metadata() if pair[0].startswith("x-")) == sorted(sent)

    await with_channel(served.target, use)


async def test_a_crash_tells_the_client_nothing(served: Served) -> None:
    def use(channel: grpc.Channel) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            stub(channel, CRASH)(StringValue())
        assert stub(channel, DOUBLE)(StringValue(value="x")).value == "xx"
        return caught.value.code(), caught.value.details()

    assert await with_channel(served.target, use) == (grpc.StatusCode.UNKNOWN, "the handler failed")


async def test_an_unknown_method_is_unimplemented(served: Served) -> None:
    def use(channel: grpc.Channel) -> grpc.StatusCode:
        with pytest.raises(grpc.RpcError) as caught:
            stub(channel, Method("/test.Echo/Other", StringValue, StringValue))(StringValue())
        return caught.value.code()

    assert await with_channel(served.target, use) is grpc.StatusCode.UNIMPLEMENTED


async def test_health(served: Served) -> None:
    def use(channel: grpc.Channel) -> None:
        check = stub(channel, CHECK)
        assert check(health_pb2.HealthCheckRequest()).status == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            check(health_pb2.HealthCheckRequest(service="nobody"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub(channel, WATCH)(health_pb2.HealthCheckRequest(service="late"))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        for status in (SERVING, NOT_SERVING):
            trio.from_thread.run_sync(served.health.set, "late", status)
            assert next(watch).status == status
        watch.cancel()

    await with_channel(served.target, use)


async def test_reflection(served: Served) -> None:
    def use(channel: grpc.Channel) -> None:
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="grpc.health.v1.Health.Check"),
            reflection_pb2.ServerReflectionRequest(file_by_filename="no/such.proto"),
        ]
        services, file, missing = stub(channel, INFO)(iter(requests))
        assert [each.name for each in services.list_services_response.service] == [
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
        ]
        described = descriptor_pb2.FileDescriptorProto.FromString(
            file.file_descriptor_response.file_descriptor_proto[0]
        )
        assert described.package == "grpc.health.v1"
        assert missing.error_response.error_code == StatusCode.NOT_FOUND
        assert missing.original_request == requests[2]

    await with_channel(served.target, use)


async def test_drain_lets_a_call_finish_and_refuses_the_next(served: Served, nursery: trio.Nursery) -> None:
    def use(channel: grpc.Channel) -> grpc.StatusCode:
        drained = threading.Event()

        def requests() -> Iterator[StringValue]:
            yield StringValue(value="before")
            drained.wait()
            yield StringValue(value="after")

        answers = stub(channel, CHAT)(requests())
        assert next(answers).value == "before!"
        trio.from_thread.run_sync(nursery.start_soon, served.server.drain)
        drained.set()
        assert next(answers).value == "after!"
        assert next(answers, None) is None
        with pytest.raises(grpc.RpcError) as caught:
            stub(channel, DOUBLE)(StringValue(value="x"))
        return caught.value.code()

    assert await with_channel(served.target, use) is grpc.StatusCode.UNAVAILABLE
    with trio.fail_after(5):
        await served.server.drain()
    assert served.server.connections == 0
